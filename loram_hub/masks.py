"""Masks of sparse releases."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loram_hub.errors import InvalidRequestError

_PATTERN = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)")
_LARGEST_GROUP = 32


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which weights of a row may be kept: any (both None), or n of every m consecutive ones."""

    kept: int | None = None
    """n: weights of a group that are kept."""
    of: int | None = None
    """m: weights of a group."""

    @property
    def is_unstructured(self) -> bool:
        """Whether the kept weights may lie anywhere."""
        return self.of is None

    @property
    def sparsity(self) -> float | None:
        """Share that is removed; None if the pattern does not say."""
        return None if self.kept is None or self.of is None else 1 - self.kept / self.of

    def __str__(self) -> str:
        """Return `unstructured` or `n:m`, the form `parse_pattern` reads."""
        return "unstructured" if self.of is None else f"{self.kept}:{self.of}"


def parse_pattern(text: str) -> Pattern:
    """Read `unstructured` or `n:m`, of which n are kept.

    Raises:
        InvalidRequestError: it is neither, or keeps all or more.
    """
    if text == "unstructured":
        return Pattern()
    found = _PATTERN.fullmatch(text)
    if found is None or not int(found[1]) < int(found[2]) <= _LARGEST_GROUP:
        raise InvalidRequestError(
            f"pattern is {text!r:.100}; n:m with n < m <= {_LARGEST_GROUP} is needed (n of every m weights are kept), "
            "as in 4:8, or unstructured."
        )
    return Pattern(int(found[1]), int(found[2]))
