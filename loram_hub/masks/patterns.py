"""Patterns of zeros: unstructured, or n:m.

n:m *keeps* n of every m consecutive weights along in_features, as NVIDIA and Wanda's paper have it. SparseGPT's code
counts the pruned ones. For 2:4 and 4:8 both mean the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from loram_hub.errors import InvalidRequestError

LARGEST_GROUP = 32
"""Largest m of n:m: a code of C(32, 16) has 30 bits."""

_N_OF_M = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """Where a mask may have its zeros; `str()` gives "unstructured" or "4:8"."""

    kept: int | None = None
    """n of n:m: weights kept in every group, from 1 to m - 1; None if unstructured."""
    of: int | None = None
    """m of n:m: consecutive weights of a row that form a group, from 2 to 32; None if unstructured."""

    def __post_init__(self) -> None:
        """Check the range; raises `InvalidRequestError`."""
        if self.kept is None and self.of is None:
            return
        if self.kept is None or self.of is None or not 0 < self.kept < self.of <= LARGEST_GROUP:
            raise InvalidRequestError(
                f"The pattern {self} keeps {self.kept} of {self.of} weights; 1 <= n < m <= {LARGEST_GROUP} is needed: "
                "2:4 or 4:8, say."
            )

    def __str__(self) -> str:
        """Return the spelling that `parse_pattern` reads."""
        return "unstructured" if self.is_unstructured else f"{self.kept}:{self.of}"

    @property
    def is_unstructured(self) -> bool:
        """Whether zeros may lie anywhere."""
        return self.kept is None and self.of is None

    @property
    def sparsity(self) -> float | None:
        """Share of the weights that is removed; None if the pattern does not say."""
        return None if self.kept is None or self.of is None else 1 - self.kept / self.of

    @property
    def group(self) -> tuple[int, int]:
        """(n, m); only of n:m."""
        assert self.kept is not None
        assert self.of is not None
        return self.kept, self.of

    def check_columns(self, columns: int, *, name: str) -> None:
        """Raise `InvalidRequestError` unless rows of so many weights divide into groups; `name` is the matrix's."""
        if self.of is not None and columns % self.of:
            raise InvalidRequestError(
                f"{name} has {columns:,} input features, which groups of {self.of} do not divide. "
                f"Use another pattern than {self}, or a sparsity."
            )


UNSTRUCTURED = Pattern()


def parse_pattern(text: str) -> Pattern:
    """Read "unstructured", or n:m such as "4:8", which keeps 4 of every 8 consecutive weights.

    Raises:
        InvalidRequestError: it is neither, or not 1 <= n < m <= 32.
    """
    if text == str(UNSTRUCTURED):
        return UNSTRUCTURED
    found = _N_OF_M.fullmatch(text)
    if found is None:
        raise InvalidRequestError(
            f"{text!r:.100} is no pattern; 'unstructured', or n:m that keeps n of every m weights (4:8), is needed."
        )
    return Pattern(kept=int(found[1]), of=int(found[2]))
