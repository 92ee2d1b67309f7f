"""The folder of a run.

```
out/
  run.json          what decides over the result: release, data, recipe; written first
  checkpoints/      what a run that is cut off goes on from, and the recovered adapter of each
  adapter/          the adapter as it was trained, in pruned shapes: no server may have it
  recovered/        the adapter for the original model
  finetune.json     the record of the run, written last
  starts.json       with how many processes and which micro-batch each part was trained
  chat_template.jinja   of the tokenizer that the recipe named, where servers would not know it
  .lock             held while a run is at work
  .*.partial, .*.removed   being written or deleted, or left by a kill
```

The first process alone writes here, but for the Trainer's own part of a checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from loram_hub.errors import InvalidRequestError, ResourceError
from loram_hub.files import dump_json, fsync_file, fsync_folder, read_json, refuse_existing, resource_errors
from loram_hub.seals import check_seal, seal

Resume = Literal["auto", "never"]

RUN_FILE = "run.json"
RECORD_FILE = "finetune.json"
STARTS_FILE = "starts.json"
CHAT_TEMPLATE = "chat_template.jinja"
_LOCK = ".lock"
_PARTIAL = f".{RUN_FILE}.partial"


class RunFolder:
    """The folder of one run."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is written yet."""
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.adapter = folder / "adapter"
        self.recovered = folder / "recovered"
        self.record = folder / RECORD_FILE
        self.starts = folder / STARTS_FILE
        self.template = folder / CHAT_TEMPLATE

    def refuse_foreign(self) -> None:
        """Check that the folder is free, or that of a run; nothing is written.

        Raises:
            InvalidRequestError: something else is in it.
            ResourceError: it cannot be written to.
        """
        is_ours = (self.folder / RUN_FILE).is_file()
        is_begun = self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= {_LOCK, _PARTIAL}
        refuse_existing(self.folder, overwrite=is_ours or is_begun)  # the first file of a run may be all that it left

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder; a killed run keeps nobody out.

        Raises:
            InvalidRequestError: something else is in it.
            ResourceError: another run is at work in it, or it cannot be written to.
        """
        self.refuse_foreign()
        lock = FileLock(self.folder / _LOCK, timeout=0)
        with resource_errors(f"Writing {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout as err:
                raise ResourceError(
                    f"Another run is at work in {self.folder}. Wait for it, or name another folder."
                ) from err
        try:
            yield
        finally:
            lock.release()

    def finished(self) -> dict[str, Any] | None:
        """Return the record of a run that was done to its end; None if it was not."""
        return read_json(self.record) if self.record.is_file() else None

    def check(self, identity: Mapping[str, Any], *, resume: Resume) -> None:
        """Check that the folder is free, or that of the same run.

        Raises:
            InvalidRequestError: something else is in it, or another run with what differs.
            ResourceError: it cannot be written to.
        """
        if resume not in ("auto", "never"):
            raise InvalidRequestError(f"resume is {resume!r}; 'auto' goes on, 'never' starts anew.")
        self.refuse_foreign()
        known = self._identity() if resume == "auto" else None
        if known is not None:
            _refuse_other(self.folder, known, identity)

    def begin(self, identity: Mapping[str, Any], *, resume: Resume) -> None:
        """Write down what the run is a run of; with resume 'never', remove what an earlier one has left first.

        Until all of that has gone, the folder is that of the earlier run: a kill meanwhile leaves nothing of it that
        could be taken for the new one's.
        """
        self.check(identity, resume=resume)
        with resource_errors(f"Writing {self.folder}"):
            self._clear_removed()
            if resume == "never":
                self._remove(self.record, self.recovered, self.adapter, self.checkpoints, self.starts, self.template)
                self._write(self.folder / RUN_FILE, seal(dict(identity)))
            elif not (self.folder / RUN_FILE).exists():
                self._write(self.folder / RUN_FILE, seal(dict(identity)))

    def note_start(self, step: int, values: Mapping[str, int]) -> None:
        """Write down how the run is trained from a step on."""
        known = [start for start in self.known_starts() if start["step"] < step]
        with resource_errors(f"Writing {self.folder}"):
            self._write(self.starts, dump_json({"starts": [*known, {"step": step, **values}]}))

    def known_starts(self) -> list[dict[str, int]]:
        """Return what was noted of all parts of the run, the first step ascending."""
        found: list[dict[str, int]] = read_json(self.starts)["starts"] if self.starts.is_file() else []
        return found

    def write_template(self, template: str) -> None:
        """Write the chat template that a server has to be given."""
        with resource_errors(f"Writing {self.folder}"):
            self._write(self.template, template)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write the record: from here on, the run is done."""
        with resource_errors(f"Writing {self.folder}"):
            self._write(self.record, dump_json(record))

    def _write(self, path: Path, text: str) -> None:
        aside = path.with_name(f".{path.name}.partial")
        aside.write_text(text, encoding="utf-8")
        fsync_file(aside)
        os.replace(aside, path)
        fsync_folder(path.parent)

    def _remove(self, *paths: Path) -> None:
        """Delete files and folders, each in one step."""
        for path in paths:
            if path.exists():
                path.rename(path.with_name(f".{path.name}.removed"))
        fsync_folder(self.folder)
        self._clear_removed()

    def _clear_removed(self) -> None:
        for path in [*self.folder.glob(".*.removed")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _identity(self) -> dict[str, Any] | None:
        path = self.folder / RUN_FILE
        return check_seal(path, read_json(path)) if path.exists() else None


def _refuse_other(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    was, is_ = dict(_leaves(before)), dict(_leaves(now))
    differing = [
        f"{name} was {was.get(name)!r:.80} and is {is_.get(name)!r:.80}"
        for name in sorted({*was, *is_})
        if was.get(name) != is_.get(name)
    ]
    if differing:
        raise InvalidRequestError(
            f"{folder} is the folder of another run: {'; '.join(differing)}. Ask for the same as before to go on, name "
            "another folder, or start anew with resume='never' (--resume never)."
        )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
