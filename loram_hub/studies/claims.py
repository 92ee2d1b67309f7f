"""What the LoRAM paper claims, judged by the numbers of a study: shown, not shown, or not measured.

A claim is judged setting by setting, on held-out sets that are in domain for the setting's training data, and its
verdict follows from differences that are paired by seed: it *shows* where every seed agrees with it, and *does not
show* where one does not. No text here is true by itself: all of it is made from the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from loram_hub.studies.aggregation import ADAPTED, RECOVERED, Measure, Results, Setting, differences, spread
from loram_hub.studies.labels import label, plural

MILDER = "beats the base, milder"
"""The claim that is about some of the settings of the one before it."""
Verdict = Literal["shows", "does not show", "not measured"]

CLAIMS: Mapping[str, str] = {
    "beats the base": "The base with the recovered adapter is better than the untouched base.",
    MILDER: "At the milder ratios, the base with the recovered adapter is better than the untouched base.",
    "recovery": "Recovery helps: the base with the recovered adapter is better than the pruned model with the adapter.",
    "alignment": "Alignment helps: the recovered adapter of an aligned release is better than that of the same release "
    "not aligned.",
    "longer alignment": "Longer alignment helps more.",
    "importance": "Stru is better than Rand.",
    "whole layers": "LoRAM is better than LoRA on only those layers of the base that it leaves whole.",
    "memory": "Fine-tuning takes less memory than plain LoRA on the base.",
    "time": "Fine-tuning takes less time than plain LoRA on the base; times are noisy.",
}
"""The claims, by name, in the order in which they are judged."""
COST_CLAIMS = ("memory", "time")
"""Those about what fine-tuning takes, which say little where cells ran side by side."""
COST = "cost"
"""The part of a page that is about them, and the ready-made study whose cells are run one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A claim about one setting."""

    claim: str
    """One of `CLAIMS`."""
    setting: str
    """What it is about, as tables call it."""
    held_out: str
    """The held-out set; empty for memory and time."""
    verdict: Verdict
    """`shows` where every seed agrees."""
    numbers: str
    """What it follows from."""
    seeds: int
    """Seeds that were compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """A claim about a whole study."""

    claim: str
    """One of `CLAIMS`."""
    findings: tuple[Finding, ...]
    """Setting by setting; empty if the study has none that the claim is about."""

    @property
    def verdict(self) -> Verdict:
        """`shows` where it does in every setting that was measured, `not measured` where none was."""
        verdicts = {finding.verdict for finding in self.findings} - {"not measured"}
        return "not measured" if not verdicts else "does not show" if "does not show" in verdicts else "shows"

    def __str__(self) -> str:
        measured = [finding for finding in self.findings if finding.verdict != "not measured"]
        if not measured:
            return f"{CLAIMS[self.claim]} Not measured here."
        count, shown = len(measured), sum(finding.verdict == "shows" for finding in measured)
        where = {1: "the one setting", 2: "both settings"}.get(count, f"all {count} settings")
        if shown == count:
            verdict = f"This shows in {where} measured"
        elif shown == 0:
            verdict = f"This does not show in {where if count == 1 else f'any of {count} settings'} measured"
        else:
            verdict = f"This shows in {shown} of {count} settings measured, and not in the others"
        left = len(self.findings) - count
        rest = f" Not measured in {plural(left, 'other setting')}." if left else ""
        return f"{CLAIMS[self.claim]} {verdict} ({_seeds_text(measured)}).{rest}"


def judge(results: Results, *, costs: bool = True) -> tuple[Judgement, ...]:
    """Judge every claim by the rows of a study.

    Args:
        results: from `gather`.
        costs: also what is claimed of memory and time; see `about_costs`.

    Returns:
        One judgement for each of `CLAIMS`, in their order, also of those that the study has no rows for.
    """
    found = [finding for held_out, setting in _in_domain(results) for finding in _findings(results, setting, held_out)]
    found += [finding for setting in results.settings("loram") for finding in _cost_findings(results, setting)]
    return tuple(
        Judgement(claim=name, findings=tuple(finding for finding in found if finding.claim == name))
        for name in CLAIMS
        if costs or name not in COST_CLAIMS
    )


def about_costs(study: str, shows: Sequence[str] | None) -> bool:
    """Whether memory and time of a study are to be judged: its cells may have run side by side.

    Args:
        study: its name.
        shows: parts of its page, none for all; None where only its rows are known.
    """
    return study == COST if shows is None else not shows or COST in shows


