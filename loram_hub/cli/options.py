"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

AS_JSON = "loram_hub.json"

_F = TypeVar("_F", bound=Callable[..., Any])


def combined(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """Make one decorator of several, which apply in the order in which they are given."""

    def apply(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def given_options(names: Iterable[str]) -> list[str]:
    """Return those of the running command's options that were given, as they are written."""
    context = click.get_current_context()
    return [
        f"--{name.replace('_', '-')}"
        for name in names
        if context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
    ]


def _note_json(context: click.Context, _: click.Parameter, value: bool) -> bool:
    context.find_root().meta[AS_JSON] = value  # errors are JSON then, too
    return value


json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_note_json, help="Print one JSON document on stdout."
)
hub_options = combined(
    click.option("--revision", help="Branch, tag or commit of a Hub id."),
    click.option("--token", help="Hub token; by default HF_TOKEN, or the one you are logged in with."),
)
write_options = combined(
    click.option(
        "--overwrite", is_flag=True, help="Replace the output folder; the old one stays until the new one is complete."
    ),
    click.option("--dry-run", is_flag=True, help="Check everything and say what would be written, without writing."),
)
SPARSITY = ("sparsity", "pattern")
sparsity_options = combined(
    click.option(
        "--sparsity", type=float, help="Remove single weights: this share of every projection, in (0, 1), anywhere."
    ),
    click.option(
        "--pattern",
        metavar="N:M",
        help="Remove single weights: KEEP n of every m inputs, as in 4:8 (half). SparseGPT's code counts what goes.",
    ),
)
CALIBRATION = ("samples", "tokens")
calibration_options = combined(
    click.option("--samples", type=int, help="Rows of calibration for sparsegpt and wanda [128]."),
    click.option("--tokens", type=int, help="Tokens in such a row, at most the model's context [2048]."),
)
STRUCTURE = ("pruning_ratio", "keep_first", "keep_last", "round_to")
structure_options = combined(
    click.option("--pruning-ratio", type=float, default=0.85, show_default=True, help="Share removed, in [0, 1)."),
    click.option("--keep-first", type=int, default=4, show_default=True, help="Whole layers at the start."),
    click.option("--keep-last", type=int, default=2, show_default=True, help="Whole layers at the end."),
    click.option(
        "--round-to", type=int, help="Round kept MLP channels up to a multiple (64 suits NF4). Off by default."
    ),
)
license_option = click.option(
    "--license", help="Licence of the base model as the Hub names it. Default: what its card or name tells."
)
evaluation_option = click.option(
    "--evaluation", type=click.Path(path_type=Path), help="What 'loram eval --json' printed, for the card."
)
mismatch_option = click.option(
    "--allow-base-mismatch", is_flag=True, help="Take another state of the base than the adapter was made for."
)
