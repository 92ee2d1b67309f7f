"""The work folder of a release: what each stage made, what it was made of, and which commits were read.

```
pruned/ refitted/ teacher/ aligned/ quantized/   outputs of the stages
aligned-run/                                     checkpoints and log of an alignment
importance.safetensors                           scores that `pruned/` was planned from
evaluation.json
.publish/<stage>.json                            what the output was made of, written when it was complete
.publish/<stage>.started.json                    what a half-done run is for
.publish/pins.json                               commits of what was named without one
```
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loram_hub.errors import LoramError, ResourceError
from loram_hub.files import fsync_folder, read_json, resource_errors
from loram_hub.seals import check_seal, seal

logger = logging.getLogger(__name__)

RECORDS = ".publish"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What is remembered of a stage that was completed."""

    made_of: Mapping[str, Any]
    """Its part of the recipe, the digests of its inputs, the versions of the tools."""
    digest: str
    """Of its output."""
    nbytes: int
    """Bytes of its output."""
    seconds: float
    """Time it took; of a stage that was resumed, the time of the last run."""
    facts: Mapping[str, Any]
    """What else later stages ask for: the commit of a push, the files of a card."""
    freed: bool = False
    """Whether the output was deleted, to save room, when nothing needed it any more."""


class Workspace:
    """A work folder; one process at a time may write to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records = folder / RECORDS

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            ResourceError: another process holds it, or it cannot be written to.
        """
        with resource_errors(f"Writing {self.folder}"):
            self._records.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._records / "lock", timeout=0)
            try:
                lock.acquire()
            except Timeout as err:
                raise ResourceError(
                    f"Another process is publishing from {self.folder}. Wait for it, or name another folder with "
                    "--work-dir."
                ) from err
        try:
            yield
        finally:
            lock.release()

    def record(self, stage: str) -> Record | None:
        """Return what is remembered of a stage; None if it was not completed, or its record is damaged."""
        values = self._read(f"{stage}.json")
        if values is None or set(values) != {field.name for field in fields(Record)}:
            return None
        return Record(**values)

    def write_record(self, stage: str, record: Record) -> None:
        """Remember that a stage was completed; afterwards nothing of it is half-done."""
        self._write(f"{stage}.json", asdict(record))
        (self._records / f"{stage}.started.json").unlink(missing_ok=True)

    def started(self, stage: str) -> Mapping[str, Any] | None:
        """Return what a half-done run of a stage is made of; None if there is none."""
        values = self._read(f"{stage}.started.json")
        made_of = None if values is None else values.get("made_of")
        return made_of if isinstance(made_of, dict) else None

    def write_started(self, stage: str, made_of: Mapping[str, Any]) -> None:
        """Remember what is being made."""
        self._write(f"{stage}.started.json", {"made_of": made_of})

    @property
    def pins(self) -> dict[str, str]:
        """Commits by what they were resolved from."""
        return {name: str(commit) for name, commit in (self._read("pins.json") or {}).items()}

    def write_pins(self, pins: Mapping[str, str]) -> None:
        """Remember commits."""
        self._write("pins.json", dict(pins))

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._records / name
        if not path.is_file():
            return None
        try:
            return check_seal(path, read_json(path))
        except LoramError as err:
            logger.warning("%s is not used: %s", path, err)
            return None

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        path = self._records / name
        written = path.with_name(f"{name}.partial")
        with resource_errors(f"Writing {path}"):
            self._records.mkdir(parents=True, exist_ok=True)
            with written.open("w", encoding="utf-8") as file:
                file.write(seal(values))
                file.flush()
                os.fsync(file.fileno())
            written.replace(path)
            fsync_folder(self._records)


def folder_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; 0 if there is none."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove(path: Path) -> None:
    """Remove a file or folder; a folder is renamed first, so that no part of it is ever taken for the whole."""
    if path.is_dir():
        aside = path.with_name(f".{path.name}.removed")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)
