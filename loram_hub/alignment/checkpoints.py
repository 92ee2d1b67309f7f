"""Checkpoints of a run that survive a kill at any instant: written aside, forced to disk, sealed, renamed.

```
checkpoints/
  step-00000200/            appears whole, by one rename
    __0_0.distcp ...        the state, one file or more per rank (`state_files`)
    .metadata               DCP's index of them
    extra.json              what the run wants back beside its state: position in the corpora, counters
    checkpoint.json         sealed: step, and name, size and SHA-256 of every other file
  .step-00000400.partial/   being written, or left by a kill: never read, cleared by the next save
```

`newest` takes the newest checkpoint of which every byte is as it was written and passes over what is torn or altered.
A seal protects against accidents, not against whoever can write the folder. Nothing in a checkpoint can run code (see
`state_files`), and links are refused, but its numbers are believed: resume only from folders of your own.

All methods are collective: every rank of the group calls them together, and all return, or raise, the same. If one
dies, the others raise `TrainingError`. The folder must be seen by all ranks. Hashing is shared: rank r of W hashes
every W-th file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from loram_hub.alignment.launch import peers_needed
from loram_hub.alignment.state_files import read_index, read_state, write_state
from loram_hub.errors import InvalidRequestError, LoramError, ResourceError, VerificationError
from loram_hub.files import dump_json, fsync_file, fsync_folder, read_json, resource_errors, sha256_of
from loram_hub.seals import check_seal, seal

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
EXTRA = "extra.json"

_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,18})")
_PARTIAL, _REPLACED, _REMOVED = ".partial", ".replaced", ".removed"

Result = TypeVar("Result")
Files = dict[str, dict[str, int | str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundCheckpoint:
    """A checkpoint of which every byte was checked."""

    step: int
    """Optimizer steps that were done."""
    folder: Path
    """Where it lies."""
    extra: Mapping[str, Any]
    """What was saved beside the state."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: of the checkpoints and nothing else; created by the first save.
        keep: how many to keep, the newest ones; at least one.
        process_group: ranks that save and load together; default: all.

    Raises:
        InvalidRequestError: `keep` is less than one.
    """

    def __init__(self, folder: Path, *, keep: int, process_group: dist.ProcessGroup | None = None) -> None:
        if keep < 1:
            raise InvalidRequestError(f"{keep} checkpoints cannot be kept: at least 1 is needed to resume from.")
        self._folder = Path(folder)
        self._keep = keep
        self._ranks = _Ranks(process_group)
        self._damaged: set[str] = set()

    def save(self, step: int, state: dict[str, Any], extra: Mapping[str, Any]) -> Path:
        """Save the state of a run after a step, then delete what is older than the ones to keep.

        Until the new checkpoint is on disk the old ones stay as they are. Checkpoints of later steps are deleted: they
        were damaged, or the run went back behind them.

        Args:
            step: optimizer steps done.
            state: nested dicts of tensors, DTensors and plain values, of this rank.
            extra: JSON values; those of rank 0 are saved.

        Returns:
            The folder of the checkpoint.

        Raises:
            ResourceError: the disk is full or cannot be written to, on whichever rank; the old ones are intact.
            InvalidRequestError: `extra` is no JSON, or `step` is negative.
        """
        name = _name(step)
        aside = self._folder / f".{name}{_PARTIAL}"
        doing = f"Writing the checkpoint of step {step} to {self._folder}"
        try:
            self._ranks.first(lambda: self._begin(aside, extra), doing)
            write_state(state, aside, group=self._ranks.group)
            files = self._sealed_files(aside, doing)
            self._ranks.first(lambda: self._finish(aside, step, files), doing)
        except LoramError:
            if self._ranks.rank == 0:  # no rank is writing any more: all have been told
                shutil.rmtree(aside, ignore_errors=True)
            raise
        return self._folder / name

    def newest(self) -> FoundCheckpoint | None:
        """Find the newest checkpoint whose files are all there and as they were written; None if there is none.

        Damaged ones are passed over, with a warning that says what is wrong. All bytes of the one that is taken are
        read.

        Raises:
            ResourceError: the folder cannot be read.
        """
        doing = f"Looking for checkpoints in {self._folder}"
        for step in self._ranks.first(self._steps, doing):
            folder = self._folder / _name(step)
            try:
                files, extra = self._ranks.first(partial(_read_manifest, folder, step), doing)
                self._check_hashes(folder, files, doing)
            except VerificationError as err:
                self._damaged.add(folder.name)
                if self._ranks.rank == 0:
                    logger.warning("Passing over checkpoint %s: %s", folder, err)
                continue
            return FoundCheckpoint(step=step, folder=folder, extra=extra)
        return None

    def load(self, found: FoundCheckpoint, state: dict[str, Any]) -> None:
        """Load a checkpoint into a state in place; it may have been saved by another number of ranks.

        Args:
            found: from `newest`.
            state: of the same keys and whole shapes as the one that was saved.

        Raises:
            IncompatibleError: it is the checkpoint of another state.
            VerificationError: it holds something that no checkpoint needs.
            ResourceError: a file cannot be read.
        """
        index = self._ranks.first(lambda: read_index(found.folder), f"Reading the checkpoint {found.folder}")
        read_state(state, found.folder, index, group=self._ranks.group)

    def clear(self) -> None:
        """Delete all checkpoints, and the folder if nothing else is in it.

        Raises:
            ResourceError: the disk cannot be written to.
        """
        self._ranks.first(self._clear, f"Deleting the checkpoints in {self._folder}")

    def _begin(self, aside: Path, extra: Mapping[str, Any]) -> None:
        try:
            text = dump_json(dict(extra))
        except (TypeError, ValueError) as err:
            raise InvalidRequestError(f"What is saved beside a checkpoint must be JSON values: {err}") from err
        self._folder.mkdir(parents=True, exist_ok=True)
        self._clean_up()
        aside.mkdir()
        (aside / EXTRA).write_text(text, encoding="utf-8")
        fsync_file(aside / EXTRA)

    def _sealed_files(self, aside: Path, doing: str) -> Files:
        names = self._ranks.first(lambda: sorted(os.listdir(aside)), doing)
        hashed = self._ranks.each(
            lambda: {name: _entry(aside / name) for name in self._ranks.share(names)}, f"{doing}: hashing"
        )
        return {name: entry for part in hashed for name, entry in part.items()}

    def _finish(self, aside: Path, step: int, files: Files) -> None:
        (aside / MANIFEST).write_text(seal({"format": _FORMAT, "step": step, "files": files}), encoding="utf-8")
        fsync_file(aside / MANIFEST)
        fsync_folder(aside)
        target = self._folder / _name(step)
        if target.exists():  # a kill between the two renames leaves `.replaced`, which `_clean_up` puts back
            target.rename(self._folder / f".{target.name}{_REPLACED}")
        aside.rename(target)
        fsync_folder(self._folder)
        self._damaged.discard(target.name)
        self._delete_old(step)
        logger.info("Saved step %d: %s, %d bytes", step, target, sum(int(entry["size"]) for entry in files.values()))

    def _delete_old(self, newest: int) -> None:
        """Delete all but the newest ones up to this step, the oldest first, and those that were found damaged."""
        steps = sorted(_steps_in(self._folder))
        sound = [step for step in steps if step <= newest and _name(step) not in self._damaged]
        kept = set(sound[-self._keep :])
        for step in steps:
            if step not in kept:
                removed = self._folder / f".{_name(step)}{_REMOVED}"
                (self._folder / _name(step)).rename(removed)  # so that half of it is never taken for a checkpoint
        self._damaged.clear()
        self._clean_up()

    def _clean_up(self) -> None:
        """Put back what a kill left between two names, and delete what it left half written or half deleted."""
        for path in [*self._folder.iterdir()]:
            name = path.name.removeprefix(".").removesuffix(_REPLACED)
            if path.name == f".{name}{_REPLACED}" and _NAME.fullmatch(name) and not (self._folder / name).exists():
                path.rename(self._folder / name)
            elif path.name.startswith(".step-") and path.suffix in (_PARTIAL, _REPLACED, _REMOVED):
                shutil.rmtree(path)

    def _steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        with contextlib.suppress(OSError):  # a folder that may only be read can still be resumed from elsewhere
            self._clean_up()
        return sorted(_steps_in(self._folder), reverse=True)

    def _check_hashes(self, folder: Path, files: Files, doing: str) -> None:
        def check() -> None:
            for name in self._ranks.share(sorted(files)):
                try:
                    digest = sha256_of(folder / name)
                except OSError as err:
                    raise VerificationError(f"{name} cannot be read: {err.strerror}.") from err
                if digest != files[name]["sha256"]:
                    raise VerificationError(
                        f"{name} was altered: its SHA-256 is {digest}, not {files[name]['sha256']}."
                    )

        self._ranks.each(check, doing)

    def _clear(self) -> None:
        if not self._folder.is_dir():
            return
        for step in sorted(_steps_in(self._folder)):
            (self._folder / _name(step)).rename(self._folder / f".{_name(step)}{_REMOVED}")
        self._clean_up()
        with contextlib.suppress(OSError):  # something else is in it
            self._folder.rmdir()


class _Ranks:
    """Processes that act together: what goes wrong on one is raised on all, so that none waits for ever."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.is_alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self.is_alone else dist.get_rank(group)
        self.size = 1 if self.is_alone else dist.get_world_size(group)

    def share(self, items: list[str]) -> list[str]:
        """Return this rank's part of a list."""
        return items[self.rank :: self.size]

    def first(self, action: Callable[[], Result], doing: str) -> Result:
        """Let rank 0 act, and give its result to all."""
        result = self.each(lambda: action() if self.rank == 0 else None, doing)[0]
        return result  # type: ignore[return-value]  # that of rank 0

    def each(self, action: Callable[[], Result], doing: str) -> list[Result]:
        """Let every rank act, and give all results to all; the first error of any rank is raised on all."""
        result: Result | LoramError
        try:
            with resource_errors(doing):
                result = action()
        except LoramError as err:
            result = err
        except OSError as err:
            result = ResourceError(f"{doing} failed: {err}. Is another process at work in this folder?")
        results: list[Any] = [result]
        if not self.is_alone:
            results = [None] * self.size
            with peers_needed():
                dist.all_gather_object(results, result, group=self.group)
        for each in results:
            if isinstance(each, LoramError):
                raise each
        return results


