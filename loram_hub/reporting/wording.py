"""Numbers and names in words, as all sections write them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TypeVar

from loram_hub.cards.escaping import visible

_T = TypeVar("_T")

MISSING = "–"
"""Cell of a table for which there is no number."""
_MOST_ROWS = 60
# Of absolute paths, of those that begin with ~ or dots, and of Windows'; not of addresses and Hub ids.
_FOLDERS = re.compile(
    r"(?<![\w:/.~-])(?:~|\.{1,2})?/(?:[^/'\":;,]+/|\.{1,2}/)+|(?<!\w)[A-Za-z]:\\+(?:[^\\'\":;,]+\\+)+|(?<!\w)~/|(?<![\w.])\.{1,2}/"
)


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with so many decimals; very small and very large ones with an exponent."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.{digits}f}"


def signed(value: float) -> str:
    """Write a difference of losses with its sign."""
    return f"{value:+.4f}".replace("-", "\u2212")


def nbytes_text(nbytes: int) -> str:
    """Write bytes in the unit that suits them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.2f} {unit}"
    return f"{nbytes} bytes"


def count_text(count: int, noun: str) -> str:
    """Write a number of things."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def span(values: Sequence[int]) -> str:
    """Write the range of whole numbers."""
    least, largest = min(values), max(values)
    return f"{least:,}" if least == largest else f"{least:,} to {largest:,}"


def at_commit(name: str, commit: str | None) -> str:
    """Name a model or adapter, with its commit if it has one."""
    return visible(name) if commit is None else f"{visible(name)} at {commit[:12]}"


def without_folders(text: str) -> str:
    """Leave of each path in a text its last part: where things lie is no reader's business."""
    return _FOLDERS.sub("", text)


def joined(words: Sequence[str]) -> str:
    """Write a list in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def thinned(rows: Sequence[_T], most: int = _MOST_ROWS) -> tuple[_T, ...]:
    """Return at most so many rows, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return tuple(rows)
    return tuple(rows[idx * (len(rows) - 1) // (most - 1)] for idx in range(most))


def plain(name: str, most: int = 28) -> str:
    """Return a name that every font can show, for a picture."""
    shown = "".join(char if " " <= char <= "~" else "?" for char in name)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."
