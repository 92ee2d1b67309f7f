"""The three methods, for the matrices of a decoder layer.

    sparsegpt   see `sparsegpt`
    wanda       score |w_ij| |x_j| (arXiv 2306.11695); the lowest of every row go, or of every group
    magnitude   score |w_ij|; the lowest of the whole matrix go, or of every group

Wanda and magnitude leave the kept weights as they are.

Shapes in this file: O out_features, I in_features.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from loram_hub.errors import VerificationError
from loram_hub.masks import Pattern
from loram_hub.sparsification.counts import removed_of
from loram_hub.sparsification.selection import keep_in_groups, keep_in_rows, keep_of_all
from loram_hub.sparsification.settings import SparsitySettings
from loram_hub.sparsification.sparsegpt import DAMPENING_STEPS, inverse_factor, prune_updating
from loram_hub.sparsification.statistics import Hessian, Statistic

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class SparseMatrix:
    """A pruned matrix."""

    weight_OI: torch.Tensor
    """With zeros where it was pruned."""
    mask_OI: torch.Tensor
    """What is kept, bool. A kept weight may be 0 as well."""
    dampening: float | None = None
    """Of SparseGPT: what was added in the end; None if no update was made."""


def prune_matrices(
    weights: Mapping[str, torch.Tensor], inputs: Statistic | None, settings: SparsitySettings
) -> Iterator[tuple[str, SparseMatrix]]:
    """Prune matrices that are given the same inputs.

    Args:
        weights: by full name, (O, I) fp32.
        inputs: what the method needs to know of them; a Hessian is used up. None for magnitude.
        settings: method, and how much of which pattern.

    Yields:
        Name and result, each weight in fp32.

    Raises:
        VerificationError: an activation or a weight is not finite.
    """
    for name, weight_OI in weights.items():
        if not bool(weight_OI.isfinite().all()):
            raise VerificationError(f"{name} has weights that are not finite. Is the base sound?")
    if isinstance(inputs, Hessian):
        yield from _sparsegpt(weights, inputs, settings)
        return
    for name, weight_OI in weights.items():
        scores_OI = weight_OI.abs()
        if inputs is not None:
            if not bool(inputs.squares_I.isfinite().all()):
                raise VerificationError(f"Activations at {name} are not finite. Is the base sound?")
            scores_OI.mul_(inputs.squares_I.sqrt())
        yield name, _masked(weight_OI, _chosen(scores_OI, settings, by_row=inputs is not None))


def _sparsegpt(
    weights: Mapping[str, torch.Tensor], hessian: Hessian, settings: SparsitySettings
) -> Iterator[tuple[str, SparseMatrix]]:
    factor = inverse_factor(hessian.matrix_II, settings.dampening, name=next(iter(weights)))
    for name, weight_OI in weights.items():
        if factor is None:
            logger.warning(
                "The inputs of %s cannot be decomposed, not even with a dampening of %g: it is pruned by magnitude, "
                "and its kept weights stay as they are. More calibration, or a larger dampening, may mend that.",
                name,
                settings.dampening * DAMPENING_STEPS[-1],
            )
            yield name, _masked(weight_OI, _chosen(weight_OI.abs(), settings, by_row=False))
            continue
        if factor.dampening > settings.dampening:
            logger.warning("%s is pruned with a dampening of %g: less was not enough", name, factor.dampening)
        yield name, SparseMatrix(*prune_updating(weight_OI, factor, settings), factor.dampening)


def _chosen(scores_OI: torch.Tensor, settings: SparsitySettings, *, by_row: bool) -> torch.Tensor:
    pattern: Pattern = settings.mask_pattern
    if not pattern.is_unstructured:
        return keep_in_groups(scores_OI, pattern)
    if by_row:
        return keep_in_rows(scores_OI, settings.removed_share)
    return keep_of_all(scores_OI, removed_of(scores_OI.numel(), settings.removed_share))


def _masked(weight_OI: torch.Tensor, mask_OI: torch.Tensor) -> SparseMatrix:
    return SparseMatrix(weight_OI.masked_fill(~mask_OI, 0), mask_OI)
