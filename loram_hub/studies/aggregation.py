"""Rows of a study by setting: means over seeds, differences paired by seed, shares of plain LoRA's gain.

A setting is all that decides a cell but its seed. A share is, seed by seed,

    (base - recovered) / (base - plain),

with the held-out losses of the untouched base, of the base with this setting's recovered adapter, and of the base with
an adapter that plain LoRA trained on it, on the same data with the same seed. What was not measured is not there:
nothing here puts a number in its place. The order of the rows does not matter.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from loram_hub.errors import IncompatibleError, InvalidRequestError
from loram_hub.studies.records import ADAPTED as ADAPTED
from loram_hub.studies.records import BASE as BASE
from loram_hub.studies.records import KINDS, METHODS, Row
from loram_hub.studies.records import PRUNED as PRUNED
from loram_hub.studies.records import RECOVERED as RECOVERED

Measure = Literal["parameters", "alignment_tokens", "making_seconds", "tuning_seconds", "peak_memory_bytes"]
"""What a cell has once, whichever model and held-out set a row is of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A cell but for its seed; what a field means stands at `Row`."""

    kind: str
    method: str = ""
    ratio: float | None = None
    importance: str = ""
    pattern: str = ""
    alignment_steps: int = 0
    quantization: str = ""
    masked: bool = False
    data: str = ""
    """Empty for the untouched base, which no data have changed."""

    @property
    def order(self) -> tuple[object, ...]:
        """The place among settings: controls first, then as tables list them."""
        place = (KINDS.index(self.kind), self.data, METHODS.index(self.method), self.importance, self.pattern)
        return (*place, self.ratio or 0.0, self.quantization, self.masked, self.alignment_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Numbers of several seeds."""

    values: tuple[tuple[int, float], ...]
    """(seed, number) pairs in the order of the seeds, never empty."""

    @property
    def n(self) -> int:
        """How many seeds there are."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(value for _, value in self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation; None for one seed, which has none."""
        return statistics.stdev([value for _, value in self.values]) if self.n > 1 else None

    def scaled(self, scale: float) -> Spread:
        """Return the spread of the numbers in another unit."""
        return Spread(values=tuple((seed, value * scale) for seed, value in self.values))


def spread(values: Mapping[int, float]) -> Spread | None:
    """Return the spread of numbers by seed; None if there are none."""
    return Spread(values=tuple(sorted(values.items()))) if values else None


