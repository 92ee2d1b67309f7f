"""Pictures on a card: which groups were kept, and how the loss fell in alignment. PNG, equal input equal bytes."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from loram_hub.architecture import Space
from loram_hub.cards.numbers import finite
from loram_hub.errors import MissingDependencyError
from loram_hub.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

KEPT_GROUPS = "pictures/kept_groups.png"
ALIGNMENT_LOSS = "pictures/alignment_loss.png"

_BINS = 96
"""Columns that groups are gathered into where there are more: a cell is the share kept of its groups."""
_MAX_POINTS = 4_096
_MAX_CORPORA = 8
"""Held-out curves in a picture."""
_MAX_NAME = 40
_NOISY_POINTS = 50
"""From so many on, a curve is shown with its running mean."""
_INK, _LIGHT = "#1f3a5f", "#b9c6d8"
# As many as there are curves at most, each with a marker of its own: colours alone do not reach everyone.
_COLOURS = ("#d55e00", "#009e73", "#7b3fa0", "#b8860b", "#2a8fd0", "#cc5f9d", "#7a4a21", "#6b7a1e")
_MARKERS = "os^DvPX*"

Curve = tuple[tuple[float, float], ...]
"""(step, loss) pairs."""


def kept_groups_picture(plan: Plan) -> bytes:
    """Draw, per layer, which KV heads are kept and how the kept MLP channels are spread.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    architecture = plan.architecture
    heads = kept_shares(plan, "kv_heads", bins=min(_BINS, architecture.num_key_value_heads))
    channels = kept_shares(plan, "channels", bins=min(_BINS, architecture.intermediate_size))
    height = min(max(2.6, 1.1 + 0.075 * architecture.num_hidden_layers), 12.0)
    with figure(9.0, height) as picture:
        left, right = picture.subplots(1, 2, sharey=True, width_ratios=(1, 2.4))
        _draw_shares(left, heads, "KV heads", "KV head", architecture.num_key_value_heads)
        image = _draw_shares(right, channels, "MLP channels", "channel", architecture.intermediate_size)
        left.set_ylabel("layer")
        picture.colorbar(image, ax=right, label="share kept", pad=0.02)
        return png(picture)


def kept_shares(plan: Plan, space: Space, *, bins: int) -> npt.NDArray[np.float64]:
    """Return the share of groups kept, (layers, bins); layers left whole are ones."""
    architecture = plan.architecture
    groups = architecture.num_key_value_heads if space == "kv_heads" else architecture.intermediate_size
    edges = np.arange(bins + 1) * groups // bins
    shares = np.ones((architecture.num_hidden_layers, bins))
    for layer, spaces in plan.kept.items():
        counts, _ = np.histogram(spaces[space], bins=edges - 0.5)
        shares[layer] = counts / np.diff(edges)
    return shares


