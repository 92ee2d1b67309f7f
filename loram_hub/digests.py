"""Hashes of files and checks that are remembered, so that a release is read once in full and not at every load.

A digest is remembered under the file's identity: device, inode, size, and the times of the last change of content and
of attributes. The kernel sets the last of these and offers no call to set it back, so a file that is written to, or
replaced, is hashed again. Bits that rot on the disk without a write go unnoticed here; `loram verify` always reads.

The records lie in the user's own cache, never beside the files: a release that is downloaded cannot bring its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import constants

from loram_hub.files import sha256_of

_MARGIN_NS = 100_000_000
"""Two changes within one tick of the file system's clock cannot be told apart; ticks are at most some 20 ms."""
_PIECE = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class _Identity:
    """What changes whenever a file's content does."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def remembered_sha256(path: Path, *, read: Callable[[Path], str] = sha256_of) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, from memory if the file is the one that was hashed.

    Args:
        path: the file.
        read: hashes a file that is not remembered. What else it checks of the content is remembered with the hash.
    """
    real = Path(os.path.realpath(path))
    record = _record_of(real, read)
    identity = _identity_of(real)
    known = _recall(record, identity)
    if known is not None:
        return known
    started = time.time_ns()
    digest = read(path)
    if _identity_of(real) == identity and identity.ctime_ns < started - _MARGIN_NS:
        with suppress(OSError):  # a cache that cannot be written costs time, nothing else
            _remember(record, identity, digest)
    return digest


def check_once(content: str, check: Callable[[], None]) -> None:
    """Run a check, unless it was passed before for the same content.

    Nothing is looked at here that could have changed since: the caller has just checked that the content has the hash.

    Args:
        content: SHA-256 that names the check and all that it depends on.
        check: raises if something is wrong; only what passed is remembered.
    """
    record = _records() / "checked" / content
    if record.is_file():
        return
    check()
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        record.touch()


def git_sha1_of(content: Path | bytes) -> str:
    """Return the id that git gives to a blob: how the Hub names the content of files outside LFS."""
    if isinstance(content, bytes):
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    digest = hashlib.sha1(b"blob %d\0" % content.stat().st_size, usedforsecurity=False)
    with content.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _identity_of(path: Path) -> _Identity:
    found = path.stat()
    return _Identity(
        device=found.st_dev,
        inode=found.st_ino,
        size=found.st_size,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
    )


def _record_of(path: Path, read: Callable[[Path], str]) -> Path:
    name = hashlib.sha256(read.__name__.encode() + b"\0" + os.fsencode(path)).hexdigest()
    return _records() / "sha256" / f"{name}.json"


def _records() -> Path:
    return Path(constants.HF_HOME) / "loram"


def _recall(record: Path, identity: _Identity) -> str | None:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("file") != asdict(identity):
        return None
    digest = found.get("sha256")
    return digest if isinstance(digest, str) else None


def _remember(record: Path, identity: _Identity, digest: str) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    written = record.with_name(f"{record.name}.{os.getpid()}.part")
    written.write_text(json.dumps({"file": asdict(identity), "sha256": digest}), encoding="utf-8")
    written.replace(record)
