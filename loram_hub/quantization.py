"""NF4 quantization, written in bitsandbytes' own serialization so that transformers loads it as a prequantized model.

Quantized are the projections of the decoder layers; embeddings, lm_head and norms stay in 16 bit (QLoRA, arXiv
2305.14314, section 3). The bytes are bitsandbytes' own: it quantizes each tensor, we only stream. In a sparse release
the code at pruned positions is set to that of 0.0 afterwards: what bitsandbytes gives to a block of 64 zeros, where it
divides by a scale of 0, is its own affair.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from huggingface_hub.utils import tqdm

from loram_hub.architecture import Architecture, is_ignored_tensor
from loram_hub.checkpoint import Checkpoint, ShardWriter, copy_companions
from loram_hub.errors import InvalidRequestError
from loram_hub.files import refuse_existing, refuse_overlap
from loram_hub.hub import fetch_release
from loram_hub.manifest import NF4_DESCRIPTION, Manifest
from loram_hub.masks import WEIGHT_MASKS
from loram_hub.plan import NF4_BLOCK, parameter_counts
from loram_hub.release import (
    NF4_ZERO,
    Release,
    base_config_of,
    bitsandbytes_config,
    open_release,
    release_config,
    write_release,
)


def sixteen_bit(checkpoint: Checkpoint, architecture: Architecture) -> torch.dtype:
    """Type that an NF4 release of this checkpoint stores the rest in: fp16 if the projections are, else bf16."""
    projections = {info.dtype for name, info in checkpoint.tensors.items() if _is_projection(architecture, name)}
    return torch.float16 if projections == {"F16"} else torch.bfloat16


def as_nf4(manifest: Manifest, base_config: Mapping[str, Any], dtype: torch.dtype) -> tuple[Manifest, dict[str, Any]]:
    """Return manifest and config of the NF4 release, given those of the unquantized one.

    Args:
        manifest: of the unquantized release.
        base_config: the base model's config.
        dtype: from `sixteen_bit`.
    """
    name = str(dtype).removeprefix("torch.")
    config = {key: value for key, value in base_config.items() if key != "torch_dtype"} | {"dtype": name}
    quantized = replace(
        manifest,
        quantization={**NF4_DESCRIPTION, "dtype": name},
        recipe={**manifest.recipe, "quantize": {"type": "nf4"}},
    )
    return quantized, release_config(config, quantization_config=bitsandbytes_config(name))


def quantized_tensors(
    architecture: Architecture, name: str, tensor: torch.Tensor, dtype: torch.dtype, mask: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return what an NF4 release stores for a tensor: the NF4 parts of a projection, anything else in `dtype`.

    Args:
        architecture: the base model's.
        name: full name of the tensor.
        tensor: its values, zero where `mask` is false.
        dtype: from `sixteen_bit`.
        mask: of a projection of a sparse release: bool (out_features, in_features), true where a weight is kept.
    """
    tensor = tensor.to(dtype)
    if not _is_projection(architecture, name):
        return {name: tensor}
    parts = nf4_tensors(name, tensor)
    if mask is not None:
        parts[name] = _with_zero_codes(parts[name], mask.to(parts[name].device))
    return parts


def _with_zero_codes(packed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Set the NF4 codes at pruned positions to that of 0.0; two codes a byte, the first in the high half."""
    kept = mask.reshape(-1)
    if kept.numel() % 2:
        kept = torch.cat([kept, kept.new_ones(1)])  # half a byte that belongs to no weight
    high, low = kept.reshape(-1, 2).to(torch.uint8).unbind(1)
    halves = (high * 0xF0 | low * 0x0F).reshape(packed.shape)
    return packed & halves | ~halves & (NF4_ZERO << 4 | NF4_ZERO)


def _is_projection(architecture: Architecture, name: str) -> bool:
    found = None if is_ignored_tensor(name) else architecture.weight_of(name)
    return found is not None and found[1].is_projection


def nf4_tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize one matrix to NF4 with double quantization.

    Args:
        name: full name of the weight.
        weight: (out_features, in_features), fp16 or bf16, on the device to quantize on.

    Returns:
        Packed codes (uint8, (ceil(out * in / 2), 1)) under `name` and the quantization state under `name.<key>`.
    """
    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
    )
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def quantize(
    release: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    device: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Release:
    """Turn an unquantized release (pruned, perhaps aligned) into an NF4 one, tensor by tensor.

    A sparse release keeps its masks, and is exactly 0 where they remove a weight.

    Args:
        release: folder or Hub id.
        out_dir: folder to create.
        device: where to quantize; None for the CPU. The bytes of one device are those of bitsandbytes on it.
        overwrite: replace an existing folder.
        revision: of a Hub id.
        token: of the Hub.

    Returns:
        The new release.

    Raises:
        InvalidRequestError: the release is NF4 already, or `out_dir` exists.
        ResourceError: the disk is full.
    """
    out = Path(out_dir).expanduser()
    source = _checked(release, out, overwrite=overwrite, revision=revision, token=token)
    masks = source.weight_masks
    with Checkpoint(source.folder) as checkpoint:
        dtype = sixteen_bit(checkpoint, source.architecture)
        manifest, config = as_nf4(source.manifest, base_config_of(source.config), dtype)
        with write_release(out, manifest=manifest, plan=source.plan, config=config, overwrite=overwrite) as folder:
            copy_companions(source.folder, folder)
            if masks is not None:
                shutil.copyfile(masks.path, folder / WEIGHT_MASKS)
            writer = ShardWriter(folder)
            for name in tqdm(sorted(checkpoint.tensors), desc="Quantizing", unit="tensor"):
                tensor = checkpoint.read(name).to(device or "cpu")
                mask = torch.from_numpy(masks.read(name)) if masks is not None and name in masks else None
                for part, value in quantized_tensors(source.architecture, name, tensor, dtype, mask).items():
                    writer.add(part, value)
            writer.finish()
    return open_release(out)


def check_quantize(
    release: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> int:
    """Check all that `quantize` checks and write nothing. Arguments and errors are those of `quantize`.

    Returns:
        Bytes of weights that would be written, as `ParameterCounts.nf4_bytes` counts them.
    """
    out = Path(out_dir).expanduser()
    source = _checked(release, out, overwrite=overwrite, revision=revision, token=token)
    return parameter_counts(source.architecture, source.plan.layers).nf4_bytes


def _checked(
    release: str | os.PathLike[str], out: Path, *, overwrite: bool, revision: str | None, token: str | bool | None
) -> Release:
    refuse_existing(out, overwrite=overwrite)
    source = fetch_release(release, revision=revision, token=token)[1]
    refuse_overlap(out, source.folder)
    if source.is_quantized:
        raise InvalidRequestError(f"{source.folder} is quantized already ({source.manifest.quantization}).")
    return source
