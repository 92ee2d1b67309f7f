"""Sections about releases: what was kept and by which scores, how alignment went, what training on it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from loram_hub.architecture import Space
from loram_hub.cards.escaping import visible
from loram_hub.cards.pictures import kept_groups_picture
from loram_hub.estimation import TrainingShape, gpu_memory, training_memory
from loram_hub.fitting import Fit, Subject, alternative_text, fit_of
from loram_hub.fitting.picture import waterfall
from loram_hub.fitting.wording import LABELS, gib
from loram_hub.plan import Plan
from loram_hub.reporting.contents import Figure, Part, Section, Table
from loram_hub.reporting.drawings import Level, importance_picture, loss_picture
from loram_hub.reporting.facts import (
    AlignmentFacts,
    Facts,
    ImportanceFacts,
    LossCurves,
    ReleaseFacts,
    RunFacts,
    ScoreBands,
)
from loram_hub.reporting.wording import MISSING, joined, nbytes_text, number, span, thinned

_GPUS = (2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141, 192)
"""Memory of common GPUs in GB; an estimate is held against the smallest that it fits."""
_SPACES: Mapping[Space, str] = {"kv_heads": "KV heads", "channels": "MLP channels"}


def kept_section(facts: Facts) -> Section:
    """Return which heads and channels each layer keeps."""
    return Section(
        id="kept",
        title="Kept heads and channels",
        parts=tuple(_kept_part(release, idx) for idx, release in enumerate(facts.releases, start=1)),
        hint="Which heads and channels are kept is in a release: give one, or the work folder of 'loram publish'.",
        command="loram report RELEASE -o report.html",
    )


def _kept_part(facts: ReleaseFacts, idx: int) -> Part:
    plan = facts.release.plan
    if facts.release.is_sparse:
        text = (
            "This is a sparse release: every head and channel is there, and single weights are zero in every matrix, "
            f"{1 - facts.counts.pruned_parameters / facts.counts.original_parameters:.1%} of all parameters."
        )
        return Part(title=visible(facts.name), paragraphs=(text,))
    if not plan.kept:
        return Part(title=visible(facts.name), paragraphs=("This release keeps every head and every channel.",))
    whole = plan.architecture.whole_layer
    kept = [plan.layers[layer] for layer in sorted(plan.kept)]
    layers = plan.architecture.num_hidden_layers
    alt = (
        f"Two heatmaps over {layers} layers. The {layers - len(plan.kept)} whole layers keep all {whole.kv_heads} KV "
        f"heads and {whole.channels:,} channels; the {len(plan.kept)} pruned ones keep "
        f"{span([sizes.kv_heads for sizes in kept])} KV heads and {span([sizes.channels for sizes in kept])} channels."
    )
    figure = Figure(
        name=_named("kept-groups", idx),
        alt=alt,
        caption="Share kept of each KV head and of each group of neighbouring MLP channels; a row is a layer.",
        table=_kept_table(plan),
        draw=lambda: kept_groups_picture(plan),
    )
    return Part(title=visible(facts.name), figures=(figure,))


def _kept_table(plan: Plan) -> Table:
    whole = plan.architecture.whole_layer
    rows = [
        (
            str(layer),
            f"{sizes.kv_heads}",
            f"{sizes.kv_heads / whole.kv_heads:.1%}",
            f"{sizes.channels:,}",
            f"{sizes.channels / whole.channels:.1%}",
        )
        for layer, sizes in enumerate(plan.layers)
    ]
    header = ("layer", "KV heads", "share", "MLP channels", "share")
    return Table(caption="Kept heads and channels per layer", header=header, rows=tuple(rows))


def importance_section(facts: Facts) -> Section:
    """Return how the importance scores of kept and pruned groups are spread."""
    return Section(
        id="importance",
        title="Importance scores",
        parts=tuple(_importance_part(one, idx) for idx, one in enumerate(facts.importances, start=1)),
        hint=(
            "Importance scores are not part of a release. 'loram publish' leaves them in its work folder, and "
            "'loram prune' writes them with --importance-out; give that folder, or the file with --importance."
        ),
        command="loram report RELEASE --importance importance.safetensors -o report.html",
    )


def _importance_part(facts: ImportanceFacts, idx: int) -> Part:
    groups = "kept and of pruned groups" if facts.has_plan else "all groups; no release at hand says what was kept"
    figure = Figure(
        name=_named("importance", idx),
        alt=f"Importance scores per layer. {' '.join(_score_sentences(facts))}",
        caption=f"Scores of {groups}: a point is a layer's median, a bar its 5th to 95th percentile.",
        table=_score_table(facts),
        draw=lambda: importance_picture(facts.bands),
    )
    method = () if facts.method is None else (f"The scores were computed by {visible(facts.method)}.",)
    return Part(title=visible(facts.name), paragraphs=method, figures=(figure,))


def _score_sentences(facts: ImportanceFacts) -> Iterator[str]:
    for space, band in facts.bands.items():
        kept = _medians(band, band.kept)
        name = _SPACES[space]
        if not facts.has_plan or not np.isfinite(band.pruned).any():
            yield f"{name}: medians from {number(min(kept))} to {number(max(kept))}."
            continue
        layers = np.isfinite(band.pruned[:, 1]) & np.isfinite(band.kept[:, 1]) & (band.pruned[:, 1] > 0)
        yield f"{name}: the median score of kept ones lies between {number(min(kept))} and {number(max(kept))}"
        if layers.any():
            ratios = band.kept[layers, 1] / band.pruned[layers, 1]
            yield f"and is {ratios.min():.1f} to {ratios.max():.1f} times that of pruned ones in the same layer."


def _medians(band: ScoreBands, values: np.ndarray) -> list[float]:
    found = values[:, 1]
    return [float(value) for value in found[np.isfinite(found)]] or [float("nan")]


def _score_table(facts: ImportanceFacts) -> Table:
    header = ["layer"]
    for space in facts.bands:
        header += [f"{_SPACES[space]}, kept: 5 %", "median", "95 %", "pruned: 5 %", "median", "95 %"]
    layers = max(len(band.kept) for band in facts.bands.values())
    rows = []
    for layer in range(layers):
        cells = [np.concatenate([band.kept[layer], band.pruned[layer]]) for band in facts.bands.values()]
        rows.append((str(layer), *(number(float(value), 3) for value in np.concatenate(cells))))
    return Table(caption="Percentiles of the scores per layer", header=tuple(header), rows=tuple(rows))


def alignment_section(facts: Facts) -> Section:
    """Return the losses of alignment, with lines for what they are compared with."""
    return Section(
        id="alignment",
        title="Alignment",
        parts=tuple(_alignment_part(one, facts, idx) for idx, one in enumerate(facts.alignments, start=1)),
        hint="No losses of an alignment are here. An aligned release has them, and the folder of its run.",
        command="loram align RELEASE ALIGNED --corpus texts.jsonl",
    )


def _alignment_part(aligned: AlignmentFacts, facts: Facts, idx: int) -> Part:
    levels, notes = [], []
    for corpus, points in aligned.curves.held_out.items():
        if points[0][0] == 0:
            levels.append(Level(loss=points[0][1], label=f"unaligned, on {corpus}"))
    base = next((row for one in facts.evaluations if (row := one.evaluation.row("base")) is not None), None)
    if base is not None:
        levels.append(Level(loss=base.loss, label="base, on the data of the evaluation"))
        notes.append(
            "The line of the base is its loss in the evaluation, whose data are others than the texts held out of the "
            "alignment: it says where the base stands, and is no target of this curve."
        )
    else:
        notes.append("There is no line of the base: give an evaluation in which it was measured.")
    figure = Figure(
        name=_named("alignment", idx),
        alt=_alignment_alt(aligned, levels),
        caption="Loss over the steps of the alignment; horizontal lines show where the unaligned model was.",
        table=curve_table(aligned.curves, "Losses of the alignment"),
        draw=lambda: loss_picture(aligned.curves, levels),
    )
    return Part(title=visible(aligned.name), paragraphs=tuple(notes), figures=(figure,))


def _alignment_alt(aligned: AlignmentFacts, levels: Sequence[Level]) -> str:
    tokens = "" if aligned.tokens is None else f" over {aligned.tokens:,} tokens"
    lines = [f"{visible(level.label)} {level.loss:.4f}" for level in levels]
    return f"{curve_sentence(aligned.curves, f'Alignment{tokens}')} Lines: {joined(lines) or 'none'}."


def memory_section(facts: Facts) -> Section:
    """Return what a fine-tuning on each release takes, as a waterfall."""
    return Section(
        id="memory",
        title="Memory of fine-tuning",
        parts=tuple(_memory_part(release, facts.runs, idx) for idx, release in enumerate(facts.releases, start=1)),
        hint="The estimate is one of a fine-tuning on a release: give one.",
        command="loram estimate RELEASE --gpu 20GB",
    )


def _memory_part(facts: ReleaseFacts, runs: Sequence[RunFacts], idx: int) -> Part:
    digest = facts.release.plan.digest
    run = next((run for run in runs if run.shape is not None and run.plan_sha256 == digest), None)
    shape = TrainingShape() if run is None or run.shape is None else run.shape
    fit = estimate(facts, shape)
    whose = "with the default settings" if run is None else f"as {visible(run.name)} trained"
    text = (
        f"Estimated for sequences of {shape.sequence_length:,} tokens, micro-batch {shape.micro_batch}, rank "
        f"{shape.rank}, {whose}. An estimate from formulas, not a measurement."
    )
    measured = (
        ""
        if run is None or not run.peak_device_bytes
        else (f" The run measured {nbytes_text(run.peak_device_bytes)} of tensors on its GPU.")
    )
    figure = Figure(
        name=_named("memory", idx),
        alt=alternative_text(fit),
        caption="What the highest moment of a step holds, bar after bar, against the smallest GPU that it fits.",
        table=_memory_table(fit),
        draw=lambda: waterfall(fit),
    )
    return Part(title=visible(facts.name), paragraphs=(text + measured,), figures=(figure,))


def estimate(facts: ReleaseFacts, shape: TrainingShape) -> Fit:
    """Estimate a fine-tuning on a release by its plan alone, against the smallest common GPU that it fits."""
    release = facts.release
    subject = Subject(
        id=visible(facts.name),
        commit=facts.commit,
        kind="release",
        architecture=release.architecture,
        layers=release.plan.layers,
        quantized=release.is_quantized,
        stored_bytes=None,
        is_sparse=release.is_sparse,
    )
    needed = training_memory(subject.architecture, subject.layers, shape, quantized=subject.quantized).total
    memories = [gpu_memory(f"{size}GB") for size in _GPUS]
    return fit_of(subject, shape, next((gpu for gpu in memories if gpu.nbytes >= needed), memories[-1]))


def _memory_table(fit: Fit) -> Table:
    rows = [(LABELS[name], gib(nbytes)) for name, nbytes in fit.breakdown.components() if nbytes]
    total = ("total", gib(fit.breakdown.total))
    return Table(caption="Estimated memory", header=("component", "bytes"), rows=(*rows, total))


def curve_sentence(curves: LossCurves, what: str) -> str:
    """Say where losses begin and end."""
    said = []
    if curves.training:
        first, last = curves.training[0], curves.training[-1]
        said.append(
            f"the training loss goes from {first[1]:.4f} at step {first[0]:g} to {last[1]:.4f} at step {last[0]:g}"
        )
    for name, points in curves.held_out.items():
        said.append(f"the loss on {visible(name)} from {points[0][1]:.4f} to {points[-1][1]:.4f}")
    return f"{what}: {joined(said) or 'no losses'}."


def curve_table(curves: LossCurves, caption: str) -> Table:
    """Return losses by step, held-out sets in columns; long curves are thinned, measurements of held-out sets kept."""
    columns = [dict(points) for points in (curves.training, *curves.held_out.values())]
    measured = sorted({step for points in curves.held_out.values() for step, _ in points})
    steps = sorted({*thinned(sorted(columns[0])), *thinned(measured)})
    rows = tuple(
        (f"{step:g}", *(number(column.get(step)) if step in column else MISSING for column in columns))
        for step in steps
    )
    total = len({step for column in columns for step in column})
    note = "" if len(steps) == total else f"; {len(steps)} of {total:,} steps"
    return Table(
        caption=f"{caption}, nats per token{note}",
        header=("step", "training", *(visible(name) for name in curves.held_out)),
        rows=rows,
    )


def _named(stem: str, idx: int) -> str:
    return stem if idx == 1 else f"{stem}-{idx}"
