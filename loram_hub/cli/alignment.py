"""Commands that train a release further, or prepare that: align, teach, refit."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from loram_hub.cli.group import main
from loram_hub.cli.options import combined, hub_options, json_option, write_options
from loram_hub.cli.output import jsonable, print_release, print_result, print_table, size_text, suggest

corpus_option = click.option(
    "--corpus",
    "corpora",
    multiple=True,
    help="SOURCE[:CONFIG][=WEIGHT]: dataset id, file or folder; repeat it to mix. Default: FineWeb and OpenWebMath.",
)
settings_option = click.option(
    "--settings",
    "settings_file",
    type=click.Path(path_type=Path),
    help="YAML or JSON with keys like those of a recipe's section, and seed; options outweigh it.",
)
stream_options = combined(
    click.option("--sequence-length", type=int, help="Tokens of a sequence [512]."),
    click.option("--held-out", type=int, help="Sequences of each corpus that are kept for evaluation [32]."),
    click.option("--seed", type=int, help="Of the order of texts [0]."),
)


@main.command(epilog="Example: loram align pruned aligned --corpus texts.jsonl --steps 200")
@click.argument("release")
@click.argument("out", type=click.Path(path_type=Path))
@corpus_option
@click.option("--steps", type=int, help="Optimizer steps [1600].")
@click.option("--batch-size", type=int, help="Sequences of a step, over all processes [128].")
@click.option("--micro-batch-size", type=int, help="Sequences that a process takes at a time [4].")
@stream_options
@click.option("--learning-rate", type=float, help="Highest learning rate [5e-5].")
@click.option("--warmup-steps", type=int, help="Steps until it is reached [100].")
@click.option("--precision", type=click.Choice(["auto", "fp32", "mixed", "bf16"]), help="mixed: fp32 weights [auto].")
@click.option("--optimizer", type=click.Choice(["adamw", "adamw_8bit"]), help="adamw_8bit on CUDA alone [adamw].")
@click.option(
    "--trainable", type=click.Choice(["full", "no-embeddings", "norms+projections"]), help="What is trained [full]."
)
@click.option("--teacher", type=click.Path(path_type=Path), help="Folder from 'loram teach', for --distillation.")
@click.option("--distillation", type=float, help="Weight of the divergence from the teacher, 0 to 1 [0].")
@click.option("--activation-checkpointing", is_flag=True, default=None, help="Less memory, a third more work.")
@click.option("--compile", is_flag=True, default=None, help="Compile each layer with torch.compile.")
@click.option("--processes", type=int, help="Stop unless just so many were started.")
@click.option("--evaluate-every", type=int, help="Steps between evaluations on held-out sequences [100].")
@click.option("--save-every", type=int, help="Steps between checkpoints [100].")
@click.option("--report-to", multiple=True, help="trackio, wandb or tensorboard; may be repeated.")
@settings_option
@click.option("--run-dir", type=click.Path(path_type=Path), help="For checkpoints and log. Default: OUT-run.")
@click.option("--resume", type=click.Choice(["auto", "never"]), default="auto", show_default=True, help="After a cut.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Default: cuda where torch sees a GPU.")
@write_options
@hub_options
@json_option
def align(release: str, out: Path, settings_file: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Train the weights of the 16-bit RELEASE further and write OUT; start it with torchrun for several processes.

    Run again after an interruption, it goes on from its last checkpoint.
    """
    from loram_hub.alignment import align as align_release
    from loram_hub.alignment import check_align
    from loram_hub.pipeline.requests import AlignRequest, align_request

    request = align_request(settings_file, _given(options, AlignRequest))
    options |= {"corpora": request.corpora, "settings": request.settings, "report_to": request.report_to}
    if dry_run:
        estimate = check_align(release, out, **options).to_dict()
        if _prints():
            _print_estimate(estimate, out, as_json)
        return
    aligned = align_release(release, out, **options)
    if _prints():
        print_release(aligned.folder, as_json)


