"""The pictures that only a report has. PNG on white, whatever surrounds it; equal input, equal bytes.

Names in them are made plain first: they may be a stranger's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loram_hub.architecture import Space
from loram_hub.cards.pictures import curve_styles, draw_losses, figure, png
from loram_hub.reporting.facts import LossCurves, Numbers, ScoreBands
from loram_hub.reporting.wording import plain
from loram_hub.updates import CHANNEL_PARTS, HEAD_PARTS, UpdateNorms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

# Of Okabe and Ito's palette, which eyes with any colour deficiency tell apart.
_BLUE, _ORANGE, _GREEN, _PURPLE, _INK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#1a1a1a"
_LINES = (_BLUE, _ORANGE, _GREEN, _PURPLE)
_NAMES: Mapping[Space, str] = {"kv_heads": "KV heads", "channels": "MLP channels"}
_NO_LORA = "#c8c8c8"
"""Colour of heads that have no LoRA; those whose update is zero are white."""
_AS_CELLS: Any = {"aspect": "auto", "interpolation": "nearest"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """A horizontal line."""

    loss: float
    """Nats per token."""
    label: str
    """Of its own end; untrusted names in it are made plain."""
    curve: str | None = None
    """Name of the held-out curve that it belongs to, and whose colour it has; None for none."""


def loss_picture(curves: LossCurves, levels: Sequence[Level] = ()) -> bytes:
    """Draw losses over steps, with horizontal lines for what they are compared with."""
    with figure(9.0, 3.8) as picture:
        axes = picture.subplots()
        draw_losses(axes, curves.training, curves.held_out)
        styles = curve_styles(curves.held_out)
        for level, style in zip(levels, itertools.cycle(("--", ":", "-."))):
            colour = _INK if level.curve is None else styles[level.curve][0]
            axes.axhline(level.loss, color=colour, linestyle=style, linewidth=1.2, label=plain(level.label, 60))
        axes.set_xlabel("step")
        _tidy(axes)
        _legend(axes)
        return png(picture)


def importance_picture(bands: Mapping[Space, ScoreBands]) -> bytes:
    """Draw, per layer, median and 5th to 95th percentile of the scores of kept and of pruned groups."""
    with figure(9.0, 3.8) as picture:
        for axes, (space, band) in zip(picture.subplots(1, len(bands), squeeze=False)[0], bands.items(), strict=True):
            for name, values, colour, shift in (
                ("kept", band.kept, _BLUE, -0.14),
                ("pruned", band.pruned, _ORANGE, 0.14),
            ):
                _draw_bands(axes, values, colour, shift, name)
            numbers = np.concatenate([band.kept, band.pruned])
            if np.nanmin(numbers) > 0:
                axes.set_yscale("log")
            axes.set_title(f"{_NAMES[space]} ({band.groups:,} per layer)", fontsize=10)
            axes.set_xlabel("layer")
            _tidy(axes)
        picture.axes[0].set_ylabel("importance score")
        _shared_legend(picture.axes)
        return png(picture)


def _draw_bands(axes: Axes, values: Numbers, colour: str, shift: float, name: str) -> None:
    layers = np.flatnonzero(np.isfinite(values[:, 1]))
    if not layers.size:
        return
    low, middle, high = values[layers].T
    axes.vlines(layers + shift, low, high, color=colour, linewidth=2.4, alpha=0.45)
    axes.plot(layers + shift, middle, "o", color=colour, markersize=3.6, label=name)


def head_norms_picture(adapters: Mapping[str, UpdateNorms]) -> bytes:
    """Draw the norm of each head's update, a row of panels per adapter, all on one colour scale."""
    norms = [found.heads[part] for found in adapters.values() for part in HEAD_PARTS]
    highest = max((float(np.nanmax(values)) for values in norms if np.isfinite(values).any()), default=0.0)
    height = min(max(2.2, 1.0 + 0.06 * max(map(len, norms))), 6.0)
    with figure(11.0, 0.7 + height * len(adapters)) as picture:
        panels = picture.subplots(len(adapters), len(HEAD_PARTS), squeeze=False)
        for row, (name, found) in zip(panels, adapters.items(), strict=True):
            row[0].set_ylabel(f"{plain(name)}\nlayer", fontsize=9).set_parse_math(False)
            for axes, part in zip(row, HEAD_PARTS, strict=True):
                image = _draw_heads(axes, found.heads[part], highest)
                axes.set_xlabel("query head" if part in ("q", "o") else "KV head", fontsize=9)
        for axes, part in zip(panels[0], HEAD_PARTS, strict=True):
            axes.set_title(part, fontsize=11)
        picture.colorbar(image, ax=panels, label="norm of the head's update", pad=0.01, aspect=40)
        return png(picture)


def _draw_heads(axes: Axes, values: Numbers, highest: float) -> AxesImage:
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor(_NO_LORA)
    axes.imshow(np.where(values == 0, 1.0, np.nan), cmap="gray", vmin=0, vmax=1, **_AS_CELLS)
    image = axes.imshow(np.where(values > 0, values, np.nan), cmap="viridis", vmin=0, vmax=highest or 1, **_AS_CELLS)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=6))
    return image


def channel_norms_picture(adapters: Mapping[str, UpdateNorms]) -> bytes:
    """Draw the mean norm of the update over a layer's active channels, a line per adapter."""
    with figure(11.0, 3.4) as picture:
        panels = picture.subplots(1, len(CHANNEL_PARTS), sharey=True)
        for axes, part in zip(panels, CHANNEL_PARTS, strict=True):
            for colour, (name, found) in zip(itertools.cycle(_LINES), adapters.items()):
                values = found.channel_means[part]
                axes.plot(
                    np.arange(len(values)),
                    values,
                    color=colour,
                    linewidth=1.6,
                    marker="o",
                    markersize=3,
                    label=plain(name),
                )
            axes.set_title(f"{part}: {'columns' if part == 'down' else 'rows'}", fontsize=10)
            axes.set_xlabel("layer")
            _tidy(axes)
        panels[0].set_ylim(bottom=0)  # of all three, which share it, once the lines of all are there
        panels[0].set_ylabel("mean norm, active channels")
        _legend(panels[0])
        return png(picture)


def recovery_picture(losses: Mapping[str, float]) -> bytes:
    """Draw the losses of the models as points on one line each, the base's as a line through all."""
    colours = {"base": _INK, "pruned": _ORANGE, "pruned + adapter": _PURPLE, "base + recovered adapter": _BLUE}
    with figure(9.0, 0.9 + 0.42 * len(losses)) as picture:
        axes = picture.subplots()
        for row, (model, loss) in enumerate(losses.items()):
            axes.plot(loss, row, "o", color=colours.get(model, _INK), markersize=8)
            axes.annotate(
                f"{loss:.4f}",
                (loss, row),
                xytext=(0, 8),
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
            )
        if "base" in losses:
            axes.axvline(losses["base"], color=_INK, linestyle=":", linewidth=1)
        axes.set_yticks(range(len(losses)), list(losses))
        axes.set_ylim(len(losses) - 0.6, -0.8)
        axes.margins(x=0.1)
        axes.set_xlabel("held-out loss (nats per token), lower is better")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return png(picture)


def _shared_legend(panels: Sequence[Axes]) -> None:
    """Put what stands in any of the panels into the legend of the first: nothing may have been pruned in that one."""
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    panels[0].legend(entries.values(), entries.keys(), fontsize=8, frameon=False)


def _legend(axes: Axes) -> None:
    for text in axes.legend(fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)  # a name with $ in it is no formula


def _tidy(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
