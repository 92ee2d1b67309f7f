"""Releases are written whole or not at all: weights first, then mask indexes, then the manifest over all of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loram_hub.checkpoint import CONFIG
from loram_hub.errors import CheckpointError, PlanMismatchError
from loram_hub.files import atomic_folder, dump_json, resource_errors
from loram_hub.manifest import MANIFEST, Manifest, Sparsification, file_entries, tool_versions
from loram_hub.masks import WEIGHT_MASKS, projection_shapes
from loram_hub.plan import Plan
from loram_hub.release.configuration import mark_format, mend_companions
from loram_hub.release.mask_index import MASK_INDEX, write_mask_index
from loram_hub.release.verification import check_described
from loram_hub.release.zeros import open_masks


@contextmanager
def write_release(
    out_dir: Path, *, manifest: Manifest, plan: Plan, config: Mapping[str, Any], overwrite: bool = False
) -> Iterator[Path]:
    """Write a release atomically: the block adds weights and other files to the folder it is given.

    Mask indexes, config and, last of all, the manifest with the hash of every file are written here. Of a sparse
    release the block also writes the masks, as `WEIGHT_MASKS`; see `seal_release`.

    Args:
        out_dir: folder to create.
        manifest: all but `files` and `tools`, which are filled in.
        plan: the kept groups; of a sparse release none, and the hash of its masks if they are those of another one.
        config: the release's `config.json`, from `release_config`.
        overwrite: replace an existing folder.

    Yields:
        The folder to write weights to.

    Raises:
        InvalidRequestError: the folder exists and is not empty.
        ResourceError: the disk is full or not writable.
        VerificationError: the base has settings that no release may have; nothing is left behind.
    """
    with atomic_folder(out_dir, overwrite=overwrite) as folder:
        (folder / CONFIG).write_text(dump_json(config), encoding="utf-8")
        yield folder
        seal_release(folder, manifest=manifest, plan=plan)
        check_described(folder)


def seal_release(folder: Path, *, manifest: Manifest, plan: Plan, only: Collection[str] | None = None) -> None:
    """Write mask indexes and manifest into a folder that holds everything else.

    Of a sparse release, what follows from its masks is filled in as well: `plan_sha256`, `kept_weights`, `parameters`.

    Args:
        folder: with config and weights, of a sparse release masks too.
        manifest: all but `files` and `tools`, which are filled in.
        plan: the kept groups; of a sparse release none, and the hash of its masks if they are those of another one.
        only: names of the files that belong to the release; None for every file in the folder.

    Raises:
        CheckpointError: a sparse release has no masks.
        PlanMismatchError: its masks are not those that the plan names.
        ResourceError: the disk is full or not writable.
    """
    with resource_errors(f"Writing {folder}"):
        write_mask_index(folder / MASK_INDEX, plan)
        mark_format(folder / CONFIG, manifest.format)
        names = only if only is not None else [path.name for path in folder.iterdir()]
        mend_companions(folder, names, vocab_size=plan.architecture.vocab_size)
        complete = replace(manifest, files=file_entries(folder, only=only), tools=tool_versions())
        if isinstance(manifest.pruning, Sparsification):
            complete = _with_masks(folder, complete, manifest.pruning, plan)
        (folder / MANIFEST).write_text(complete.to_json(), encoding="utf-8")


def _with_masks(folder: Path, manifest: Manifest, pruning: Sparsification, plan: Plan) -> Manifest:
    """Complete the manifest of a sparse release by what its masks say."""
    if WEIGHT_MASKS not in manifest.files:
        raise CheckpointError(f"{folder} has no {WEIGHT_MASKS}: a sparse release is written with its masks.")
    sha256 = manifest.files[WEIGHT_MASKS].sha256
    if plan.masks_sha256 not in (None, sha256):
        raise PlanMismatchError(f"{folder / WEIGHT_MASKS} does not hold the masks that the plan names.")
    masks = open_masks(folder, plan, pruning)
    kept_weights = sum(map(masks.kept, masks.names))
    prunable = sum(rows * columns for rows, columns in projection_shapes(plan).values())
    return replace(
        manifest,
        pruning=replace(pruning, kept_weights=kept_weights, plan_sha256=replace(plan, masks_sha256=sha256).digest),
        parameters=manifest.base.parameters - prunable + kept_weights,
    )
