"""Commands of those who train on releases, and of whoever wants to look at one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loram_hub.cli.group import main
from loram_hub.cli.options import hub_options, json_option, mismatch_option, write_options
from loram_hub.cli.output import jsonable, print_info, print_result, size_text, suggest
from loram_hub.errors import IncompatibleError

if TYPE_CHECKING:
    from loram_hub.doctor import Diagnosis, FixedAdapter


@main.command(name="info", epilog="Example: loram info org/Llama-3.1-70B-LoRAM-0.85")
@click.argument("release")
@hub_options
@json_option
def show_info(release: str, revision: str | None, token: str | None, as_json: bool) -> None:
    """Describe RELEASE (Hub id or folder): base, pruning, sizes."""
    from loram_hub import info

    described = info(release, revision=revision, token=token)
    print_result(described, as_json, lambda: print_info(described))


@main.command(epilog="Example: loram verify org/Llama-3.1-70B-LoRAM-0.85")
@click.argument("target")
@click.option("--full", is_flag=True, help="Also compare the kept weights with the base model's, bit by bit.")
@click.option("--base", help="The base model, folder or Hub id. Default: what TARGET names, where it is needed.")
@hub_options
@json_option
def verify(target: str, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Check every byte and every claim of TARGET, a release or an adapter (Hub id or folder)."""
    from loram_hub import verify as verify_target

    found = verify_target(target, **options)
    result = {
        "intact": True,
        "kind": found.kind,
        "id": found.id,
        "commit": found.commit,
        "files": found.files,
        "bytes": found.nbytes,
        "checked": list(found.checked),
        "not_checked": list(found.not_checked),
    }

    def show() -> None:
        click.echo(f"Intact: {found.kind} of {found.files} files, {size_text(found.nbytes)}.")
        for mark, phrases in (("checked", found.checked), ("not checked", found.not_checked)):
            for phrase in phrases:
                click.echo(f"  {mark}: {phrase}")

    print_result(result, as_json, show)


@main.command(epilog="Example: loram recover outputs/checkpoint-400 my-adapter")
@click.argument("adapter")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--release", help="The release it was trained on, folder or Hub id. Default: what the adapter itself names."
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Type of the written factors.",
)
@click.option(
    "--calibrate-scale",
    "development_set",
    metavar="DATA",
    help="Multiply the adapter by the number with which the original model has the lowest loss on DATA (file, folder "
    "or dataset id): texts or tasks that were not trained on.",
)
@click.option("--base", help="With --calibrate-scale: the original model. Default: what the release names.")
@click.option("--device", help="With --calibrate-scale: where the original model runs. Default: cpu.")
@write_options
@hub_options
@json_option
def recover(
    adapter: str,
    out: Path,
    development_set: str | None,
    base: str | None,
    device: str | None,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Recover ADAPTER, trained on a release, to full size in OUT; works without torch and without weights.

    With --calibrate-scale it needs both: the original model runs over DATA some eight times.
    """
    from loram_hub import recover as recover_adapter

    scale = None
    if development_set is None:
        if base is not None or device is not None:
            raise click.UsageError("--base and --device go with --calibrate-scale.")
        recovered = recover_adapter(adapter, out, **options)
    else:
        from loram_hub import recover_scaled

        scaled = recover_scaled(adapter, out, data=development_set, base=base, device=device, **options)
        recovered, scale = scaled.adapter, scaled.scale
    result = jsonable(asdict(recovered)) | {"dry_run": options["dry_run"]}
    result |= {"scale": None if scale is None else jsonable(asdict(scale))}

    def show() -> None:
        verb = "Would write" if options["dry_run"] else "Wrote"
        click.echo(
            f"{verb} {recovered.folder}: {len(recovered.modules)} modules, rank {recovered.rank}, "
            f"alpha {recovered.alpha}, {size_text(recovered.nbytes)}, for {recovered.base_id}."
        )
        if scale is not None:
            losses = ", ".join(f"{factor:.3g}: {loss:.4f}" for factor, loss in sorted(scale.losses))
            click.echo(f"Scale {scale.factor:.3g}; development loss at each that was tried: {losses}.")
        lora = ("--enable-lora", "--max-lora-rank", recovered.max_lora_rank, "--lora-modules")
        suggest("vllm serve", recovered.base_id, *lora, f"tuned={recovered.folder}")

    print_result(result, as_json, show)


@main.command(epilog="Example: loram doctor my-adapter --target vllm")
@click.argument("adapter")
@click.option(
    "--target",
    type=click.Choice(["vllm", "sglang", "llamacpp", "peft"]),
    default="vllm",
    show_default=True,
    help="What shall serve it.",
)
@click.option("--base", help="The base model, folder or Hub id, to compare shapes and names with.")
@click.option("--fix", "fix_into", type=click.Path(path_type=Path), help="Write the canonical form to this folder.")
@click.option("--overwrite", is_flag=True, help="Replace the folder of --fix.")
@hub_options
@json_option
def doctor(adapter: str, fix_into: Path | None, overwrite: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Say whether a server will take ADAPTER, why not, and the command that serves it (exit code 4 if it will not)."""
    from loram_hub.doctor import examine, fix

    fixed = None
    if fix_into is not None:
        known = {name: options[name] for name in ("base", "revision", "token")}
        fixed = fix(adapter, fix_into, overwrite=overwrite, **known)
    diagnosis = examine(adapter if fixed is None else fixed.folder, **options)
    result = jsonable(asdict(diagnosis)) | {"verdict": diagnosis.verdict, "fixable": diagnosis.is_fixable}
    result |= {"fixed": None if fixed is None else jsonable(asdict(fixed))}
    print_result(result, as_json, lambda: _print_diagnosis(diagnosis, fixed))
    if diagnosis.verdict != "serves":
        if fixed is None and diagnosis.is_fixable and not as_json:
            suggest("loram doctor", adapter, f"--target={diagnosis.target}", "--fix=OUT")
        click.get_current_context().exit(IncompatibleError.exit_code)


def _print_diagnosis(diagnosis: Diagnosis, fixed: FixedAdapter | None) -> None:
    for line in _diagnosis_lines(diagnosis, fixed):
        # An adapter is a stranger's text: shown as it is, it could move the cursor and hide what the doctor says.
        click.echo("".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line))


