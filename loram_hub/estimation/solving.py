"""The estimate read backward: the largest sequence, batch or rank that fits, and the smallest pruning ratio.

What a step holds grows with each of the first three and falls with the ratio, so halving an interval finds the border.
An answer fits and the next one does not; where even the least does not fit there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loram_hub.architecture import Architecture, LayerSizes
from loram_hub.errors import InvalidRequestError
from loram_hub.estimation.settings import TrainingShape
from loram_hub.estimation.training import training_memory
from loram_hub.plan import PruningSettings, planned_sizes

Setting = Literal["sequence_length", "micro_batch", "rank"]

LONGEST = {"sequence_length": 2**20, "micro_batch": 2**16, "rank": 2**16}
"""Where the search ends."""
RATIO_STEPS = 1000
"""Pruning ratios are tried in thousandths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Largest:
    """The largest value of each setting that fits while the others stay; None where 1 does not fit."""

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
    """Find the largest sequence, micro-batch and rank, each alone.

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
        )

    return Largest(sequence_length=largest("sequence_length"), micro_batch=largest("micro_batch"), rank=largest("rank"))


def _with(shape: TrainingShape, setting: Setting, value: int) -> TrainingShape:
    if setting == "sequence_length":
        return replace(shape, sequence_length=value)
    return replace(shape, micro_batch=value) if setting == "micro_batch" else replace(shape, rank=value)


def largest_that_fits(fits: Callable[[int], bool], *, limit: int) -> int | None:
    """Return a whole number from 1 to `limit` that fits while the next one does not (or is beyond); None if 1 does not.

    Args:
        fits: whether a number does.
        limit: largest number that is tried.
    """
    if not fits(1):
        return None
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
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
    """Find the smallest pruning ratio, in thousandths, whose release can be trained in a budget.

    Args:
        architecture: of the base model.
        shape: how it will be trained.
        budget: bytes of the GPU.
        keep_first: layers at the start that stay whole.
        keep_last: layers at the end that stay whole.
        round_to: round kept MLP channels up to a multiple.
        quantized: whether the release will be NF4.

    Returns:
        The ratio, in [0, 1); None if no ratio that leaves something of a layer fits, or no layer is left to prune.
    """

    def sizes(thousandths: int) -> tuple[LayerSizes, ...] | None:
        ratio = thousandths / RATIO_STEPS
        try:
            return planned_sizes(
                architecture,
                PruningSettings(pruning_ratio=ratio, keep_first=keep_first, keep_last=keep_last, round_to=round_to),
            )
        except InvalidRequestError:  # nothing would be left of a layer
            return None

    def fits(layers: Sequence[LayerSizes]) -> bool:
        return training_memory(architecture, layers, shape, quantized=quantized).total <= budget

    if fits([architecture.whole_layer] * architecture.num_hidden_layers):
        return 0.0
    most = largest_that_fits(lambda thousandths: sizes(thousandths) is not None, limit=RATIO_STEPS - 1)
    smallest = None if most is None else sizes(most)
    if most is None or smallest is None or not fits(smallest):
        return None
    too_small = largest_that_fits(lambda thousandths: not fits(sizes(thousandths) or smallest), limit=most)
    return ((too_small or 0) + 1) / RATIO_STEPS
