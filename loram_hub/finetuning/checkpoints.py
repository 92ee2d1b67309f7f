"""Checkpoints of transformers' Trainer that count only when they are whole.

```
run/
  checkpoint-200/            the Trainer writes it in place, file by file
    adapter_model.safetensors, optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json, ...
    loram.json               digest of the plan of the release (`origins`)
    loram-checkpoint.json    sealed, written last: name, size and SHA-256 of every other file
  .checkpoint-100.removed/   being deleted, or left by a kill
```

The Trainer itself resumes from the highest number, torn or not: without `optimizer.pt` with a fresh Adam and not a
word, without `trainer_state.json` with a crash. `latest_checkpoint` takes the newest of which every byte is as it was
written, and says what is wrong with those it passes over.

What the seal protects against: a kill, a full disk, a flipped bit, a file that was lost, added or replaced by accident.
Not against somebody who may write the folder and seals it anew. The Trainer opens its pickles (optimizer.pt,
scheduler.pt, rng_state.pth) as plain values, so that they cannot run code, but believes their numbers: resume only from
folders of your own. Nobody should publish them; `loram push` and `loram verify` refuse folders that hold them.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_hub.errors import CheckpointError, VerificationError
from loram_hub.files import fsync_file, fsync_folder, read_json, resource_errors, sha256_of
from loram_hub.seals import check_seal, seal

logger = logging.getLogger(__name__)

SEAL_FILE = "loram-checkpoint.json"
"""Written last; a checkpoint without it does not count."""

_FORMAT = 1
_FIELDS = {"format", "step", "max_steps", "has_stopped", "processes", "plan_sha256", "files"}
_NAME = re.compile(r"checkpoint-(0|[1-9]\d{0,17})")
_REMOVED = re.compile(rf"\.{_NAME.pattern}\.removed")


@dataclass(frozen=True, kw_only=True, slots=True)
class SealedCheckpoint:
    """A checkpoint of which every byte was checked; goes where a path goes: `train(resume_from_checkpoint=...)`."""

    folder: Path
    """Where it lies."""
    step: int
    """Optimizer steps that were done."""
    max_steps: int
    """Optimizer steps that the run was to do."""
    has_stopped: bool
    """Whether the run ended with it, after all its steps or early. The Trainer knows no such state: resumed from
    here, it would train at least one step more."""
    processes: int
    """How many trained together; as many continue exactly."""
    plan_sha256: str | None
    """Digest of the plan of the release that was trained on; None if nothing was known of a release."""

    def __fspath__(self) -> str:
        """Return the folder, so that the Trainer and `os.path` take it as it is."""
        return str(self.folder)


def latest_checkpoint(folder: str | os.PathLike[str]) -> SealedCheckpoint | None:
    """Find the newest checkpoint of a run that is whole: what a killed run can resume from.

    Torn, altered and unsealed ones are passed over with a warning that says what is wrong. All bytes of the one that is
    taken are read. Nothing is changed.

    Args:
        folder: `output_dir` of the run; need not exist.

    Returns:
        The checkpoint; None if there is none to resume from.

    Raises:
        ResourceError: the folder cannot be read.

    Example:
        >>> from loram_hub.finetuning import latest_checkpoint  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=latest_checkpoint("outputs"))  # doctest: +SKIP
    """
    run = Path(folder).expanduser()
    for step in sorted(steps_in(run), reverse=True):
        try:
            return open_checkpoint(checkpoint_folder(run, step))
        except VerificationError as err:
            logger.warning("Passing over %s: %s", checkpoint_folder(run, step), err)
    return None


def open_checkpoint(folder: str | os.PathLike[str]) -> SealedCheckpoint:
    """Check every byte of a checkpoint.

    Args:
        folder: `checkpoint-N` of a run.

    Returns:
        What was sealed.

    Raises:
        CheckpointError: it was not sealed: torn, or never meant to be.
        VerificationError: a file is missing, altered, or does not belong there.
        ResourceError: the folder cannot be read.
    """
    path = Path(folder)
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is no checkpoint of a Trainer: these are named checkpoint-N.")
    with resource_errors(f"Reading {path}"):
        values = _read_seal(path, step=int(match[1]))
        _check_files(path, values["files"])
    return SealedCheckpoint(
        folder=path,
        step=int(match[1]),
        max_steps=values["max_steps"],
        has_stopped=values["has_stopped"],
        processes=values["processes"],
        plan_sha256=values["plan_sha256"],
    )


def seal_checkpoint(
    folder: Path, *, max_steps: int, has_stopped: bool, processes: int, plan_sha256: str | None
) -> SealedCheckpoint:
    """Force a checkpoint that was written in full to disk, then seal it.

    Args:
        folder: `checkpoint-N`.
        max_steps: see `SealedCheckpoint`; so for the others.
        has_stopped: whether the run ends with it.
        processes: how many trained together.
        plan_sha256: digest of the plan, if one is known.

    Returns:
        What was sealed.

    Raises:
        ResourceError: the disk is full or cannot be written to.
    """
    match = _NAME.fullmatch(folder.name)
    assert match is not None, folder
    sealed = SealedCheckpoint(
        folder=folder,
        step=int(match[1]),
        max_steps=max_steps,
        has_stopped=has_stopped,
        processes=processes,
        plan_sha256=plan_sha256,
    )
    with resource_errors(f"Sealing {folder}"):
        (folder / SEAL_FILE).unlink(missing_ok=True)
        files = _list_files(folder)
        for path in files.values():
            fsync_file(path)
        entries = {name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for name, path in files.items()}
        values = {"format": _FORMAT, "step": sealed.step, "files": entries, "plan_sha256": plan_sha256}
        values |= {"max_steps": max_steps, "has_stopped": has_stopped, "processes": processes}
        aside = folder / f".{SEAL_FILE}.partial"
        aside.write_text(seal(values), encoding="utf-8")
        fsync_file(aside)
        for below in sorted({path.parent for path in files.values()} | {folder}):
            fsync_folder(below)
        aside.rename(folder / SEAL_FILE)
        fsync_folder(folder)
        fsync_folder(folder.parent)
    return sealed


def steps_in(run: Path) -> list[int]:
    """Return the steps of all checkpoints in the folder of a run, whole or not."""
    if not run.is_dir():
        return []
    with resource_errors(f"Looking for checkpoints in {run}"):
        names = [match for path in run.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted(int(match[1]) for match in names)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return where the Trainer writes the checkpoint of a step."""
    return run / f"checkpoint-{step}"


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; a kill meanwhile leaves nothing that could be taken for one.

    Raises:
        ResourceError: the disk cannot be written to.
    """
    with resource_errors(f"Deleting {folder}"):
        removed = folder.with_name(f".{folder.name}.removed")
        if removed.exists():
            shutil.rmtree(removed)
        folder.rename(removed)
        shutil.rmtree(removed)


def clear_removed(run: Path) -> None:
    """Delete what a kill left of checkpoints that were being deleted."""
    if run.is_dir():
        with resource_errors(f"Clearing {run}"):
            for path in [*run.iterdir()]:
                if _REMOVED.fullmatch(path.name):
                    shutil.rmtree(path)


def _read_seal(folder: Path, *, step: int) -> dict[str, Any]:
    if folder.is_symlink() or not folder.is_dir():
        raise VerificationError(f"{folder} is no folder of its own.")
    if not (folder / SEAL_FILE).is_file():
        raise CheckpointError(f"it has no {SEAL_FILE}: either it was not written to its end, or without SealCallback.")
    values = check_seal(folder / SEAL_FILE, read_json(folder / SEAL_FILE))
    if values.get("format") != _FORMAT or values.get("step") != step or set(values) != _FIELDS:
        raise VerificationError(
            f"{SEAL_FILE} is of step {values.get('step')!r:.40} in format {values.get('format')!r:.40}; step {step} in "
            f"format {_FORMAT} was expected."
        )
    return values


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    found = _list_files(folder)
    found.pop(SEAL_FILE)
    missing, unknown = sorted(files.keys() - found.keys()), sorted(found.keys() - files.keys())
    if missing or unknown:
        raise VerificationError(f"{missing[0]} is missing." if missing else f"{unknown[0]} does not belong there.")
    for name, entry in files.items():  # all sizes before the first hash: what is torn is told at once
        size = found[name].stat().st_size
        if size != entry["size"]:
            raise VerificationError(f"{name} has {size:,} bytes, {entry['size']:,} were written.")
    for name, entry in files.items():
        digest = sha256_of(found[name])
        if digest != entry["sha256"]:
            raise VerificationError(f"{name} was altered: its SHA-256 is {digest}, not {entry['sha256']}.")


def _list_files(folder: Path) -> dict[str, Path]:
    """Return all files of a checkpoint by their path in it; those of a sharded model lie in folders of their own."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise VerificationError(f"{name} is no plain file.")
        if path.is_file() and name != f".{SEAL_FILE}.partial":
            found[name] = path
    return found
