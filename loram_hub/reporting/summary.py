"""The top of the page: what it is about in a few sentences, the main figures, and the facts of every source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loram_hub.cards.escaping import visible
from loram_hub.cards.history import history_of
from loram_hub.manifest import Pruning
from loram_hub.reporting.contents import KeyFigure, Part, Section, Table
from loram_hub.reporting.facts import (
    AdapterFacts,
    EvaluationFacts,
    Facts,
    ReleaseFacts,
    RunFacts,
    StudyFacts,
    finite_points,
)
from loram_hub.reporting.wording import at_commit, count_text, joined, nbytes_text, number

_MOST_KEY_FIGURES = 6
_MOST_FILES = 4
"""Of a model in shards, whose hashes are shown."""


def title_of(facts: Facts) -> str:
    """Name the report by its first source."""
    kinds = (facts.releases, facts.runs, facts.adapters, facts.studies, facts.evaluations, facts.alignments)
    names = [one.name for found in kinds for one in found]
    return f"LoRAM report: {visible(names[0])}" if names else "LoRAM report"


def lead(facts: Facts) -> tuple[str, ...]:
    """Say in a few sentences what the sources are, and what was measured."""
    sentences = [
        *(_release_sentence(release) for release in facts.releases),
        *(_run_sentence(run) for run in facts.runs),
        *(_adapter_sentence(adapter) for adapter in facts.adapters),
        *_loss_sentences(facts),
        *(_study_sentence(study) for study in facts.studies),
    ]
    return tuple(sentences) or ("Nothing but its files is known of this source.",)


def _release_sentence(facts: ReleaseFacts) -> str:
    manifest, counts = facts.release.manifest, facts.counts
    history = history_of(manifest.alignment)
    done = [
        *(["refitted"] if history.refit is not None else []),
        *(["aligned on general text"] if history.training is not None else ["not aligned"]),
        "stored in NF4" if facts.release.is_quantized else "not quantized",
    ]
    return (
        f"{visible(facts.name)} is a LoRAM release of {at_commit(manifest.base.id, manifest.base.commit)}: "
        f"{_how_pruned(facts)} left {counts.pruned_parameters:,} of {counts.original_parameters:,} parameters, "
        f"{counts.reduction:.2f} times fewer{_zeros(facts)}; it is {joined(done)}."
    )


def _zeros(facts: ReleaseFacts) -> str:
    """Say of a sparse release what its zeros do not do."""
    return " (zeros, which save no memory in training)" if facts.release.is_sparse else ""


def _how_pruned(facts: ReleaseFacts) -> str:
    pruning = facts.release.manifest.pruning
    if isinstance(pruning, Pruning):
        return f"structured pruning at ratio {pruning.pruning_ratio:g} by {visible(pruning.importance)} importance"
    return f"{visible(pruning.label)}"


def _run_sentence(facts: RunFacts) -> str:
    points = finite_points(facts.curves.training)
    losses = "" if len(points) < 2 else f"; its training loss went from {points[0][1]:.4f} to {points[-1][1]:.4f}"
    if lost := len(facts.curves.training) - len(points):
        losses += f"; {lost:,} of its {len(facts.curves.training):,} training losses are not finite"
    reached = "no checkpoint yet" if facts.step is None else f"step {facts.step:,}"
    state = f"gave the adapter of {reached}" if facts.is_finished else f"has not finished ({reached})"
    trained_on = "" if facts.release is None else f" on {facts.release}"
    return f"The fine-tuning run {visible(facts.name)}{trained_on} {state}{losses}."


def _adapter_sentence(facts: AdapterFacts) -> str:
    release = "" if facts.release is None else f", trained on {visible(facts.release)}"
    base = "" if facts.base is None else f" for {visible(_last_part(facts.base))}"
    return (
        f"{visible(facts.name)} is a {facts.kind} of rank {facts.rank}{base}{release}: "
        f"{count_text(facts.modules, 'module')}, {facts.parameters:,} numbers, {nbytes_text(facts.nbytes)}."
    )


def _study_sentence(facts: StudyFacts) -> str:
    results = facts.results
    return (
        f"{visible(facts.name)} is a study: {count_text(len(results.rows), 'measurement')} of "
        f"{count_text(len(results.settings()), 'setting')} with {count_text(len(results.seeds), 'seed')}."
    )


def _loss_sentences(facts: Facts) -> Iterator[str]:
    for measured in facts.evaluations:
        base, recovered = (measured.evaluation.row(name) for name in ("base", "base + recovered adapter"))
        if base is None or recovered is None:
            continue
        difference = recovered.loss - base.loss
        tokens = f"{measured.evaluation.tokens:,} held-out tokens"
        where = f"By {visible(measured.name)}, on {tokens}, {_adapter_of(measured)}"
        if difference == 0:
            yield f"{where} leaves the loss of the base where it is, at {base.loss:.4f} nats per token."
            continue
        verb = "lowers" if difference < 0 else "raises"
        yield (
            f"{where} {verb} the loss of the base from {base.loss:.4f} to {recovered.loss:.4f}, by "
            f"{abs(difference):.4f} nats per token."
        )


def _adapter_of(facts: EvaluationFacts) -> str:
    """Name the adapter that an evaluation measured: one of the report's, another one, or one that it does not name."""
    part = next((part for part in facts.parts if part.part == "recovered"), None)
    if part is not None and part.here is not None:
        return visible(part.here)
    if part is None:
        none_of_ours = ", and that is none of this report's," if facts.misfit is not None else ""
        return f"an adapter that it does not name{none_of_ours}"
    named = at_commit(part.id, part.commit)
    is_other = part.is_other or facts.misfit is not None
    return f"another adapter than this report's, {named}," if is_other else f"the adapter {named}"


