"""Refit a release: solve o_proj and down_proj of its pruned layers anew, in closed form, one layer in memory.

A pruned layer's output lacks what the removed heads and channels added to it; part of that can be told from what is
left. The kept weights move away from the base's, which recovered factors pay for: whether a refit helps what is trained
on the release afterwards is a question of measurement, so it is off unless asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm

from loram_hub.architecture import LAYER_PREFIX, layer_tensor
from loram_hub.checkpoint import Checkpoint, ShardWriter, copy_companions
from loram_hub.errors import IncompatibleError, InvalidRequestError
from loram_hub.files import refuse_existing, refuse_overlap
from loram_hub.hub import check_base_checkpoint, fetch_release, find_base, resolve
from loram_hub.manifest import Manifest
from loram_hub.refitting.layers import refitted_layers, refitted_weights, solve_layers
from loram_hub.refitting.settings import RefitSettings
from loram_hub.release import Release, base_config_of, open_release, release_config, write_release
from loram_hub.streaming import check_device
from loram_hub.texts import Calibration, check_calibration, describe_calibration, read_calibration

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitEstimate:
    """What a refit would do."""

    layers: int
    """Layers that are refitted: those that lost anything."""
    parameters: int
    """Weights that are solved for."""
    tokens: int
    """Tokens of calibration."""
    most_columns: int
    """Columns of the widest matrix; fewer tokens than that leave its solution to the ridge."""
    solver_bytes: int
    """Memory of the normal equations and their solution, beside one decoder layer in fp32."""
    nbytes: int
    """Bytes of weights that are written."""


def refit(
    release: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    calibration: Calibration,
    base: str | os.PathLike[str] | None = None,
    settings: RefitSettings | None = None,
    device: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Release:
    """Refit an unquantized release to its base: ridge least squares of o_proj and down_proj in every pruned layer.

    All other tensors stay as they are, bit by bit. Weights are read once, from base and release. That the base is the
    one that was pruned is told from its config and, in one layer, from the weights that nothing has changed since; of a
    release that was trained, or saved from memory, from the config alone.

    Args:
        release: folder or Hub id; pruned, perhaps aligned.
        out_dir: release folder to create; appears whole or not at all.
        calibration: token ids (samples, tokens), or texts (a list, a file, a folder or a dataset id).
        base: folder or Hub id of the base; None for the one that the release names, at its commit.
        settings: what to solve for; None for the defaults.
        device: where to compute, in fp32, with solutions in fp64; None for the CPU.
        overwrite: replace an existing folder.
        revision: of a release on the Hub.
        token: of the Hub.

    Returns:
        The new release.

    Raises:
        InvalidRequestError: the release is NF4 or sparse, its family cannot be refitted to this target, calibration is
            missing or too short, a matrix is not determined without a ridge, or `out_dir` exists.
        IncompatibleError: the base is not the one that the release was pruned from.
        VerificationError: activations are not finite.
        ResourceError: disk or memory ran out.

    Example:
        >>> from loram_hub import refit  # doctest: +SKIP
        >>> refit("model-loram-0.65", "model-loram-0.65-refit", calibration="texts.jsonl")  # doctest: +SKIP
    """
    settings = settings or RefitSettings()
    with _checked(
        release,
        out_dir,
        calibration=calibration,
        base=base,
        settings=settings,
        device=device,
        overwrite=overwrite,
        revision=revision,
        token=token,
    ) as job:
        _warn_of_few_tokens(job, settings)
        _write(job, settings, device=device or "cpu", overwrite=overwrite)
    return open_release(job.out)


def check_refit(
    release: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    calibration: Calibration,
    base: str | os.PathLike[str] | None = None,
    settings: RefitSettings | None = None,
    device: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> RefitEstimate:
    """Check all that `refit` checks before it computes, and write nothing. Arguments and errors are those of `refit`.

    Returns:
        What would be solved and written.
    """
    settings = settings or RefitSettings()
    with _checked(
        release,
        out_dir,
        calibration=calibration,
        base=base,
        settings=settings,
        device=device,
        overwrite=overwrite,
        revision=revision,
        token=token,
    ) as job:
        return _estimate(job, settings)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class _Job:
    """A call whose arguments are sound."""

    release: Release
    base: Checkpoint
    weights: Checkpoint
    calibration: torch.Tensor
    out: Path


@contextmanager
def _checked(
    release: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    calibration: Calibration,
    base: str | os.PathLike[str] | None,
    settings: RefitSettings,
    device: str | None,
    overwrite: bool,
    revision: str | None,
    token: str | bool | None,
) -> Iterator[_Job]:
    """Check everything that can fail before minutes of streaming, and open base and release."""
    out = Path(out_dir).expanduser()
    refuse_existing(out, overwrite=overwrite)
    check_device(device)
    opened = fetch_release(release, revision=revision, token=token)[1]
    refuse_overlap(out, opened.folder, *_local_texts(calibration))
    _refuse_target(opened, settings)
    found = find_base(opened, base, token=token)
    ids = read_calibration(
        calibration, opened.folder, samples=settings.samples, tokens=settings.tokens, seed=settings.seed
    )
    check_calibration(ids, vocab_size=opened.architecture.vocab_size)
    source = resolve(found.name, revision=found.revision, token=token)
    refuse_overlap(out, source.folder)
    with Checkpoint(source.folder) as original, Checkpoint(opened.folder) as weights:
        check_base_checkpoint(original, source)
        _check_kept_weights(opened, weights, original)
        yield _Job(release=opened, base=original, weights=weights, calibration=ids, out=out)


def _local_texts(calibration: Calibration) -> list[Path]:
    """Return the file or folder that calibration is read from, if it is one."""
    if not isinstance(calibration, str | os.PathLike):
        return []
    path = Path(calibration).expanduser()
    return [path] if path.exists() else []


def _refuse_target(release: Release, settings: RefitSettings) -> None:
    if release.is_sparse:
        raise InvalidRequestError(
            f"{release.folder} lost single weights (by {release.manifest.pruning.method}), and a refit would fill the "
            "gaps again. SparseGPT solves for the kept weights while it prunes; where Wanda or magnitude leave too "
            "much error, prune with method sparsegpt, or align the release."
        )
    if release.is_quantized:
        raise InvalidRequestError(
            f"{release.folder} is NF4, whose weights cannot be solved for. Refit the unquantized release, quantize it "
            "afterwards."
        )
    if settings.target == "residual" and release.architecture.normalizes_outputs:
        raise InvalidRequestError(
            f"{release.architecture.family.model_type} puts a norm over the output of o_proj and down_proj before it "
            "reaches the residual stream: no least squares lands there. Use the target 'output'."
        )


def _check_kept_weights(release: Release, weights: Checkpoint, base: Checkpoint) -> None:
    """Compare a layer's matrices with the base's: a config alone does not tell a model from its fine-tuned version."""
    layers, alignment = refitted_layers(release.plan), release.manifest.alignment
    if not layers or release.was_saved or _was_trained(alignment):
        return
    refitted = () if alignment is None else release.architecture.output_projections
    for weight in (weight for weight in release.architecture.projections if weight not in refitted):
        name = layer_tensor(layers[0], weight.name)
        kept = base.read(name)
        for axis, positions in enumerate(release.plan.kept_on_axes(name)):
            kept = kept if positions is None else kept.index_select(axis, torch.from_numpy(positions))
        if not torch.equal(kept, weights.read(name).to(kept.dtype)):
            raise IncompatibleError(
                f"{name!r} of {base.folder} is not what {release.folder} has kept of it: the release was pruned from "
                f"another model, {release.manifest.base.id}. Give that one."
            )


def _was_trained(alignment: object) -> bool:
    """Whether a manifest's `alignment`, or one that it followed, records more than refits."""
    while isinstance(alignment, Mapping):
        if set(alignment) - {"refit", "earlier"}:
            return True
        alignment = alignment.get("earlier")
    return False