@main.command(epilog="Example: loram teach org/base teacher --corpus texts.jsonl --steps 200")
@click.argument("base")
@click.argument("out", type=click.Path(path_type=Path))
@corpus_option
@click.option("--steps", type=int, help="Of the alignment; times --batch-size, sequences that get targets [1600].")
@click.option("--batch-size", type=int, help="Of the alignment; alone, it goes with the default of --steps [128].")
@stream_options
@click.option("--k", type=int, help="Most probable tokens that are kept for each position [64].")
@click.option("--block-sequences", type=int, help="Sequences for which the base is read once [512].")
@settings_option
@click.option("--device", help="Where to compute, for example cuda. Default: cpu.")
@write_options
@hub_options
@json_option
def teach(base: str, out: Path, settings_file: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Store the most probable next tokens of BASE for the texts that an alignment will train on, in OUT.

    BASE is streamed layer by layer. Run again after an interruption, it goes on; started with torchrun, the processes
    share the work.
    """
    from loram_hub.alignment import AlignmentSettings
    from loram_hub.pipeline.requests import TeachRequest, teach_request
    from loram_hub.teaching import check_teach
    from loram_hub.teaching import teach as teach_base

    steps, batch_size = options.pop("steps"), options.pop("batch_size")
    if steps is not None or batch_size is not None:
        usual = AlignmentSettings()
        options["sequences"] = (usual.steps if steps is None else steps) * (
            usual.batch_size if batch_size is None else batch_size
        )
    request = teach_request(settings_file, _given(options, TeachRequest))
    options |= {"corpora": request.corpora, "settings": request.settings}
    if dry_run:
        estimate = asdict(check_teach(base, out, **options))
        if _prints():
            _print_estimate(estimate, out, as_json)
        return
    shards = teach_base(base, out, **options)
    if not _prints():
        return
    sequences, k = request.settings.sequences, request.settings.k
    result = {"folder": str(out), "sequences": sequences, "k": k, "finished": shards is not None}

    def show() -> None:
        if shards is None:
            click.echo(f"This process's share of the targets is in {out}; other processes still compute theirs.")
            return
        click.echo(f"Targets for {sequences:,} sequences, the {k} most probable tokens each, are in {out}.")
        suggest("loram align", "PRUNED", "OUT", f"--teacher={out}", "--distillation=0.5")

    print_result(result, as_json, show)


@main.command(epilog="Example: loram refit pruned refitted --calibration texts.jsonl")
@click.argument("release")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--calibration", required=True, help="Texts: a .jsonl, .txt or .parquet file, a folder, or a dataset id.")
@click.option("--base", help="The base model, folder or Hub id. Default: the one that RELEASE names, at its commit.")
@click.option("--target", type=click.Choice(["residual", "output"]), help="What is met: the stream, or each matrix.")
@click.option("--ridge", type=float, help="Pull toward the weights as they are [0.05].")
@click.option("--samples", type=int, help="Rows of calibration [64].")
@click.option("--tokens", type=int, help="Tokens in a row [128].")
@click.option("--seed", type=int, help="Of the choice of calibration texts [0].")
@click.option("--device", help="Where to compute, for example cuda. Default: cpu.")
@write_options
@hub_options
@json_option
def refit(release: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Solve o_proj and down_proj of the 16-bit RELEASE anew, by least squares, and write OUT."""
    from loram_hub.refitting import RefitSettings, check_refit
    from loram_hub.refitting import refit as refit_release

    options["settings"] = RefitSettings(**_given(options, RefitSettings))
    if dry_run:
        _print_estimate(asdict(check_refit(release, out, **options)), out, as_json)
        return
    print_release(refit_release(release, out, **options).folder, as_json)


def _prints() -> bool:
    """Whether this is the process that prints: of those that `torchrun` starts, the first."""
    return int(os.environ.get("RANK", "0")) == 0


def _given(options: dict[str, Any], request: type) -> dict[str, Any]:
    """Take the options that are keys of a request, and return those that were given, as a file would have them."""
    from loram_hub.corpora import parse_corpus
    from loram_hub.recipes import keys_of

    values = {name: options.pop(name) for name in keys_of(request) if name in options}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    if values.get("corpora"):
        values["corpora"] = [asdict(parse_corpus(text)) for text in values["corpora"]]
    return {name: value for name, value in values.items() if value is not None and value != []}


def _print_estimate(estimate: dict[str, Any], out: Path, as_json: bool) -> None:
    """Print what a dry run found."""
    rows = [
        (
            name.replace("_", " "),
            size_text(value) if name.endswith("bytes") else f"{value:,}" if isinstance(value, int) else str(value),
        )
        for name, value in estimate.items()
    ]
    print_result(jsonable(estimate) | {"would_write": str(out)}, as_json, lambda: print_table(None, rows))
