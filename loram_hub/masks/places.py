"""Which matrices of a model masks belong to, and what masks of them take."""

from __future__ import annotations

from loram_hub.architecture import LAYER_PREFIX
from loram_hub.masks.codes import row_bytes
from loram_hub.masks.patterns import UNSTRUCTURED, Pattern
from loram_hub.plan import Plan


def projection_shapes(plan: Plan) -> dict[str, tuple[int, int]]:
    """Name and planned shape (out_features, in_features) of every projection of the layers.

    That is what masks remove single weights from, and what NF4 packs.
    """
    names = {weight.name for weight in plan.architecture.projections}
    return {
        name: (shape[0], shape[1])
        for name, shape in plan.tensor_shapes().items()
        if name.startswith(LAYER_PREFIX) and name.split(".", 3)[-1] in names
    }


def mask_bytes(rows: int, columns: int, pattern: Pattern = UNSTRUCTURED) -> int:
    """Bytes of the mask of a matrix, every row of whole bytes.

    Args:
        rows: out_features, or those of a shard.
        columns: in_features.
        pattern: as it is coded on disk; unstructured is a bit per weight, as every mask is in memory.

    Raises:
        InvalidRequestError: the columns do not divide into groups of the pattern.
    """
    return rows * row_bytes(columns, pattern)
