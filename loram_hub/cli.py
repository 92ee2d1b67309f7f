"""The `loram` command: parse, call one library function, print.

Results go to stdout (with `--json` one JSON document), talk and progress to stderr. Errors are one message and an exit
code: 0 ok, 1 unexpected, 2 usage, 3 verification failed, 4 incompatible, 5 access, 6 disk or memory, 130 interrupted.

Commands take their options as **options: click has parsed and typed them, and they go on to one library function by
name.
"""

from __future__ import annotations

import errno
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from loram_hub.errors import LoramError

_AS_JSON = "loram_hub.json"
EXIT_UNEXPECTED, EXIT_RESOURCE, EXIT_INTERRUPTED = 1, 6, 130

_F = TypeVar("_F", bound=Callable[..., Any])


class _LoramGroup(click.Group):
    """Turns errors into one message and an exit code; commands are listed in the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 (click's)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            _fail("Interrupted; nothing half-written was left.", EXIT_INTERRUPTED, "Interrupted")
        except LoramError as err:
            _fail(str(err), err.exit_code, type(err).__name__, reraise=err)
        except MemoryError as err:
            _fail("Out of memory.", EXIT_RESOURCE, "MemoryError", reraise=err)
        except OSError as err:
            code = EXIT_RESOURCE if err.errno in (errno.ENOSPC, errno.EDQUOT) else EXIT_UNEXPECTED
            _fail(f"{type(err).__name__}: {err}. --debug shows where.", code, type(err).__name__, reraise=err)
        # The border to the user: whatever is left becomes one message and exit code 1, with --debug the traceback.
        except Exception as err:
            out_of_memory = type(err).__name__ == "OutOfMemoryError"  # torch's, which derives from RuntimeError
            code = EXIT_RESOURCE if out_of_memory else EXIT_UNEXPECTED
            _fail(f"{type(err).__name__}: {err} --debug shows where.", code, type(err).__name__, reraise=err)


def _fail(message: str, code: int, kind: str, *, reraise: BaseException | None = None) -> None:
    context = click.get_current_context()
    if context.find_root().params.get("debug") and reraise is not None:
        raise reraise
    if context.find_root().meta.get(_AS_JSON):
        click.echo(json.dumps({"error": {"code": code, "kind": kind, "message": message}}))
    click.echo(f"Error: {message}", err=True)
    context.exit(code)


@click.group(
    cls=_LoramGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with: loram demo",
)
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bars, warnings only.")
@click.version_option(package_name="loram-hub")
def main(debug: bool, quiet: bool) -> None:
    """Train LoRA on a pruned model, use it on the original one (LoRAM, arXiv 2502.13533)."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    logging.getLogger("loram_hub").setLevel(level)
    # transformers 5.23 renamed it; peft and trl still use the old name, and users can do nothing about that.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
    if quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def _options(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    def apply(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def _note_json(context: click.Context, _: click.Parameter, value: bool) -> bool:
    context.find_root().meta[_AS_JSON] = value  # errors are JSON then, too
    return value


_json = click.option("--json", "as_json", is_flag=True, callback=_note_json, help="Print one JSON document on stdout.")
_hub = _options(
    click.option("--revision", help="Branch, tag or commit of a Hub id."),
    click.option("--token", envvar="HF_TOKEN", help="Hub token; by default the one you are logged in with."),
)
_write = _options(
    click.option(
        "--overwrite", is_flag=True, help="Replace the output folder; the old one stays until the new one is complete."
    ),
    click.option("--dry-run", is_flag=True, help="Check everything and say what would be written, without writing."),
)
_STRUCTURE = ("pruning_ratio", "keep_first", "keep_last", "round_to")
_structure = _options(
    click.option("--pruning-ratio", type=float, default=0.85, show_default=True, help="Share removed, in [0, 1)."),
    click.option("--keep-first", type=int, default=4, show_default=True, help="Whole layers at the start."),
    click.option("--keep-last", type=int, default=2, show_default=True, help="Whole layers at the end."),
    click.option(
        "--round-to", type=int, help="Round kept MLP channels up to a multiple (64 suits NF4). Off by default."
    ),
)


@main.command(epilog="Example: loram plan meta-llama/Llama-3.1-70B --pruning-ratio 0.85")
@click.argument("model")
@_structure
@_hub
@_json
def plan(model: str, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Count what pruning MODEL would leave; needs only its config.json (folder, file or Hub id)."""
    from loram_hub.inspection import count_parameters

    counts = count_parameters(model, **options)
    if as_json:
        _print_json(counts.to_dict())
        return
    _print_counts(counts.to_dict())
    structure = [f"--{name.replace('_', '-')}={options[name]}" for name in _STRUCTURE if options[name] is not None]
    _next("loram prune", model, "OUT", *structure, "--calibration=TEXTS.jsonl", "--quantize")


@main.command(epilog="Example: loram prune org/model OUT --pruning-ratio 0.65 --calibration texts.jsonl --quantize")
@click.argument("base")
@click.argument("out", type=click.Path(path_type=Path))
@_structure
@click.option(
    "--importance",
    default="taylor",
    show_default=True,
    help="random, magnitude[:l2|:l1] or taylor[:param_first|:vectorize|:param_second|:param_mix].",
)
@click.option("--calibration", help="Texts for taylor: a .jsonl, .txt or .parquet file, a folder, or a dataset id.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of random scores and the choice of calibration texts."
)
@click.option("--quantize", is_flag=True, help="Write NF4 directly.")
@click.option("--device", help="Where to compute Taylor gradients and NF4, for example cuda. Default: cpu.")
@_write
@_hub
@_json
def prune(base: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Prune BASE (Hub id or folder) into the release folder OUT."""
    if dry_run:
        from loram_hub.pruning import check_prune

        del options["quantize"]
        counts = check_prune(base, out, **options).to_dict()
        _print(counts | {"would_write": str(out)}, as_json, lambda: _print_counts(counts))
        return
    from loram_hub import prune as prune_model

    release = prune_model(base, out, **options)
    _print_release(release.folder, as_json)


@main.command(epilog="Example: loram quantize PRUNED OUT")
@click.argument("release")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--device", help="Where to quantize, for example cuda. Default: cpu.")
@_write
@_hub
@_json
def quantize(release: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Turn the 16-bit RELEASE into the NF4 release OUT."""
    if dry_run:
        from loram_hub.quantization import check_quantize

        del options["device"]
        nbytes = check_quantize(release, out, **options)
        would = {"would_write": str(out), "nf4_bytes": nbytes}
        _print(would, as_json, lambda: click.echo(f"Would write {_size(nbytes)} of weights to {out}."))
        return
    from loram_hub import quantize as quantize_release

    _print_release(quantize_release(release, out, **options).folder, as_json)


@main.command(name="info", epilog="Example: loram info org/Llama-3.1-70B-LoRAM-0.85")
@click.argument("release")
@_hub
@_json
def show_info(release: str, revision: str | None, token: str | None, as_json: bool) -> None:
    """Describe RELEASE (Hub id or folder): base, pruning, sizes."""
    from loram_hub import info

    described = info(release, revision=revision, token=token)
    _print(described, as_json, lambda: _print_info(described))


@main.command(epilog="Example: loram verify org/Llama-3.1-70B-LoRAM-0.85")
@click.argument("release")
@_hub
@_json
def verify(release: str, revision: str | None, token: str | None, as_json: bool) -> None:
    """Check every byte of RELEASE against its manifest, and its plan against its config."""
    from loram_hub import verify as verify_release

    found = verify_release(release, revision=revision, token=token)
    files = found.manifest.files
    result = {"intact": True, "files": len(files), "bytes": sum(entry.size for entry in files.values())}
    _print(result, as_json, lambda: click.echo(f"Intact: {result['files']} files, {_size(result['bytes'])}."))


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
@_write
@_hub
@_json
def recover(adapter: str, out: Path, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Recover ADAPTER, trained on a release, to full size in OUT; works without torch and without weights."""
    from loram_hub import recover as recover_adapter

    recovered = recover_adapter(adapter, out, **options)
    result = _jsonable(asdict(recovered)) | {"dry_run": options["dry_run"]}

    def show() -> None:
        verb = "Would write" if options["dry_run"] else "Wrote"
        click.echo(
            f"{verb} {recovered.folder}: {len(recovered.modules)} modules, rank {recovered.rank}, "
            f"alpha {recovered.alpha}, {_size(recovered.nbytes)}, for {recovered.base_id}."
        )
        lora = ("--enable-lora", "--max-lora-rank", recovered.max_lora_rank, "--lora-modules")
        _next("vllm serve", recovered.base_id, *lora, f"tuned={recovered.folder}")

    _print(result, as_json, show)


@main.command(epilog="Example: loram merge meta-llama/Llama-3.1-70B my-adapter merged")
@click.argument("base")
@click.argument("adapter")
@click.argument("out", type=click.Path(path_type=Path))
@_write
@_hub
@_json
def merge(base: str, adapter: str, out: Path, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Merge the full-size ADAPTER into BASE, tensor by tensor, and write the model to OUT."""
    from loram_hub import merge as merge_adapter

    merged = merge_adapter(base, adapter, out, **options)
    result = _jsonable(asdict(merged)) | {"dry_run": options["dry_run"]}

    def show() -> None:
        verb = "Would write" if options["dry_run"] else "Wrote"
        click.echo(
            f"{verb} {merged.folder}: {merged.merged} of {merged.tensors} tensors changed, {_size(merged.nbytes)}."
        )
        _next("vllm serve", merged.folder)

    _print(result, as_json, show)


@main.command(
    name="eval",
    epilog="Example: loram eval held_out.jsonl --base org/model --release R --adapter A --recovered my-adapter",
)
@click.argument("data")
@click.option("--base", help="The original model.")
@click.option("--release", help="The pruned model.")
@click.option("--adapter", help="The adapter trained on the release.")
@click.option("--recovered", help="The recovered adapter, for the base.")
@click.option("--max-tokens", type=int, default=1024, show_default=True, help="Longest sequence.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Sequences per forward pass.")
@click.option("--limit", type=int, help="Read at most this many records.")
@click.option("--device", help="Where to run, for example cuda. Default: cpu.")
@_json
def evaluate(data: str, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Compare test loss and perplexity on DATA: texts or prompt/completion records (file, folder or dataset id)."""
    from loram_hub import evaluate as evaluate_models

    table = evaluate_models(data, **options)
    rows = [
        (
            row.model,
            f"{row.loss:.4f}",
            "-" if row.perplexity is None else f"{row.perplexity:.2f}",
            f"{row.parameters:,}",
        )
        for row in table.rows
    ]
    _print(table.to_dict(), as_json, lambda: _print_table(("model", "loss", "perplexity", "parameters"), rows))


@main.command(epilog="Example: loram demo --model Qwen/Qwen3-0.6B --steps 100")
@click.option("--model", help="Folder or Hub id of any supported model. Default: SmolLM2-135M-Instruct from its wheel.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Where everything goes. Default: ./loram-demo.")
@click.option("--pruning-ratio", type=float, help="Share removed, in [0, 1).")
@click.option("--steps", type=int, help="Optimizer steps of the fine-tuning.")
@click.option("--device", help="Where models run, for example cuda. Default: cpu.")
@_json
def demo(model: str | None, work_dir: Path | None, device: str | None, as_json: bool, **chosen: Any) -> None:  # noqa: ANN401
    """Run the whole loop on a small real model: prune, quantize, fine-tune, recover, evaluate."""
    from loram_hub.demo import DemoSettings, run_demo

    settings = DemoSettings(**{name: value for name, value in chosen.items() if value is not None})
    report = run_demo(model, work_dir, settings=settings, device=device)
    _print(report.to_dict(), as_json, lambda: click.echo(str(report)))


def _print(result: Mapping[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        _print_json(result)
    else:
        show()


def _print_json(result: Mapping[str, Any]) -> None:
    click.echo(json.dumps(result, indent=2))


def _jsonable(value: Any) -> Any:  # noqa: ANN401 (any record's fields)
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _next(command: str, *arguments: object) -> None:
    click.echo(f"Next: {' '.join([command, *(shlex.quote(str(argument)) for argument in arguments)])}", err=True)


def _size(nbytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} bytes"


def _print_counts(counts: Mapping[str, Any]) -> None:
    rows = [
        ("parameters before", f"{counts['original_parameters']:,}"),
        ("parameters after", f"{counts['pruned_parameters']:,}"),
        ("reduction", f"{counts['reduction']:.2f}x  (the paper's x4 for NF4: {counts['paper_reduction']:.2f}x)"),
        ("weights in bf16", _size(counts["bf16_bytes"])),
        ("weights in NF4", f"{_size(counts['nf4_bytes'])}  (embeddings and lm_head in bf16)"),
        (
            "the paper's NF4 figure",
            f"{counts['paper_nf4_gib']:.2f} GiB  (half a byte for every parameter, embeddings too)",
        ),
    ]
    _print_table(None, rows)
    for first, last, sizes in _runs(counts["kept"]):
        layers = f"layer {first}" if first == last else f"layers {first}-{last}"
        click.echo(f"  {layers}: {sizes[0]} KV heads, {sizes[1]:,} MLP channels")


def _runs(kept: Sequence[Mapping[str, int]]) -> list[tuple[int, int, tuple[int, int]]]:
    """Merge neighbouring layers of equal sizes: (first, last, (kv_heads, channels))."""
    runs: list[tuple[int, int, tuple[int, int]]] = []
    for entry in kept:
        sizes = (entry["kv_heads"], entry["channels"])
        if runs and runs[-1][2] == sizes:
            runs[-1] = (runs[-1][0], entry["layer"], sizes)
        else:
            runs.append((entry["layer"], entry["layer"], sizes))
    return runs


def _print_info(described: Mapping[str, Any]) -> None:
    pruning, base = described["pruning"], described["base"]
    quantization = described["quantization"]
    _print_table(
        None,
        [
            ("release", described["id"]),
            ("base model", f"{base['id']} @ {base['commit'] or 'local folder'}"),
            ("pruning", f"{pruning['method']}, {pruning['importance']}, ratio {pruning['pruning_ratio']}"),
            ("aligned", "yes" if described["alignment"] else "no"),
            ("weights", f"{quantization['type']}, rest {quantization['dtype']}" if quantization else "not quantized"),
            ("files", _size(described["file_bytes"])),
        ],
    )
    _print_counts(described)


def _print_table(header: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> None:
    lines = [list(header)] if header else []
    lines += [list(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_release(folder: Path, as_json: bool) -> None:
    from loram_hub import info

    described = info(folder)
    _print(described | {"folder": str(folder)}, as_json, lambda: _print_info(described))
    if not as_json:
        _next("loram verify", folder)
