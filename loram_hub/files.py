"""Files as every format here needs them: strict JSON, content hashes, folders that appear whole or not at all.

JSON that comes from outside is untrusted: the size is capped before parsing, duplicate keys and NaN are refused
(Python's own parser takes both), and so is nesting that would exhaust the stack.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from loram_hub.errors import CheckpointError, InvalidRequestError, LoramError, ResourceError, VerificationError

MAX_JSON_BYTES = 8 * 1024 * 1024
"""Cap on config, manifest and adapter configuration files; a shard index of a very large model has its own."""

MAX_INDEX_BYTES = 128 * 1024 * 1024
"""Cap on `model.safetensors.index.json`: one line per tensor, a few million tensors at most."""

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors, written in Rust, reports the system's errors


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from an untrusted file.

    Args:
        path: the file.
        max_bytes: files larger than this are refused before they are read.

    Returns:
        The object.

    Raises:
        CheckpointError: the file is missing.
        VerificationError: it is too large, unreadable, no plain file, no JSON object, or has duplicate keys, NaN or
            excessive nesting.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would keep its reader waiting
            raise VerificationError(f"{path} is no plain file; JSON was expected there.")
        size = status.st_size
        if size > max_bytes:
            raise VerificationError(f"{path} is {size:,} bytes; at most {max_bytes:,} are read. Is it the right file?")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise CheckpointError(f"{path.name} is missing in {path.parent}.") from err
    except UnicodeDecodeError as err:
        raise VerificationError(f"{path} is not UTF-8 text: {err}") from err
    except OSError as err:
        raise VerificationError(f"{path!s:.300} cannot be read: {err.strerror or 'unknown reason'}.") from err
    return parse_json(text, source=str(path))


def parse_json(text: str, *, source: str) -> dict[str, Any]:
    """Parse an untrusted JSON object; `source` names it in errors. Raises `VerificationError`."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise VerificationError(f"{source} has the key {twice!r:.200} twice; which one counts cannot be told.")
        return found

    def refuse_constant(name: str) -> NoReturn:
        raise VerificationError(f"{source} holds {name}, which is not JSON.")

    def finite(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise VerificationError(f"{source} holds {digits[:40]}, which no float can.")
        return value

    try:
        value = json.loads(
            text, object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant, parse_float=finite
        )
    except VerificationError:
        raise
    except (ValueError, RecursionError) as err:
        raise VerificationError(f"{source} is not valid JSON: {err}") from err
    if not isinstance(value, dict):
        raise VerificationError(f"{source} must hold a JSON object, found {type(value).__name__}.")
    return value


def dump_json(value: object) -> str:
    """Serialize to the one JSON text that all files here use: sorted keys, two spaces, a final newline, no NaN."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Force a folder's entries to disk; without it a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Force a file's bytes to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_bytes` does, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file that appears whole or not at all, in place of one that is there, and outlasts a power cut.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with resource_errors(f"Writing {path}"):
        try:
            partial.write_bytes(content)
            fsync_file(partial)
            partial.replace(path)
            fsync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def resource_errors(action: str) -> Iterator[None]:
    """Turn 'no space left', 'quota', 'read-only' and the like into a `ResourceError` that names the action."""
    try:
        yield
    except LoramError:
        raise
    except (OSError, SafetensorError) as err:
        number = errno_of(err)
        if number in (None, errno.ENOENT):  # a file that is not there is no matter of disk or memory
            raise
        hint = "Free some space or write elsewhere." if number in DISK_FULL else "Write elsewhere, or mend the path."
        raise ResourceError(f"{action} failed: {err}. {hint}") from err
    except MemoryError as err:
        raise ResourceError(f"{action} ran out of memory.") from err


def errno_of(err: Exception) -> int | None:
    """Return the system's number of an error, also of one from a library in Rust, which has it in the text alone."""
    if isinstance(err, OSError):
        return err.errno
    found = _OS_ERROR.search(str(err))
    return int(found[1]) if found else None


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Build a folder aside and let it appear under its name in one step.

    The block fills the folder it is given. When it ends, every file is forced to disk and the folder takes the place of
    `target`; when it raises, or the process is killed, `target` is what it was. What a killed run left behind is
    removed by the next one.

    Args:
        target: the folder to create.
        overwrite: replace an existing folder (it stays in place until the new one is complete).

    Yields:
        The folder to fill, `.<name>.partial` beside `target`.

    Raises:
        InvalidRequestError: `target` exists and is not an empty folder, and `overwrite` is false.
        ResourceError: the disk is full or not writable, or another process is building the same folder.
    """
    target = Path(os.path.realpath(target))  # a link to a folder stays a link
    refuse_existing(target, overwrite=overwrite)
    partial = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    lock_path = target.with_name(f".{target.name}.lock")
    with resource_errors(f"Writing {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock_path, timeout=0):
                try:
                    if replaced.exists() and not target.exists():
                        replaced.rename(target)  # a run was killed between the two renames of `_swap`
                    refuse_existing(target, overwrite=overwrite)  # again: the first look was without the lock
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir()
                    yield partial
                    _publish(partial, target, replaced)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
                    lock_path.unlink(missing_ok=True)
        except Timeout as err:
            raise ResourceError(f"Another process is writing {target} (lock {lock_path.name}).") from err


def refuse_overlap(target: Path, *inputs: Path) -> None:
    """Raise `InvalidRequestError` if writing `target` would replace an input, or a folder that an input lies in."""
    out = Path(os.path.realpath(target))
    for folder in inputs:
        read = Path(os.path.realpath(folder))
        if out == read or out in read.parents or read in out.parents:
            raise InvalidRequestError(f"{target} and {folder} overlap: what is read would be written over.")


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise `InvalidRequestError` if `target` holds something that may not be replaced, or cannot be made at all."""
    above = next((folder for folder in Path(os.path.abspath(target)).parents if folder.exists()), Path("/"))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ResourceError(f"{target} cannot be created: {above} is no folder that can be written to.")
    if target.is_mount():
        raise InvalidRequestError(f"{target} is a mount point, which cannot be exchanged; name a folder inside it.")
    if target.exists() and not target.is_dir():
        raise InvalidRequestError(f"{target} is a file; give the name of a folder to create.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InvalidRequestError(
            f"{target} already exists and is not empty. Choose another name, or ask to overwrite it."
        )


def _publish(partial: Path, target: Path, replaced: Path) -> None:
    for path in sorted(partial.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        else:
            fsync_file(path)
    fsync_folder(partial)
    if not target.exists():
        partial.rename(target)
    elif not _exchange(partial, target):
        _swap(partial, target, replaced)
    fsync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step, so that neither name is ever vacant; false where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def _swap(partial: Path, target: Path, replaced: Path) -> None:
    """Replace `target` in two renames; a kill between them leaves `replaced`, which the next run puts back."""
    shutil.rmtree(replaced, ignore_errors=True)
    target.rename(replaced)
    try:
        partial.rename(target)
    except OSError:
        replaced.rename(target)
        raise
