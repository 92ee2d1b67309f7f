"""How many weights each method keeps of a matrix, and so of a model: exactly, before anything is computed."""

from __future__ import annotations

from loram_hub import estimation, masks
from loram_hub.architecture import Architecture
from loram_hub.estimation import SparseCounts, planned_sparse_counts
from loram_hub.estimation import removed_of as removed_of
from loram_hub.plan import Plan
from loram_hub.sparsification.settings import SparsitySettings


def kept_of(shape: tuple[int, int], settings: SparsitySettings) -> int:
    """Return how many weights of a matrix (out_features, in_features) are kept."""
    return estimation.kept_of(shape, settings.mask_pattern, settings.sparsity, by_row=_rounds_by_row(settings))


def asked_counts(architecture: Architecture, settings: SparsitySettings) -> SparseCounts:
    """Count what a model keeps under the settings.

    Raises:
        InvalidRequestError: a projection's inputs do not divide into groups of the pattern, or none of its weights
            would be removed, or none kept.
    """
    by_row = _rounds_by_row(settings)
    return planned_sparse_counts(architecture, settings.mask_pattern, settings.sparsity, by_row=by_row)


def projection_shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Shape (out_features, in_features) of every projection of every decoder layer, by full name."""
    return masks.projection_shapes(Plan(architecture, {}))


def _rounds_by_row(settings: SparsitySettings) -> bool:
    """Whether as many weights go from every row."""
    return settings.method == "wanda"
