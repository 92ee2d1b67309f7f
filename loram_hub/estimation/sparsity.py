"""What removing single weights does to a model's size: parameters, and bytes as they are stored and as they could be.

A sparse release (LoRAM-Semi, LoRAM-Unst) keeps every shape: a removed weight is a zero that takes as much room as any
other number, on the disk and on the GPU, and a mask comes on top. So there are two counts that must not be mistaken for
each other: the parameters that are left, by which the paper names these variants, and the bytes.

The paper's table 4 (arXiv 2502.13533) for LLaMA-2-13B: 50 % of the projections leave 6,671,979,520 parameters, 1.95
times fewer, as its tables 1 to 3 say; the 6,738,415,616 that table 4 prints for LoRAM-Semi is the size of LLaMA-2-7B.
At 55 % they leave 6,037,591,040; for LoRAM-Unst it prints 37,872 more; which weights were
counted there is not said.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from loram_hub.architecture import Architecture
from loram_hub.errors import InvalidRequestError, PlanMismatchError
from loram_hub.masks import Pattern, mask_bytes, projection_shapes
from loram_hub.plan import PAPER_REDUCTION_OF_NF4, Plan, parameter_counts

_BF16 = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseCounts:
    """What removing single weights does to a model's size; the JSON of `loram plan` with a sparsity or a pattern.

    Fields that `ParameterCounts` has too mean the same here.
    """

    pattern: str
    """`unstructured`, or `n:m`: n of every m consecutive weights of a row are kept."""
    sparsity: float
    """Share of the projections' weights that is removed."""
    original_parameters: int
    """Parameters of the base model, tied embeddings counted once."""
    pruned_parameters: int
    """Parameters that are left: kept weights of the projections, and everything else."""
    reduction: float
    """original / pruned."""
    paper_reduction: float
    """The paper's figure for QLoRAM: reduction x 4."""
    prunable_weights: int
    """Weights of all projections of all layers."""
    kept_weights: int
    """Those of them that are kept."""
    bf16_bytes: int
    """Bytes of the weights as a release stores them in bf16, zeros included: the base's own."""
    nf4_bytes: int
    """The same with projections in NF4, see `ParameterCounts.nf4_bytes`."""
    mask_bytes: int
    """Bytes of the masks, which come on top; the file's header is not counted."""
    packed_bf16_bytes: int
    """Bytes that masks and kept weights alone would take in bf16. No release does that: transformers reads matrices."""
    packed_nf4_bytes: int
    """The same with the kept weights of projections in NF4, in the blocks and with the scales of the whole matrix."""

    @property
    def mask_bits(self) -> float:
        """Bits of mask per weight of a projection."""
        return 8 * self.mask_bytes / self.prunable_weights

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "mask_bits": self.mask_bits}


def planned_sparse_counts(
    architecture: Architecture, pattern: Pattern, sparsity: float | None = None, *, by_row: bool = False
) -> SparseCounts:
    """Count what a sparsity or an n:m pattern would leave of a model, from its config alone.

    Args:
        architecture: the base model's.
        pattern: `n:m`, or unstructured.
        sparsity: share of each projection's weights to remove, in (0, 1), for an unstructured pattern; n:m says it
            itself.
        by_row: whether the share is rounded in every row, as Wanda does, and not in every matrix, as SparseGPT and
            magnitude pruning do.

    Raises:
        InvalidRequestError: the sparsity is missing, out of range or given beside n:m, removes all weights of a
            projection or none, or the groups of n:m do not divide the inputs of one.
    """
    if (sparsity is None) == pattern.is_unstructured:
        raise InvalidRequestError(
            "Either a sparsity (the share to remove, as in 0.55) or a pattern n:m (n of every m are kept, as in 4:8) "
            f"is needed; found sparsity {sparsity} and pattern {pattern}."
        )
    if sparsity is not None and not 0 < sparsity < 1:  # also refuses NaN
        raise InvalidRequestError(f"sparsity is {sparsity}; it is the share removed and must lie in (0, 1): 0.55, say.")
    kept_weights = 0
    for name, (rows, columns) in _matrices(architecture).items():
        pattern.check_columns(columns, name=name)
        kept = kept_of((rows, columns), pattern, sparsity, by_row=by_row)
        if not 0 < kept < rows * columns:
            raise InvalidRequestError(
                f"sparsity {sparsity} keeps {kept:,} of the {rows * columns:,} weights of {name}. Choose one that "
                "removes some, and leaves some."
            )
        kept_weights += kept
    return sparse_counts(architecture, pattern, kept_weights=kept_weights)


def kept_of(shape: tuple[int, int], pattern: Pattern, sparsity: float | None, *, by_row: bool = False) -> int:
    """Return how many weights of a matrix are kept.

    Args:
        shape: (out_features, in_features).
        pattern: `n:m`, which divides the columns, or unstructured.
        sparsity: share to remove; only of an unstructured pattern.
        by_row: see `planned_sparse_counts`.
    """
    rows, columns = shape
    if sparsity is None:
        kept, of = pattern.group
        return rows * columns // of * kept
    if by_row:
        return rows * (columns - removed_of(columns, sparsity))
    return rows * columns - removed_of(rows * columns, sparsity)


def removed_of(weights: int, sparsity: float) -> int:
    """Return how many of a number of weights go: the largest whole number not above their share.

    The share counts as the decimal fraction that it is written as: 0.29 of 100 are 29, though the float is below that.
    """
    return math.floor(weights * Fraction(str(sparsity)))


def sparse_counts(architecture: Architecture, pattern: Pattern, *, kept_weights: int) -> SparseCounts:
    """Count parameters and bytes of a sparse model by what its masks keep.

    Args:
        architecture: the base model's.
        pattern: of the masks.
        kept_weights: of all projections.

    Raises:
        PlanMismatchError: there are not as many weights.
    """
    whole = parameter_counts(architecture, [architecture.whole_layer] * architecture.num_hidden_layers)
    shapes = _matrices(architecture).values()
    prunable = sum(map(math.prod, shapes))
    if not 0 < kept_weights <= prunable:
        raise PlanMismatchError(f"{kept_weights:,} kept weights are claimed; the projections have {prunable:,} in all.")
    pruned = whole.original_parameters - prunable + kept_weights
    masks = sum(mask_bytes(rows, columns, pattern) for rows, columns in shapes)
    rest = _BF16 * (whole.original_parameters - prunable)
    return SparseCounts(
        pattern=str(pattern),
        sparsity=1 - kept_weights / prunable,
        original_parameters=whole.original_parameters,
        pruned_parameters=pruned,
        reduction=whole.original_parameters / pruned,
        paper_reduction=PAPER_REDUCTION_OF_NF4 * whole.original_parameters / pruned,
        prunable_weights=prunable,
        kept_weights=kept_weights,
        bf16_bytes=whole.bf16_bytes,
        nf4_bytes=whole.nf4_bytes,
        mask_bytes=masks,
        packed_bf16_bytes=rest + masks + _BF16 * kept_weights,
        packed_nf4_bytes=masks + whole.nf4_bytes - (prunable - kept_weights) // 2,
    )


def mask_memory(architecture: Architecture) -> int:
    """Bytes of masks in memory while LoRA on every projection is trained masked: a bit per weight, whatever is stored.

    Args:
        architecture: the base model's.
    """
    return sum(mask_bytes(rows, columns) for rows, columns in _matrices(architecture).values())


def _matrices(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Shape of every projection of every layer, none smaller than the base's."""
    return projection_shapes(Plan(architecture, {}))
