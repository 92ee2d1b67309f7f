"""The weights of a release against its plan, by their headers: every tensor, no other, each of its type and shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loram_hub.checkpoint import INDEX_FILE, SINGLE_FILE, index_tensors
from loram_hub.errors import CheckpointError, PlanMismatchError, VerificationError
from loram_hub.files import read_json
from loram_hub.manifest import Manifest
from loram_hub.masks import projection_shapes
from loram_hub.plan import Plan
from loram_hub.release.contents import is_weights
from loram_hub.release.nf4 import NF4_PARTS, check_parts, check_states
from loram_hub.tensors import TensorInfo

_FLOATS = ("BF16", "F16", "F32", "F64")
_FOREIGN = 100  # tensors beyond the plan's that are read at all, so that the error can name one
_MAX_INDEX_BYTES = 8 * 1024 * 1024
_CODES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def check_weights(folder: Path, plan: Plan, manifest: Manifest) -> dict[str, TensorInfo]:
    """Check the headers of a release's weights.

    Args:
        folder: the release.
        plan: its plan, which gives every shape.
        manifest: says which files there are, and whether projections are NF4.

    Returns:
        Every tensor by name.

    Raises:
        CheckpointError: a file or a tensor is missing.
        VerificationError: a header is damaged, a file is not listed, or a tensor has a type that weights do not have.
        PlanMismatchError: a tensor is not of its planned shape, or has no place in the plan.
    """
    if INDEX_FILE in manifest.files and manifest.files[INDEX_FILE].size > _MAX_INDEX_BYTES:
        raise VerificationError(
            f"{folder / INDEX_FILE} is larger than {_MAX_INDEX_BYTES:,} bytes, for no release's tensors."
        )
    shapes = plan.tensor_shapes()
    quantization = manifest.quantization
    packed = {} if quantization is None else projection_shapes(plan)
    known = set(shapes) | {f"{name}.{part}" for name in packed for part in NF4_PARTS}
    found = index_tensors(folder, most=len(known) + _FOREIGN)
    _check_weight_files(folder, found, manifest)
    floats = _FLOATS if quantization is None else (_CODES[quantization["dtype"]],)
    for name, shape in shapes.items():
        if name not in found:
            raise CheckpointError(f"{folder} has no tensor {name!r}.")
        if name not in packed:
            _check_plain(name, found[name], shape, floats)
    for name, shape in packed.items():
        check_parts(name, shape, found)
    check_states(packed, found)
    foreign = sorted(set(found) - known)
    if foreign:
        raise PlanMismatchError(f"{folder} has a tensor {foreign[0]!r:.200}, which the plan knows nothing of.")
    return found


def _check_weight_files(folder: Path, found: Mapping[str, TensorInfo], manifest: Manifest) -> None:
    used = {info.file.name for info in found.values()}
    listed = {name for name in manifest.files if is_weights(name)}
    for file in sorted(used - listed):
        raise VerificationError(f"{folder} has weights in {file}, which its manifest does not list.")
    for file in sorted(listed - used):
        raise VerificationError(f"{folder} has a weight file {file!r} that is no part of its model.")
    if not (folder / INDEX_FILE).is_file():
        return
    if (folder / SINGLE_FILE).exists():
        raise VerificationError(f"{folder} has both {SINGLE_FILE} and {INDEX_FILE}; which one counts cannot be told.")
    weight_map = read_json(folder / INDEX_FILE, max_bytes=_MAX_INDEX_BYTES)["weight_map"]
    for name in sorted(set(found) - set(weight_map)):
        raise VerificationError(
            f"{folder / INDEX_FILE} does not place {name!r:.200}, which {found[name].file.name} holds."
        )


def _check_plain(name: str, info: TensorInfo, shape: tuple[int, ...], floats: tuple[str, ...]) -> None:
    if info.shape != shape:
        raise PlanMismatchError(f"Tensor {name!r} has shape {info.shape}; the plan gives it {shape}.")
    if info.dtype not in floats:
        raise VerificationError(f"Tensor {name!r} is {info.dtype}; unquantized weights are {' or '.join(floats)} here.")
