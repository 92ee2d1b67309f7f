"""Releases are written whole or not at all: weights first, then mask indexes, then the manifest over all of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loram_hub.checkpoint import CONFIG
from loram_hub.files import atomic_folder, dump_json, resource_errors
from loram_hub.manifest import MANIFEST, Manifest, file_entries, tool_versions
from loram_hub.plan import Plan
from loram_hub.release.configuration import mend_companions
from loram_hub.release.mask_index import MASK_INDEX, write_mask_index
from loram_hub.release.verification import check_described


@contextmanager
def write_release(
    out_dir: Path, *, manifest: Manifest, plan: Plan, config: Mapping[str, Any], overwrite: bool = False
) -> Iterator[Path]:
    """Write a release atomically: the block adds weights and other files to the folder it is given.

    Mask indexes, config and, last of all, the manifest with the hash of every file are written here.

    Args:
        out_dir: folder to create.
        manifest: all but `files` and `tools`, which are filled in.
        plan: the kept groups.
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

    Args:
        folder: with config and weights.
        manifest: all but `files` and `tools`, which are filled in.
        plan: the kept groups.
        only: names of the files that belong to the release; None for every file in the folder.
    """
    with resource_errors(f"Writing {folder}"):
        write_mask_index(folder / MASK_INDEX, plan)
        names = only if only is not None else [path.name for path in folder.iterdir()]
        mend_companions(folder, names, vocab_size=plan.architecture.vocab_size)
        complete = replace(manifest, files=file_entries(folder, only=only), tools=tool_versions())
        (folder / MANIFEST).write_text(complete.to_json(), encoding="utf-8")
