"""Sections about fine-tuning: losses before and after recovery, losses in training, and the norms of updates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from loram_hub.adapter import WEIGHTS as ADAPTER_WEIGHTS
from loram_hub.cards.escaping import visible
from loram_hub.cards.evaluations import MODELS, Evaluation
from loram_hub.cards.task_scores import Score, TaskScores
from loram_hub.manifest import MANIFEST
from loram_hub.reporting.contents import Figure, Part, Section, Table
from loram_hub.reporting.drawings import channel_norms_picture, head_norms_picture, loss_picture, recovery_picture
from loram_hub.reporting.facts import (
    AdapterFacts,
    EvaluationFacts,
    Facts,
    LossCurves,
    MeasuredPart,
    Numbers,
    RunFacts,
)
from loram_hub.reporting.release_sections import broken_caption, broken_text, curve_sentence, curve_table
from loram_hub.reporting.wording import MISSING, at_commit, joined, number, signed, without_folders
from loram_hub.updates import CHANNEL_PARTS, HEAD_PARTS, UpdateNorms

_MOST_ADAPTERS = 4
"""Adapters that are laid side by side."""
_PARTS = {"base": "base", "release": "release", "adapter": "adapter as trained", "recovered": "recovered adapter"}
_WEIGHTS = (ADAPTER_WEIGHTS, MANIFEST)
_MOST_TASKS = 200
"""Scores in a table."""


def recovery_section(facts: Facts) -> Section:
    """Return what was measured of the base, the pruned model and both with the adapter: losses, and scores on tasks."""
    sizes = {release.counts.pruned_parameters for release in facts.releases}
    return Section(
        id="recovery",
        title="Before and after recovery",
        parts=tuple(_recovery_part(one, sizes, idx) for idx, one in enumerate(facts.evaluations, start=1)),
        hint="Nothing was measured. Measure it on held-out data, and give the JSON with --evaluation.",
        command="loram eval DATA --base BASE --release R --adapter A --recovered RECOVERED --json > evaluation.json",
    )


def _recovery_part(facts: EvaluationFacts, sizes: Collection[int], idx: int) -> Part:
    evaluation = facts.evaluation
    losses = {row.model: row.loss for row in evaluation.rows}
    paragraphs = [*_what_was_measured(evaluation), *_whose(facts), *_other_models(evaluation, sizes)]
    tables = [*([_loss_table(evaluation)] if losses else []), *_task_tables(evaluation.tasks)]
    if not losses:
        return Part(title=visible(facts.name), paragraphs=tuple(paragraphs), tables=tuple(tables))
    said = joined([f"{model} {loss:.4f}" for model, loss in losses.items()])
    figure = Figure(
        name="recovery" if idx == 1 else f"recovery-{idx}",
        alt=f"Held-out losses in nats per token: {said}. {_verdict(losses)}".strip(),
        caption=f"Held-out loss of each model{'; the dotted line is the base' if 'base' in losses else ''}.",
        table=tables[0],
        draw=lambda: recovery_picture(losses),
    )
    return Part(title=visible(facts.name), paragraphs=tuple(paragraphs), tables=tuple(tables), figures=(figure,))


def _what_was_measured(evaluation: Evaluation) -> Iterator[str]:
    if evaluation.rows:
        data = "" if evaluation.dataset is None else f" of {visible(evaluation.dataset)}"
        how = ", by the protocol of the LoRAM paper (at most 512 tokens)" if evaluation.protocol == "paper" else ""
        tokens = f"{evaluation.tokens:,} tokens of {evaluation.examples:,} sequences{data}{how}"
        yield f"Losses were measured on {tokens}, the same for every model."
    if evaluation.tasks is not None:
        yield f"Tasks were measured with lm-evaluation-harness {visible(evaluation.tasks.harness)}."


def _whose(facts: EvaluationFacts) -> Iterator[str]:
    """Say whether the files that were measured are those of the report."""
    if facts.misfit is not None:
        yield facts.misfit
    if not facts.parts:
        yield "The evaluation does not say which files it measured."
        return
    same = [f"{_PARTS[part.part]} {visible(part.here)}" for part in facts.parts if part.here is not None]
    others = [part_text(part) for part in facts.parts if part.is_other]
    if same:
        yield f"Measured on the very files of this report: {joined(same)}."
    if others:
        yield f"Measured on other files than those of this report: {joined(others)}."


def part_text(part: MeasuredPart) -> str:
    """Name what was measured: what it is, its id, and the beginning of a hash that tells it from others."""
    name = next((name for name in _WEIGHTS if name in part.files), min(part.files, default=None))
    digest = "" if name is None else f" ({visible(name)} {part.files[name][:12]})"
    return f"{_PARTS[part.part]} {at_commit(part.id, part.commit)}{digest}"


def _other_models(evaluation: Evaluation, sizes: Collection[int]) -> Iterator[str]:
    """Say so if the pruned model that was measured cannot be a release that the report is about."""
    measured = evaluation.parameters.get("pruned")
    if sizes and measured is not None and measured not in sizes:
        yield (
            f"This is an evaluation of another release: its pruned model has {measured:,} parameters, what the report "
            f"is about has {joined([f'{size:,}' for size in sorted(sizes)])}."
        )


def _loss_table(evaluation: Evaluation) -> Table:
    base = evaluation.row("base")
    rows = []
    for model in MODELS:
        row = evaluation.row(model)
        if row is None:
            rows.append((model, "not measured", MISSING, MISSING, MISSING))
            continue
        difference = MISSING if base is None or row is base else signed(row.loss - base.loss)
        rows.append((model, f"{row.loss:.4f}", difference, number(row.perplexity, 2), f"{row.parameters:,}"))
    header = ("model", "loss", "to the base", "perplexity", "parameters")
    return Table(caption="Held-out loss in nats per token", header=header, rows=tuple(rows))


def _task_tables(tasks: TaskScores | None) -> Iterator[Table]:
    if tasks is None:
        return
    models = [model for model in MODELS if any(model in task.scores for task in tasks.tasks)]
    rows = []
    for task in tasks.tasks[:_MOST_TASKS]:
        metric = task.metric if task.filter == "none" else f"{task.metric} ({task.filter})"
        part = (
            "" if task.is_whole or task.samples is None else f", {task.samples:,} of {task.documents or 0:,} questions"
        )
        shots = MISSING if task.num_fewshot is None else str(task.num_fewshot)
        scores = (_score(task.scores.get(model)) for model in models)
        rows.append((visible(f"{task.task}{part}"), visible(metric), shots, *scores))
    header = ("task", "metric", "shots", *models)
    yield Table(caption="Scores on tasks, value ± standard error", header=header, rows=tuple(rows))


def _score(score: Score | None) -> str:
    if score is None:
        return "not measured"
    return " ± ".join(number(part) for part in (score.value, score.stderr) if part is not None)


def _verdict(losses: Mapping[str, float]) -> str:
    base, recovered = losses.get("base"), losses.get("base + recovered adapter")
    if base is None or recovered is None:
        return ""
    compared = "lower than" if recovered < base else "higher than" if recovered > base else "equal to"
    return f"With the recovered adapter the base's loss is {compared} without it ({signed(recovered - base)})."


def training_section(facts: Facts) -> Section:
    """Return the losses of fine-tuning runs."""
    drawn = [run for run in facts.runs if run.curves.training or run.curves.held_out]
    return Section(
        id="training",
        title="Losses of fine-tuning",
        parts=tuple(_training_part(run, idx) for idx, run in enumerate(drawn, start=1)),
        hint="There is no run, or it has logged no step yet. Losses are in the folder of a fine-tuning run: give it.",
        command="loram report RUN -o report.html",
    )


def _training_part(run: RunFacts, idx: int) -> Part:
    figure = Figure(
        name="training" if idx == 1 else f"training-{idx}",
        alt=curve_sentence(run.curves, "Fine-tuning"),
        caption=f"Loss over the steps of the fine-tuning{_curves_text(run.curves)}.{broken_caption(run.curves)}",
        table=curve_table(run.curves, "Losses of the fine-tuning"),
        draw=lambda: loss_picture(run.curves),
    )
    sets = (
        ("No evaluation set was measured during training.",)
        if not run.curves.held_out
        else ("Evaluation sets were measured on the pruned model with the adapter, as it was trained.",)
    )
    broken = broken_text(run.curves)
    return Part(title=visible(run.name), paragraphs=(*([broken] if broken else []), *sets), figures=(figure,))


def _curves_text(curves: LossCurves) -> str:
    drawn = [*(["in training"] if curves.training else []), *(["on the evaluation sets"] if curves.held_out else [])]
    return f", {joined(drawn)}"


def norms_section(facts: Facts) -> Section:
    """Return how large the updates of adapters are, side by side."""
    measured, left_out = _side_by_side([adapter for adapter in facts.adapters if adapter.norms is not None])
    failed = [adapter for adapter in facts.adapters if adapter.norms is None]
    reasons = [(visible(adapter.name), visible(without_folders(adapter.why_no_norms or ""))) for adapter in failed]
    notes = tuple(f"The norms of {name} could not be computed: {why_not}" for name, why_not in reasons)
    if left_out:
        names = joined([visible(adapter.name) for adapter in left_out])
        notes += (f"Not shown, since {_MOST_ADAPTERS} adapters lie side by side at most: {names}.",)
    parts = [_norms_part(measured, notes)] if measured else [Part(paragraphs=notes)] if notes else []
    return Section(
        id="norms",
        title="Where the updates went",
        parts=tuple(parts),
        hint="Norms are those of an adapter's update: give an adapter or a run, and a plain one to compare with.",
        command="loram report RECOVERED --compare PLAIN_LORA -o report.html",
    )


def _side_by_side(adapters: Sequence[AdapterFacts]) -> tuple[list[AdapterFacts], list[AdapterFacts]]:
    """Return the adapters that are shown and those that are left out; what others are compared with has its place."""
    compared = sum(adapter.is_compared for adapter in adapters)
    shown: list[AdapterFacts] = []
    for adapter in adapters:
        others = sum(not other.is_compared for other in shown)
        if adapter.is_compared or others < _MOST_ADAPTERS - min(compared, 1):
            shown.append(adapter)
    return shown, [adapter for adapter in adapters if not any(adapter is other for other in shown)]


def _norms_part(adapters: Sequence[AdapterFacts], notes: tuple[str, ...]) -> Part:
    norms = {_label(adapter, adapters): adapter.norms for adapter in adapters if adapter.norms is not None}
    heads = Figure(
        name="head-norms",
        alt=f"Heatmaps of layers by heads. {' '.join(_head_sentence(name, found) for name, found in norms.items())}",
        caption=(
            "L2 norm of the part of the scaled update that belongs to each attention head: its rows of q, k and v, its "
            "columns of o. One colour scale for all. White heads were pruned or gained nothing, gray ones have no LoRA."
        ),
        table=_head_table(norms),
        draw=lambda: head_norms_picture(norms),
    )
    channels = Figure(
        name="channel-norms",
        alt=f"Lines over layers. {' '.join(_channel_sentence(name, found) for name, found in norms.items())}",
        caption="Mean norm of the update over a layer's active channels: rows of gate and up, columns of down.",
        table=_channel_table(norms),
        draw=lambda: channel_norms_picture(norms),
    )
    return Part(paragraphs=notes, figures=(heads, channels))


def _label(adapter: AdapterFacts, adapters: Sequence[AdapterFacts]) -> str:
    """Name an adapter by what it is; by its name as well where several are of one kind."""
    kinds = [other.kind for other in adapters]
    name = visible(adapter.name)
    if [visible(other.name) for other in adapters].count(name) > 1:
        name = f"{name} ({1 + next(idx for idx, other in enumerate(adapters) if other is adapter)})"
    return name if kinds.count(adapter.kind) > 1 else f"{adapter.kind.removesuffix(' adapter')}: {name}"


def _head_sentence(name: str, norms: UpdateNorms) -> str:
    said = [
        f"{part} mean {number(_mean(norms.heads[part]))}, highest {number(_max(norms.heads[part]))}"
        for part in HEAD_PARTS
    ]
    return f"{name}, over heads that have an update: {joined(said)}."


def _channel_sentence(name: str, norms: UpdateNorms) -> str:
    said = [
        f"{part} from {number(_min(norms.channel_means[part]))} to {number(_max(norms.channel_means[part]))}"
        for part in CHANNEL_PARTS
    ]
    return f"{name}, mean norm per layer: {joined(said)}."


def _head_table(norms: Mapping[str, UpdateNorms]) -> Table:
    header = ["layer"]
    for name in norms:
        header += [f"{name}: {part}, {what}" for part in HEAD_PARTS for what in ("mean", "highest")]
    layers = max(len(found.heads["q"]) for found in norms.values())
    rows = []
    for layer in range(layers):
        cells = [str(layer)]
        for found in norms.values():
            for part in HEAD_PARTS:
                values = found.heads[part][layer : layer + 1]
                cells += [number(_mean(values)), number(_max(values))]
        rows.append(tuple(cells))
    caption = "Norms per layer, over the heads that have an update"
    return Table(caption=caption, header=tuple(header), rows=tuple(rows))


def _channel_table(norms: Mapping[str, UpdateNorms]) -> Table:
    header = ["layer"]
    for name in norms:
        header += [cell for part in CHANNEL_PARTS for cell in (f"{name}: {part}", "active")]
    layers = max(len(found.channel_means["gate"]) for found in norms.values())
    rows = []
    for layer in range(layers):
        cells = [str(layer)]
        for found in norms.values():
            for part in CHANNEL_PARTS:
                inside = layer < len(found.channel_means[part])
                cells += [
                    number(float(found.channel_means[part][layer])) if inside else MISSING,
                    f"{int(found.active_channels[part][layer]):,}" if inside else MISSING,
                ]
        rows.append(tuple(cells))
    caption = "Mean norm per layer, and the channels that it is a mean of"
    return Table(caption=caption, header=tuple(header), rows=tuple(rows))


def _mean(values: Numbers) -> float | None:
    found = values[np.isfinite(values) & (values > 0)]
    return float(found.mean()) if found.size else None


def _max(values: Numbers) -> float | None:
    found = values[np.isfinite(values)]
    return float(found.max()) if found.size else None


def _min(values: Numbers) -> float | None:
    found = values[np.isfinite(values)]
    return float(found.min()) if found.size else None
