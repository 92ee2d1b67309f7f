"""The search along one line: which scale gives the lowest loss, in a few evaluations that always include 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loram_hub.errors import InvalidRequestError

_STEP = math.log(1.5)
"""Distance between scales until the best has neighbours on both sides, in ln(scale)."""
_NARROW = math.log(1.25)
"""Between points this near to each other a loss is a parabola for all that matters."""
_CLOSE = math.log(1.03)
"""Scales nearer to each other than this differ in loss by less than any development set can tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleSearch:
    """How the scale is looked for; the defaults are eight passes at most over a few hundred examples."""

    low: float = 0.25
    """Smallest scale that is tried, in (0, 1]."""
    high: float = 4.0
    """Largest scale that is tried, at least 1."""
    evaluations: int = 8
    """Most scales that are tried, 1.0 among them; at least 3."""
    limit: int = 256
    """Most records of the data that are read."""
    max_tokens: int = 1024
    """Longest sequence in tokens: longer texts are split, longer tasks lose the start of their prompt."""
    batch_size: int = 8
    """Sequences per forward pass at most."""

    def __post_init__(self) -> None:
        """Check the ranges; raises `InvalidRequestError`."""
        if not 0 < self.low <= 1 <= self.high < math.inf:
            raise InvalidRequestError(f"Scales from {self.low} to {self.high} are asked for; 1 must lie in between.")
        least = {"evaluations": 3, "limit": 2, "batch_size": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; at least {minimum} is needed.")


def lowest(measure: Callable[[float], float], search: ScaleSearch) -> dict[float, float]:
    """Look for the scale with the lowest loss, along ln(scale), from 1 outwards.

    1.5 and 1 / 1.5 are tried beside 1; while the best lies at an end, the next one lies further out. Once the best has
    neighbours on both sides, the vertex of the parabola through the three is next (Brent's method without its golden
    sections: a loss along this line is smooth and has one valley). Where the vertex was tried already, the wider side
    is halved, until both are narrow.

    Args:
        measure: loss at a scale; each is asked for once. What is not finite counts as infinitely high.
        search: range and number of scales.

    Returns:
        Loss by scale, in the order of trying; 1.0 is the first.
    """
    bounds = math.log(search.low), math.log(search.high)
    tried: dict[float, float] = {}
    heights: dict[float, float] = {}

    def try_at(position: float) -> None:
        # Three decimals: the record is read by people, too. A bound is taken as it is.
        scale = {bounds[0]: search.low, bounds[1]: search.high}.get(position) or round(math.exp(position), 3)
        tried[scale] = loss = measure(scale)
        heights[math.log(scale)] = loss if math.isfinite(loss) else math.inf

    try_at(0.0)
    for start in (_STEP, -_STEP):
        position = min(max(start, bounds[0]), bounds[1])
        if _is_new(position, heights):
            try_at(position)
    while len(tried) < search.evaluations:
        following = _next_position(heights, bounds)
        if following is None or not _is_new(following, heights):
            break
        try_at(following)
    return tried


def _is_new(position: float, heights: dict[float, float]) -> bool:
    return all(abs(position - known) >= _CLOSE for known in heights)


def _next_position(heights: dict[float, float], bounds: tuple[float, float]) -> float | None:
    """Say where to look next: beyond the best if it is at an end, else at the vertex of a parabola; None to end."""
    positions = sorted(heights)
    best = min(positions, key=lambda position: (heights[position], abs(position)))
    place = positions.index(best)
    if place == len(positions) - 1 and best < bounds[1] - _CLOSE:
        return min(best + _STEP, bounds[1])
    if place == 0 and best > bounds[0] + _CLOSE:
        return max(best - _STEP, bounds[0])
    if len(positions) < 3:
        return None
    middle = min(max(place, 1), len(positions) - 2)
    left, centre, right = positions[middle - 1 : middle + 2]
    vertex = _vertex([(position, heights[position]) for position in (left, centre, right)])
    if vertex is not None and _is_new(nearest := min(max(vertex, left), right), heights):
        return nearest
    first, second = (left, centre) if centre - left > right - centre else (centre, right)
    return (first + second) / 2 if vertex is None or second - first > _NARROW else None


def _vertex(points: Sequence[tuple[float, float]]) -> float | None:
    """Return where the parabola through three points is lowest; None if it has no lowest point."""
    (left, low), (centre, middle), (right, high) = points
    if not all(map(math.isfinite, (low, middle, high))):
        return None
    rise, fall = (high - middle) / (right - centre), (middle - low) / (centre - left)
    curvature = (rise - fall) / (right - left)
    if curvature <= 0:
        return None
    return (left + centre) / 2 - fall / (2 * curvature)
