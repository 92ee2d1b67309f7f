"""How many weights each method keeps of a matrix, and so of a model: exactly, before anything is computed."""

from __future__ import annotations

import math
from fractions import Fraction

from loram_hub.architecture import Architecture, layer_tensor
from loram_hub.errors import InvalidRequestError
from loram_hub.estimation import SparseCounts, sparse_counts
from loram_hub.sparsification.settings import SparsitySettings


def removed_of(weights: int, sparsity: float) -> int:
    """Return how many of a number of weights go: the largest whole number not above their share.

    The share counts as the decimal fraction that it is written as: 0.29 of 100 are 29, though the float is below that.
    """
    return math.floor(weights * Fraction(str(sparsity)))


def kept_of(shape: tuple[int, int], settings: SparsitySettings) -> int:
    """Return how many weights of a matrix (out_features, in_features) are kept."""
    rows, columns = shape
    if not settings.mask_pattern.is_unstructured:
        kept, of = settings.mask_pattern.group
        return rows * columns // of * kept
    if settings.method == "wanda":  # as many in every row
        return rows * (columns - removed_of(columns, settings.removed_share))
    return rows * columns - removed_of(rows * columns, settings.removed_share)


def asked_counts(architecture: Architecture, settings: SparsitySettings) -> SparseCounts:
    """Count what a model keeps under the settings.

    Raises:
        InvalidRequestError: a projection's inputs do not divide into groups of the pattern, or none of its weights
            would be removed, or none kept.
    """
    shapes = projection_shapes(architecture)
    for name, shape in shapes.items():
        settings.mask_pattern.check_columns(shape[1], name=name)
        kept = kept_of(shape, settings)
        if not 0 < kept < math.prod(shape):
            raise InvalidRequestError(
                f"sparsity {settings.sparsity} keeps {kept:,} of the {math.prod(shape):,} weights of {name}. Choose "
                "one that removes some, and leaves some."
            )
    return sparse_counts(
        architecture, settings.mask_pattern, kept_weights=sum(kept_of(shape, settings) for shape in shapes.values())
    )


def projection_shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Shape (out_features, in_features) of every projection of every decoder layer, by full name."""
    shapes = {}
    for layer in range(architecture.num_hidden_layers):
        for weight in architecture.projections:
            rows, columns = architecture.shape(weight, architecture.whole_layer)
            shapes[layer_tensor(layer, weight.name)] = (rows, columns)
    return shapes
