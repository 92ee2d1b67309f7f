"""Sparsify a base model into a release: prune layer by layer, then put weights and masks together.

Everything streams, and a killed run goes on: pruned layers lie in a folder beside the release until it is there. LoRAM
calls this P(.) as well (arXiv 2502.13533, eq. 3), with LoRAM-Semi (n:m) and LoRAM-Unst as its results.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from loram_hub.architecture import LM_HEAD, Architecture, is_ignored_tensor
from loram_hub.checkpoint import CONFIG, Checkpoint, ShardWriter, copy_companions, weight_files
from loram_hub.digests import remembered_sha256
from loram_hub.errors import InvalidRequestError, ResourceError
from loram_hub.estimation import SparseCounts
from loram_hub.files import dump_json, refuse_existing, refuse_overlap, sha256_of
from loram_hub.hub import Source, check_base_checkpoint, resolve
from loram_hub.manifest import BaseModel, Manifest, Sparsification, tool_versions
from loram_hub.masks import WEIGHT_MASKS, MaskWriter
from loram_hub.plan import Plan
from loram_hub.quantization import as_nf4, quantized_tensors, sixteen_bit
from loram_hub.release import Release, open_release, release_config, write_release
from loram_hub.sparsification.counts import asked_counts, projection_shapes
from loram_hub.sparsification.finished import FinishedLayers, only_process, work_folder
from loram_hub.sparsification.layers import prune_layers
from loram_hub.sparsification.settings import SparsitySettings
from loram_hub.streaming import check_device
from loram_hub.texts import Calibration, check_calibration, describe_calibration, read_calibration

logger = logging.getLogger(__name__)


def sparsify(
    base: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    settings: SparsitySettings,
    calibration: Calibration = None,
    quantize: bool = False,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Release:
    """Remove single weights from all projections of a base model, optionally straight to NF4.

    The release keeps every shape and is as large as the base; training on it takes as much memory. A run that was
    killed goes on after the last finished layer when it is called again with the same arguments. Two runs give the same
    bytes on the same machine with the same number of threads (`torch.get_num_threads`): sums in fp32 depend on it.

    Args:
        base: the base model: Hub id or folder with safetensors.
        out_dir: release folder to create; appears whole or not at all. Until then finished layers lie beside it, in
            `.<name>.sparsifying`.
        settings: method, and which weights go.
        calibration: for SparseGPT and Wanda: token ids (samples, tokens), or texts (a list, a file, a folder or a
            dataset id).
        quantize: write the projections as NF4 and the rest in 16 bit.
        seed: of the choice of calibration texts.
        device: where to compute; None for the CPU, in fp32. On others layers run in the stored type.
        overwrite: replace an existing folder.
        revision: of a Hub id.
        token: of the Hub.

    Returns:
        The release, opened from disk.

    Raises:
        InvalidRequestError: calibration is missing, too short or no token ids of the model, a projection's inputs do
            not divide into groups of the pattern, or `out_dir` exists.
        UnsupportedModelError: the base breaks the pattern of its family; the message names the module.
        CheckpointError: the base is no checkpoint or lacks a shard.
        VerificationError: a weight or an activation is not finite.
        ResourceError: the disk is full, or another process makes the same release.

    Example:
        >>> from loram_hub.sparsification import SparsitySettings, sparsify  # doctest: +SKIP
        >>> settings = SparsitySettings(pattern="4:8")  # doctest: +SKIP
        >>> sparsify("org/model", "model-sparse", settings=settings, calibration="texts.jsonl")  # doctest: +SKIP
    """
    request = _Request(
        base=base,
        out=Path(out_dir).expanduser(),
        settings=settings,
        calibration=calibration,
        seed=seed,
        device=device,
        overwrite=overwrite,
        revision=revision,
        token=token,
    )
    with _checked(request) as job, only_process(request.out):
        _check_room(job, quantize=quantize)
        finished = FinishedLayers(work_folder(request.out), _run_of(job), settings.mask_pattern)
        prune_layers(job.checkpoint, job.architecture, job.ids_NT, settings, finished, device=device)
        exceptions = _exceptions(settings, finished)
        plan, kept = _write_masks(job, finished)
        _write(job, finished, plan, _manifest(job, plan, kept, exceptions), quantize=quantize)
        finished.remove()
    logger.info(
        "removed %s of %s weights of the projections by %s",
        f"{job.counts.prunable_weights - kept:,}",
        f"{job.counts.prunable_weights:,}",
        settings.method,
    )
    return open_release(request.out)


def check_sparsify(
    base: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    settings: SparsitySettings,
    calibration: Calibration = None,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> SparseCounts:
    """Check all that `sparsify` checks, reading headers and calibration but no weights, and write nothing.

    Arguments and errors are those of `sparsify`.

    Returns:
        What the release would hold.
    """
    request = _Request(
        base=base,
        out=Path(out_dir).expanduser(),
        settings=settings,
        calibration=calibration,
        seed=seed,
        device=device,
        overwrite=overwrite,
        revision=revision,
        token=token,
    )
    with _checked(request) as job:
        return job.counts


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class _Request:
    """What was asked for: the arguments of both functions."""

    base: str | os.PathLike[str]
    out: Path
    settings: SparsitySettings
    calibration: Calibration
    seed: int
    device: str | None
    overwrite: bool
    revision: str | None
    token: str | bool | None


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class _Job:
    """A request that is sound, and what was found to it."""

    request: _Request
    source: Source
    checkpoint: Checkpoint
    architecture: Architecture
    counts: SparseCounts
    ids_NT: torch.Tensor | None
    """The calibration's tokens, N samples of T; None where the method needs none."""

    @property
    def settings(self) -> SparsitySettings:
        return self.request.settings

    @property
    def device(self) -> str:
        return self.request.device or "cpu"


