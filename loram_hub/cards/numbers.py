"""Numbers in files that a stranger may have written."""

from __future__ import annotations

_MOST = 1e12
"""No loss, rate or step is larger."""


def finite(value: object) -> float | None:
    """Return a number as a float; None for what is no number, not finite, or of no use for its size.

    JSON has integers of any size, which no float holds, and Python's reader takes NaN: both fail the comparison.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST:
        return None
    return float(value)
