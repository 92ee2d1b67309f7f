"""Which weights of a matrix go: those with the lowest scores, exactly as many as asked.

The published codes compare with a threshold (`<=`), which removes more where scores are equal, and SparseGPT's one more
even where they are not (see `sparsegpt`). Here equal scores are settled by the index: the weight that comes first, row
by row, is kept.

Shapes in this file: O out_features, I in_features.
"""

from __future__ import annotations

import torch

from loram_hub.masks import Pattern
from loram_hub.sparsification.counts import removed_of

_ROWS = 1024
"""Rows that are sorted at once: the order of a whole matrix would take 8 bytes a weight."""


def keep_of_all(scores_OI: torch.Tensor, removed: int) -> torch.Tensor:
    """Remove the weights with the lowest scores, wherever they lie.

    Args:
        scores_OI: finite; a transposed view is as good.
        removed: how many go.

    Returns:
        What is kept, bool (O, I).
    """
    if removed == 0:
        return torch.ones_like(scores_OI, dtype=torch.bool)
    threshold = scores_OI.reshape(-1).kthvalue(removed).values
    mask_OI = scores_OI > threshold
    tied_OI = scores_OI == threshold
    # Those at the threshold that stay: the first ones.
    staying = scores_OI.numel() - removed - int(mask_OI.sum())
    if staying:
        positions = tied_OI.nonzero()[:staying]
        mask_OI[positions[:, 0], positions[:, 1]] = True
    return mask_OI


def keep_in_rows(scores_OI: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Remove the same share of every row: its weights with the lowest scores."""
    columns = scores_OI.shape[1]
    return torch.cat([_keep_highest(rows, columns - removed_of(columns, sparsity)) for rows in scores_OI.split(_ROWS)])


def keep_in_groups(scores_OI: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Keep, of every m consecutive weights of a row, the n with the highest scores."""
    kept, of = pattern.group
    return torch.cat([_keep_highest(rows.unflatten(1, (-1, of)), kept).flatten(1) for rows in scores_OI.split(_ROWS)])


def _keep_highest(scores: torch.Tensor, kept: int) -> torch.Tensor:
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :kept]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
