"""Merge a full-size LoRA adapter into its base model, tensor by tensor.

Each adapted weight becomes W + s B A, computed in fp32 a block of rows at a time and rounded once to the type it is
stored in. Memory: about the largest tensor. Serving needs no merging: vLLM and PEFT apply a recovered adapter as it is.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import tqdm

from loram_hub.adapter import DTYPES, Adapter, DtypeName, LoraPair, check_base, pinned_revision, read_adapter
from loram_hub.architecture import EMBEDDING, LM_HEAD
from loram_hub.checkpoint import CONFIG, Checkpoint, ShardWriter, TensorInfo, copy_companions
from loram_hub.errors import IncompatibleError, InvalidRequestError, PlanMismatchError, VerificationError
from loram_hub.files import atomic_folder, dump_json, refuse_existing, refuse_overlap, resource_errors
from loram_hub.hub import ADAPTER_FILES, resolve
from loram_hub.release import MODEL_TYPE_PREFIX

logger = logging.getLogger(__name__)

_BLOCK_ELEMENTS = 4 * 2**20
"""Weights computed at a time: 16 MiB in fp32, little beside a stored tensor of a large model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedModel:
    """A model folder, as `merge` wrote it."""

    folder: Path
    """Where it is."""
    merged: int
    """Tensors that the adapter changed."""
    tensors: int
    """Tensors of the model."""
    nbytes: int
    """Bytes of all tensors."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class _Step:
    """One tensor of the merged model."""

    name: str
    origin: str
    """Tensor of the base that it starts from: its own, but for an lm_head that is untied from the embedding."""
    pair: LoraPair | None
    """What is added."""


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: DtypeName | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    device: str | None = None,
    allow_base_mismatch: bool = False,
) -> MergedModel:
    """Merge a recovered (or any full-size) LoRA adapter into the original model and write the whole model.

    An adapter of a tied lm_head unties it: the merged model has an `lm_head.weight` of its own.

    Args:
        base: the original model, not quantized: folder or Hub id.
        adapter: full-size adapter: folder or Hub id.
        out_dir: model folder to create; appears whole or not at all.
        dtype: type of the written weights; None keeps each as it is stored.
        overwrite: replace an existing folder.
        dry_run: check everything and say what would be written, without writing.
        revision: of the base on the Hub; None for the one the adapter names, if it names this base.
        token: of the Hub.
        device: where to multiply; None for the CPU.
        allow_base_mismatch: merge into another state of the base than the one that the adapter was made for.

    Returns:
        What was written.

    Raises:
        PlanMismatchError: the adapter does not fit the base, for example because it was not recovered.
        UnsupportedAdapterError: it is no plain LoRA.
        IncompatibleError: the base is quantized, is itself a release, or is not at the commit the adapter names.
        CheckpointError: base or adapter lack a file.
        VerificationError: a file is torn, or a weight overflows `dtype`.
        InvalidRequestError: `out_dir` exists.

    Example:
        >>> from loram_hub import merge  # doctest: +SKIP
        >>> merge("meta-llama/Llama-3.1-70B", "my-adapter", "merged")  # doctest: +SKIP
    """
    target = Path(out_dir).expanduser()
    refuse_existing(target, overwrite=overwrite)
    if dtype is not None and dtype not in DTYPES:
        raise InvalidRequestError(f"dtype is {dtype!r}; one of {', '.join(DTYPES)} is needed.")
    adapter_folder = resolve(adapter, token=token, files=ADAPTER_FILES).folder
    lora = read_adapter(adapter_folder)
    if lora.marked_plan is not None:
        raise PlanMismatchError(f"{lora.source} is a pruned adapter. Recover it first: loram recover {adapter} OUT")
    source = resolve(base, revision=revision or pinned_revision(adapter_folder, base), token=token)
    folder = source.folder
    if not allow_base_mismatch:
        check_base(adapter_folder, folder, commit=source.commit)
    refuse_overlap(target, folder, adapter_folder)
    if lora.config.base not in (None, str(base), source.id):
        logger.warning("The adapter was made for %s; merging it into %s", lora.config.base, source.id)
    with Checkpoint(folder) as checkpoint:
        _refuse_base(checkpoint)
        steps = _steps(checkpoint, lora)
        nbytes = sum(_nbytes(checkpoint.tensors[step.origin], dtype) for step in steps)
        if not dry_run:
            with atomic_folder(target, overwrite=overwrite) as partial:
                _write_small_files(partial, checkpoint, unties=LM_HEAD in _tensors(lora), dtype=dtype)
                _write_weights(partial, checkpoint, steps, dtype=dtype, device=device)
    verb = "Would merge" if dry_run else "Merged"
    logger.info("%s %d of %d tensors, %d bytes", verb, len(lora.pairs), len(steps), nbytes)
    return MergedModel(folder=target, merged=len(lora.pairs), tensors=len(steps), nbytes=nbytes)


def _refuse_base(checkpoint: Checkpoint) -> None:
    model_type = str(checkpoint.config.get("model_type"))
    if model_type.startswith(MODEL_TYPE_PREFIX):
        raise IncompatibleError(f"{checkpoint.folder} is a LoRAM release. Merge into the original model instead.")
    if checkpoint.config.get("quantization_config"):
        raise IncompatibleError(
            f"{checkpoint.folder} is quantized: merging would round it a second time. Merge into the unquantized model."
        )


def _tensors(adapter: Adapter) -> dict[str, LoraPair]:
    return {f"{module}.weight": pair for module, pair in adapter.pairs.items()}


def _steps(checkpoint: Checkpoint, adapter: Adapter) -> list[_Step]:
    """Say for every tensor of the merged model where it comes from; checks that each pair fits."""
    pairs = _tensors(adapter)
    origins = {name: name for name in checkpoint.tensors}
    if LM_HEAD in pairs:
        origins.setdefault(LM_HEAD, EMBEDDING)  # tied: the base stores one matrix for both
    for name, pair in pairs.items():
        found = checkpoint.tensors.get(origins.get(name, name))
        if found is None:
            raise PlanMismatchError(
                f"{adapter.source} adapts {name.removesuffix('.weight')!r}, which {checkpoint.folder} does not have. "
                "Merge into the model it was recovered for."
            )
        if found.shape != pair.shape:
            raise PlanMismatchError(
                f"{adapter.source} has an update of shape {pair.shape} for {name!r}, which has shape {found.shape} in "
                f"{checkpoint.folder}. If it was trained on a LoRAM release, run `loram recover` on it first."
            )
    matrices = (name for name, info in checkpoint.tensors.items() if len(info.shape) == 2 and name != EMBEDDING)
    adapter.check_targets({name.removesuffix(".weight") for name in (*matrices, *pairs) if name.endswith(".weight")})
    return [_Step(name=name, origin=origin, pair=pairs.get(name)) for name, origin in origins.items()]


def _write_small_files(folder: Path, checkpoint: Checkpoint, *, unties: bool, dtype: DtypeName | None) -> None:
    """Write the config and copy tokenizer, licence and the like; not the card, which describes the base."""
    config = {key: value for key, value in checkpoint.config.items() if key not in ("auto_map", "_name_or_path")}
    if unties:
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    with resource_errors(f"Writing {folder}"):
        (folder / CONFIG).write_text(dump_json(config), encoding="utf-8")
    copy_companions(checkpoint.folder, folder)


def _write_weights(
    folder: Path, checkpoint: Checkpoint, steps: list[_Step], *, dtype: DtypeName | None, device: str | None
) -> None:
    writer = ShardWriter(folder)
    for step in tqdm(steps, desc="Merging", unit="tensor"):
        weight = checkpoint.read(step.origin)
        target = getattr(torch, dtype) if dtype is not None and weight.is_floating_point() else weight.dtype
        if step.pair is not None:
            weight = _added(weight, step.pair, target, device, name=step.name)
        elif target != weight.dtype:
            weight = weight.to(target)
            _check_finite(weight, step.name)
        writer.add(step.name, weight)
    writer.finish()


def _added(weight: torch.Tensor, pair: LoraPair, dtype: torch.dtype, device: str | None, *, name: str) -> torch.Tensor:
    """Return weight + scale * B @ A, (out_features, in_features), on the CPU in `dtype`; may overwrite `weight`."""
    lora_a = torch.from_numpy(pair.lora_A.astype(np.float32)).to(device)
    lora_b = torch.from_numpy(pair.lora_B.astype(np.float32)).to(device)
    merged = weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)
    rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        update = (lora_b[block] @ lora_a).mul_(pair.scale)
        merged[block] = update.add_(weight[block].to(update.device))  # added in fp32, rounded by the assignment
        _check_finite(merged[block], name)
    return merged


def _check_finite(weight: torch.Tensor, name: str) -> None:
    if weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():  # ten times faster than on each
        raise VerificationError(f"{name!r} overflows {weight.dtype}. Ask for dtype='float32'.")


def _nbytes(info: TensorInfo, dtype: DtypeName | None) -> int:
    is_float = info.dtype in ("F64", "F32", "F16", "BF16")
    return info.nbytes if dtype is None or not is_float else math.prod(info.shape) * DTYPES[dtype].itemsize
