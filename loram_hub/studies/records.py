"""What a study has measured: one row for each cell, model and held-out set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from loram_hub.errors import VerificationError

RESULTS = "results.jsonl"
CELLS = "cells"

Kind = Literal["base", "plain", "whole layers", "loram"]


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
    """Time that pruning, alignment and quantization took; None for controls."""
    tuning_seconds: float | None
    """Time that fine-tuning took, loading and saving included; None for the untouched base."""
    peak_memory_bytes: int | None
    """Highest memory of the process (CUDA: of the device) while it fine-tuned; None if it cannot be told."""
    threads: int
    """CPU threads of torch."""

    @property
    def setting(self) -> tuple[object, ...]:
        """Everything that tells cells apart, except for the seed."""
        return (
            self.kind, self.method, self.ratio, self.alignment_steps, self.quantization, self.masked, self.data,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def rows_of(cell: Mapping[str, Any], *, study: str) -> list[Row]:
    """Return the rows of a cell's record."""
    return [Row(study=study, **row) for row in cell["rows"]]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines; the file appears whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def read_rows(path: Path) -> list[Row]:
    """Read `results.jsonl`, or the one in a folder.

    Raises:
        VerificationError: there is none, or a line is no row.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise VerificationError(f"{file} cannot be read: {err}") from err
    return [_row(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _row(line: str, place: str) -> Row:
    try:
        values = json.loads(line)
    except ValueError as err:
        raise VerificationError(f"{place} is no JSON: {err}") from err
    names = {field.name for field in fields(Row)}
    if not isinstance(values, dict) or values.keys() != names:
        found = sorted(values.keys() ^ names) if isinstance(values, dict) else values
        raise VerificationError(f"{place} is no row of a study; these keys are missing or unknown: {found!r:.200}.")
    for name, hint in get_type_hints(Row).items():
        if not _fits(values[name], hint):
            raise VerificationError(f"{place} has {name} = {values[name]!r:.80}, which is no value of that key.")
    return Row(**values)


def _fits(value: object, hint: Any) -> bool:  # noqa: ANN401 (a type)
    if hint is Kind:
        return value in ("base", "plain", "whole layers", "loram")
    kinds = {str: (str,), int: (int,), bool: (bool,), float: (int, float)}
    for kind, accepted in kinds.items():
        if hint in (kind, kind | None):
            is_bool = isinstance(value, bool)
            return (value is None and hint != kind) or (isinstance(value, accepted) and is_bool == (kind is bool))
    raise AssertionError(f"a row has no values of type {hint}")
