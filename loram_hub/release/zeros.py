"""The zeros of a sparse release: its masks, and that its weights are zero where a mask says so.

A weight that is not zero at a pruned position would be a model other than the one described: masked training, which
multiplies by the mask, and plain training would differ, and so would what an aligned release claims to have kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loram_hub.checkpoint import CONFIG
from loram_hub.errors import PlanMismatchError, VerificationError
from loram_hub.manifest import MANIFEST, Manifest, Sparsification
from loram_hub.masks import WEIGHT_MASKS, MaskFile, parse_pattern, projection_shapes
from loram_hub.plan import Plan
from loram_hub.tensors import TensorInfo, item_bytes, read_rows

NF4_ZERO = 7
"""The code of 0.0 in NF4."""

_PIECE = 4 * 1024 * 1024  # weights that are looked at in one go
_ROUNDING = 0.001
"""How far the kept share may lie from the sparsity that was asked for, besides one weight for every row: methods round
once per row, block or matrix, and a threshold takes all weights that tie with it."""


def open_masks(folder: Path, plan: Plan, pruning: Sparsification) -> MaskFile:
    """Open the masks of a sparse release and check their header.

    Raises:
        CheckpointError: they are not there, as where only the metadata of a release was fetched.
        VerificationError: the header is damaged, or the pattern cannot be.
        PlanMismatchError: a mask is missing, has no place in the model, or has another shape.
    """
    return MaskFile(folder / WEIGHT_MASKS, projection_shapes(plan), parse_pattern(pruning.pattern))


def zeros_digest(manifest: Manifest) -> str:
    """Name what `check_zeros` checks, by the hashes of all bytes that it depends on.

    Those are weights and masks, which it reads, and the config, which says what shapes they have. Where the hashes were
    checked, an earlier check of the same content need not be repeated.
    """
    pruning = manifest.pruning
    assert isinstance(pruning, Sparsification)
    needed = {CONFIG, *(name for name in manifest.files if name.endswith(".safetensors"))}
    hashes = {name: entry.sha256 for name, entry in manifest.files.items() if name in needed}
    text = f"zeros 2;{pruning.pattern};{pruning.kept_weights};{sorted(hashes.items())}"
    return hashlib.sha256(text.encode()).hexdigest()


def check_zeros(folder: Path, masks: MaskFile, tensors: Mapping[str, TensorInfo], pruning: Sparsification) -> None:
    """Check weights against their masks, a few megabytes in memory.

    16-bit and 32-bit weights are +0 or -0 where they are pruned; NF4 has the code of 0.0 there. Kept weights may be
    anything, zero too.

    Args:
        folder: names the release in errors.
        masks: one for each projection.
        tensors: every tensor of the release, of checked types and shapes.
        pruning: what the manifest says.

    Raises:
        VerificationError: a weight is not zero where it should be, or the bits of a mask are none of its pattern.
        PlanMismatchError: the masks keep another number of weights than the manifest says.
    """
    kept_weights = 0
    for name in masks.names:
        rows, columns = masks.shape(name)
        step = max(1, _PIECE // columns)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            kept = masks.read_rows(name, first, last)
            kept_weights += int(np.count_nonzero(kept))
            revived = nonzero_rows(tensors[name], first, last, columns) > kept
            if revived.any():
                row, column = (int(index[0]) for index in np.nonzero(revived))
                raise VerificationError(
                    f"{name!r} of {folder} is not zero in row {first + row}, column {column}, which its mask in "
                    f"{WEIGHT_MASKS} removes. Weights and masks do not belong together: do not use it."
                )
    if kept_weights != pruning.kept_weights:
        raise PlanMismatchError(
            f"{folder / MANIFEST} claims {pruning.kept_weights:,} kept weights; {WEIGHT_MASKS} keeps {kept_weights:,}."
        )


def nonzero_rows(info: TensorInfo, first: int, last: int, columns: int) -> npt.NDArray[np.bool_]:
    """Return where rows of a projection are not zero.

    Args:
        info: its values, or its packed NF4 codes.
        first: first row.
        last: end of the rows.
        columns: in_features.

    Returns:
        bool (last - first, columns).
    """
    if info.dtype != "U8":
        return is_nonzero(read_rows(info, first, last).view(f"u{item_bytes(info.dtype)}"))
    start, stop = first * columns, last * columns
    nonzero = is_nonzero(read_rows(info, start // 2, -(-stop // 2)))  # a row may begin in the middle of a byte
    return nonzero[start % 2 :][: stop - start].reshape(-1, columns)


def is_nonzero(stored: npt.NDArray[np.unsignedinteger[Any]]) -> npt.NDArray[np.bool_]:
    """Return where stored weights are not zero.

    Args:
        stored: floating-point numbers as bits, of 2, 4 or 8 bytes; or bytes of two NF4 codes each, the first in the
            high half.

    Returns:
        bool, of the same shape; of NF4 codes flat, two for each byte.
    """
    nonzero: npt.NDArray[np.bool_]
    if stored.dtype == np.uint8:
        packed = stored.reshape(-1)
        nonzero = np.stack([packed >> 4, packed & 0x0F], axis=1).reshape(-1) != NF4_ZERO
    else:
        nonzero = stored << 1 != 0  # without the sign
    return nonzero


def check_sparse_claims(folder: Path, plan: Plan, manifest: Manifest, pruning: Sparsification) -> None:
    """Check what the manifest of a sparse release says of sizes, against its config and its own count of kept weights.

    Raises:
        PlanMismatchError: numbers do not agree.
    """
    shapes = projection_shapes(plan)
    prunable = sum(rows * columns for rows, columns in shapes.values())
    parameters = manifest.base.parameters - prunable + pruning.kept_weights
    if manifest.parameters != parameters:
        raise PlanMismatchError(
            f"{folder / MANIFEST} claims {manifest.parameters:,} parameters; with {pruning.kept_weights:,} of "
            f"{prunable:,} weights kept the config makes {parameters:,}."
        )
    pattern = parse_pattern(pruning.pattern)
    rows = 0 if not pattern.is_unstructured else sum(rows for rows, _ in shapes.values())
    allowed = 0 if not pattern.is_unstructured else _ROUNDING * prunable + rows
    expected = (1 - pruning.sparsity) * prunable
    if abs(pruning.kept_weights - expected) > allowed + 0.5:  # half a weight: the share is a float
        raise PlanMismatchError(
            f"{folder / MANIFEST} claims a sparsity of {pruning.sparsity:g}, which leaves some {expected:,.0f} of "
            f"{prunable:,} weights; it says that {pruning.kept_weights:,} are kept."
        )