def key_figures(facts: Facts) -> tuple[KeyFigure, ...]:
    """Return the main numbers, at most six."""
    return tuple([*_release_figures(facts), *_loss_figures(facts), *_adapter_figures(facts)][:_MOST_KEY_FIGURES])


def _release_figures(facts: Facts) -> Iterator[KeyFigure]:
    for release in facts.releases[:1]:
        counts = release.counts
        yield KeyFigure(
            label="parameters",
            value=_short(counts.pruned_parameters),
            note=f"of {_short(counts.original_parameters)} in the base",
        )
        note = "in parameters; zeros save no memory" if release.release.is_sparse else "in parameters"
        yield KeyFigure(label="reduction", value=f"{counts.reduction:.2f} ×", note=note)
        stored = sum(entry.size for entry in release.release.manifest.files.values())
        kind = "NF4" if release.release.is_quantized else visible(release.release.config.get("dtype", "not quantized"))
        yield KeyFigure(label="files of the release", value=nbytes_text(stored), note=kind)


def _loss_figures(facts: Facts) -> Iterator[KeyFigure]:
    """Return the loss of the first evaluation; of one that is of these very files before others."""
    ranked = sorted(facts.evaluations, key=lambda one: not any(part.here for part in one.parts))
    for measured in ranked[:1]:
        base, recovered = (measured.evaluation.row(name) for name in ("base", "base + recovered adapter"))
        source = visible(measured.name)
        if recovered is not None:
            alone = "" if base is None else f"; base alone: {base.loss:.4f}"
            note = f"base with {_adapter_of(measured).rstrip(',')}{alone}; {source}"
            yield KeyFigure(label="held-out loss", value=f"{recovered.loss:.4f}", note=note)
        elif base is not None:
            yield KeyFigure(label="held-out loss", value=f"{base.loss:.4f}", note=f"base; {source}")


def _adapter_figures(facts: Facts) -> Iterator[KeyFigure]:
    for adapter in facts.adapters[:1]:
        yield KeyFigure(label="adapter", value=nbytes_text(adapter.nbytes), note=f"rank {adapter.rank}")
    for run in facts.runs[:1]:
        if run.step is not None:
            yield KeyFigure(label="steps", value=f"{run.step:,}", note="of fine-tuning")


def _short(count: int) -> str:
    for scale, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return str(count)


def _last_part(base: str) -> str:
    """Return a Hub id as it is, of a path its last part: where things lie is nobody's business."""
    return (
        base if base.count("/") == 1 and not base.startswith(("/", ".", "~")) else base.rstrip("/").rpartition("/")[2]
    )


def provenance_section(facts: Facts) -> Section:
    """Return where everything comes from and how it was made, a table for each source."""
    parts = [
        *(Part(title=visible(one.name), tables=tuple(_release_tables(one))) for one in facts.releases),
        *(Part(title=visible(one.name), tables=tuple(_run_tables(one))) for one in facts.runs),
        *(Part(title=visible(one.name), tables=(_adapter_table(one),)) for one in facts.adapters),
        *(Part(title=visible(one.name), tables=(_evaluation_table(one),)) for one in facts.evaluations),
        *(Part(title=visible(one.name), tables=(_study_table(one),)) for one in facts.studies),
        *([Part(title="Stages of the publication", tables=(_stage_table(facts),))] if facts.stages else []),
    ]
    return Section(
        id="provenance",
        title="Names, digests, versions, seeds",
        parts=tuple(parts),
        hint="Names, digests and versions are those of what is reported on: a release, a run, an adapter, a study.",
        command="loram report RELEASE RUN ADAPTER -o report.html",
    )


def _release_tables(facts: ReleaseFacts) -> Iterator[Table]:
    manifest, counts = facts.release.manifest, facts.counts
    pruning, base = manifest.pruning, manifest.base
    rows = [
        ("release", at_commit(facts.name, facts.commit)),
        ("base model", visible(base.id)),
        ("commit of the base", base.commit or "a local folder"),
        ("pruning", _how_pruned(facts)),
        ("seed of the pruning", str(pruning.seed)),
        *(
            [("whole layers", f"{pruning.keep_first} first, {pruning.keep_last} last")]
            if isinstance(pruning, Pruning)
            else []
        ),
        ("calibration", _pairs(pruning.calibration) or "none"),
        (
            "parameters",
            f"{counts.pruned_parameters:,} of {counts.original_parameters:,} ({counts.reduction:.3f} × fewer)",
        ),
        ("weights in 16 bit", nbytes_text(counts.bf16_bytes)),
        ("weights in NF4", nbytes_text(counts.nf4_bytes)),
        ("files", nbytes_text(sum(entry.size for entry in manifest.files.values()))),
        ("quantization", _pairs(manifest.quantization) or "none"),
        ("alignment", _alignment(facts)),
        ("licence of the base", facts.licence or "not known here: see the card of the base"),
        ("digest of the plan", facts.release.plan.digest),
        ("SHA-256 of loram.json", facts.manifest_sha256),
        ("SHA-256 of the base's config", base.config_sha256),
        ("made with", _pairs(manifest.tools) or "not said"),
    ]
    yield Table(caption="The release", header=(), rows=tuple(rows))


