"""The estimate read backward: up to which sequence, batch or rank everything fits, and from which pruning ratio on.

What a step holds grows with each of the first three and falls with the ratio, so halving an interval finds the border,
but for the moments of 8-bit optimizers: those of a small factor stay in fp32, and those of a large one leave the GPU
where they are paged (see `standing`). A factor that grows past such a number of elements takes less than before, so
that rank 13 may fit while 10 to 12 do not. The answer is the border up to which everything fits: 9. Between the ranks
and ratios at which a factor passes such a number the rule holds again: each stretch between two is halved for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from loram_hub.architecture import Architecture, LayerSizes
from loram_hub.errors import InvalidRequestError
from loram_hub.estimation.settings import TrainingShape, chosen_targets
from loram_hub.estimation.standing import factor_counts, moment_borders
from loram_hub.estimation.training import training_memory
from loram_hub.plan import PruningSettings, planned_sizes

Setting = Literal["sequence_length", "micro_batch", "rank"]

LONGEST = {"sequence_length": 2**20, "micro_batch": 2**16, "rank": 2**16}
"""Where the search ends."""
RATIO_STEPS = 1000
"""Pruning ratios are tried in thousandths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Largest:
    """The value of each setting up to which every one fits while the others stay; None where 1 does not fit."""

    sequence_length: int | None
    """Tokens."""
    micro_batch: int | None
    """Sequences."""
    rank: int | None
    """Of LoRA."""


def largest_settings(
    architecture: Architecture,
    layers: Sequence[LayerSizes],
    shape: TrainingShape,
    budget: int,
    *,
    quantized: bool = True,
) -> Largest:
    """Find the sequence, micro-batch and rank up to which everything fits, each alone.

    Args:
        architecture: the base model's.
        layers: sizes of each layer.
        shape: the other settings.
        budget: bytes of the GPU.
        quantized: whether the projections are NF4.
    """

    def largest(setting: Setting) -> int | None:
        return largest_that_fits(
            lambda value: (
                training_memory(architecture, layers, _with(shape, setting, value), quantized=quantized).total <= budget
            ),
            limit=LONGEST[setting],
            borders=ranks if setting == "rank" else (),
        )

    sides = factor_counts(architecture, layers, 1, chosen_targets(architecture, shape.targets))
    ranks = {-(-border // side) for side in sides for border in moment_borders(shape.optimizer)}
    return Largest(sequence_length=largest("sequence_length"), micro_batch=largest("micro_batch"), rank=largest("rank"))


def _with(shape: TrainingShape, setting: Setting, value: int) -> TrainingShape:
    if setting == "sequence_length":
        return replace(shape, sequence_length=value)
    return replace(shape, micro_batch=value) if setting == "micro_batch" else replace(shape, rank=value)


def largest_that_fits(fits: Callable[[int], bool], *, limit: int, borders: Iterable[int] = ()) -> int | None:
    """Return the whole number from 1 to `limit` up to which every one fits; None if 1 does not.

    Args:
        fits: whether a number does. Of two numbers that no border parts, the smaller fits if the larger does.
        limit: largest number that is tried.
        borders: numbers that may fit though the one before does not.
    """
    low = 0
    for end in sorted({*(border - 1 for border in borders if 1 < border <= limit), limit}):
        low = _last_of_stretch(fits, low, end)
        if low < end:
            break
    return low or None


def _last_of_stretch(fits: Callable[[int], bool], low: int, end: int) -> int:
    """Return the last number up to `end` that fits, or `low`; above it none fits after one that does not."""
    if fits(end):
        return end
    while end - low > 1:
        middle = (low + end) // 2
        low, end = (middle, end) if fits(middle) else (low, middle)
    return low


def smallest_ratio(
    architecture: Architecture,
    shape: TrainingShape,
    budget: int,
    *,
    keep_first: int = 4,
    keep_last: int = 2,
    round_to: int | None = None,
    quantized: bool = True,
) -> float | None:
    """Find the pruning ratio, in thousandths, from which on every release can be trained in a budget.

    Args:
        architecture: of the base model.
        shape: how it will be trained.
        budget: bytes of the GPU.
        keep_first: layers at the start that stay whole.
        keep_last: layers at the end that stay whole.
        round_to: round kept MLP channels up to a multiple.
        quantized: whether the release will be NF4.

    Returns:
        The ratio, in [0, 1); 0 is the model as it is. None if even the largest that leaves something of a layer does
        not fit; where no layer is left to prune, 0 is the largest.
    """

    def sizes(thousandths: int) -> tuple[LayerSizes, ...] | None:
        if not thousandths:
            return (architecture.whole_layer,) * architecture.num_hidden_layers
        ratio = thousandths / RATIO_STEPS
        try:
            return planned_sizes(
                architecture,
                PruningSettings(pruning_ratio=ratio, keep_first=keep_first, keep_last=keep_last, round_to=round_to),
            )
        except InvalidRequestError:  # nothing would be left of a layer
            return None

    most = largest_that_fits(lambda thousandths: sizes(thousandths) is not None, limit=RATIO_STEPS - 1) or 0
    planned = [layers for thousandths in range(most, -1, -1) if (layers := sizes(thousandths)) is not None]
    found = largest_that_fits(
        lambda count: training_memory(architecture, planned[count - 1], shape, quantized=quantized).total <= budget,
        limit=len(planned),
        borders=_borders(architecture, planned, shape),
    )
    return None if found is None else (most + 1 - found) / RATIO_STEPS


def _borders(architecture: Architecture, planned: Sequence[Sequence[LayerSizes]], shape: TrainingShape) -> list[int]:
    """Return the places of plans, from 1, in which more factors have passed a border of their moments than before."""
    targets, borders = chosen_targets(architecture, shape.targets), moment_borders(shape.optimizer)
    passed = []
    for layers in planned if borders else ():
        counts = factor_counts(architecture, layers, shape.rank, targets)
        passed.append([sum(count for each, count in counts.items() if each >= border) for border in borders])
    return [place for place, (before, here) in enumerate(pairwise(passed), start=2) if here != before]
