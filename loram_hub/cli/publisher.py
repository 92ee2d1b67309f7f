"""Commands of those who make releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loram_hub.cli.group import main
from loram_hub.cli.options import STRUCTURE, hub_options, json_option, structure_options, write_options
from loram_hub.cli.output import print_counts, print_json, print_release, print_result, size_text, suggest


@main.command(epilog="Example: loram plan meta-llama/Llama-3.1-70B --pruning-ratio 0.85")
@click.argument("model")
@structure_options
@hub_options
@json_option
def plan(model: str, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Count what pruning MODEL would leave; needs only its config.json (folder, file or Hub id)."""
    from loram_hub.inspection import count_parameters

    counts = count_parameters(model, **options)
    if as_json:
        print_json(counts.to_dict())
        return
    print_counts(counts.to_dict())
    structure = [f"--{name.replace('_', '-')}={options[name]}" for name in STRUCTURE if options[name] is not None]
    suggest("loram prune", model, "OUT", *structure, "--calibration=TEXTS.jsonl", "--quantize")


@main.command(epilog="Example: loram prune org/model OUT --pruning-ratio 0.65 --calibration texts.jsonl --quantize")
@click.argument("base")
@click.argument("out", type=click.Path(path_type=Path))
@structure_options
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
@write_options
@hub_options
@json_option
def prune(base: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Prune BASE (Hub id or folder) into the release folder OUT."""
    if dry_run:
        from loram_hub.pruning import check_prune

        del options["quantize"]
        counts = check_prune(base, out, **options).to_dict()
        print_result(counts | {"would_write": str(out)}, as_json, lambda: print_counts(counts))
        return
    from loram_hub import prune as prune_model

    release = prune_model(base, out, **options)
    print_release(release.folder, as_json)


@main.command(epilog="Example: loram quantize PRUNED OUT")
@click.argument("release")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--device", help="Where to quantize, for example cuda. Default: cpu.")
@write_options
@hub_options
@json_option
def quantize(release: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Turn the 16-bit RELEASE into the NF4 release OUT."""
    if dry_run:
        from loram_hub.quantization import check_quantize

        del options["device"]
        nbytes = check_quantize(release, out, **options)
        would = {"would_write": str(out), "nf4_bytes": nbytes}
        print_result(would, as_json, lambda: click.echo(f"Would write {size_text(nbytes)} of weights to {out}."))
        return
    from loram_hub import quantize as quantize_release

    print_release(quantize_release(release, out, **options).folder, as_json)