def _alignment(facts: ReleaseFacts) -> str:
    history = history_of(facts.release.manifest.alignment)
    training = history.training
    if training is None:
        return "none; refitted" if history.refit is not None else "none"
    names = ("steps", "tokens", "sequence_length", "batch_size", "learning_rate", "seed")
    return _pairs({name: training[name] for name in names if name in training}) or "trained further"


def _run_tables(facts: RunFacts) -> Iterator[Table]:
    rows = [
        ("run", visible(facts.name)),
        ("state", "finished" if facts.is_finished else "not finished"),
        *([("trained on", facts.release)] if facts.release is not None else []),
        *([("adapter of step", f"{facts.step:,}")] if facts.step is not None else []),
        *facts.settings,
        *([("peak GPU memory", nbytes_text(facts.peak_device_bytes))] if facts.peak_device_bytes else []),
        ("made with", _pairs(facts.versions) or "not said"),
    ]
    yield Table(caption="The fine-tuning run", header=(), rows=tuple(rows))


def _adapter_table(facts: AdapterFacts) -> Table:
    rows = [
        ("adapter", at_commit(facts.name, facts.commit)),
        ("kind", facts.kind),
        ("base", visible(_last_part(facts.base)) if facts.base is not None else "it names none"),
        *([("trained on", visible(facts.release))] if facts.release is not None else []),
        *([("digest of the plan", visible(facts.plan_sha256))] if facts.plan_sha256 is not None else []),
        ("rank, alpha", f"{facts.rank}, {facts.alpha:g}"),
        ("modules", f"{facts.modules:,}"),
        ("numbers", f"{facts.parameters:,}"),
        ("weights", nbytes_text(facts.nbytes)),
        *((f"SHA-256 of {file}", digest) for file, digest in facts.files.items()),
    ]
    return Table(caption="The adapter", header=(), rows=tuple(rows))


def _evaluation_table(facts: EvaluationFacts) -> Table:
    evaluation = facts.evaluation
    rows = [("evaluation", visible(facts.name))]
    for part in facts.parts:
        told = "the one of this report" if part.here is not None else "none of this report" if part.is_other else None
        rows.append((part.part, at_commit(part.id, part.commit) + (f", {told}" if told else "")))
        rows += [(f"SHA-256 of its {file}", digest) for file, digest in [*part.files.items()][:_MOST_FILES]]
        if len(part.files) > _MOST_FILES:
            rows.append(("further files", f"{len(part.files) - _MOST_FILES:,}"))
    if not facts.parts:
        rows.append(("models and adapters", "it does not say which"))
    if evaluation.rows:
        rows.append(("held-out data", evaluation.dataset or "not on the Hub, or not said"))
        rows.append(("sequences, tokens", f"{evaluation.examples:,}, {evaluation.tokens:,}"))
    rows += facts.settings
    return Table(caption="The evaluation", header=(), rows=tuple(rows))


def _study_table(facts: StudyFacts) -> Table:
    results, conditions = facts.results, facts.conditions
    rows = [
        ("study", visible(facts.name)),
        ("measurements", f"{len(results.rows):,} of {count_text(len(results.settings()), 'setting')}"),
        ("seeds", ", ".join(map(str, results.seeds))),
    ]
    if conditions is None:
        rows.append(("machines and versions", "its folder does not tell them"))
        return Table(caption="The study", header=(), rows=tuple(rows))
    rows += [
        *([("command", visible(conditions.command))] if facts.has_command else []),
        *(("machine", _pairs(machine)) for machine in conditions.machines),
        *(("measured with", _pairs(versions)) for versions in conditions.versions),
        ("time of all cells", f"{number(conditions.seconds, 1)} s"),
    ]
    return Table(caption="The study", header=(), rows=tuple(rows))


def _stage_table(facts: Facts) -> Table:
    return Table(
        caption="What the stages of the publication took",
        header=("stage", "seconds", "output"),
        rows=tuple((stage.name, number(stage.seconds, 1), nbytes_text(stage.nbytes)) for stage in facts.stages),
    )


def _pairs(values: object) -> str:
    if not isinstance(values, Mapping):
        return ""
    simple = {key: value for key, value in values.items() if isinstance(value, str | int | float)}
    return ", ".join(visible(f"{key} {value}") for key, value in [*simple.items()][:20])
