"""Commands of those who make releases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loram_hub.cli.group import main
from loram_hub.cli.options import (
    CALIBRATION,
    SPARSITY,
    STRUCTURE,
    calibration_options,
    evaluation_option,
    given_options,
    hub_options,
    json_option,
    license_option,
    sparsity_options,
    structure_options,
    write_options,
)
from loram_hub.cli.output import print_counts, print_json, print_release, print_result, print_table, size_text, suggest
from loram_hub.errors import InvalidRequestError

if TYPE_CHECKING:
    from loram_hub.estimation import SparseCounts
    from loram_hub.plan import ParameterCounts
    from loram_hub.pushing import Pushed
    from loram_hub.release import Release


STRUCTURED = "structured"
SCORES = ("importance", "importance_out")


@main.command(epilog="Example: loram plan meta-llama/Llama-3.1-70B --pruning-ratio 0.85")
@click.argument("model")
@structure_options
@sparsity_options
@hub_options
@json_option
def plan(model: str, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Count what pruning MODEL would leave; needs only its config.json (folder, file or Hub id).

    With --sparsity or --pattern: what is left of the parameters if single weights are removed. Wanda rounds a sparsity
    in every row, and keeps a few more; loram prune --dry-run counts what the method keeps.
    """
    from loram_hub.inspection import count_parameters

    is_sparse = any(options[name] is not None for name in SPARSITY)
    if is_sparse:
        _refuse_structure(f"--{'sparsity' if options['pattern'] is None else 'pattern'}")
    unused = STRUCTURE if is_sparse else SPARSITY
    counts = count_parameters(model, **{name: value for name, value in options.items() if name not in unused})
    if as_json:
        print_json(counts.to_dict())
        return
    print_counts(counts.to_dict())
    used = SPARSITY if is_sparse else STRUCTURE
    chosen = [f"--{name.replace('_', '-')}={options[name]}" for name in used if options[name] is not None]
    method = ("--method=sparsegpt",) if is_sparse else ()
    suggest("loram prune", model, "OUT", *method, *chosen, "--calibration=TEXTS.jsonl", "--quantize")


