"""Processes that share the blocks of a run: which one this is, its device, and its lock on the folder.

They need no connection: `torchrun` tells each its number, and the folder tells what is done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from loram_hub.errors import InvalidRequestError, ResourceError
from loram_hub.files import resource_errors


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Which process this is, of how many."""

    rank: int
    """Its number, from 0."""
    count: int
    """Processes of the run."""


def read_ranks() -> Ranks:
    """Read what `torchrun` and `accelerate launch` tell a process; raises `InvalidRequestError` if that is no rank."""
    told = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    if not told:
        return Ranks(rank=0, count=1)
    try:
        ranks = Ranks(rank=int(told["RANK"]), count=int(told["WORLD_SIZE"]))
    except (KeyError, ValueError) as err:
        raise InvalidRequestError(
            f"The environment has {told}; RANK and WORLD_SIZE, both numbers, say which share of the blocks is this "
            "process's. Start it with torchrun, or unset them."
        ) from err
    if not 0 <= ranks.rank < ranks.count:
        raise InvalidRequestError(f"RANK is {ranks.rank} and WORLD_SIZE {ranks.count}: ranks run from 0 to one less.")
    return ranks


def own_device(device: str | None) -> str:
    """Return the device of this process; None means the CPU."""
    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if device == "cuda" and own is not None else device or "cpu"


@contextmanager
def only_process(out: Path, rank: int) -> Iterator[None]:
    """Keep another run of the same rank out of the folder, which is made if need be.

    Raises:
        ResourceError: another process has the rank, or the folder cannot be written.
    """
    lock = out / f".rank-{rank}.lock"
    with resource_errors(f"Writing {out}"):
        out.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, timeout=0):
                yield
                lock.unlink(missing_ok=True)
        except Timeout as err:
            raise ResourceError(f"Another process is writing {out} (lock {lock.name}).") from err
