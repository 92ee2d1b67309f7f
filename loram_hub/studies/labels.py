"""How tables, figures and pages call settings, held-out sets and sizes."""

from __future__ import annotations

import re

from loram_hub.studies.aggregation import Results, Setting, Spread

_CONTROLS = {
    "base": "base untouched",
    "plain": "plain LoRA on the base",
    "whole layers": "LoRA on the whole layers",
}
METHOD_NAMES = {"rand": "Rand", "stru": "Stru", "semi": "Semi", "unst": "Unst"}


def label(results: Results, setting: Setting) -> str:
    """Return what a setting is called: its method and ratio, and of the rest what the study varies."""
    parts = [method_label(results, setting)]
    loram = results.settings("loram")
    if setting.kind == "loram" and len({one.alignment_steps for one in loram}) > 1:
        parts.append(f"{setting.alignment_steps} alignment steps" if setting.alignment_steps else "not aligned")
    return ", ".join([*parts, *_rest(results, setting)])


def group_label(results: Results, setting: Setting) -> str:
    """Return what a setting is called where alignment is told apart otherwise."""
    return ", ".join([method_label(results, setting), *_rest(results, setting)])


def series_label(results: Results, setting: Setting) -> str:
    """Return what a setting is called where ratios and alignment are on an axis."""
    name = _method_name(results, setting) if setting.kind == "loram" else setting.kind
    return ", ".join([name, *_rest(results, setting)])


def method_label(results: Results, setting: Setting) -> str:
    """Return method and ratio or pattern, or which control it is."""
    if setting.kind != "loram":
        return _CONTROLS[setting.kind]
    name = _method_name(results, setting)
    return name if setting.ratio is None else f"{name} {setting.ratio:g}"


def _method_name(results: Results, setting: Setting) -> str:
    """Name the method, with its pattern, and with how it scores where the study compares several."""
    alike = (one for one in results.settings("loram") if one.method == setting.method)
    scored = [f"({setting.importance})"] if len({one.importance for one in alike}) > 1 else []
    pattern = [setting.pattern] if setting.pattern else []
    return " ".join([METHOD_NAMES[setting.method], *scored, *pattern])


def _rest(results: Results, setting: Setting) -> list[str]:
    if setting.kind == "base":
        return []
    quantized = {"": [], "nf4": ["NF4"]}.get(setting.quantization, [setting.quantization])
    masked = ["masked"] if setting.masked else []
    return [*quantized, *masked, *([setting.data] if len(results.data) > 1 else [])]


def set_name(results: Results, held_out: str) -> str:
    """Name a held-out set and say of what training set it is."""
    data = results.in_domain[held_out]
    if data is None:
        return f"{held_out} (out of domain)"
    return f"{held_out} (in domain)" if len(results.data) == 1 else f"{held_out} (in domain for {data})"


def number_text(numbers: Spread, digits: int = 3) -> str:
    """Write numbers in a sentence: mean ± deviation."""
    deviation = f" ± {numbers.deviation:,.{digits}f}" if numbers.deviation else ""
    return f"{numbers.mean:,.{digits}f}{deviation}"


def count_text(count: float) -> str:
    """Write a number of parameters for people."""
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:.{2 if unit == 'B' else 1}f} {unit}"
    return f"{count:,.0f}"


def plural(count: int, noun: str) -> str:
    """Write a number of things."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def slug(name: str) -> str:
    """Return a name as letters, digits and dashes, for labels and files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "set"
