"""The memory of a training step as a waterfall against the line of the GPU. PNG, equal input equal bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loram_hub.cards.pictures import figure, png
from loram_hub.files import resource_errors
from loram_hub.fitting.estimating import Fit
from loram_hub.fitting.wording import LABELS, gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue, orange, grey of Okabe and Ito's palette, which eyes with any colour deficiency tell apart.
_STANDING, _STEP, _RESERVED, _TOTAL, _LINE = "#0072B2", "#E69F00", "#999999", "#1a1a1a", "#D55E00"
_OF_A_STEP = ("inputs", "activations", "logits", "workspace")
_RESERVES = ("context", "fragmentation")
_LEAST_SHOWN = 0.002
"""Share of the total below which a component is drawn with the others that are small."""


def save_picture(fit: Fit, path: str | os.PathLike[str]) -> str:
    """Draw an estimate and write it as PNG.

    Args:
        fit: the estimate.
        path: where it goes.

    Returns:
        What the picture shows, in words, for those who cannot see it.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ResourceError: the file cannot be written.
    """
    target = Path(path)
    data = waterfall(fit)
    with resource_errors(f"Writing {target}"):
        target.write_bytes(data)
    return alternative_text(fit)


def alternative_text(fit: Fit) -> str:
    """Say what the picture shows."""
    parts = ", ".join(f"{label} {gib(nbytes)}" for label, nbytes, _ in _bars(fit))
    verdict = f"{gib(abs(fit.free_bytes))} {'free' if fit.fits else 'too much'}"
    return (
        f"Waterfall of the estimated GPU memory of a training step on {fit.subject.id}: {parts}; "
        f"{gib(fit.breakdown.total)} in all, against {gib(fit.gpu.nbytes)} of {fit.gpu.name}: {verdict}."
    )


def waterfall(fit: Fit) -> bytes:
    """Return the picture as PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    bars = list(_bars(fit))
    with figure(9.0, 1.6 + 0.34 * (len(bars) + 1)) as picture:
        axes = picture.subplots()
        _draw_bars(axes, fit, bars)
        _draw_line(axes, fit)
        axes.set_title(_title(fit), loc="left", fontsize=10)
        return png(picture)


def _bars(fit: Fit) -> Iterator[tuple[str, int, str]]:
    """Label, bytes and colour of each bar; what is too small to be seen makes one bar of each colour."""
    for names, colour, rest in (
        ([name for name, _ in fit.breakdown.components() if name not in (*_OF_A_STEP, *_RESERVES)], _STANDING, "other"),
        (_OF_A_STEP, _STEP, "other, of a step"),
        (_RESERVES, _RESERVED, "other, set aside"),
    ):
        sizes = {name: getattr(fit.breakdown, name) for name in names}
        shown = {name: nbytes for name, nbytes in sizes.items() if nbytes >= _LEAST_SHOWN * fit.breakdown.total}
        yield from ((LABELS[name], nbytes, colour) for name, nbytes in shown.items())
        left = sum(sizes.values()) - sum(shown.values())
        if left:
            yield rest, left, colour


def _draw_bars(axes: Axes, fit: Fit, bars: list[tuple[str, int, str]]) -> None:
    start = 0.0
    for row, (_, nbytes, colour) in enumerate(bars):
        width = nbytes / 2**30
        axes.barh(row, width, left=start, color=colour, height=0.7)
        _write(axes, start + width, row, f"{width:.2f}", "normal")
        start += width
    axes.barh(len(bars), start, color=_TOTAL, height=0.7)
    _write(axes, start, len(bars), f"{start:.2f}", "bold")
    axes.set_yticks(range(len(bars) + 1), [*(label for label, _, _ in bars), "total"], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.13 * max(start, fit.gpu.nbytes / 2**30))
    axes.set_xlabel("GiB (estimated)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    for colour, what in ((_STANDING, "all the time"), (_STEP, "at the highest moment"), (_RESERVED, "set aside")):
        axes.barh(0, 0, color=colour, label=what)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8, frameon=False)


def _write(axes: Axes, end: float, row: int, text: str, weight: str) -> None:
    axes.annotate(
        text,
        (end, row),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        fontweight=weight,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )


def _draw_line(axes: Axes, fit: Fit) -> None:
    limit = fit.gpu.nbytes / 2**30
    axes.axvline(limit, color=_LINE, linestyle="--", linewidth=1.8)
    axes.annotate(
        f"{fit.gpu.name} ",
        (limit, 0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=_LINE,
    )


def _title(fit: Fit) -> str:
    shape = fit.shape
    verdict = f"{gib(abs(fit.free_bytes))} {'free' if fit.fits else 'too much'}"
    name = fit.subject.id if len(fit.subject.id) <= 48 else f"{fit.subject.id[:47]}…"
    # matplotlib reads text between two dollar signs as mathematics.
    return (
        f"{name}, {shape.sequence_length} tokens x {shape.micro_batch}, rank {shape.rank}: "
        f"{'fits' if fit.fits else 'does not fit'}, {verdict}"
    ).replace("$", r"\$")
