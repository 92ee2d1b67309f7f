"""`mask_index.safetensors`: the plan on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from loram_hub.architecture import LAYER_PREFIX, Architecture, Indices, Space
from loram_hub.errors import CheckpointError, PlanMismatchError, VerificationError
from loram_hub.plan import Plan
from loram_hub.tensors import TensorInfo, read_array, read_headers

MASK_INDEX = "mask_index.safetensors"

_MASK_NAME = re.compile(rf"{re.escape(LAYER_PREFIX)}\.(0|[1-9][0-9]{{0,5}})\.(self_attn\.kv_heads|mlp\.channels)")
_SPACE_OF_MASK: Mapping[str, Space] = {"self_attn.kv_heads": "kv_heads", "mlp.channels": "channels"}
_MAX_MASK_BYTES = 256 * 1024 * 1024


def write_mask_index(path: Path, plan: Plan) -> None:
    """Write the kept indices, int32, under the names of docs/format.md."""
    names = {space: name for name, space in _SPACE_OF_MASK.items()}
    arrays = {
        f"{LAYER_PREFIX}.{layer}.{names[space]}": np.ascontiguousarray(indices)
        for layer, spaces in plan.kept.items()
        for space, indices in spaces.items()
    }
    path.write_bytes(save(arrays))  # not save_file, which makes the file readable to its owner alone


def read_mask_index(path: Path, architecture: Architecture) -> Plan:
    """Read kept indices from an untrusted file.

    Raises:
        VerificationError: the file is torn, too large, or has a tensor under a foreign name.
        PlanMismatchError: an index breaks the rules (type, order, range) or does not fit the architecture.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}; it is no release.")
    if path.stat().st_size > _MAX_MASK_BYTES:
        raise VerificationError(f"{path} is larger than {_MAX_MASK_BYTES:,} bytes.")
    kept: dict[int, dict[Space, Indices]] = {}
    for name, info in read_headers(path).items():
        match = _MASK_NAME.fullmatch(name)
        if match is None:
            raise VerificationError(f"{path} holds {name!r:.200}, which is no mask index.")
        space = _SPACE_OF_MASK[match[2]]
        _check_header(name, info, _groups(architecture, space))
        kept.setdefault(int(match[1]), {})[space] = read_array(info)
    return Plan(architecture, kept)


def _groups(architecture: Architecture, space: Space) -> int:
    return architecture.num_key_value_heads if space == "kv_heads" else architecture.intermediate_size


def _check_header(name: str, info: TensorInfo, groups: int) -> None:
    """Check what can be before anything is read: no more is read than the base model has groups."""
    if info.dtype != "I32":
        raise PlanMismatchError(f"Mask index {name} has dtype {info.dtype}; I32 is needed.")
    if len(info.shape) == 1 and info.shape[0] > groups:
        raise PlanMismatchError(
            f"Mask index {name} keeps {info.shape[0]:,} groups; a layer of the base model has {groups:,}."
        )
