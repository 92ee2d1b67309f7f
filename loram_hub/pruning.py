"""Prune a base model into a release: score the channel groups, choose what is kept, slice the weights.

Everything streams: importance holds one decoder layer, slicing one tensor. LoRAM calls this P(.) (arXiv 2502.13533,
eq. 3).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm

from loram_hub.architecture import LM_HEAD, Architecture, is_ignored_tensor
from loram_hub.checkpoint import CONFIG, Checkpoint, ShardWriter, copy_companions
from loram_hub.errors import InvalidRequestError
from loram_hub.files import refuse_existing, refuse_overlap, sha256_of
from loram_hub.hub import Source, check_base_checkpoint, resolve
from loram_hub.importance import (
    Importance,
    StoredScores,
    importance_scores,
    parse_importance,
    read_scores,
    write_scores,
)
from loram_hub.manifest import BaseModel, Manifest, Pruning
from loram_hub.plan import (
    ParameterCounts,
    Plan,
    PruningSettings,
    parameter_counts,
    plan_from_scores,
    planned_sizes,
    pruned_layers,
)
from loram_hub.quantization import as_nf4, quantized_tensors, sixteen_bit
from loram_hub.release import Release, open_release, release_config, write_release
from loram_hub.streaming import check_device
from loram_hub.texts import Calibration, describe_calibration, read_calibration

logger = logging.getLogger(__name__)

CALIBRATION_SAMPLES = 32
"""Rows of calibration when texts are given; LLM-Pruner uses 10 of 64 tokens."""
CALIBRATION_TOKENS = 128
"""Tokens per row of calibration when texts are given."""
FROM_FILE = "file:"
"""Before the path of a file with scores, where a method of importance is asked for."""


def prune(
    base: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    pruning_ratio: float = 0.85,
    importance: str = "taylor",
    calibration: Calibration = None,
    keep_first: int = 4,
    keep_last: int = 2,
    seed: int = 0,
    round_to: int | None = None,
    quantize: bool = False,
    device: str | None = None,
    importance_out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Release:
    """Prune a base model into a release, optionally straight to NF4.

    Args:
        base: the base model: Hub id or folder with safetensors.
        out_dir: release folder to create; appears whole or not at all.
        pruning_ratio: share removed of each prunable dimension of each pruned layer, in [0, 1).
        importance: `random`, `magnitude[:l1|:l2]` or `taylor[:param_first|:vectorize|:param_second|:param_mix]`; or
            `file:PATH` for scores that `importance_out` wrote: another ratio then costs no other pass. Seed and
            calibration are those of the file, and the release is the one that computing the scores would give.
        calibration: for `taylor`: token ids (samples, tokens), or texts (a list, a file, a folder or a dataset id).
        keep_first: layers at the start that stay whole.
        keep_last: layers at the end that stay whole.
        seed: of random scores and of the choice of calibration texts.
        round_to: round kept MLP channels up to a multiple; None keeps the paper's counts.
        quantize: write the projections as NF4 and the rest in 16 bit.
        device: where Taylor gradients and NF4 are computed; None for the CPU.
        importance_out: file for the scores, written before the weights are; see `loram_hub.importance.read_scores`.
        overwrite: replace an existing folder, and file of scores.
        revision: of a Hub id.
        token: of the Hub.

    Returns:
        The release, opened from disk.

    Raises:
        InvalidRequestError: an argument is out of range, calibration is missing or too short, `out_dir` or
            `importance_out` exists, or a file has no scores of a layer that is to be pruned.
        IncompatibleError: the scores in a file are of another base.
        VerificationError: that file is damaged.
        UnsupportedModelError: the base breaks the pattern of its family; the message names the module.
        CheckpointError: the base is no checkpoint or lacks a shard.
        ResourceError: the disk is full.

    Example:
        >>> from loram_hub import prune  # doctest: +SKIP
        >>> prune("org/model", "model-loram-0.65", pruning_ratio=0.65, calibration="texts.jsonl")  # doctest: +SKIP
    """
    with _checked(
        base,
        out_dir,
        settings=PruningSettings(
            pruning_ratio=pruning_ratio, keep_first=keep_first, keep_last=keep_last, round_to=round_to
        ),
        importance=importance,
        calibration=calibration,
        seed=seed,
        device=device,
        importance_out=importance_out,
        overwrite=overwrite,
        revision=revision,
        token=token,
    ) as job:
        scored = job.stored or _score(job, seed=seed, device=device)
        plan = plan_from_scores(job.architecture, job.settings, scored.scores)  # refuses NaN
        if job.importance_out is not None:
            write_scores(job.importance_out, scored)
        manifest = _manifest(job, plan, scored)
        _write(job.checkpoint, plan, manifest, job.out, quantize=quantize, device=device or "cpu", overwrite=overwrite)
    logger.info(
        "pruned %d of %d layers, %s -> %s parameters",
        len(plan.kept),
        plan.architecture.num_hidden_layers,
        f"{manifest.base.parameters:,}",
        f"{manifest.parameters:,}",
    )
    return open_release(job.out)


def check_prune(
    base: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    pruning_ratio: float = 0.85,
    importance: str = "taylor",
    calibration: Calibration = None,
    keep_first: int = 4,
    keep_last: int = 2,
    seed: int = 0,
    round_to: int | None = None,
    device: str | None = None,
    importance_out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ParameterCounts:
    """Check all that `prune` checks, reading headers and calibration but no weights, and write nothing.

    Arguments and errors are those of `prune`.

    Returns:
        What the release would hold.
    """
    settings = PruningSettings(
        pruning_ratio=pruning_ratio, keep_first=keep_first, keep_last=keep_last, round_to=round_to
    )
    with _checked(
        base,
        out_dir,
        settings=settings,
        importance=importance,
        calibration=calibration,
        seed=seed,
        device=device,
        importance_out=importance_out,
        overwrite=overwrite,
        revision=revision,
        token=token,
    ) as job:
        return parameter_counts(job.architecture, planned_sizes(job.architecture, settings))


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class _Job:
    """A call whose arguments are sound."""

    source: Source
    checkpoint: Checkpoint
    architecture: Architecture
    settings: PruningSettings
    importance: Importance
    calibration: torch.Tensor | None
    stored: StoredScores | None
    """Scores from a file; None if they are to be computed."""
    importance_out: Path | None
    out: Path


@contextmanager
def _checked(
    base: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    settings: PruningSettings,
    importance: str,
    calibration: Calibration,
    seed: int,
    device: str | None,
    importance_out: str | os.PathLike[str] | None,
    overwrite: bool,
    revision: str | None,
    token: str | bool | None,
) -> Iterator[_Job]:
    """Check everything that can fail before minutes of importance, and open the base."""
    stored = _stored_scores(importance, calibration)
    method = parse_importance(importance if stored is None else stored.importance)
    out = Path(out_dir).expanduser()
    refuse_existing(out, overwrite=overwrite)
    _check_seed(seed)
    check_device(device)
    source = resolve(base, revision=revision, token=token)
    refuse_overlap(out, source.folder)
    scores_out = None if importance_out is None else Path(importance_out).expanduser()
    if scores_out is not None:
        _check_scores_out(scores_out, out, source.folder, overwrite=overwrite)
    with Checkpoint(source.folder) as checkpoint:
        architecture = check_base_checkpoint(checkpoint, source)
        planned_sizes(architecture, settings)
        if stored is not None:
            _check_stored(stored, source, pruned_layers(architecture, settings), importance)
        needs_calibration = stored is None and method.method == "taylor"
        yield _Job(
            source=source,
            checkpoint=checkpoint,
            architecture=architecture,
            settings=settings,
            importance=method,
            calibration=_calibration(calibration, source.folder, seed) if needs_calibration else None,
            stored=stored,
            importance_out=scores_out,
            out=out,
        )


def _stored_scores(importance: str, calibration: Calibration) -> StoredScores | None:
    """Read the scores that a file is named for; None if a method is."""
    if not importance.startswith(FROM_FILE):
        return None
    if calibration is not None:
        raise InvalidRequestError(
            f"Importance comes from a file ({importance!r:.200}), so no calibration is needed: leave it out, or name "
            "a method of importance."
        )
    return read_scores(Path(importance.removeprefix(FROM_FILE)).expanduser())


def _check_stored(stored: StoredScores, source: Source, layers: range, importance: str) -> None:
    file = importance.removeprefix(FROM_FILE)
    stored.check_base(commit=source.commit, config_sha256=sha256_of(source.folder / CONFIG), source=file)
    missing = sorted(set(layers) - set(stored.scores))
    if missing:
        raise InvalidRequestError(
            f"{file} has scores of {len(stored.scores)} layers, {min(stored.scores)} to {max(stored.scores)}; layer "
            f"{missing[0]} is to be pruned too. Keep more layers whole (keep_first, keep_last), or score again."
        )


def _check_scores_out(file: Path, out: Path, base: Path, *, overwrite: bool) -> None:
    if file.is_dir():
        raise InvalidRequestError(f"{file} is a folder; give the name of a file for the scores (importance_out).")
    if not file.exists():
        refuse_existing(file, overwrite=overwrite)  # which says if it cannot be created
    elif not overwrite:
        raise InvalidRequestError(f"{file} already exists. Choose another name, or ask to overwrite it.")
    refuse_overlap(file, out, base)


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InvalidRequestError(f"seed is {seed!r}; a whole number from 0 is needed.")


def _calibration(given: Calibration, folder: Path, seed: int) -> torch.Tensor:
    if given is None:
        raise InvalidRequestError(
            "Taylor importance needs calibration: pass token ids (samples, tokens), or a file, folder or dataset with "
            "texts. importance='magnitude' and 'random' need none."
        )
    return read_calibration(given, folder, samples=CALIBRATION_SAMPLES, tokens=CALIBRATION_TOKENS, seed=seed)


def _score(job: _Job, *, seed: int, device: str | None) -> StoredScores:
    scores = importance_scores(
        job.checkpoint,
        job.architecture,
        pruned_layers(job.architecture, job.settings),
        importance=job.importance,
        calibration=job.calibration,
        seed=seed,
        device=device,
    )
    return StoredScores(
        scores=scores,
        importance=str(job.importance),
        seed=seed,
        base_id=job.source.id,
        base_commit=job.source.commit,
        base_config_sha256=sha256_of(job.source.folder / CONFIG),
        calibration=None if job.calibration is None else describe_calibration(job.calibration),
    )


def _manifest(job: _Job, plan: Plan, scored: StoredScores) -> Manifest:
    source, settings = job.source, job.settings
    counts = parameter_counts(plan.architecture, plan.layers)
    pruning = Pruning(
        method="structured",
        importance=scored.importance,
        pruning_ratio=settings.pruning_ratio,
        keep_first=settings.keep_first,
        keep_last=settings.keep_last,
        round_to=settings.round_to,
        seed=scored.seed,
        calibration=scored.calibration,
        plan_sha256=plan.digest,
    )
    base = BaseModel(
        id=source.id,
        commit=source.commit,
        config_sha256=sha256_of(source.folder / CONFIG),
        parameters=counts.original_parameters,
    )
    recipe = {
        "prune": {
            "base": source.id,
            "revision": source.commit,
            "pruning_ratio": settings.pruning_ratio,
            "importance": scored.importance,
            "keep_first": settings.keep_first,
            "keep_last": settings.keep_last,
            "round_to": settings.round_to,
            "seed": scored.seed,
        }
    }
    return Manifest(base=base, pruning=pruning, parameters=counts.pruned_parameters, recipe=recipe)


def _write(
    checkpoint: Checkpoint, plan: Plan, manifest: Manifest, out: Path, *, quantize: bool, device: str, overwrite: bool
) -> None:
    config = release_config(checkpoint.config)
    dtype = sixteen_bit(checkpoint, plan.architecture)
    if quantize:
        manifest, config = as_nf4(manifest, checkpoint.config, dtype)
    with write_release(out, manifest=manifest, plan=plan, config=config, overwrite=overwrite) as folder:
        copy_companions(checkpoint.folder, folder)
        writer = ShardWriter(folder)
        for name, tensor in _sliced_tensors(checkpoint, plan):
            parts = {name: tensor}
            if quantize:
                parts = quantized_tensors(plan.architecture, name, tensor.to(device), dtype)
            for part, value in parts.items():
                writer.add(part, value)
        writer.finish()


def _sliced_tensors(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    names = [name for name in sorted(checkpoint.tensors) if not is_ignored_tensor(name)]
    if plan.architecture.tie_word_embeddings:
        names = [name for name in names if name != LM_HEAD]
    for name in tqdm(names, desc="Pruning", unit="tensor"):
        tensor = checkpoint.read(name)
        for axis, kept in enumerate(plan.kept_on_axes(name)):
            if kept is not None:
                tensor = tensor.index_select(axis, torch.from_numpy(kept))
        yield name, tensor
