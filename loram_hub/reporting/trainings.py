"""Losses over the steps of trainings: from a run's record or checkpoints, from a release, or the log of an alignment.

All of these are files of a run folder, which may be a stranger's: a value that is no number is left out. A loss that
was not finite stays, as NaN, so that a run that diverged does not look like one that went well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path, PurePosixPath, PureWindowsPath

from loram_hub.alignment.curves import RunLog
from loram_hub.alignment.runs import LOG_FILE
from loram_hub.cards.escaping import visible
from loram_hub.cards.history import history_of
from loram_hub.cards.numbers import finite
from loram_hub.cards.pictures import Curve, alignment_curve, held_out_curves
from loram_hub.errors import InvalidRequestError, VerificationError
from loram_hub.estimation import TrainingShape
from loram_hub.files import MAX_JSON_BYTES, read_json
from loram_hub.finetuning.recipe import FinetuneRecipe, MemorySection
from loram_hub.finetuning.runs import RECORD_FILE, RUN_FILE, STARTS_FILE
from loram_hub.finetuning.shapes import training_shape
from loram_hub.manifest import Manifest
from loram_hub.recipes import section_from
from loram_hub.reporting.facts import AlignmentFacts, LossCurves, RunFacts

_MOST_SETS = 8
_MOST_VERSIONS = 20
_BROKEN = float("nan")
_PREFIX, _SUFFIX = "eval_", "_loss"
_STATE = "trainer_state.json"
_SIZING: Mapping[str, tuple[str, ...]] = {
    "lora": ("r", "dropout", "targets"),
    "training": ("max_tokens",),
    "memory": tuple(key.name for key in fields(MemorySection)),
}
"""Keys of a recipe that, with the preset, decide over memory."""


def run_facts(folder: Path, *, name: str) -> RunFacts:
    """Read a fine-tuning run; of one that has not ended, what its newest checkpoint has logged.

    Raises:
        CheckpointError: it has no record.
        VerificationError: a file is no JSON object, or too large.
    """
    if (folder / RECORD_FILE).is_file():
        record = read_json(folder / RECORD_FILE)
        history, step, is_finished = record.get("history"), _whole(record.get("steps")), True
        starts = record.get("starts")
    else:
        record = read_json(folder / RUN_FILE)
        history, step = _checkpoint_history(folder / "checkpoints")
        is_finished = False
        starts = read_json(folder / STARTS_FILE).get("starts") if (folder / STARTS_FILE).is_file() else None
    recipe, release = _mapping(record.get("recipe")), _mapping(record.get("release"))
    named = release.get("id", recipe.get("release"))
    versions = [(key, value) for key, value in _mapping(record.get("versions")).items() if isinstance(value, str)]
    return RunFacts(
        name=name,
        release=None if named is None else visible(_without_folders(named)),
        commit=_text(release.get("commit")),
        plan_sha256=_text(release.get("plan_sha256")),
        is_finished=is_finished,
        step=step,
        curves=_curves(history if isinstance(history, list) else []),
        settings=tuple(_settings(record, recipe)),
        versions=dict(versions[:_MOST_VERSIONS]),
        shape=_shape(record, recipe, starts),
        peak_device_bytes=_whole(record.get("peak_device_bytes")),
    )


def aligned_facts(manifest: Manifest, *, name: str) -> AlignmentFacts | None:
    """Read the last training from a release's manifest; None if it has no curve that can be drawn."""
    training = history_of(manifest.alignment).training
    curves = LossCurves(training=alignment_curve(training), held_out=held_out_curves(training))
    if not curves.training:
        return None
    return AlignmentFacts(name=name, curves=curves, tokens=_whole((training or {}).get("tokens")))


def logged_facts(folder: Path, *, name: str) -> AlignmentFacts | None:
    """Read the log of an alignment that may be going on; None if it has no step yet.

    Raises:
        VerificationError: a line of the log is no record.
    """
    records = RunLog(folder / LOG_FILE).read()
    training = _points(_losses(records, "loss"))
    held_out: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for corpus, loss in _mapping(record.get("held_out")).items():
            for point in _points([(record.get("step"), loss)]):
                held_out.setdefault(str(corpus), []).append(point)
    if not training:
        return None
    kept = {corpus: tuple(held_out[corpus]) for corpus in sorted(held_out)[:_MOST_SETS]}
    tokens = [count for record in records if (count := _whole(record.get("tokens"))) is not None]
    return AlignmentFacts(
        name=name, curves=LossCurves(training=training, held_out=kept), tokens=max(tokens, default=None)
    )