def _name(step: int) -> str:
    if step < 0:
        raise InvalidRequestError(f"A checkpoint of step {step} cannot be: steps count from 0.")
    return f"step-{step:08d}"


def _steps_in(folder: Path) -> list[int]:
    names = [match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [step for match in names if _name(step := int(match[1])) == match[0]]


def _entry(path: Path) -> dict[str, int | str]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _read_manifest(folder: Path, step: int) -> tuple[Files, Mapping[str, Any]]:
    """Check everything but the hashes, and return what the manifest and the extra file hold.

    Raises:
        VerificationError: the checkpoint is damaged.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise VerificationError(f"{folder.name} is no folder of its own.")
    found = {path.name: path.lstat() for path in folder.iterdir()}
    links = sorted(name for name in found if (folder / name).is_symlink() or not (folder / name).is_file())
    if links:
        raise VerificationError(f"{links[0]} is no plain file.")
    values = check_seal(folder / MANIFEST, read_json(folder / MANIFEST))
    files: Files = values.get("files", {})
    if values.get("format") != _FORMAT or values.get("step") != step:
        raise VerificationError(
            f"{MANIFEST} is of step {values.get('step')} in format {values.get('format')}; "
            f"step {step} in format {_FORMAT} was expected."
        )
    missing, unknown = sorted(files.keys() - found), sorted(found.keys() - files - {MANIFEST})
    if missing or unknown:
        raise VerificationError(f"{missing[0]} is missing." if missing else f"{unknown[0]} does not belong there.")
    for name, entry in files.items():
        if found[name].st_size != entry["size"]:
            raise VerificationError(f"{name} has {found[name].st_size:,} bytes, {entry['size']:,} were written.")
    return files, read_json(folder / EXTRA)