def milder(results: Results, setting: Setting) -> bool:
    """Whether a ratio is in the lower half, the middle one included, of two or more that the study has for a method."""
    same = (setting.method, setting.importance)
    alike = (one for one in results.settings("loram") if (one.method, one.importance) == same)
    ratios = sorted({one.ratio for one in alike if one.ratio is not None})
    return len(ratios) > 1 and setting.ratio in ratios[: (len(ratios) + 1) // 2]


def _in_domain(results: Results) -> Iterator[tuple[str, Setting]]:
    for held_out, data in results.in_domain.items():
        yield from ((held_out, setting) for setting in results.settings("loram") if setting.data == data)


def _findings(results: Results, setting: Setting, held_out: str) -> Iterator[Finding]:
    """Judge what is said of a setting's losses; the first loss of each pair is claimed to be the lower one."""
    recovered = results.losses(setting, RECOVERED, held_out)
    base = results.base_losses(held_out)
    pairs = {"beats the base": base, "recovery": results.losses(setting, ADAPTED, held_out)}
    if milder(results, setting):
        pairs[MILDER] = base
    for claim, other in _others(results, setting):
        pairs[claim] = results.losses(other, RECOVERED, held_out)
    for claim, losses in pairs.items():
        yield _compared(claim, label(results, setting), held_out, recovered, losses, "nats")


def _others(results: Results, setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Yield the settings that a setting is compared with, and the claim that it is the better one."""
    loram = results.settings("loram")
    alike = [one for one in loram if replace(one, alignment_steps=setting.alignment_steps) == setting]
    if setting.alignment_steps and alike[0].alignment_steps == 0:
        yield "alignment", alike[0]
    for shorter, longer in pairwise(one for one in alike if one.alignment_steps):
        if longer == setting:
            yield "longer alignment", shorter
    if setting.method == "stru":
        random = replace(setting, method="rand", importance="")
        yield from (("importance", one) for one in loram if replace(one, importance="") == random)
    whole = [one for one in results.settings("whole layers") if one.data == setting.data]
    if whole and setting.method in ("rand", "stru"):
        same = [one for one in whole if one.quantization == setting.quantization]
        yield "whole layers", (same or whole)[0]


def _cost_findings(results: Results, setting: Setting) -> Iterator[Finding]:
    plain = [one for one in results.settings("plain") if one.data == setting.data]
    if not plain:
        return
    control = next((one for one in plain if one.quantization == setting.quantization), plain[0])
    costs: tuple[tuple[str, Measure, float, str], ...] = (
        ("memory", "peak_memory_bytes", 1e-6, "MB"),
        ("time", "tuning_seconds", 1.0, "s"),
    )
    for claim, measure, scale, unit in costs:
        own, other = (
            {seed: value * scale for seed, value in results.measures(one, measure).items()}
            for one in (setting, control)
        )
        yield _compared(claim, label(results, setting), "", own, other, unit)


def _seeds_text(findings: Sequence[Finding]) -> str:
    least, most = min(finding.seeds for finding in findings), max(finding.seeds for finding in findings)
    return plural(most, "seed") if least == most else f"{least} to {most} seeds"


def _compared(
    claim: str, setting: str, held_out: str, lower: Mapping[int, float], higher: Mapping[int, float], unit: str
) -> Finding:
    """Judge whether numbers are lower than others at every seed that has both."""
    change = spread(differences(lower, higher))
    if change is None:
        return Finding(claim=claim, setting=setting, held_out=held_out, verdict="not measured", numbers="", seeds=0)
    agree = sum(value < 0 for _, value in change.values)
    first, second = (spread({seed: one[seed] for seed, _ in change.values}) for one in (lower, higher))
    assert first is not None
    assert second is not None
    digits = 3 if unit == "nats" else 1
    deviation = "" if change.deviation is None else f" ± {change.deviation:.{digits}f}"
    return Finding(
        claim=claim,
        setting=setting,
        held_out=held_out,
        verdict="shows" if agree == change.n else "does not show",
        numbers=f"{first.mean:,.{digits}f} against {second.mean:,.{digits}f} {unit}: "
        f"{change.mean:+,.{digits}f}{deviation}, lower at {agree} of {plural(change.n, 'seed')}",
        seeds=change.n,
    )