def alignment_curve(alignment: Mapping[str, object] | None) -> Curve:
    """Read (step, loss) pairs from a manifest's `alignment.losses`; empty if there is no curve that can be drawn."""
    losses = None if alignment is None else alignment.get("losses")
    if not isinstance(losses, list | tuple) or not 2 <= len(losses) <= 1_000_000:
        return ()
    points = [_point(pair) for pair in losses[:: -(-len(losses) // _MAX_POINTS)]]
    sound = tuple(point for point in points if point is not None)
    return sound if len(sound) == len(points) else ()


def held_out_curves(alignment: Mapping[str, object] | None) -> dict[str, Curve]:
    """Read a curve per corpus from a manifest's `alignment.held_out`, pairs of a step and losses by corpus.

    Returns:
        (step, loss) pairs by corpus, in the order of their names; without what cannot be drawn.
    """
    rows = None if alignment is None else alignment.get("held_out")
    if not isinstance(rows, list | tuple) or len(rows) > 1_000_000:
        return {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows[:: -(-len(rows) // _MAX_POINTS) or 1]:
        if not isinstance(row, list | tuple) or len(row) != 2 or not isinstance(row[1], Mapping):
            return {}
        for corpus, loss in [*row[1].items()][:_MAX_CORPORA]:
            if (point := _point((row[0], loss))) is not None:
                curves.setdefault(str(corpus), []).append(point)
    return {corpus: tuple(curves[corpus]) for corpus in sorted(curves)[:_MAX_CORPORA]}


def _point(pair: object) -> tuple[float, float] | None:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    step, loss = finite(pair[0]), finite(pair[1])
    return None if step is None or loss is None else (step, loss)


def alignment_picture(curve: Curve, held_out: Mapping[str, Curve] | None = None) -> bytes:
    """Draw the losses of alignment over its steps.

    Args:
        curve: (step, loss in nats per token) in training, at least two, from `alignment_curve`.
        held_out: the same on held-out texts, by corpus, from `held_out_curves`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with figure(7.0, 3.2) as picture:
        axes = picture.subplots()
        draw_losses(axes, curve, held_out or {})
        axes.set_xlabel("step")
        return png(picture)


def draw_losses(axes: Axes, curve: Curve, held_out: Mapping[str, Curve]) -> None:
    """Draw losses into a figure: the one of training light, with its running mean, those held out marked.

    Args:
        axes: to draw into.
        curve: (step, loss in nats per token) in training. A loss that is NaN breaks the line, here and in the next.
        held_out: the same on held-out texts, by corpus; names may be untrusted.
    """
    if curve:
        steps, losses = zip(*curve, strict=True)
        is_noisy = len(curve) >= _NOISY_POINTS
        axes.plot(steps, losses, color=_LIGHT if is_noisy else _INK, linewidth=0.8 if is_noisy else 1.6, label="train")
        if is_noisy:
            axes.plot(steps, _running_mean(losses), color=_INK, linewidth=1.6, label="train, running mean")
    styles = curve_styles(held_out)
    for corpus, points in held_out.items():
        steps, losses = zip(*points, strict=True)
        colour, marker = styles[corpus]
        axes.plot(steps, losses, color=colour, linewidth=1.2, marker=marker, markersize=4, label=_legend_name(corpus))
    axes.set_ylabel("loss (nats per token)")
    _tidy(axes)
    if held_out:
        for text in axes.legend(fontsize=8, frameon=False).get_texts():
            text.set_parse_math(False)  # a name with $ in it is no formula


def curve_styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each held-out curve, as `draw_losses` has them."""
    return dict(zip(names, itertools.cycle(zip(_COLOURS, _MARKERS, strict=True))))


def draw_rates(axes: Axes, rates: Curve) -> None:
    """Draw learning rates over steps, for a panel below the losses."""
    axes.plot([step for step, _ in rates], [rate for _, rate in rates], color=_INK, linewidth=1.2)
    axes.set_ylabel("learning rate", fontsize=8)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _running_mean(losses: Sequence[float]) -> npt.NDArray[np.float64]:
    """Average over a window around each point, which is cut at both ends; NaN where the point is."""
    half = max(1, len(losses) // 100)
    values = np.asarray(losses, dtype=np.float64)
    is_finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    middle = np.arange(len(losses))
    low, high = np.maximum(middle - half, 0), np.minimum(middle + half + 1, len(losses))
    mean = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(is_finite, mean, np.nan)


def _legend_name(corpus: str) -> str:
    """Return a name that every font can show, and that matplotlib does not leave out for its first character."""
    shown = "".join(char if " " <= char <= "~" else "?" for char in corpus)
    return f"held out: {shown if len(shown) <= _MAX_NAME else shown[: _MAX_NAME - 3] + '...'}"


def _draw_shares(axes: Axes, shares: npt.NDArray[np.float64], title: str, label: str, groups: int) -> AxesImage:
    from matplotlib.ticker import MaxNLocator

    layers = shares.shape[0]
    image = axes.imshow(
        shares,
        aspect="auto",
        interpolation="nearest",
        cmap="Blues",
        vmin=0,
        vmax=1,
        extent=(-0.5, groups - 0.5, layers - 0.5, -0.5),
    )
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return image


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """Open a figure in matplotlib's own style, whatever the user has configured; no window, no global state.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as err:
        raise MissingDependencyError("Pictures need matplotlib: pip install matplotlib") from err
    with style.context("default"):
        yield Figure(figsize=(width, height), dpi=110, layout="constrained")


def png(picture: Figure) -> bytes:
    """Return a figure as a PNG file, equal figures as equal bytes."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", metadata={"Software": None})  # else it holds matplotlib's version
    return buffer.getvalue()