@contextmanager
def _checked(request: _Request) -> Iterator[_Job]:
    """Check everything that can fail before hours of pruning, and open the base."""
    if not isinstance(request.settings, SparsitySettings):
        raise InvalidRequestError(
            f"settings is a {type(request.settings).__name__}; give SparsitySettings(method=..., pattern=... or "
            "sparsity=...)."
        )
    refuse_existing(request.out, overwrite=request.overwrite)
    if isinstance(request.seed, bool) or not isinstance(request.seed, int) or request.seed < 0:
        raise InvalidRequestError(f"seed is {request.seed!r}; a whole number from 0 is needed.")
    check_device(request.device)
    source = resolve(request.base, revision=request.revision, token=request.token)
    refuse_overlap(request.out, source.folder)
    refuse_overlap(work_folder(request.out), source.folder)
    with Checkpoint(source.folder) as checkpoint:
        architecture = check_base_checkpoint(checkpoint, source)
        counts = asked_counts(architecture, request.settings)
        yield _Job(
            request=request,
            source=source,
            checkpoint=checkpoint,
            architecture=architecture,
            counts=counts,
            ids_NT=_calibration_ids(request, checkpoint, architecture),
        )


def _calibration_ids(request: _Request, checkpoint: Checkpoint, architecture: Architecture) -> torch.Tensor | None:
    given, settings = request.calibration, request.settings
    if not settings.needs_calibration:
        return None
    if given is None:
        raise InvalidRequestError(
            f"{settings.method} needs calibration: pass token ids (samples, tokens), or a file, folder or dataset with "
            "texts. method='magnitude' needs none."
        )
    context = checkpoint.config.get("max_position_embeddings")
    tokens = min(settings.tokens, context) if isinstance(context, int) else settings.tokens
    ids = read_calibration(given, checkpoint.folder, samples=settings.samples, tokens=tokens, seed=request.seed)
    check_calibration(ids, vocab_size=architecture.vocab_size)
    if isinstance(context, int) and ids.shape[1] > context:
        raise InvalidRequestError(
            f"Calibration has rows of {ids.shape[1]:,} tokens; the model has positions for {context:,}. Cut them."
        )
    return ids


def _run_of(job: _Job) -> dict[str, Any]:
    """Return all that decides over the pruned layers; where the files lie does not."""
    source, settings = job.source, asdict(job.settings)
    for name in ("samples", "tokens"):  # of texts, which the calibration's hash stands for
        del settings[name]
    base = {"id": source.id, "commit": source.commit, "config_sha256": sha256_of(source.folder / CONFIG)}
    if source.commit is None:
        weights = {path.name: remembered_sha256(path) for path in weight_files(source.folder)}
        base["weights_sha256"] = hashlib.sha256(dump_json(weights).encode()).hexdigest()
    return {
        "base": base,
        "settings": settings,
        "calibration": None if job.ids_NT is None else describe_calibration(job.ids_NT),
        "seed": job.request.seed,
        "device": job.device,
        "tools": tool_versions(),
    }


def _check_room(job: _Job, *, quantize: bool) -> None:
    """Check that the disk has room for the pruned layers and the release; raises `ResourceError`."""
    folder, masks = work_folder(job.request.out), job.counts.mask_bytes
    there = sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
    layers = job.checkpoint.nbytes + 2 * masks  # with each layer's matrices, and all together in one file
    release = masks + (job.counts.nf4_bytes if quantize else job.checkpoint.nbytes)
    needed, free = max(0, layers - there) + release, shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ResourceError(
            f"The disk of {folder.parent} has {free / 1e9:,.1f} GB free; {needed / 1e9:,.1f} GB are needed: "
            f"{release / 1e9:,.1f} GB for the release, the rest for pruned layers until it is there. Free some space "
            "or write elsewhere."
        )


