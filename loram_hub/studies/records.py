"""What a study has measured: one row for each cell, model and held-out set."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from loram_hub.errors import VerificationError
from loram_hub.files import parse_json, write_text

RESULTS = "results.jsonl"
CELLS = "cells"

MAX_BYTES = 64 * 1024 * 1024
"""Cap on `results.jsonl`, of which a row has some 600 bytes."""

Kind = Literal["base", "plain", "whole layers", "loram"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kinds of cells, controls first."""
METHODS = ("", "rand", "stru", "semi", "unst")
"""Ways of pruning; controls have none."""
MODELS = BASE, PRUNED, ADAPTED, RECOVERED = "base", "pruned", "pruned + adapter", "base + recovered adapter"
"""Models that a row can be of."""

_CELL = re.compile("[0-9a-f]{12}")
_STUDY = re.compile("-*[A-Za-z0-9][A-Za-z0-9-]{0,63}")
_LONGEST_NAME = 200
_CHOICES = {"method": METHODS, "model": MODELS, "quantization": ("", "nf4")}
_MANY = 10**15
_RANGES: Mapping[str, tuple[float, float]] = {
    "ratio": (0, math.nextafter(1, 0)),
    "alignment_steps": (0, _MANY),
    "alignment_tokens": (0, _MANY),
    "seed": (0, _MANY),
    "parameters": (1, _MANY),
    "loss": (0, 1e6),
    "tokens": (1, _MANY),
    "making_seconds": (0, 1e9),
    "tuning_seconds": (0, 1e9),
    "peak_memory_bytes": (0, _MANY),
    "threads": (1, 1e6),
}
"""Least and most of each number: what lies outside was not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured loss, with what it is the loss of."""

    study: str
    """Name of the study."""
    cell: str
    """First 12 hexadecimal digits of the hash of all that decides over the cell; `cells/<cell>.json` has the rest."""
    kind: Kind
    """`base`: untouched. `plain`: LoRA on the base. `whole layers`: LoRA on only those layers of the base that
    structured pruning leaves whole. `loram`: LoRA on a pruned model."""
    method: str
    """`rand`, `stru`, `semi` or `unst`; empty for controls."""
    ratio: float | None
    """Pruning ratio of `rand` and `stru`, sparsity of `unst`; None of the others."""
    importance: str
    """How channel groups were scored: `random` of `rand`, `taylor` and others of `stru`; empty of the others."""
    pattern: str
    """Of `semi`: n of every m weights were kept, as in `4:8`; empty of the others."""
    alignment_steps: int
    """Optimizer steps of alignment; 0 for none."""
    alignment_tokens: int
    """Tokens that they took."""
    quantization: str
    """Empty or `nf4`."""
    masked: bool
    """Whether the LoRA update was masked in training."""
    data: str
    """Name of the training data."""
    seed: int
    """Seed of the cell."""
    parameters: int
    """Of the model that was trained on, without what a sparse release removed."""
    model: str
    """What was measured: `base`, `pruned`, `pruned + adapter` or `base + recovered adapter`."""
    held_out: str
    """Name of the held-out set."""
    in_domain: bool
    """Whether that set is like the training data; always false for an untouched base's sets of no data."""
    loss: float
    """Mean held-out loss, nats per scored token."""
    tokens: int
    """Scored tokens."""
    making_seconds: float | None
    """Time that pruning, alignment and quantization took; None for controls, and where they were cut off."""
    tuning_seconds: float | None
    """Time that fine-tuning took, loading and saving included; None for the untouched base, and where it was cut
    off."""
    peak_memory_bytes: int | None
    """Highest memory of the process (CUDA: of the device) while it fine-tuned; None if it cannot be told."""
    threads: int
    """CPU threads of torch."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def is_name(text: str) -> bool:
    """Whether a text can be the name of data and held-out sets: one line of at most 200 visible characters."""
    return text.strip() != "" and text.isprintable() and len(text) <= _LONGEST_NAME


def is_study_name(text: str) -> bool:
    """Whether a text can be the name of a study, and of a folder: letters, digits and dashes."""
    return _STUDY.fullmatch(text) is not None


def rows_of(cell: Mapping[str, Any], *, study: str) -> list[Row]:
    """Return the rows of a cell's record.

    Args:
        cell: the record.
        study: name of the study that they are to be of.

    Raises:
        VerificationError: the record has no rows, or one is none of a study.
    """
    rows = cell.get("rows")
    place = f"The record of the cell {cell.get('label')!r:.200}"
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise VerificationError(f"{place} has no rows. Delete it, and run the study again.")
    return [_row({"study": study, **row}, place) for row in rows]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines; the file appears whole. Raises `ResourceError`."""
    write_text(path, "".join(json.dumps(row.to_dict(), allow_nan=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Read `results.jsonl`, or the one in a folder; what stands there is not trusted.

    Raises:
        VerificationError: there is none, it is larger than 64 MiB, or a line is no row that a study can have; the
            message names the line.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        lines = content.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise VerificationError(f"{file} cannot be read: {err}") from err
    if len(content) > MAX_BYTES:
        raise VerificationError(f"{file} has more than {MAX_BYTES:,} bytes. Is it the right file?")
    places = ((f"{file}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    return [_row(parse_json(line, source=place), place) for place, line in places]


def _row(values: Mapping[str, Any], place: str) -> Row:
    names = {field.name for field in fields(Row)}
    if values.keys() != names:
        found = sorted(values.keys() ^ names)
        raise VerificationError(f"{place} is no row of a study; these keys are missing or unknown: {found!r:.200}.")
    for name, hint in get_type_hints(Row).items():
        if not _fits(values[name], hint) or not _is_possible(name, values[name]):
            raise VerificationError(f"{place} has {name} = {values[name]!r:.80}, which is no value of that key.")
    row = Row(**values)
    problem = next(_contradictions(row), None)
    if problem is not None:
        raise VerificationError(f"{place} contradicts itself: {problem}.")
    return row


def _fits(value: object, hint: Any) -> bool:  # noqa: ANN401 (a type)
    """Whether a value is of a key's type."""
    if hint is Kind:
        return value in KINDS
    kinds = {str: (str,), int: (int,), bool: (bool,), float: (int, float)}
    for kind, accepted in kinds.items():
        if hint in (kind, kind | None):
            is_bool = isinstance(value, bool)
            return (value is None and hint != kind) or (isinstance(value, accepted) and is_bool == (kind is bool))
    raise AssertionError(f"a row has no values of type {hint}")


def _is_possible(name: str, value: Any) -> bool:  # noqa: ANN401 (of the key's type)
    """Whether a value of the right type is one that a measurement can give."""
    if value is None:
        return True
    if name == "cell":
        return _CELL.fullmatch(value) is not None
    if name == "study":
        return is_study_name(value)
    if name in _CHOICES:
        return value in _CHOICES[name]
    if name in _RANGES:
        least, most = _RANGES[name]
        return bool(least <= value <= most)
    return not isinstance(value, str) or is_name(value) or (value == "" and name in ("data", "importance", "pattern"))


def _contradictions(row: Row) -> Iterator[str]:
    """Yield what a row says that cannot be so at once."""
    is_loram, is_base = row.kind == "loram", row.kind == "base"
    structured, sparse = row.method in ("rand", "stru"), row.method in ("semi", "unst")
    if is_loram != bool(row.method):
        yield f"kind {row.kind!r} with method {row.method!r}"
    if not is_loram and row.model in (PRUNED, ADAPTED):
        yield f"kind {row.kind!r} with model {row.model!r}"
    if is_base and (row.model != BASE or row.data):
        yield f"an untouched base with model {row.model!r} and data {row.data!r}"
    if not is_base and not row.data:
        yield f"kind {row.kind!r} without data"
    if (row.ratio is not None) != (structured or row.method == "unst"):
        yield f"method {row.method!r} with ratio {row.ratio}"
    if bool(row.importance) != structured or bool(row.pattern) != (row.method == "semi"):
        yield f"method {row.method!r} with importance {row.importance!r} and pattern {row.pattern!r}"
    if row.masked and not sparse:
        yield f"method {row.method!r} with a masked update"
