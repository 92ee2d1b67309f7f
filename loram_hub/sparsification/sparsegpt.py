"""SparseGPT of one matrix (arXiv 2301.00774, algorithm 1): which weights go, and what the others become.

The columns are pruned from first to last. What the removal of a weight does to the matrix's outputs on the calibration,
the columns after it make up for, as far as they can: with the inputs' Hessian H = 2/N sum x x^T and the upper triangle
U of H^-1 = U^T U,

    score   w_ij^2 / U_jj^2               of a weight, once the columns before it are done
    error   e_ij = w_ij / U_jj            of a weight that goes, 0 of one that stays
    update  W[:, j:] -= e_:j U[j, j:]

Columns go in blocks: an update reaches the block at once, what lies behind it when the block is done. Without a pattern
the weights of a block are chosen when it begins, over all its rows and columns, in the numbers that the whole matrix
owes up to there; with n:m those of a group, when it begins. The published code sorts the scores of a block of n
weights and removes those up to the one with the index int(n * sparsity), itself included: one weight more per block
than asked. With as many asked here as that removes, masks and weights are the same.

U comes from one Cholesky decomposition of H, its rows and columns in reverse: H = R R^T with R upper triangular, so
U = R^-1. The published code decomposes H, inverts it and decomposes the inverse, which takes twice the operations.

Shapes in this file: O out_features, I in_features, C columns of a block. Matrices are worked on transposed, (I, O): a
column of weights then lies together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loram_hub.errors import VerificationError
from loram_hub.sparsification.counts import removed_of
from loram_hub.sparsification.selection import keep_in_groups, keep_of_all
from loram_hub.sparsification.settings import SparsitySettings

DAMPENING_STEPS = (1, 10, 100)
"""What the dampening is multiplied with, one after another, until the Hessian can be decomposed."""
_SOLVED_COLUMNS = 512


@dataclass(frozen=True, eq=False, slots=True)
class InverseFactor:
    """The inverse of a damped Hessian, decomposed."""

    upper_II: torch.Tensor
    """U, upper triangular: H^-1 = U^T U."""
    dead_I: torch.Tensor
    """Inputs that were always 0, bool."""
    dampening: float
    """The share of the mean diagonal that was added in the end."""


def inverse_factor(hessian_II: torch.Tensor, dampening: float, *, name: str) -> InverseFactor | None:
    """Dampen, invert and decompose a Hessian.

    Args:
        hessian_II: symmetric; is changed.
        dampening: share of the mean diagonal that is added.
        name: of a matrix that it belongs to, for errors.

    Returns:
        The factor, or None if it cannot be had even with the largest dampening.

    Raises:
        VerificationError: an activation was not finite.
    """
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    diagonal_I[dead_I] = 1
    mean = float(diagonal_I.mean())
    if not (bool(hessian_II.isfinite().all()) and mean < float("inf")):
        raise VerificationError(f"Activations at {name} are not finite. Is the base sound?")
    added = 0.0
    for step in DAMPENING_STEPS:
        diagonal_I.add_((dampening * step - added) * mean)
        added = dampening * step
        lower_II, failed = torch.linalg.cholesky_ex(hessian_II.flip(0, 1))
        if int(failed) == 0:
            upper_II = _inverted_in_reverse(lower_II, out=torch.zeros_like(hessian_II))
            if bool(upper_II.isfinite().all()):
                return InverseFactor(upper_II, dead_I, added)
    return None


def _inverted_in_reverse(lower_II: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Invert a lower triangle, with rows and columns of the result in reverse: U. The zeros of both cost nothing."""
    size = len(lower_II)
    for start in range(0, size, _SOLVED_COLUMNS):
        stop = min(start + _SOLVED_COLUMNS, size)
        unit = torch.eye(size - start, stop - start, dtype=lower_II.dtype, device=lower_II.device)
        solved = torch.linalg.solve_triangular(lower_II[start:, start:], unit, upper=False)
        out[: size - start, size - stop : size - start] = solved.flip(0, 1)
    return out


def prune_updating(
    weight_OI: torch.Tensor, factor: InverseFactor, settings: SparsitySettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune a matrix by SparseGPT.

    Args:
        weight_OI: fp32; stays as it is.
        factor: of its inputs.
        settings: how much of which pattern, in which blocks.

    Returns:
        The matrix, fp32, with zeros where it was pruned, and what is kept, bool (O, I).
    """
    weight_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    weight_IO[factor.dead_I] = 0
    mask_IO = torch.ones_like(weight_IO, dtype=torch.bool)
    columns, rows = weight_IO.shape
    for start in range(0, columns, settings.block_columns):
        stop = min(start + settings.block_columns, columns)
        block_CO, mask_CO = weight_IO[start:stop], mask_IO[start:stop]
        upper_CC = factor.upper_II[start:stop, start:stop]
        if settings.mask_pattern.is_unstructured:
            share = settings.removed_share
            removed = removed_of(rows * stop, share) - removed_of(rows * start, share)
            mask_CO.copy_(keep_of_all(_scores(block_CO, upper_CC).T, removed).T)
        errors_CO = _prune_block_(block_CO, mask_CO, upper_CC, settings)
        weight_IO[stop:].addmm_(factor.upper_II[start:stop, stop:].T, errors_CO, alpha=-1)
    return weight_IO.T.contiguous(), mask_IO.T.contiguous()


def _prune_block_(
    block_CO: torch.Tensor, mask_CO: torch.Tensor, upper_CC: torch.Tensor, settings: SparsitySettings
) -> torch.Tensor:
    """Prune the columns of a block in place, one after another; returns their errors, (C, O)."""
    pattern, errors_CO = settings.mask_pattern, torch.empty_like(block_CO)
    for column in range(len(block_CO)):
        if pattern.of is not None and column % pattern.of == 0:
            group = slice(column, column + pattern.of)
            scores_MO = _scores(block_CO[group], upper_CC[group, group])
            mask_CO[group] = keep_in_groups(scores_MO.T, pattern).T
        weights_O, error_O = block_CO[column], errors_CO[column]
        torch.div(weights_O, upper_CC[column, column], out=error_O)
        error_O.masked_fill_(mask_CO[column], 0)
        weights_O.masked_fill_(~mask_CO[column], 0)
        block_CO[column + 1 :].addr_(upper_CC[column, column + 1 :], error_O, alpha=-1)
    return errors_CO


def _scores(weight_CO: torch.Tensor, upper_CC: torch.Tensor) -> torch.Tensor:
    """Square roots of the scores, whose order is the same."""
    return (weight_CO / upper_CC.diagonal().unsqueeze(1)).abs_()
