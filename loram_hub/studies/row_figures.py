"""Figures with a row for each setting: losses of all models, recovery and alignment, domains, and cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loram_hub.cards.pictures import figure, png
from loram_hub.studies.aggregation import ADAPTED, BASE, PRUNED, RECOVERED, Measure, Results, Setting, Spread, spread
from loram_hub.studies.labels import group_label, label, number_text, plural, set_name, slug
from loram_hub.studies.plots import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    SKY,
    Mark,
    Picture,
    draw_spread,
    name_rows,
    tidy,
)
from loram_hub.studies.tables import CONTROLS, aligned_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MODELS = {
    PRUNED: Mark(shape="o", colour=FAINT, label="pruned, before fine-tuning"),
    ADAPTED: Mark(shape="s", colour=ORANGE, label="pruned, with the adapter"),
    RECOVERED: Mark(shape="D", colour=BLUE, label="base, with the recovered adapter"),
}
_NEITHER = Mark(shape="o", colour=FAINT, label="neither")
_ALIGNED = Mark(shape="s", colour=ORANGE, label="aligned, not recovered")
_RECOVERED = Mark(shape="^", colour=SKY, label="recovered, not aligned")
_BOTH = Mark(shape="D", colour=BLUE, label="both")
_CONTROL = Mark(shape="D", colour=INK, label="controls")
_COSTS: tuple[tuple[Measure, str, float, int], ...] = (
    ("parameters", "parameters (M)", 1e-6, 1),
    ("peak_memory_bytes", "peak memory (MB)", 1e-6, 0),
    ("tuning_seconds", "fine-tuning (s, noisy)", 1.0, 0),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One setting with what is drawn of it."""

    name: str
    marks: tuple[tuple[Mark, Spread], ...]


def draw_losses(results: Results, held_out: str) -> Picture:
    """Draw the models of every setting: before fine-tuning, with the adapter, the base with the recovered one."""
    rows = _controls(results, held_out)
    for setting in results.settings("loram"):
        rows.append(
            _row(
                label(results, setting),
                ((mark, results.losses(setting, model, held_out)) for model, mark in _MODELS.items()),
            )
        )
    title = f"Held-out loss on {set_name(results, held_out)}"
    finding = _range_text(results, held_out)
    return Picture(
        name=f"losses-{slug(held_out)}",
        png=_draw_rows(rows, title, [_CONTROL, *_MODELS.values()]),
        alt=f"{title}, in nats per token. {_controls_text(results, held_out)} {finding}",
    )


def draw_recovery(results: Results, held_out: str) -> Picture:
    """Draw every method and ratio with and without recovery, with and without alignment (the paper's figure 6)."""
    rows, pairs = _controls(results, held_out), aligned_pairs(results)
    for unaligned, aligned in pairs:
        marks = (
            (_NEITHER, results.losses(unaligned, ADAPTED, held_out)),
            (_ALIGNED, results.losses(aligned, ADAPTED, held_out)),
            (_RECOVERED, results.losses(unaligned, RECOVERED, held_out)),
            (_BOTH, results.losses(aligned, RECOVERED, held_out)),
        )
        rows.append(_row(group_label(results, aligned), marks))
    title = f"With and without recovery and alignment, on {set_name(results, held_out)}"
    own = rows[len(rows) - len(pairs) :]
    findings = " ".join(f"{row.name}: {_marks_text(row)}." for row in own)
    return Picture(
        name=f"recovery-{slug(held_out)}",
        png=_draw_rows(rows, title, [_CONTROL, _NEITHER, _ALIGNED, _RECOVERED, _BOTH]),
        alt=f"{title}: loss in nats per token. {_controls_text(results, held_out)} {findings}",
    )


def draw_domains(results: Results) -> Picture:
    """Draw every setting on every held-out set, a panel each (the paper's table 7)."""
    settings = results.settings()
    names = [label(results, setting) for setting in settings]
    title = "The base with the recovered adapter, trained on one domain, measured on all"
    findings = []
    with figure(3.2 + 2.3 * len(results.held_out), 1.5 + 0.3 * len(settings)) as picture:
        panels = picture.subplots(1, len(results.held_out), sharey=True, squeeze=False)[0]
        for axes, held_out in zip(panels, results.held_out, strict=True):
            found = []
            for place, setting in enumerate(settings):
                numbers = spread(results.losses(setting, _served(setting), held_out))
                if numbers is not None:
                    is_own = results.in_domain[held_out] == setting.data
                    mark = _CONTROL if setting.kind != "loram" else _BOTH
                    draw_spread(axes, place, numbers, replace(mark, is_filled=is_own), across=True)
                    _write(axes, numbers.mean, place - 0.2, f"{numbers.mean:.2f}", dx=0, va="bottom", ha="center")
                    found.append(f"{names[place]} {number_text(numbers)}")
            findings.append(f"On {held_out}: {', '.join(found)}.")
            axes.set_title(set_name(results, held_out), fontsize=8.5).set_parse_math(False)
            axes.margins(x=0.12)
            tidy(axes, grid="x")
        name_rows(panels[0], names)
        picture.supxlabel("loss, nats per token; filled marks: in domain; black: controls", fontsize=9)
        picture.suptitle(title, x=0.01, ha="left", fontsize=10)
        data = png(picture)
    return Picture(name="domains", png=data, alt=f"{title}: held-out loss in nats per token. {' '.join(findings)}")


