"""What stands in one place of a table: numbers with their spread, a text, or that nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loram_hub.studies.aggregation import (
    ADAPTED,
    BASE,
    PRUNED,
    RECOVERED,
    Measure,
    Results,
    Setting,
    Spread,
    differences,
    spread,
)
from loram_hub.studies.labels import count_text, label

_LARGEST_EXPONENT = 700.0
"""exp() of more is no float."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What stands in one place of a table."""

    value: Spread | str | None
    """Numbers by seed; a text, empty where nothing applies; None for what was not measured."""
    digits: int = 3
    """Decimal places of numbers."""
    signed: bool = False
    """Whether numbers above zero get a plus, as differences do."""
    bold: bool = False
    """Whether it is what the table is about."""
    seeds: int | None = None
    """Seeds of the row: numbers of fewer seeds say of how many. None: nothing to say."""

    @property
    def parts(self) -> tuple[str, str, str]:
        """Mean, deviation and number of seeds as texts, each empty where it is not shown; for numbers alone."""
        assert isinstance(self.value, Spread)
        deviation = self.value.deviation
        is_short = self.seeds is not None and self.value.n < self.seeds
        return (
            f"{self.value.mean:{'+' if self.signed else ''}.{self.digits}f}",
            "" if deviation is None else f"{deviation:.{self.digits}f}",
            f"{self.value.n} of {self.seeds}" if is_short else "",
        )


NOTHING = Entry(value="")
"""Where nothing applies."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A setting of a study, to be asked for the entries of its row."""

    results: Results
    setting: Setting
    held_out: str | None = None
    """The set that losses are of; None for all."""

    @property
    def seeds(self) -> int:
        """How many seeds were measured."""
        return len(
            {
                seed
                for setting, seed, name, _ in self.results.rows
                if setting == self.setting and self.held_out in (None, name)
            }
        )

    @property
    def is_base(self) -> bool:
        """Whether it is the untouched base."""
        return self.setting.kind == "base"

    @property
    def is_loram(self) -> bool:
        """Whether the adapter was trained on a pruned model."""
        return self.setting.kind == "loram"

    def name(self) -> Entry:
        """What the setting is called."""
        return Entry(value=label(self.results, self.setting))

    def seed_count(self) -> Entry:
        """The number of seeds; the untouched base has none."""
        return NOTHING if self.is_base else Entry(value=str(self.seeds))

    def parameters(self) -> Entry:
        """Parameters of the model that is trained on."""
        found = spread(self.results.measures(self.setting, "parameters"))
        return Entry(value=None if found is None else count_text(found.mean))

    def reduction(self) -> Entry:
        """How many times fewer parameters than the base has."""
        found = spread(self.results.reductions(self.setting))
        return Entry(value=None if found is None else f"{found.mean:.2f}")

    def alignment_tokens(self) -> Entry:
        """Tokens of alignment."""
        found = spread(self.results.measures(self.setting, "alignment_tokens"))
        if not self.is_loram:
            return NOTHING
        return Entry(value=None if found is None else f"{found.mean:,.0f}")

    def losses(self, model: str) -> dict[int, float]:
        """A model's losses by seed."""
        return self.results.losses(self.setting, model, self.held_out or "")

    def loss(self, model: str) -> Entry:
        """A pruned model's loss; controls have none."""
        return self._numbers(self.losses(model)) if self.is_loram else NOTHING

    def before(self) -> Entry:
        """The loss of the model that is trained on, before it is."""
        return NOTHING if self.is_base else self.loss(PRUNED) if self.is_loram else self._base()

    def adapted(self) -> Entry:
        """The loss of the pruned model with the adapter."""
        return self.loss(ADAPTED)

    def final(self) -> Entry:
        """The loss of what is served: the base with the recovered adapter, or the base as it is."""
        return self._numbers(self.losses(BASE if self.is_base else RECOVERED), bold=True)

    def perplexity(self) -> Entry:
        """exp(loss) of what is served."""
        losses = self.losses(BASE if self.is_base else RECOVERED)
        if any(loss > _LARGEST_EXPONENT for loss in losses.values()):
            return Entry(value="infinite")
        return self._numbers({seed: math.exp(loss) for seed, loss in losses.items()}, digits=2)

    def gain(self) -> Entry:
        """By how much the adapter lowers the base's loss."""
        gains = self.results.gains(self.setting, self.held_out or "")
        return NOTHING if self.is_base else self._numbers(gains, signed=True)

    def share(self) -> Entry:
        """The share of plain LoRA's gain."""
        if self.setting.kind in ("base", "plain"):
            return NOTHING
        held_out = self.held_out or ""
        shares = self.results.shares(self.setting, held_out)
        plain = self.results.plain_gains(self.setting.data, held_out)
        if any(gain <= 0 for gain in plain.values()):
            return Entry(value="no gain to share")
        return self._numbers(shares, digits=2)

    def difference(self, first: Mapping[int, float], second: Mapping[int, float]) -> Entry:
        """First - second, paired by seed."""
        return self._numbers(differences(first, second), signed=True)

    def measured(self, measure: Measure, *, scale: float = 1.0, digits: int = 0) -> Entry:
        """What a cell has once."""
        values = self.results.measures(self.setting, measure)
        return self._numbers({seed: value * scale for seed, value in values.items()}, digits=digits)

    def _base(self) -> Entry:
        losses = self.results.base_losses(self.held_out or "")
        return Entry(value=spread(dict([*losses.items()][:1])))  # one measurement, however many seeds there are

    def _numbers(
        self, values: Mapping[int, float], *, digits: int = 3, signed: bool = False, bold: bool = False
    ) -> Entry:
        return Entry(value=spread(values), digits=digits, signed=signed, bold=bold, seeds=self.seeds)