def differences(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """Return first - second by seed, where both have it."""
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


@dataclass(frozen=True, kw_only=True)
class Results:
    """The rows of one study, to be asked by setting; made by `gather`."""

    rows: Mapping[tuple[Setting, int, str, str], Row]
    """By setting, seed, held-out set and model."""
    planned: tuple[tuple[Setting, int], ...]
    """Every cell (setting, seed) that the study is to have, those that have rows among them."""
    in_domain: Mapping[str, str | None]
    """By held-out set, in the order of tables, the training set that it is in domain for; None for none."""

    @property
    def study(self) -> str:
        """Name of the study."""
        return next(iter(self.rows.values())).study

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of all cells but the untouched base."""
        return tuple(sorted({seed for setting, seed in self.planned if setting.kind != "base"}))

    @property
    def held_out(self) -> tuple[str, ...]:
        """Names of the held-out sets, in the order of tables."""
        return tuple(self.in_domain)

    @cached_property
    def data(self) -> tuple[str, ...]:
        """Names of the training sets."""
        return tuple(sorted({setting.data for setting, _ in self.planned if setting.kind != "base"}))

    def settings(self, *kinds: str) -> tuple[Setting, ...]:
        """Return the settings of these kinds, by default of all, in the order of tables."""
        return tuple(setting for setting in self._seeds_by_setting if not kinds or setting.kind in kinds)

    def losses(self, setting: Setting, model: str, held_out: str) -> dict[int, float]:
        """Return a model's held-out losses by seed, in nats per token."""
        return {
            seed: row.loss
            for seed in self._seeds_by_setting.get(setting, ())
            if (row := self.rows.get((setting, seed, held_out, model))) is not None
        }

    def base_losses(self, held_out: str) -> dict[int, float]:
        """Return the loss of the untouched base for every seed: it has no seed, and is the same for all."""
        measured = [row.loss for (_, _, name, model), row in self.rows.items() if (name, model) == (held_out, BASE)]
        return dict.fromkeys(self.seeds or (0,), measured[0]) if measured else {}

    def plain_losses(self, data: str, held_out: str) -> dict[int, float]:
        """Return, by seed, the losses of the base with an adapter that plain LoRA trained on it.

        Where the study has plain LoRA on the base both as it is and quantized, it is the one on the base as it is.
        """
        of_data = [setting for setting in self.settings("plain") if setting.data == data]
        return self.losses(of_data[0], RECOVERED, held_out) if of_data else {}

    def gains(self, setting: Setting, held_out: str) -> dict[int, float]:
        """Return, by seed, by how much the recovered adapter lowers the base's loss."""
        return differences(self.base_losses(held_out), self.losses(setting, RECOVERED, held_out))

    def plain_gains(self, data: str, held_out: str) -> dict[int, float]:
        """Return, by seed, by how much plain LoRA lowers the base's loss; where it does not, there is no share."""
        return differences(self.base_losses(held_out), self.plain_losses(data, held_out))

    def shares(self, setting: Setting, held_out: str) -> dict[int, float]:
        """Return, by seed, the share of plain LoRA's gain that is kept; not where plain LoRA gains nothing."""
        gains, plain = self.gains(setting, held_out), self.plain_gains(setting.data, held_out)
        return {seed: gains[seed] / plain[seed] for seed in sorted(gains.keys() & plain.keys()) if plain[seed] > 0}

    def measures(self, setting: Setting, measure: Measure) -> dict[int, float]:
        """Return, by seed, what was measured once for a cell."""
        rows = {seed: row for seed, row in self._cells.get(setting, {}).items() if getattr(row, measure) is not None}
        return {seed: getattr(row, measure) for seed, row in rows.items()}

    def reductions(self, setting: Setting) -> dict[int, float]:
        """Return, by seed, how many times fewer parameters the trained model has than the base."""
        bases = [self.measures(one, "parameters") for one in self.settings("base", "plain")]
        base = next((value for values in bases for value in values.values()), None)
        own = self.measures(setting, "parameters")
        return {} if base is None else {seed: base / value for seed, value in own.items()}

    def missing(self, settings: Iterable[Setting], held_out: str | None = None) -> list[tuple[Setting, int]]:
        """Return the planned cells of these settings that have no rows (of a held-out set)."""
        there = {(setting, seed) for setting, seed, name, _ in self.rows if held_out in (None, name)}
        wanted = set(settings)
        return [cell for cell in self.planned if cell[0] in wanted and cell not in there]

    @cached_property
    def _seeds_by_setting(self) -> dict[Setting, list[int]]:
        """The planned seeds of each setting, both in order."""
        found: dict[Setting, list[int]] = {}
        for setting, seed in self.planned:
            found.setdefault(setting, []).append(seed)
        return found

    @cached_property
    def _cells(self) -> dict[Setting, dict[int, Row]]:
        """A row of each cell, for what a cell has once."""
        found: dict[Setting, dict[int, Row]] = {}
        for (setting, seed, _, _), row in self.rows.items():
            found.setdefault(setting, {}).setdefault(seed, row)
        return found


def gather(
    rows: Iterable[Row],
    *,
    planned: Sequence[tuple[Setting, int]] | None = None,
    held_out: Sequence[str] = (),
) -> Results:
    """Gather the rows of a study, in any order.

    Args:
        rows: what was measured.
        planned: every cell that the study is to have. By default each setting that has a row, with each seed that any
            setting has.
        held_out: names of held-out sets in the order in which tables are to come; others follow, in domain first.

    Returns:
        The results, which tables, figures and claims are made of.

    Raises:
        InvalidRequestError: there are no rows.
        IncompatibleError: the rows are of several studies, one is there twice, a seed of a setting has two cells, or a
            held-out set is not the same for all: its tokens, or the training set that it is in domain for.
    """
    found: dict[tuple[Setting, int, str, str], Row] = {}
    names: dict[tuple[Setting, int], str] = {}
    for row in sorted(rows, key=lambda row: (setting_of(row).order, row.seed, row.held_out, row.model)):
        key = (setting_of(row), row.seed, row.held_out, row.model)
        cell = names.setdefault(key[:2], row.cell)
        if key in found or cell != row.cell:
            raise IncompatibleError(
                f"Seed {row.seed} of {row.kind} {row.method} has {row.model!r} on {row.held_out!r} twice, or cells "
                f"{cell} and {row.cell}. Take the rows of one study, each cell once."
            )
        found[key] = row
    if not found:
        raise InvalidRequestError("The study has no rows yet. Run it first.")
    _check_one_study(list(found.values()))
    cells = {(setting, seed) for setting, seed, _, _ in found}
    cells |= set(_every_seed(cells) if planned is None else planned)
    return Results(
        rows=found,
        planned=tuple(sorted(cells, key=lambda cell: (cell[0].order, cell[1]))),
        in_domain=_domains(found.values(), held_out),
    )


def setting_of(row: Row) -> Setting:
    """Return what decides a row's cell, but for the seed."""
    return Setting(
        kind=row.kind,
        method=row.method,
        ratio=row.ratio,
        importance=row.importance,
        pattern=row.pattern,
        alignment_steps=row.alignment_steps,
        quantization=row.quantization,
        masked=row.masked,
        data="" if row.kind == "base" else row.data,
    )


def _every_seed(cells: set[tuple[Setting, int]]) -> Iterator[tuple[Setting, int]]:
    seeds = {seed for setting, seed in cells if setting.kind != "base"}
    yield from ((setting, seed) for setting, _ in cells if setting.kind != "base" for seed in seeds)


def _domains(rows: Iterable[Row], order: Sequence[str]) -> dict[str, str | None]:
    """Return, by held-out set, the training set that it is in domain for; the untouched base's rows do not say."""
    found: dict[str, str | None] = {}
    said: dict[tuple[str, str], Row] = {}
    for row in rows:
        found.setdefault(row.held_out, None)
        if row.kind == "base":
            continue
        first = said.setdefault((row.held_out, row.data), row)
        if first.in_domain != row.in_domain or (row.in_domain and found[row.held_out] not in (None, row.data)):
            raise IncompatibleError(
                f"Cells do not agree on the training set that {row.held_out!r} is in domain for: {row.cell} is one of "
                "them. Take rows that were measured with one `of` for each held-out set."
            )
        if row.in_domain:
            found[row.held_out] = row.data
    others = sorted(found.keys() - set(order), key=lambda name: (found[name] is None, name))
    return {name: found[name] for name in (*order, *others) if name in found}


def _check_one_study(rows: Sequence[Row]) -> None:
    studies = sorted({row.study for row in rows})
    if len(studies) > 1:
        raise IncompatibleError(f"The rows are of the studies {', '.join(studies)}. Take the rows of one.")
    tokens: dict[str, int] = {}
    for row in rows:
        if tokens.setdefault(row.held_out, row.tokens) != row.tokens:
            raise IncompatibleError(
                f"The held-out set {row.held_out!r} has {tokens[row.held_out]:,} tokens in one cell and {row.tokens:,} "
                f"in {row.cell}. Losses on different tokens cannot be compared; run one of them again."
            )