def _write_masks(job: _Job, finished: FinishedLayers) -> tuple[Plan, int]:
    """Put the masks of all layers into one file, in the work folder; returns plan and number of kept weights."""
    path, shapes, kept = finished.folder / WEIGHT_MASKS, projection_shapes(job.architecture), 0
    with MaskWriter(path, shapes, job.settings.mask_pattern) as writer:
        for name, (_, columns) in shapes.items():
            mask_OI = finished.mask(_layer_of(job.architecture, name), name, columns)
            kept += int(mask_OI.sum())
            writer.add(name, mask_OI)
    return Plan(job.architecture, {}, masks_sha256=sha256_of(path)), kept


def _exceptions(settings: SparsitySettings, finished: FinishedLayers) -> dict[str, float | str]:
    """Return what SparseGPT did otherwise than asked: matrices with their dampening, or `magnitude`.

    Raises:
        InvalidRequestError: it could not update a single one, so that nothing about the result is SparseGPT's.
    """
    if settings.method != "sparsegpt":
        return {}
    found = {name: "magnitude" if value is None else value for name, value in finished.dampenings.items()}
    if set(found.values()) == {"magnitude"}:
        raise InvalidRequestError(
            "SparseGPT could decompose the inputs of no matrix: the calibration is too small or too uniform, or the "
            f"dampening ({settings.dampening:g}) too low. Raise one of them, or take --method magnitude."
        )
    return {name: value for name, value in found.items() if value != settings.dampening}


def _manifest(job: _Job, plan: Plan, kept: int, exceptions: dict[str, float | str]) -> Manifest:
    source, settings, counts = job.source, job.settings, job.counts
    is_sparsegpt = settings.method == "sparsegpt"
    pruning = Sparsification(
        method=settings.method,
        pattern=str(settings.mask_pattern),
        sparsity=settings.removed_share,
        kept_weights=kept,
        dampening=settings.dampening if is_sparsegpt else None,
        block_size=settings.block_columns if is_sparsegpt else None,
        seed=job.request.seed,
        calibration=None if job.ids_NT is None else describe_calibration(job.ids_NT),
        plan_sha256=plan.digest,
    )
    base = BaseModel(
        id=source.id,
        commit=source.commit,
        config_sha256=sha256_of(source.folder / CONFIG),
        parameters=counts.original_parameters,
    )
    recipe = {
        "base": source.id,
        "revision": source.commit,
        "method": settings.method,
        "sparsity": settings.sparsity,
        "pattern": settings.pattern,
        "seed": job.request.seed,
        **_calibration_recipe(job),
        **({"dampening": settings.dampening, "block_size": settings.block_size} if is_sparsegpt else {}),
        **({"exceptions": exceptions} if exceptions else {}),
    }
    parameters = counts.original_parameters - counts.prunable_weights + kept
    return Manifest(base=base, pruning=pruning, parameters=parameters, recipe={"sparsify": recipe})


def _calibration_recipe(job: _Job) -> dict[str, Any]:
    """Return what a recipe says of the calibration; of a path its last part, the rest is a matter of this machine."""
    given, settings = job.request.calibration, job.settings
    if job.ids_NT is None:
        return {}
    if not isinstance(given, str | os.PathLike | list):
        return {"calibration": "token ids"}
    sizes = {"samples": settings.samples, "tokens": settings.tokens}
    if isinstance(given, list):
        return {"calibration": f"{len(given)} texts", **sizes}
    path = Path(given).expanduser()
    return {"calibration": path.resolve().name if path.exists() else str(given), **sizes}


def _write(job: _Job, finished: FinishedLayers, plan: Plan, manifest: Manifest, *, quantize: bool) -> None:
    checkpoint, architecture = job.checkpoint, job.architecture
    out, overwrite = job.request.out, job.request.overwrite
    config = release_config(checkpoint.config)
    dtype = sixteen_bit(checkpoint, architecture)
    if quantize:
        manifest, config = as_nf4(manifest, checkpoint.config, dtype)
    shapes = projection_shapes(architecture)
    with write_release(out, manifest=manifest, plan=plan, config=config, overwrite=overwrite) as folder:
        copy_companions(checkpoint.folder, folder)
        shutil.copyfile(finished.folder / WEIGHT_MASKS, folder / WEIGHT_MASKS)
        writer = ShardWriter(folder)
        for name in tqdm(_names(job), desc="Writing", unit="tensor"):
            if name in shapes:
                layer, columns = _layer_of(architecture, name), shapes[name][1]
                tensor, mask_OI = finished.weight(layer, name), torch.from_numpy(finished.mask(layer, name, columns))
            else:
                tensor, mask_OI = checkpoint.read(name), None
            parts = {name: tensor}
            if quantize:
                parts = quantized_tensors(architecture, name, tensor.to(job.device), dtype, mask_OI)
            for part, value in parts.items():
                writer.add(part, value)
        writer.finish()


def _names(job: _Job) -> list[str]:
    names = [name for name in sorted(job.checkpoint.tensors) if not is_ignored_tensor(name)]
    return [name for name in names if name != LM_HEAD or not job.architecture.tie_word_embeddings]


def _layer_of(architecture: Architecture, name: str) -> int:
    found = architecture.weight_of(name)
    assert found is not None
    return found[0]
