"""Fine-tuning by a recipe: finetune."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loram_hub.cli.group import EXIT_RESOURCE, main
from loram_hub.cli.options import AS_JSON, json_option
from loram_hub.cli.output import print_result, print_table, size_text, suggest

if TYPE_CHECKING:
    from loram_hub.finetuning import FinetunePreview, FinetuneResult


@main.command(epilog="Example: loram finetune consume/finetune-20gb.yaml --out my-task --dry-run")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the run. Default: one of the recipe's name, here."
)
@click.option(
    "--resume", type=click.Choice(["auto", "never"]), default="auto", show_default=True, help="After an interruption."
)
@click.option("--token", help="Hub token; by default HF_TOKEN, or the one you are logged in with.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done, without doing it.")
@json_option
def finetune(recipe: Path, out: Path | None, resume: str, token: str | None, dry_run: bool, as_json: bool) -> None:
    """Train LoRA on a release by RECIPE, and recover the adapter for the original model.

    Run again after an interruption, it goes on from its last whole checkpoint. Start it with torchrun or accelerate
    launch for several GPUs. A dry run ends with exit code 6 if the estimate says that the run does not fit.
    """
    from loram_hub.finetuning import check_finetune
    from loram_hub.finetuning import finetune as finetune_release

    if not _prints():
        click.get_current_context().find_root().meta[AS_JSON] = False  # its errors go to stderr alone
    folder = Path(recipe.stem) if out is None else out
    if dry_run:
        preview = check_finetune(recipe, folder, resume=resume, token=token)  # type: ignore[arg-type]  # click chose
        if _prints():
            print_result(preview.to_dict(), as_json, lambda: _print_preview(preview))
        fit = preview.prepared.sizing.fit
        if fit is not None and not fit.fits:
            click.get_current_context().exit(EXIT_RESOURCE)
        return
    result = finetune_release(recipe, folder, resume=resume, token=token)  # type: ignore[arg-type]  # click chose
    if _prints():
        print_result(result.to_dict(), as_json, lambda: _print_finished(result))


def _prints() -> bool:
    """Whether this is the process that prints: of those that a launcher starts, the first."""
    return int(os.environ.get("RANK", "0")) == 0


def _print_preview(preview: FinetunePreview) -> None:
    prepared, fit = preview.prepared, preview.prepared.sizing.fit
    materials, schedule, report = prepared.materials, prepared.schedule, prepared.data.report
    for line in report.lines():
        click.echo(line)
    passes, batch = schedule.steps / schedule.steps_per_epoch, min(schedule.batch_size, report.train.examples)
    rows = [
        ("release", f"{materials.source.id} @ {materials.source.commit or 'local folder'}"),
        (
            "adapter",
            f"{', '.join(materials.targets)}; {materials.adapter_parameters(prepared.recipe.lora.r):,} numbers"
            f"{'; masked as the weights are' if materials.is_masked else ''}",
        ),
        ("steps", f"{schedule.steps:,} of {batch} examples, {passes:,.2f} times all of them"),
        (
            "batch",
            f"{schedule.micro_batch} at a time x {schedule.accumulation} x {schedule.processes} process(es) on "
            f"{prepared.processes.device}",
        ),
        ("evaluation", "none" if schedule.evaluate_every is None else f"every {schedule.evaluate_every:,} steps"),
        ("checkpoints", f"every {schedule.save_every:,} steps"),
        ("memory", "not estimated: no GPU was named" if fit is None else _memory(preview)),
        ("time", "unknown"),
        ("would write", f"{preview.folder}, up to {size_text(prepared.disk_bytes)}"),
    ]
    if preview.pushes_to is not None:
        rows.append(("would push to", preview.pushes_to))
    if preview.is_finished:
        rows.append(("state", "trained to its end; nothing would be trained"))
    elif preview.resumes_from is not None:
        rows.append(("state", f"would go on from step {preview.resumes_from:,}"))
    print_table(None, rows)
    if fit is not None and not fit.fits:
        click.echo(prepared.sizing.explain())


def _memory(preview: FinetunePreview) -> str:
    fit = preview.prepared.sizing.fit
    assert fit is not None
    words = "fits" if fit.fits else "DOES NOT FIT"
    return f"{words} {fit.gpu.name}: {size_text(fit.breakdown.total)} of {size_text(fit.gpu.nbytes)}, by the estimate"


def _print_finished(result: FinetuneResult) -> None:
    losses = [("training loss", result.training_loss), *((f"{k} loss", v) for k, v in result.evaluation_losses.items())]
    rows = [
        ("adapter for the original model", str(result.recovered)),
        ("as trained, for no server", str(result.adapter)),
        ("steps", f"{result.steps:,}"),
        *((name, f"{value:.4f}") for name, value in losses if value is not None),
    ]
    if not result.is_exact:
        rows.append(("not exact", "parts were trained by other numbers of processes, or with another micro-batch"))
    print_table(None, rows)
    command, *arguments = shlex.split(result.serving_command)
    suggest(command, *arguments)
