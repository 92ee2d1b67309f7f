"""What a folder of targets says of itself.

`teaching.json` is written when a run begins: base, settings, and the corpora at their commits, so that
whoever goes on with the run reads the same texts. `teacher.json` is written last, over all shards. Both are sealed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from loram_hub.corpora import Corpus
from loram_hub.errors import CheckpointError, InvalidRequestError, VerificationError
from loram_hub.files import dump_json, fsync_folder, read_json, resource_errors
from loram_hub.manifest import FileEntry
from loram_hub.seals import check_seal, seal
from loram_hub.teaching.settings import TeachingSettings

STARTED = "teaching.json"
TEACHER = "teacher.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRecord:
    """A run of the teacher."""

    base: Mapping[str, Any]
    """Id, commit and config_sha256 of the base model; of a local one, which has no commit, also weights_sha256."""
    settings: TeachingSettings
    compute_type: str
    """What layers computed in."""
    vocab_size: int
    requested: tuple[Corpus, ...]
    """The corpora as they were asked for; files by absolute path."""
    corpora: tuple[Corpus, ...]
    """The corpora at the commits that were read."""
    stream_digest: str
    """Of the stream of tokens, `PackedStream.stream_digest`."""
    shards: tuple[FileEntry, ...] = ()
    """Hash and size of every shard, once all are written."""

    @property
    def run_digest(self) -> str:
        """Hash of everything that decides over the targets: base, settings and stream, wherever their files lie."""
        return self._hash_of("base", "settings", "compute_type", "vocab_size", "stream_digest")

    @property
    def digest(self) -> str:
        """Hash of what decides over the targets and of the targets themselves, once all are written.

        Two machines may differ in the last bits of the targets of one run.
        """
        return self._hash_of("base", "settings", "compute_type", "vocab_size", "stream_digest", "shards")

    def _hash_of(self, *names: str) -> str:
        values = asdict(self)
        return hashlib.sha256(dump_json({name: values[name] for name in names}).encode()).hexdigest()

    def to_json(self) -> str:
        """Serialize, sealed."""
        return seal({"format": FORMAT, **asdict(self)})


def read_record(folder: Path, name: str = TEACHER) -> TeacherRecord:
    """Read what a folder of targets says of itself.

    Args:
        folder: of the run.
        name: `TEACHER`, or `STARTED` for a run that may not be finished.

    Raises:
        CheckpointError: there is none; the message tells an unfinished run apart.
        VerificationError: it was altered, or is of another format.
    """
    path = folder / name
    if not path.is_file():
        if (folder / STARTED).is_file():
            raise CheckpointError(f"{folder} is not finished: it lacks {name}. Run the same loram teach again.")
        raise CheckpointError(f"{folder} holds no targets of a teacher: it lacks {name}. Make them with loram teach.")
    values = check_seal(path, read_json(path))
    if values.pop("format", None) != FORMAT:
        raise VerificationError(f"{path} is not of format {FORMAT}, the one that is read here.")
    try:
        return _record(values)
    except (TypeError, AttributeError, InvalidRequestError) as err:
        raise VerificationError(f"{path} does not describe a run of the teacher: {err}") from err


def _record(values: dict[str, Any]) -> TeacherRecord:
    if set(values) != {field.name for field in fields(TeacherRecord)}:
        raise TypeError(f"its fields are {sorted(values)!r:.200}")
    return TeacherRecord(
        base=dict(values["base"]),
        settings=TeachingSettings(**values["settings"]),
        compute_type=str(values["compute_type"]),
        vocab_size=int(values["vocab_size"]),
        requested=tuple(Corpus(**corpus) for corpus in values["requested"]),
        corpora=tuple(Corpus(**corpus) for corpus in values["corpora"]),
        stream_digest=str(values["stream_digest"]),
        shards=tuple(FileEntry(**entry) for entry in values["shards"]),
    )


def write_started(folder: Path, record: TeacherRecord, *, rank: int) -> None:
    """Write `teaching.json` unless another process has."""
    with resource_errors(f"Writing {folder}"):
        part = _write_part(folder, STARTED, record, rank)
        with suppress(FileExistsError):
            os.link(part, folder / STARTED)  # unlike a rename, fails where the name is taken
        part.unlink()
        fsync_folder(folder)


def write_finished(folder: Path, record: TeacherRecord, *, rank: int) -> None:
    """Write `teacher.json`, last of all."""
    with resource_errors(f"Writing {folder}"):
        _write_part(folder, TEACHER, record, rank).rename(folder / TEACHER)
        fsync_folder(folder)


def _write_part(folder: Path, name: str, record: TeacherRecord, rank: int) -> Path:
    part = folder / f".{name}.{rank}.part"
    with part.open("w", encoding="utf-8") as file:
        file.write(record.to_json())
        file.flush()
        os.fsync(file.fileno())
    return part


def differences(found: TeacherRecord, asked: TeacherRecord) -> list[str]:
    """Name what differs between a run that was begun and the one that is asked for."""
    names = [f"base.{key}" for key in sorted({*found.base, *asked.base}) if found.base.get(key) != asked.base.get(key)]
    had, wants = asdict(found.settings), asdict(asked.settings)
    names += [key for key in had if had[key] != wants[key]]
    names += ["compute_type"] if found.compute_type != asked.compute_type else []
    return names if same_corpora(found, asked.requested) else [*names, "corpora"]


def same_corpora(found: TeacherRecord, requested: Sequence[Corpus]) -> bool:
    """Whether corpora are those of a run, as they were asked for then or as they were pinned."""
    return tuple(requested) in (found.requested, found.corpora)