def draw_cost(results: Results) -> Picture:
    """Draw parameters, peak memory and time of fine-tuning for every setting (the paper's table 8)."""
    settings = [setting for setting in results.settings() if setting.kind != "base"]
    names = [label(results, setting) for setting in settings]
    with figure(9.0, 1.5 + 0.3 * len(settings)) as picture:
        panels = picture.subplots(1, len(_COSTS), sharey=True)
        for axes, (measure, title, scale, digits) in zip(panels, _COSTS, strict=True):
            for place, setting in enumerate(settings):
                found = spread(results.measures(setting, measure))
                if found is not None:
                    numbers = found.scaled(scale)
                    axes.barh(place, numbers.mean, height=0.62, color=SKY if setting.kind == "loram" else FAINT)
                    axes.errorbar(numbers.mean, place, xerr=numbers.deviation or 0.0, color=INK, elinewidth=1.2)
                    at = numbers.mean + (numbers.deviation or 0.0)
                    _write(axes, at, place, f"{numbers.mean:,.{digits}f}", dx=5, va="center")
            axes.set_xlabel(title, fontsize=9)
            axes.set_xlim(left=0)
            axes.margins(x=0.2)
            tidy(axes, grid="x")
        name_rows(panels[0], names)
        picture.suptitle("What fine-tuning costs: controls grey, LoRAM blue", x=0.01, ha="left", fontsize=10)
        return Picture(name="cost", png=png(picture), alt=_cost_text(results, settings))


def _draw_rows(rows: Sequence[_Row], title: str, marks: Sequence[Mark]) -> bytes:
    used = [mark for mark in marks if any(mark == one for row in rows for one, _ in row.marks)]
    with figure(8.0, 1.7 + 0.3 * len(rows)) as picture:
        axes = picture.subplots()
        for place, row in enumerate(rows):
            for mark, numbers in row.marks:
                draw_spread(axes, place, numbers, mark, across=True)
            if row.marks:
                mark, last = row.marks[-1]
                _write(
                    axes,
                    last.mean,
                    place - 0.2,
                    f"{last.mean:.2f}",
                    dx=0,
                    va="bottom",
                    ha="center",
                    colour=mark.colour,
                )
        for mark in used:
            face = mark.colour if mark.is_filled else "white"
            axes.plot([], [], mark.shape, color=mark.colour, markerfacecolor=face, label=mark.label)
        name_rows(axes, [row.name for row in rows])
        axes.set_xlabel("held-out loss, nats per token", fontsize=9)
        axes.set_title(title, loc="left", fontsize=10).set_parse_math(False)
        tidy(axes, grid="x")
        legend = picture.legend(loc="outside lower center", ncols=min(4, len(used)), frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
        return png(picture)


def _write(
    axes: Axes, across: float, up: float, text: str, *, dx: float, va: str, ha: str = "left", colour: str = INK
) -> None:
    axes.annotate(
        text, (across, up), xytext=(dx, 0), textcoords="offset points", va=va, ha=ha, fontsize=7.5, color=colour,
        annotation_clip=False,
    )  # fmt: skip


def _row(name: str, marks: Iterable[tuple[Mark, dict[int, float]]]) -> _Row:
    """Make a row of what was measured of it."""
    found = ((mark, spread(losses)) for mark, losses in marks)
    return _Row(name=name, marks=tuple((mark, numbers) for mark, numbers in found if numbers is not None))


def _controls(results: Results, held_out: str) -> list[_Row]:
    return [
        _row(label(results, setting), [(_CONTROL, results.losses(setting, _served(setting), held_out))])
        for setting in results.settings(*CONTROLS)
    ]


def _served(setting: Setting) -> str:
    return BASE if setting.kind == "base" else RECOVERED


def _marks_text(row: _Row) -> str:
    return ", ".join(f"{mark.label} {number_text(numbers)}" for mark, numbers in row.marks) or "not measured"


def _controls_text(results: Results, held_out: str) -> str:
    """State the losses of the controls."""
    found = (f"{row.name} {number_text(numbers)}" for row in _controls(results, held_out) for _, numbers in row.marks)
    return f"{', '.join(found) or 'No control was measured'}."


def _range_text(results: Results, held_out: str) -> str:
    """State the best and the worst of the recovered adapters."""
    found = [
        (numbers.mean, label(results, setting), numbers)
        for setting in results.settings("loram")
        if (numbers := spread(results.losses(setting, RECOVERED, held_out))) is not None
    ]
    if not found:
        return "No LoRAM setting was measured."
    found.sort(key=lambda one: one[:2])
    (_, best, lowest), (_, worst, highest) = found[0], found[-1]
    if len(found) == 1:
        return f"{best}: the base with the recovered adapter has {number_text(lowest)}."
    return (
        f"Of {plural(len(found), 'LoRAM setting')} the base with the recovered adapter is best for {best}, "
        f"{number_text(lowest)}, and worst for {worst}, {number_text(highest)}."
    )


def _cost_text(results: Results, settings: Sequence[Setting]) -> str:
    """State the cost of the controls, and the range of LoRAM's."""
    texts = ["Bars of what fine-tuning costs."]
    for measure, title, scale, digits in _COSTS:
        costs = [
            (setting, numbers.scaled(scale))
            for setting in settings
            if (numbers := spread(results.measures(setting, measure))) is not None
        ]
        parts = [f"{label(results, one)} {number_text(cost, digits)}" for one, cost in costs if one.kind != "loram"]
        loram = sorted((cost.mean, label(results, one)) for one, cost in costs if one.kind == "loram")
        if loram:
            (low, least), (high, most) = loram[0], loram[-1]
            span = f" to {high:,.{digits}f} ({most})" if len(loram) > 1 else ""
            parts.append(f"LoRAM {low:,.{digits}f} ({least}){span}")
        texts.append(f"{title[0].upper()}{title[1:]}: {', '.join(parts) or 'not measured'}.")
    return " ".join(texts)
