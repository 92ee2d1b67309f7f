"""Parts that the figures of a study share: colours, seeds as points, means with error bars, labels that do not collide.

Colours are Okabe and Ito's, which eyes with any colour deficiency tell apart; shapes tell the same, once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loram_hub.studies.aggregation import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT = "#333333", "#8a8a8a"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """How a model or a series is drawn."""

    shape: str
    """Name of matplotlib's marker."""
    colour: str
    label: str
    """In the legend, or at the side."""
    is_filled: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One figure."""

    name: str
    """Of its file, without `.png`."""
    png: bytes
    alt: str
    """What it shows, in words and numbers."""


def draw_spread(axes: Axes, place: float, numbers: Spread, mark: Mark, *, across: bool, size: float = 7.0) -> None:
    """Draw a mean with its standard deviation as a bar, and the seeds as small points.

    Args:
        axes: to draw into.
        place: where, on the axis that has no numbers.
        numbers: what to draw.
        mark: how.
        across: whether the numbers lie on the horizontal axis.
        size: of the mean's mark, in points.
    """
    values = [value for _, value in numbers.values]
    places = [place + (0.2 if across else 0.0)] * len(values)  # below the mean's bar, which would cover them
    pairs = (values, places) if across else (places, values)
    if numbers.n > 1:
        axes.plot(*pairs, ".", color=mark.colour, alpha=0.45, markersize=4, zorder=2)
    bar = numbers.deviation or 0.0
    at = (numbers.mean, place) if across else (place, numbers.mean)
    axes.errorbar(
        *at,
        xerr=bar if across else None,
        yerr=None if across else bar,
        fmt=mark.shape,
        color=mark.colour,
        markerfacecolor=mark.colour if mark.is_filled else "white",
        markersize=size,
        elinewidth=1.3,
        capsize=3,
        zorder=3,
    )


def label_sides(axes: Axes, labels: Sequence[tuple[float, str, str]], *, gap: float) -> None:
    """Write labels at the right edge of a plot, moved apart where they would overlap.

    Args:
        axes: the plot.
        labels: height, text and colour of each.
        gap: least distance of two labels, as a share of the plot's height.
    """
    low, high = axes.get_ylim()
    wanted = sorted(labels)
    heights = spaced([(height - low) / (high - low) for height, _, _ in wanted], gap)
    for height, (_, text, colour) in zip(heights, wanted, strict=True):
        written = axes.annotate(
            text, (1.0, height), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points", va="center",
            fontsize=8, color=colour, annotation_clip=False,
        )  # fmt: skip
        written.set_parse_math(False)  # a name with $ in it is no formula


def spaced(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights apart until each is at least `gap` above the one before; groups keep their middle."""
    groups: list[tuple[float, int]] = []  # lowest height and size of each group that touches
    for height in heights:
        lowest, size = height, 1
        while groups and groups[-1][0] + groups[-1][1] * gap > lowest:
            below, count = groups.pop()
            middle = ((below + (count - 1) * gap / 2) * count + (lowest + (size - 1) * gap / 2) * size) / (count + size)
            size += count
            lowest = middle - (size - 1) * gap / 2
        groups.append((lowest, size))
    return [lowest + index * gap for lowest, size in groups for index in range(size)]


def tidy(axes: Axes, *, grid: str) -> None:
    """Leave out what carries no number."""
    axes.grid(axis=grid, linewidth=0.5, alpha=0.5)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a plot, the first on top."""
    for text in axes.set_yticks(range(len(names)), names, fontsize=8.5):
        text.label1.set_parse_math(False)
    axes.set_ylim(len(names) - 0.5, -0.5)
