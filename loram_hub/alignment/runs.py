"""The folder of a run: what it is a run of, its lock, its log, its checkpoints.

```
OUT-run/
  run.json       what decides over the result: release, stream, teacher, settings; and the corpora with their commits
  log.jsonl      what each step brought; stays when the run is done
  curves.png     the log drawn, when the last step is done; only where matplotlib is installed
  checkpoints/   deleted when the run is done
  .lock          held while a run is at work; stays, for a lock that is removed can be held by two at once
```

A run that is started again with the same arguments goes on from its newest checkpoint. It reads datasets from the
commits that it read at first, even if their branches have moved. The first process alone touches these files.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loram_hub.alignment.curves import RunLog, draw_curves
from loram_hub.alignment.settings import FREE, AlignmentSettings
from loram_hub.corpora import Corpus, PackedStream
from loram_hub.errors import InvalidRequestError, MissingDependencyError, ResourceError, VerificationError
from loram_hub.files import dump_json, fsync_file, fsync_folder, read_json, resource_errors, sha256_of
from loram_hub.manifest import MANIFEST
from loram_hub.release import Release
from loram_hub.seals import check_seal, seal

RUN_FILE = "run.json"
LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"
CURVES = "curves.png"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """What decides over the bytes of the result."""

    release_sha256: str
    """Hash of the source release's manifest, which has the hash of every other file."""
    stream_sha256: str
    """`PackedStream.stream_digest`."""
    teacher_sha256: str | None
    """Digest of the teacher's targets; None without one."""
    precision: str
    """What `auto` stood for."""
    settings: Mapping[str, Any]
    """All but those of `settings.FREE`."""

    @property
    def digest(self) -> str:
        """A hash of all of it."""
        return hashlib.sha256(dump_json(asdict(self)).encode()).hexdigest()


def identity_of(
    release: Release, stream: PackedStream, teacher_sha256: str | None, settings: AlignmentSettings, precision: str
) -> RunIdentity:
    """Say what a run is a run of."""
    return RunIdentity(
        release_sha256=sha256_of(release.folder / MANIFEST),
        stream_sha256=stream.stream_digest,
        teacher_sha256=teacher_sha256,
        precision=precision,
        settings={name: value for name, value in settings.to_dict().items() if name not in FREE},
    )


class RunFolder:
    """The folder of one run; use on the first process alone, inside `locked`."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is written yet."""
        self.folder = folder
        self.checkpoints = folder / CHECKPOINTS
        self.log = RunLog(folder / LOG_FILE)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder; a killed run keeps nobody out.

        Raises:
            ResourceError: another run is at work in it, or it cannot be written to.
        """
        lock = FileLock(self.folder / ".lock", timeout=0)
        with resource_errors(f"Writing {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout as err:
                raise ResourceError(
                    f"Another run is at work in {self.folder}. Wait for it, or name another run_dir."
                ) from err
        try:
            yield
        finally:
            lock.release()

    def pinned(self, corpora: Sequence[Corpus]) -> tuple[Corpus, ...]:
        """Return the corpora as this run has read them before, if it has been asked for the same ones."""
        known = self._read()
        if known is None or known.get("corpora") != [asdict(corpus) for corpus in corpora]:
            return tuple(corpora)
        return tuple(Corpus(**values) for values in known["pinned"])

    def begin(self, identity: RunIdentity, corpora: Sequence[Corpus], pinned: Sequence[Corpus]) -> None:
        """Write down what this is a run of, unless that was done.

        Raises:
            InvalidRequestError: it is the folder of another run.
        """
        self.check(identity)
        if self._read() is not None:
            return
        values = {
            "identity": asdict(identity),
            "corpora": [asdict(corpus) for corpus in corpora],
            "pinned": [asdict(corpus) for corpus in pinned],
        }
        aside = self.folder / f".{RUN_FILE}.partial"
        with resource_errors(f"Writing {self.folder}"):
            aside.write_text(seal(values), encoding="utf-8")
            fsync_file(aside)
            os.replace(aside, self.folder / RUN_FILE)
            fsync_folder(self.folder)

    def check(self, identity: RunIdentity) -> None:
        """Raise `InvalidRequestError` if the folder is another run's, with what differs."""
        known = self._read()
        if known is None:
            return
        before, now = _flat(known["identity"]), _flat(asdict(identity))
        differing = [
            f"{name} was {before.get(name)!r:.80} and is {now.get(name)!r:.80}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if differing:
            raise InvalidRequestError(
                f"{self.folder} is the folder of another run: {'; '.join(differing)}. Ask for the same as before to go "
                "on, name another run_dir, or start anew with resume='never'."
            )

    def forget(self) -> None:
        """Remove what an earlier run has left, its checkpoints excepted."""
        with resource_errors(f"Writing {self.folder}"):
            for name in (RUN_FILE, LOG_FILE, CURVES):
                (self.folder / name).unlink(missing_ok=True)

    def cut_log(self, step: int) -> None:
        """Bring the log back to a checkpoint's step; -1 empties it.

        Raises:
            VerificationError: steps are missing from it.
        """
        self.log.cut_back(step)
        found = [record["step"] for record in self.log.read() if record.get("learning_rate") is not None]
        if found != list(range(1, step + 1)):
            raise VerificationError(
                f"{self.folder / LOG_FILE} does not have every step up to {step}, of which there is a "
                "checkpoint. It was altered; start anew with resume='never'."
            )

    def record(self, measured: Mapping[str, Any]) -> None:
        """Add to the log, on disk: no checkpoint may outlast the record of a step before it."""
        self.log.append(measured)
        with resource_errors(f"Writing {self.folder}"):
            fsync_file(self.folder / LOG_FILE)

    def draw(self) -> None:
        """Draw the log as `curves.png`, if matplotlib is installed.

        Raises:
            ResourceError: the disk is full or cannot be written to.
        """
        try:
            picture = draw_curves(self.log.read())
        except MissingDependencyError as err:
            logger.debug("No %s: %s", CURVES, err)
            return
        aside = self.folder / f".{CURVES}.partial"
        with resource_errors(f"Writing {self.folder}"):
            aside.write_bytes(picture)
            os.replace(aside, self.folder / CURVES)

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / RUN_FILE
        return check_seal(path, read_json(path)) if path.exists() else None


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in identity.items() if name != "settings"}, **identity["settings"]}
