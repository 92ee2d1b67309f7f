"""What was done to a release's weights after pruning, from its manifest's `alignment`, the last step first.

Each `alignment` describes one step, a refit or a training, the latter perhaps after a refit; `earlier` holds that of
the release it started from. What is read here may be a stranger's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Alignment = Mapping[str, object]
_NO_TRAINING = frozenset({"refit", "earlier"})


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """Refit and training of a release."""

    steps: tuple[Alignment, ...] = ()
    """The `alignment` of each step, the last first."""

    @property
    def training(self) -> Alignment | None:
        """The last training, None if there was none; a refit in closed form is no training."""
        return next((step for step in self.steps if set(step) - _NO_TRAINING), None)

    @property
    def refit(self) -> Alignment | None:
        """The last refit, None if there was none."""
        refits = (step.get("refit") for step in self.steps)
        return next((refit for refit in refits if isinstance(refit, Mapping)), None)

    @property
    def ends_with_refit(self) -> bool:
        """Whether the weights were refitted after their last training: losses of that training are not theirs."""
        return self.training is not None and self.training is not self.steps[0]

    @property
    def corpora(self) -> tuple[str, ...]:
        """Names of all data that were trained on, those of the last training first."""
        named = (step.get("corpora") for step in self.steps)
        lists = [corpora for corpora in named if isinstance(corpora, list | tuple)]
        return tuple(dict.fromkeys(name for names in lists for name in names if isinstance(name, str)))


def history_of(alignment: Alignment | None) -> History:
    """Read a manifest's `alignment`."""
    steps: list[Alignment] = []
    step: object = alignment
    while isinstance(step, Mapping):
        steps.append(step)
        step = step.get("earlier")
    return History(steps=tuple(steps))