def _diagnosis_lines(diagnosis: Diagnosis, fixed: FixedAdapter | None) -> Iterator[str]:
    for change in fixed.changes if fixed is not None else ():
        yield f"fixed: {change}"
    for finding in diagnosis.findings:
        yield f"{finding.severity}: {finding.what}"
        yield f"  {finding.why} ({finding.source})"
        yield f"  {finding.remedy}"
    for phrase in diagnosis.not_checked:
        yield f"not checked: {phrase}"
    for note in diagnosis.notes:
        yield f"note: {note}"
    yield f"{diagnosis.target}: {diagnosis.verdict}"
    yield from diagnosis.command or ()


@main.command(epilog="Example: loram merge meta-llama/Llama-3.1-70B my-adapter merged")
@click.argument("base")
@click.argument("adapter")
@click.argument("out", type=click.Path(path_type=Path))
@mismatch_option
@write_options
@hub_options
@json_option
def merge(base: str, adapter: str, out: Path, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Merge the full-size ADAPTER into BASE, tensor by tensor, and write the model to OUT."""
    from loram_hub import merge as merge_adapter

    merged = merge_adapter(base, adapter, out, **options)
    result = jsonable(asdict(merged)) | {"dry_run": options["dry_run"]}

    def show() -> None:
        verb = "Would write" if options["dry_run"] else "Wrote"
        click.echo(
            f"{verb} {merged.folder}: {merged.merged} of {merged.tensors} tensors changed, {size_text(merged.nbytes)}."
        )
        suggest("vllm serve", merged.folder)

    print_result(result, as_json, show)


@main.command(epilog="Example: loram demo --model Qwen/Qwen3-0.6B --steps 100")
@click.option("--model", help="Folder or Hub id of any supported model. Default: SmolLM2-135M-Instruct from its wheel.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Where everything goes. Default: ./loram-demo.")
@click.option("--pruning-ratio", type=float, help="Share removed, in [0, 1).")
@click.option("--steps", type=int, help="Optimizer steps of the fine-tuning.")
@click.option("--device", help="Where models run, for example cuda. Default: cpu.")
@json_option
def demo(model: str | None, work_dir: Path | None, device: str | None, as_json: bool, **chosen: Any) -> None:  # noqa: ANN401
    """Run the whole loop on a small real model: prune, quantize, fine-tune, recover, evaluate."""
    from loram_hub.demo import DemoSettings, run_demo

    settings = DemoSettings(**{name: value for name, value in chosen.items() if value is not None})
    report = run_demo(model, work_dir, settings=settings, device=device)
    print_result(report.to_dict(), as_json, lambda: click.echo(str(report)))