def _estimate(job: _Job, settings: RefitSettings) -> RefitEstimate:
    plan = job.release.plan
    shapes = [
        [plan.architecture.shape(weight, plan.layers[layer]) for weight in refitted_weights(plan, layer, settings)]
        for layer in refitted_layers(plan)
    ]
    # Sums, factor and solution in fp64. The target `output` has the sums of both matrices of a layer at once.
    equations = [[8 * (2 * columns * columns + 2 * rows * columns) for rows, columns in layer] for layer in shapes]
    together = sum if settings.target == "output" else max
    return RefitEstimate(
        layers=len(shapes),
        parameters=sum(rows * columns for layer in shapes for rows, columns in layer),
        tokens=job.calibration.numel(),
        most_columns=max((columns for layer in shapes for _, columns in layer), default=0),
        solver_bytes=max((together(layer) for layer in equations if layer), default=0),
        nbytes=job.weights.nbytes,
    )


def _warn_of_few_tokens(job: _Job, settings: RefitSettings) -> None:
    estimate = _estimate(job, settings)
    if estimate.tokens < estimate.most_columns:
        logger.warning(
            "Calibration has %s tokens for matrices of up to %s columns: the ridge decides what they do not. "
            "More samples make a better refit.",
            f"{estimate.tokens:,}",
            f"{estimate.most_columns:,}",
        )


def _write(job: _Job, settings: RefitSettings, *, device: str, overwrite: bool) -> None:
    release = job.release
    with write_release(
        job.out,
        manifest=_manifest(release.manifest, job.calibration, settings),
        plan=release.plan,
        config=release_config(base_config_of(release.config)),
        overwrite=overwrite,
    ) as folder:
        copy_companions(release.folder, folder)
        writer = ShardWriter(folder)
        for name, tensor in _tensors(job, settings, device):
            writer.add(name, tensor)
        writer.finish()


def _tensors(job: _Job, settings: RefitSettings, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the release's tensors, refitted layers as they are solved: none has to wait in memory for the others."""
    plan, waiting = job.release.plan, set(job.weights.tensors)
    layers = refitted_layers(plan)
    solutions = solve_layers(job.base, job.weights, plan, job.calibration, settings, device) if layers else iter(())
    for layer, solved in tqdm(solutions, desc="Refitting", unit="layer", total=len(layers)):
        for name in sorted(name for name in waiting if name.startswith(f"{LAYER_PREFIX}.{layer}.")):
            waiting.remove(name)
            yield name, solved[name] if name in solved else job.weights.read(name)
    for name in sorted(waiting):
        yield name, job.weights.read(name)


def _manifest(manifest: Manifest, calibration: torch.Tensor, settings: RefitSettings) -> Manifest:
    described = describe_calibration(calibration)
    record = {
        "target": settings.target,
        "ridge": settings.ridge,
        "samples": described["samples"],
        "tokens": described["tokens"],
        "calibration_sha256": described["sha256"],
    }
    earlier = {} if manifest.alignment is None else {"earlier": manifest.alignment}
    return replace(
        manifest,
        alignment={"refit": record, **earlier},
        recipe={**manifest.recipe, "refit": asdict(settings)},
    )
