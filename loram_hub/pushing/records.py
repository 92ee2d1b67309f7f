"""What a push did, or would do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from loram_hub.hub import Gate
from loram_hub.licences import Duty


@dataclass(frozen=True, kw_only=True, slots=True)
class PushedFile:
    """A file of a push."""

    name: str
    size: int
    """Bytes."""
    is_new: bool
    """Whether `main` on the Hub lacks it or holds other content under its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """What a push did, or, from a dry run, what it would do."""

    repo_id: str
    url: str
    kind: Literal["release", "recovered adapter", "PEFT adapter"]
    base_id: str
    commit: str | None
    """Commit on `main`; None from a dry run."""
    files: tuple[PushedFile, ...]
    left_out: tuple[str, ...]
    """Files of the folder that are not pushed."""
    deleted: tuple[str, ...]
    """Files on the Hub that go: those of an earlier push, with `overwrite` also others that loaders would open."""
    licence: str
    """The Hub's identifier."""
    duties: tuple[Duty, ...]
    """Conditions of the licence."""
    private: bool
    gated: Gate
    tag: str | None
    collection: str | None
    notes: tuple[str, ...]
    """What was decided on the way, and why."""
    problems: tuple[str, ...]
    """What stops the push; always empty but in a dry run."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def new_bytes(self) -> int:
        """Bytes of the files that the Hub does not have."""
        return sum(file.size for file in self.files if file.is_new)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"nbytes": self.nbytes, "new_bytes": self.new_bytes}
