"""Sections about releases: what was kept and by which scores, how alignment went, what training on it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from loram_hub.architecture import Space
from loram_hub.cards.escaping import visible
from loram_hub.cards.pictures import kept_groups_picture
from loram_hub.errors import InvalidRequestError, UnsupportedAdapterError
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
    finite_points,
)
from loram_hub.reporting.wording import MISSING, count_text, joined, nbytes_text, number, span, thinned

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
        if points[0][0] == 0 and math.isfinite(points[0][1]):
            levels.append(Level(loss=points[0][1], label=f"unaligned, on {corpus}", curve=corpus))
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
        caption=f"Loss over the steps of the alignment{_level_caption(aligned, levels)}",
        table=curve_table(aligned.curves, "Losses of the alignment"),
        draw=lambda: loss_picture(aligned.curves, levels),
    )
    broken = broken_text(aligned.curves)
    return Part(title=visible(aligned.name), paragraphs=(*([broken] if broken else []), *notes), figures=(figure,))


def _level_caption(aligned: AlignmentFacts, levels: Sequence[Level]) -> str:
    """Say what the horizontal lines are, of those that there are, and what breaks are."""
    named = [
        *(
            ["where the unaligned model was, each in its curve's colour"]
            if any(level.curve for level in levels)
            else []
        ),
        *(["where the base is"] if any(level.curve is None for level in levels) else []),
    ]
    lines = f"; horizontal lines show {joined(named)}" if named else ""
    return f"{lines}.{broken_caption(aligned.curves)}"


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
    run, fit = _fit_of_run(facts, runs)
    shape = fit.shape
    whose = "with the default settings" if run is None else f"as {visible(run.name)} trained"
    text = (
        f"Estimated for sequences of {shape.sequence_length:,} tokens, micro-batch {shape.micro_batch}, rank "
        f"{shape.rank} on {_targets_text(shape)}, dropout {shape.dropout:g}, {shape.optimizer}, "
        f"{'with' if shape.checkpointing else 'without'} gradient checkpointing, embedding: {shape.options.embedding}, "
        f"lm_head: {shape.options.lm_head}{', activations offloaded' if shape.options.activation_offloading else ''}, "
        f"{count_text(shape.processes, 'GPU')}, {whose}. An estimate from formulas, not a measurement."
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


def _fit_of_run(facts: ReleaseFacts, runs: Sequence[RunFacts]) -> tuple[RunFacts | None, Fit]:
    """Return the first run on this release whose settings can be estimated, and the estimate; else of the defaults."""
    for run in runs:
        if run.shape is not None and _was_trained_on(run, facts):
            try:
                return run, estimate(facts, run.shape)
            except (InvalidRequestError, UnsupportedAdapterError):  # modules that this model does not have
                continue
    return None, estimate(facts, TrainingShape())


def _was_trained_on(run: RunFacts, facts: ReleaseFacts) -> bool:
    """Whether a run names this release. One plan may have several: aligned or not, in NF4 or in 16 bit."""
    if run.plan_sha256 != facts.release.plan.digest or (run.commit or facts.commit) != (facts.commit or run.commit):
        return False
    names = (visible(facts.name), visible(facts.name).rpartition("/")[2]) if facts.commit is None else (facts.name,)
    return run.release in names


def _targets_text(shape: TrainingShape) -> str:
    return "every projection" if shape.targets is None else joined([visible(target) for target in shape.targets])


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
    if points := finite_points(curves.training):
        first, last = points[0], points[-1]
        said.append(
            f"the training loss goes from {first[1]:.4f} at step {first[0]:g} to {last[1]:.4f} at step {last[0]:g}"
        )
    for name, curve in curves.held_out.items():
        if points := finite_points(curve):
            said.append(f"the loss on {visible(name)} from {points[0][1]:.4f} to {points[-1][1]:.4f}")
    broken = broken_text(curves)
    return f"{what}: {joined(said) or 'no losses'}.{' ' + broken if broken else ''}"


def broken_text(curves: LossCurves) -> str:
    """Say how many losses were not finite; empty if all were."""
    said = []
    for name, points in (("training", curves.training), *curves.held_out.items()):
        lost = len(points) - len(finite_points(points))
        if lost:
            where = "in training" if name == "training" else f"on {visible(name)}"
            said.append(f"{lost:,} of {len(points):,} losses {where}")
    return f"Not finite: {joined(said)}." if said else ""


def broken_caption(curves: LossCurves) -> str:
    """Say what a break in a curve is, if there is one."""
    return " Where a loss was not finite the line is broken." if broken_text(curves) else ""


def curve_table(curves: LossCurves, caption: str) -> Table:
    """Return losses by step, held-out sets in columns; long curves are thinned, measurements of held-out sets kept."""
    columns = [dict(points) for points in (curves.training, *curves.held_out.values())]
    measured = sorted({step for points in curves.held_out.values() for step, _ in points})
    steps = sorted({*thinned(sorted(columns[0])), *thinned(measured)})
    rows = tuple(
        (f"{step:g}", *(_loss_text(column[step]) if step in column else MISSING for column in columns))
        for step in steps
    )
    total = len({step for column in columns for step in column})
    note = "" if len(steps) == total else f"; {len(steps)} of {total:,} steps"
    return Table(
        caption=f"{caption}, nats per token{note}",
        header=("step", "training", *(visible(name) for name in curves.held_out)),
        rows=rows,
    )


def _loss_text(loss: float) -> str:
    return number(loss) if math.isfinite(loss) else "not finite"


def _named(stem: str, idx: int) -> str:
    return stem if idx == 1 else f"{stem}-{idx}"
