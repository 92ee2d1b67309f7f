"""The aligned release: the source release with trained weights, and in its manifest what was done.

Nothing in it depends on time, machine or interruptions: a run that was killed and went on ends with the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch.distributed.tensor import DTensor

from loram_hub.alignment.curves import held_out_for_manifest, losses_for_manifest
from loram_hub.alignment.launch import Ranks, peers_needed
from loram_hub.alignment.settings import AlignmentSettings
from loram_hub.checkpoint import Checkpoint, ShardWriter, copy_companions
from loram_hub.corpora import Corpus
from loram_hub.errors import TrainingError
from loram_hub.manifest import Manifest, read_manifest
from loram_hub.masks import WEIGHT_MASKS
from loram_hub.release import Release, base_config_of, is_release, release_config, write_release
from loram_hub.teaching import TeacherShards

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMED = (
    "sequence_length",
    "batch_size",
    "steps",
    "learning_rate",
    "warmup_steps",
    "trainable",
    "distillation",
    "seed",
)


def corpus_names(corpora: Sequence[Corpus]) -> tuple[str, ...]:
    """Name corpora for people: a dataset by its id, files by their own name, never by where they lie.

    Names that occur twice are numbered.
    """
    names = [corpus.path.name if corpus.is_local else corpus.name for corpus in corpora]
    return tuple(
        name if names.count(name) == 1 else f"{name} ({names[: number + 1].count(name)})"
        for number, name in enumerate(names)
    )


def aligned_manifest(
    source: Manifest,
    settings: AlignmentSettings,
    *,
    corpora: Sequence[Corpus],
    records: Sequence[Mapping[str, Any]],
    run_sha256: str,
    teacher: TeacherShards | None = None,
) -> Manifest:
    """Describe the aligned release.

    Args:
        source: of the release that was trained.
        settings: of the run.
        corpora: pinned.
        records: of the run's log.
        run_sha256: `RunIdentity.digest`.
        teacher: what was distilled from, if anything was.
    """
    names = corpus_names(corpora)
    before = dict(source.alignment or {})
    refit = {"refit": before.pop("refit")} if "refit" in before else {}
    earlier = {"earlier": before} if before else {}
    described = [
        {**asdict(corpus), "source": corpus.path.name if corpus.is_local else corpus.source} for corpus in corpora
    ]
    alignment = {
        **refit,
        **earlier,
        **{name: getattr(settings, name) for name in _NAMED},
        "corpora": list(names),
        "tokens": settings.tokens,
        "losses": losses_for_manifest(records),
        "held_out": held_out_for_manifest(records),
        "run_sha256": run_sha256,
        **({} if teacher is None else {"teacher": _described(teacher)}),
    }
    recipe = {**source.recipe, "align": {**settings.to_dict(), "corpora": described}}
    return replace(source, alignment=alignment, recipe=recipe)


def _described(teacher: TeacherShards) -> dict[str, Any]:
    base = teacher.record.base
    return {"id": base["id"], "commit": base["commit"], "k": teacher.k, "digest": teacher.digest}


def is_result(folder: Path, run_sha256: str) -> bool:
    """Whether a folder is the release that a run has written."""
    if not is_release(folder):
        return False
    alignment = read_manifest(folder).alignment
    return alignment is not None and alignment.get("run_sha256") == run_sha256


def write_aligned(
    source: Release,
    trained: Mapping[str, DTensor],
    out: Path,
    *,
    manifest: Manifest,
    ranks: Ranks,
    overwrite: bool,
) -> None:
    """Write the aligned release; tensors are gathered one by one and stored in the type of the source release.

    Args:
        source: what was trained; what was not, is copied from it.
        trained: sharded weights by name.
        out: folder to create.
        manifest: from `aligned_manifest`.
        ranks: the processes; the first one writes.
        overwrite: replace an existing folder.

    Raises:
        ResourceError: the disk is full, on the first process; raised on all.
        TrainingError: a weight is not finite in the type that it is stored in.
    """
    with ExitStack() as writing, Checkpoint(source.folder) as checkpoint:
        writer: list[ShardWriter] = []

        def open_writer() -> None:
            config = release_config(base_config_of(source.config))
            opened = write_release(out, manifest=manifest, plan=source.plan, config=config, overwrite=overwrite)
            folder = writing.enter_context(opened)
            copy_companions(source.folder, folder)
            if source.is_sparse:  # zeros were kept, so that the masks are still those of the weights
                shutil.copyfile(source.folder / WEIGHT_MASKS, folder / WEIGHT_MASKS)
            writer.append(ShardWriter(folder))

        def close_writer() -> None:
            writer[0].finish()
            writing.close()

        ranks.first(open_writer)
        names = tqdm(sorted(checkpoint.tensors), desc="Writing", unit="tensor", disable=not ranks.is_first or None)
        for name in names:
            tensor = _whole(trained[name]) if name in trained else None

            def add(name: str = name, tensor: torch.Tensor | None = tensor) -> None:
                if tensor is None:
                    writer[0].add(name, checkpoint.read(name))
                else:
                    writer[0].add(name, _stored(name, tensor, _DTYPES[checkpoint.tensors[name].dtype]))

            ranks.first(add)
        ranks.first(close_writer)


def _stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values = tensor.to("cpu", dtype)
    if not torch.isfinite(values).all():
        raise TrainingError(
            f"{name} is not finite in {str(dtype).removeprefix('torch.')}, the type of the release, after the last "
            "step: no release was written. Lower learning_rate, and start anew with resume='never'."
        )
    return values


def _whole(tensor: DTensor) -> torch.Tensor:
    with peers_needed(), torch.no_grad():
        return tensor.full_tensor()