@main.command(epilog="Example: loram prune org/model OUT --pruning-ratio 0.65 --calibration texts.jsonl --quantize")
@click.argument("base")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--method",
    type=click.Choice([STRUCTURED, "sparsegpt", "wanda", "magnitude"]),
    default=STRUCTURED,
    show_default=True,
    help="Remove channel groups (structured) or, which saves no memory in training, single weights.",
)
@structure_options
@click.option(
    "--importance",
    default="taylor",
    show_default=True,
    help="Of channel groups: random, magnitude[:l2|:l1], taylor[:param_first|:vectorize|:param_second|:param_mix], or "
    "file:PATH, scores that --importance-out wrote.",
)
@click.option(
    "--importance-out",
    type=click.Path(path_type=Path),
    help="Write the scores of the channel groups to this file; another ratio then needs no scoring.",
)
@sparsity_options
@click.option(
    "--calibration",
    help="Texts for taylor, sparsegpt and wanda: a .jsonl, .txt or .parquet file, a folder, or a dataset id.",
)
@calibration_options
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of random scores and the choice of calibration texts."
)
@click.option("--quantize", is_flag=True, help="Write NF4 directly.")
@click.option("--device", help="Where to compute Taylor gradients, Hessians and NF4, for example cuda. Default: cpu.")
@write_options
@hub_options
@json_option
def prune(base: str, out: Path, method: str, dry_run: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Prune BASE (Hub id or folder) into the release folder OUT.

    The default method removes channel groups, by --pruning-ratio, and the model gets smaller. The others remove single
    weights, by --pattern or --sparsity, and leave zeros in matrices of the same sizes. SparseGPT's dampening and block
    size can be set in a recipe (loram publish).
    """
    if dry_run:
        counts = _check_prune(base, out, method, options).to_dict()
        print_result(counts | {"would_write": str(out)}, as_json, lambda: print_counts(counts))
        return
    print_release(_prune(base, out, method, options).folder, as_json)


def _check_prune(base: str, out: Path, method: str, options: Mapping[str, Any]) -> ParameterCounts | SparseCounts:
    chosen = {name: value for name, value in _arguments(method, options).items() if name != "quantize"}
    if method == STRUCTURED:
        from loram_hub.pruning import check_prune

        return check_prune(base, out, **chosen)
    from loram_hub.sparsification import check_sparsify

    return check_sparsify(base, out, **chosen)


def _prune(base: str, out: Path, method: str, options: Mapping[str, Any]) -> Release:
    chosen = _arguments(method, options)
    if method == STRUCTURED:
        from loram_hub import prune as prune_model

        return prune_model(base, out, **chosen)
    from loram_hub import sparsify

    return sparsify(base, out, **chosen)


def _arguments(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `prune` or `sparsify`; raises `InvalidRequestError` for an option of the other one."""
    if method == STRUCTURED:
        given = given_options(SPARSITY)
        if given:
            raise InvalidRequestError(
                f"{' and '.join(given)} removes single weights; --method structured, the default, removes channel "
                "groups by --pruning-ratio. Add --method sparsegpt, or wanda or magnitude."
            )
        if given := given_options(CALIBRATION):
            raise InvalidRequestError(
                f"{' and '.join(given)} says how much of the texts sparsegpt and wanda look at; --method structured "
                "has numbers of its own. Leave it out, or add --method sparsegpt or wanda."
            )
        return {name: value for name, value in options.items() if name not in (*SPARSITY, *CALIBRATION)}
    _refuse_structure(f"--method {method}")
    from loram_hub.sparsification.settings import SparsitySettings

    asked: dict[str, Any] = {"method": method, **{name: options[name] for name in SPARSITY}}
    asked |= {name: options[name] for name in CALIBRATION if options[name] is not None}
    unused = (*SPARSITY, *CALIBRATION, *STRUCTURE, *SCORES)
    rest = {name: value for name, value in options.items() if name not in unused}
    return {**rest, "settings": SparsitySettings(**asked)}


def _refuse_structure(option: str) -> None:
    """Raise `InvalidRequestError` if channel groups were asked for as well as single weights."""
    given = given_options((*STRUCTURE, *SCORES))
    if given:
        raise InvalidRequestError(
            f"{', '.join(given)} says which channel groups go; {option} removes single weights, in every layer. Leave "
            "out one or the other."
        )


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


@main.command(epilog="Example: loram card release-nf4 --repo-id org/Llama-3.1-70B-LoRAM-0.85 --evaluation eval.json")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--repo-id", help="Hub id under which it will be published.")
@license_option
@evaluation_option
@click.option("--dry-run", is_flag=True, help="Print the card instead of writing it.")
@json_option
def card(folder: Path, evaluation: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Write README.md and its pictures into a release or recovered adapter, from what FOLDER records."""
    from loram_hub.cards import make_card, write_card
    from loram_hub.files import read_json

    made = make_card(folder, evaluation=None if evaluation is None else read_json(evaluation), **options)
    names = list(made.all_files)
    if not dry_run:
        write_card(folder, made)
    result = {"files": names, "dry_run": dry_run} | ({"card": made.text} if dry_run else {})
    text = made.text if dry_run else f"Wrote {', '.join(names)} into {folder}."
    print_result(result, as_json, lambda: click.echo(text))


@main.command(epilog="Example: loram push release-nf4 org/Llama-3.1-70B-LoRAM-0.85 --tag v1 --dry-run")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option("--private/--public", default=None, help="Default: public, but private if the base is gated or not seen.")
@click.option(
    "--gated",
    type=click.Choice(["auto", "manual", "off"]),
    help="How access is granted. Default: as the repository is; auto if the base is gated.",
)
@license_option
@evaluation_option
@click.option("--tag", help="Tag for the commit, such as v1.")
@click.option("--collection", help="Slug of a collection, or the title of one of yours; made if there is none.")
@click.option("--message", help="Title of the commit.")
@click.option(
    "--overwrite", is_flag=True, help="Delete files in REPO_ID that no push put there, if loaders would open them."
)
@click.option("--token", help="Hub token; by default HF_TOKEN, or the one you are logged in with.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be pushed, without pushing.")
@json_option
def push(folder: Path, repo_id: str, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Publish the release or recovered adapter FOLDER on the Hub; run it again to complete a push that broke off."""
    from loram_hub import push as push_release
    from loram_hub import push_adapter
    from loram_hub.adapter import CONFIG as ADAPTER_CONFIG

    publish = push_adapter if (folder / ADAPTER_CONFIG).is_file() else push_release
    options["gated"] = False if options["gated"] == "off" else options["gated"]
    pushed = publish(folder, repo_id, **options)
    print_result(pushed.to_dict(), as_json, lambda: _print_pushed(pushed, folder))
    if pushed.problems:  # of a dry run: what the push itself would end with
        click.get_current_context().exit(InvalidRequestError.exit_code)


def _print_pushed(pushed: Pushed, folder: Path) -> None:
    rows = [(file.name, size_text(file.size), "new" if file.is_new else "on the Hub already") for file in pushed.files]
    print_table(("file", "size", ""), rows)
    for name in pushed.left_out:
        click.echo(f"left out: {name}")
    for name in pushed.deleted:
        click.echo(f"deleted on the Hub: {name}")
    click.echo(f"licence: {pushed.licence}")
    for duty in pushed.duties:
        click.echo(f"  {'met' if duty.met else 'NOT MET'}: {duty.what}{'' if duty.met else f'. {duty.how}'}")
    for note in pushed.notes:
        click.echo(note)
    seen = "private" if pushed.private else "public"
    gate = f", gated ({pushed.gated})" if pushed.gated else ""
    size = f"{len(pushed.files)} files, {size_text(pushed.nbytes)}, {size_text(pushed.new_bytes)} of them new"
    if pushed.tag is not None:
        click.echo(f"tag: {pushed.tag}")
    if pushed.collection is not None:
        click.echo(f"collection: {pushed.collection}")
    for problem in pushed.problems:
        click.echo(f"PROBLEM: {problem}")
    verb = "Pushed" if pushed.commit else "Would NOT push" if pushed.problems else "Would push"
    click.echo(f"{verb} {folder} to {pushed.url} ({seen}{gate}): {size}.")
    if pushed.commit:
        click.echo(f"commit: {pushed.commit}")