def _checkpoint_history(checkpoints: Path) -> tuple[object, int | None]:
    """Return what the Trainer logged up to the newest checkpoint, and that one's step."""
    states = {
        int(number): path
        for path in checkpoints.glob(f"checkpoint-*/{_STATE}")
        if (number := path.parent.name.removeprefix("checkpoint-")).isdecimal()
    }
    if not states:
        return [], None
    step = max(states)
    path = states[step]
    if path.stat().st_size > MAX_JSON_BYTES:
        raise VerificationError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes; is it the state of a Trainer?")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))  # the Trainer writes NaN, which strict JSON lacks
    except (ValueError, RecursionError) as err:
        raise VerificationError(f"{path} is not valid JSON: {err}. Resume the run, or finish it.") from err
    return _mapping(state).get("log_history"), step


def _curves(history: Sequence[object]) -> LossCurves:
    records = [_mapping(record) for record in history]
    names = [name for record in records for name in record if name.startswith(_PREFIX) and name.endswith(_SUFFIX)]
    held_out: dict[str, Curve] = {}
    for name in [*dict.fromkeys(names)][:_MOST_SETS]:
        if points := _points(_losses(records, name)):
            held_out[name.removeprefix(_PREFIX).removesuffix(_SUFFIX) or "held out"] = points
    return LossCurves(training=_points(_losses(records, "loss")), held_out=held_out)


def _losses(records: Iterable[Mapping[str, object]], name: str) -> Iterator[tuple[object, object]]:
    return ((record.get("step"), record[name]) for record in records if name in record)


def _points(pairs: Iterable[tuple[object, object]]) -> Curve:
    """Return what can be drawn: logs have null for a number that is not finite, and NaN stands for it here."""
    found = []
    for number, value in pairs:
        step, loss = _whole(number), finite(value)
        is_broken = value is None or (isinstance(value, int | float) and not isinstance(value, bool) and loss is None)
        if step is not None and (loss is not None or is_broken):
            found.append((float(step), _BROKEN if loss is None else loss))
    return tuple(found)


def _settings(record: Mapping[str, object], recipe: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    training, lora = _mapping(recipe.get("training")), _mapping(recipe.get("lora"))
    schedule = _mapping(record.get("schedule"))
    shown: tuple[tuple[str, object], ...] = (
        ("preset", recipe.get("preset")),
        ("rank, alpha", None if not lora else f"{lora.get('r')}, {lora.get('alpha')}"),
        ("targets", _words(lora.get("targets"))),
        ("masked", {True: "yes", False: "no"}.get(record.get("masked") is True) if "masked" in record else None),
        ("learning rate", training.get("learning_rate")),
        ("schedule", training.get("schedule")),
        ("steps", schedule.get("steps", training.get("steps"))),
        ("batch", training.get("batch_size")),
        ("longest example, tokens", training.get("max_tokens")),
        ("seed", recipe.get("seed")),
        ("device", record.get("device")),
    )
    yield from ((name, visible(value)) for name, value in shown if value is not None)
    for source in _data_sources(record):
        yield "data", source


def _data_sources(record: Mapping[str, object]) -> Iterator[str]:
    records = _mapping(record.get("data")).get("records")
    for entry in records[:_MOST_SETS] if isinstance(records, list) else ():
        values = _mapping(entry)
        name, rows, sha256 = _mapping(values.get("source")).get("source"), values.get("rows"), values.get("sha256")
        if isinstance(name, str):
            yield visible(f"{_without_folders(name)}, {rows} records, SHA-256 {sha256}")


def _without_folders(name: object) -> str:
    """Return the last part of a local path, so that a report does not tell where things lie; a Hub id stays."""
    text = str(name)
    if text.startswith(("/", "~", ".")) or text.count("/") > 1:
        return PurePosixPath(text).name
    return PureWindowsPath(text).name if "\\" in text else text


def _words(value: object) -> str | None:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value[:20])
    return None if value is None else str(value)


def _shape(record: Mapping[str, object], recipe: Mapping[str, object], starts: object) -> TrainingShape | None:
    """Return how a run trained, as `finetune` itself estimates it; None if the record does not give all of that."""
    begun = [_mapping(start) for start in starts] if isinstance(starts, list) else []
    last = begun[-1] if begun else {}
    micro_batch = last.get("micro_batch", _mapping(record.get("schedule")).get("micro_batch"))
    processes = last.get("processes", 1)
    if not (isinstance(micro_batch, int) and isinstance(processes, int)):
        return None
    if "r" not in _mapping(recipe.get("lora")) or "max_tokens" not in _mapping(recipe.get("training")):
        return None
    values: dict[str, object] = {
        section: {key: value for key in keys if (value := _mapping(recipe.get(section)).get(key)) is not None}
        for section, keys in _SIZING.items()
    }
    values |= {"preset": recipe["preset"]} if "preset" in recipe else {}
    try:
        read = section_from(FinetuneRecipe, values | {"release": "-", "data": {"train": [{"source": "-"}]}})
        return training_shape(
            read, micro_batch=micro_batch, processes=processes, is_masked=record.get("masked") is True
        )
    except InvalidRequestError:
        return None


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15 else None
