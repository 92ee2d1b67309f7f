"""Faults to order: which request they hit, and what happens to it."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Fault:
    """Something that goes wrong with the requests whose line `METHOD /path?query` matches `pattern`."""

    pattern: str
    times: int = 1
    """How many requests it hits; -1: all of them."""
    skip: int = 0
    """How many matching requests it lets through first."""
    status: int | None = None
    """Answer with this status instead of doing what is asked."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers of that answer, such as `Retry-After`."""
    drop_after: int | None = None
    """Close the connection after so many bytes of an upload's body, or of a download's; at 0 nothing is answered."""
    reset: bool = False
    """Close it with RST instead of FIN; alone it means the same as with `drop_after=0`."""
    lost_response: bool = False
    """Do what is asked, then close the connection without an answer."""
    corrupt_at: int | None = None
    """Flip the bits of the byte at this offset of the file that is sent."""
    delay: float = 0.0
    """Seconds to wait before anything else."""
    hits: int = 0
    """How many requests it has hit."""

    @property
    def refuses(self) -> bool:
        """Whether the connection closes before anything of the request is looked at."""
        return self.drop_after == 0 or (self.reset and self.drop_after is None and not self.lost_response)

    def _hits(self, line: str) -> bool:
        if self.times == 0 or not re.search(self.pattern, line):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        self.hits += 1
        return True


class Faults:
    """The faults in force; the first that matches a request hits it, alone."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        """Put a fault in force."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def take(self, line: str) -> Fault | None:
        """Return the fault that hits the request, and count it."""
        with self._lock:
            return next((fault for fault in self._faults if fault._hits(line)), None)

    def clear(self) -> None:
        """Let everything work again."""
        with self._lock:
            self._faults.clear()
