"""Pictures on a card: which groups were kept, and how the loss fell in alignment. PNG, equal input equal bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from loram_hub.architecture import Space
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
_INK = "#1f3a5f"


def kept_groups_picture(plan: Plan) -> bytes:
    """Draw, per layer, which KV heads are kept and how the kept MLP channels are spread.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    architecture = plan.architecture
    heads = kept_shares(plan, "kv_heads", bins=min(_BINS, architecture.num_key_value_heads))
    channels = kept_shares(plan, "channels", bins=min(_BINS, architecture.intermediate_size))
    height = min(max(2.6, 1.1 + 0.075 * architecture.num_hidden_layers), 12.0)
    with _figure(9.0, height) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2.4))
        _draw_shares(left, heads, "KV heads", "KV head", architecture.num_key_value_heads)
        image = _draw_shares(right, channels, "MLP channels", "channel", architecture.intermediate_size)
        left.set_ylabel("layer")
        figure.colorbar(image, ax=right, label="share kept", pad=0.02)
        return _png(figure)


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


def alignment_curve(alignment: Mapping[str, object] | None) -> tuple[tuple[float, float], ...]:
    """Read (step, loss) pairs from a manifest's `alignment.losses`; empty if there is no curve that can be drawn."""
    losses = None if alignment is None else alignment.get("losses")
    if not isinstance(losses, list | tuple) or not 2 <= len(losses) <= 1_000_000:
        return ()
    points = [_point(pair) for pair in losses[:: -(-len(losses) // _MAX_POINTS)]]
    sound = tuple(point for point in points if point is not None)
    return sound if len(sound) == len(points) else ()


def _point(pair: object) -> tuple[float, float] | None:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    numbers = [value for value in pair if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) != 2 or not all(math.isfinite(value) and abs(value) < 1e12 for value in numbers):
        return None
    return float(numbers[0]), float(numbers[1])


def alignment_picture(curve: Sequence[tuple[float, float]]) -> bytes:
    """Draw the loss of alignment over its steps.

    Args:
        curve: (step, loss in nats per token), at least two, from `alignment_curve`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    steps, losses = zip(*curve, strict=True)
    with _figure(7.0, 3.2) as figure:
        axes = figure.subplots()
        axes.plot(steps, losses, color=_INK, linewidth=1.6)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        return _png(figure)


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
def _figure(width: float, height: float) -> Iterator[Figure]:
    """Open a figure in matplotlib's own style, whatever the user has configured; no window, no global state."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as err:
        raise MissingDependencyError("Pictures on model cards need matplotlib: pip install matplotlib") from err
    with style.context("default"):
        yield Figure(figsize=(width, height), dpi=110, layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # else it holds matplotlib's version
    return buffer.getvalue()
