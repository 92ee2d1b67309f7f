"""Which processes are at work in a study's folder: releases may be deleted by one that is alone there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class Workers:
    """The processes of a folder; each holds a lock while it works, which the kernel frees if it is killed.

    Args:
        folder: the work folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "workers"
        self._own = self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.lock"

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Count as at work."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._own)
        with self._changing():
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
            self._own.unlink(missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Yield whether no other process is at work; none can begin to be until the block ends."""
        with self._changing():
            yield not any(_is_held(path) for path in self._folder.glob("*-*.lock") if path != self._own)

    def _changing(self) -> FileLock:
        return FileLock(self._folder / "changing.lock")


def _is_held(path: Path) -> bool:
    """Whether another process holds a lock; what a killed one left behind is cleared away."""
    try:
        with FileLock(path, blocking=False):
            path.unlink(missing_ok=True)
    except Timeout:
        return True
    return False
