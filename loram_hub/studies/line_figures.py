"""Figures with a line for each method: losses over the ratio and over the steps of alignment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loram_hub.cards.pictures import figure, png
from loram_hub.studies.aggregation import BASE, RECOVERED, Results, Setting, Spread, spread
from loram_hub.studies.labels import group_label, label, number_text, series_label, set_name, slug
from loram_hub.studies.plots import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    Mark,
    Picture,
    draw_spread,
    label_sides,
    tidy,
)
from loram_hub.studies.tables import CONTROLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_METHODS = {"rand": ("o", ORANGE), "stru": ("D", BLUE), "semi": ("s", GREEN), "unst": ("^", PURPLE)}
_OTHERS = (("D", BLUE), ("o", ORANGE), ("s", GREEN), ("^", PURPLE), ("v", SKY))
_LOSS = "loss, nats per token"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """A series of settings that differ in one number."""

    mark: Mark
    points: tuple[tuple[float, Setting, Spread], ...]
    """Place on the horizontal axis, setting, losses of the base with the recovered adapter."""


def draw_ratios(results: Results, held_out: str) -> Picture:
    """Draw the loss and the reduction of parameters over the ratio (the paper's figures 7 and 8)."""
    settings = [setting for setting in results.settings("loram") if setting.ratio is not None]
    lines = _lines(results, held_out, settings, "ratio", lambda setting: setting.ratio or 0.0)
    title = f"The base with the recovered adapter over the ratio, on {set_name(results, held_out)}"
    with figure(8.4, 5.6) as picture:
        upper, lower = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
        _draw_lines(upper, lines, _levels(results, held_out), gap=0.055)
        upper.set_title(title, loc="left", fontsize=10).set_parse_math(False)
        _draw_reductions(lower, results, lines)
        lower.set_xlabel("pruning ratio; of Unst, sparsity", fontsize=9)
        data = png(picture)
    return Picture(name=f"ratios-{slug(held_out)}", png=data, alt=_text(results, held_out, title, lines, "ratio {:g}"))


def draw_steps(results: Results, held_out: str) -> Picture:
    """Draw the loss over the steps of alignment (the paper's figure 5)."""
    settings = results.settings("loram")
    steps = sorted({setting.alignment_steps for setting in settings})
    tokens = {
        setting.alignment_steps: count
        for setting in settings
        for count in results.measures(setting, "alignment_tokens").values()
    }
    lines = _lines(results, held_out, settings, "alignment_steps", lambda one: float(steps.index(one.alignment_steps)))
    title = f"The base with the recovered adapter over the steps of alignment, on {set_name(results, held_out)}"
    with figure(8.4, 4.2) as picture:
        axes = picture.subplots()
        _draw_lines(axes, lines, _levels(results, held_out), gap=0.055)
        axes.set_xticks(range(len(steps)), [f"{step}\n{tokens.get(step, 0):,.0f}" for step in steps], fontsize=8.5)
        axes.set_xlabel("steps of alignment, tokens below (evenly spaced)", fontsize=9)
        axes.set_title(title, loc="left", fontsize=10).set_parse_math(False)
        data = png(picture)
    names = {float(place): f"{step} steps" for place, step in enumerate(steps)}
    return Picture(name=f"steps-{slug(held_out)}", png=data, alt=_text(results, held_out, title, lines, names))


def _lines(
    results: Results, held_out: str, settings: Sequence[Setting], varied: str, place: Callable[[Setting], float]
) -> list[_Line]:
    """Make a line of the settings that differ in nothing but what is varied."""
    series: dict[Setting, list[Setting]] = {}
    for setting in settings:
        blank = replace(setting, ratio=None) if varied == "ratio" else replace(setting, alignment_steps=0)
        series.setdefault(blank, []).append(setting)
    marks = _marks(results, list(series), varied)
    lines = []
    for key, members in series.items():
        points = [
            (place(setting), setting, numbers)
            for setting in members
            if (numbers := spread(results.losses(setting, RECOVERED, held_out))) is not None
        ]
        if points:
            lines.append(_Line(mark=marks[key], points=tuple(sorted(points, key=lambda point: point[0]))))
    return lines


def _marks(results: Results, keys: Sequence[Setting], varied: str) -> dict[Setting, Mark]:
    """Give each series a mark: the colour of its method where that tells them apart, hollow if it is not aligned."""
    groups = list(dict.fromkeys(replace(key, alignment_steps=0) for key in keys))
    is_told = len({group.method for group in groups}) == len(groups)
    steps = {key.alignment_steps for key in keys}
    marks = {}
    for key in keys:
        index = groups.index(replace(key, alignment_steps=0))
        shape, colour = _METHODS[key.method] if is_told else _OTHERS[index % len(_OTHERS)]
        name = series_label(results, key) if varied == "ratio" else group_label(results, key)
        if len(steps) > 1:
            name += f", {key.alignment_steps} alignment steps" if key.alignment_steps else ", not aligned"
        is_filled = (len(steps) == 1 or key.alignment_steps > 0) and index < len(_OTHERS)
        marks[key] = Mark(shape=shape, colour=colour, label=name, is_filled=is_filled)
    return marks


def _levels(results: Results, held_out: str) -> list[tuple[str, Spread, str]]:
    """Return name, losses and colour of the controls."""
    found = []
    for setting in results.settings(*CONTROLS):
        numbers = spread(results.losses(setting, BASE if setting.kind == "base" else RECOVERED, held_out))
        if numbers is not None:
            found.append((label(results, setting), numbers, INK if setting.kind == "base" else FAINT))
    return found


def _draw_lines(axes: Axes, lines: Sequence[_Line], levels: Sequence[tuple[str, Spread, str]], *, gap: float) -> None:
    for name, numbers, colour in levels:
        axes.axhline(numbers.mean, color=colour, linewidth=1.1, linestyle="--" if name.startswith("base") else ":")
        if numbers.deviation:
            low, high = numbers.mean - numbers.deviation, numbers.mean + numbers.deviation
            axes.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
    for line in lines:
        style = "-" if line.mark.is_filled else "--"
        places, means = [place for place, _, _ in line.points], [numbers.mean for _, _, numbers in line.points]
        axes.plot(places, means, style, color=line.mark.colour, linewidth=1.5, zorder=2.5)
        for place, _, numbers in line.points:
            draw_spread(axes, place, numbers, line.mark, across=False)
    axes.margins(x=0.04, y=0.08)
    axes.set_ylabel(_LOSS, fontsize=9)
    tidy(axes, grid="both")
    ends = [(line.points[-1][2].mean, line.mark.label, line.mark.colour) for line in lines]
    label_sides(axes, [*ends, *((numbers.mean, name, colour) for name, numbers, colour in levels)], gap=gap)


def _draw_reductions(axes: Axes, results: Results, lines: Sequence[_Line]) -> None:
    """Draw how many times fewer parameters there are; alignment changes nothing in it."""
    drawn: dict[tuple[tuple[float, float], ...], tuple[Mark, list[str]]] = {}
    for line in lines:
        found = tuple(
            (place, numbers.mean)
            for place, setting, _ in line.points
            if (numbers := spread(results.reductions(setting))) is not None
        )
        if found:
            names = drawn.setdefault(found, (line.mark, []))[1]
            names.append(line.mark.label.partition(",")[0])
    labels = []
    for found, (mark, names) in drawn.items():
        axes.plot(*zip(*found, strict=True), f"-{mark.shape}", color=mark.colour, linewidth=1.5)
        labels.append((found[-1][1], ", ".join(dict.fromkeys(names)), mark.colour))
    axes.set_ylabel("times fewer\nparameters", fontsize=9)
    axes.margins(y=0.15)
    tidy(axes, grid="both")
    label_sides(axes, labels, gap=0.15)


def _text(
    results: Results, held_out: str, title: str, lines: Sequence[_Line], places: str | Mapping[float, str]
) -> str:
    """State the ends of each line and the controls."""

    def named(place: float) -> str:
        return places.format(place) if isinstance(places, str) else places[place]

    parts = [f"{name} {number_text(numbers)}" for name, numbers, _ in _levels(results, held_out)]
    texts = [f"{title}: loss in nats per token.", *([f"{', '.join(parts)}."] if parts else [])]
    for line in lines:
        (first, _, start), (last, _, end) = line.points[0], line.points[-1]
        span = f" to {number_text(end)} at {named(last)}" if len(line.points) > 1 else ""
        texts.append(f"{line.mark.label}: {number_text(start)} at {named(first)}{span}.")
    return " ".join(texts)
