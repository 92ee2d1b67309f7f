"""Scores on downstream tasks: the `tasks` of what `loram eval --json` prints, read with suspicion."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeGuard

from loram_hub.cards.escaping import is_hub_id
from loram_hub.errors import InvalidRequestError

MODELS = ("base", "pruned", "pruned + adapter", "base + recovered adapter")
"""What is measured, in the order of tables."""
_SHARES = re.compile(r"acc|acc_norm|exact_match|pass@[0-9]+")
"""Metrics of the harness, and ours, that are shares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One number."""

    value: float
    """In the metric's own unit."""
    stderr: float | None
    """Standard error; None where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredTask:
    """One metric of one task, on every model that was measured."""

    task: str
    """In the harness; untrusted text."""
    metric: str
    """Untrusted text."""
    filter: str
    """How answers were taken out of what was generated; untrusted text."""
    is_headline: bool
    """Whether the task is known by this number."""
    scores: Mapping[str, Score]
    """By model."""
    num_fewshot: int | None = None
    """Solved examples before each question; None of groups and means."""
    samples: int | None = None
    """Questions that were measured; None of groups and means."""
    documents: int | None = None
    """Questions that there are."""
    dataset: str | None = None
    """Hub id of the data; None where they are not on the Hub."""
    dataset_config: str | None = None
    """Configuration of the dataset; untrusted text."""
    dataset_revision: str | None = None
    """Commit of the dataset."""
    split: str | None = None
    """Split of the dataset; untrusted text."""
    is_own: bool = False
    """Whether its task file was the measurer's own, whatever it is called: not to be compared with the harness's."""

    @property
    def is_whole(self) -> bool:
        """Whether all questions were asked, so that the number can stand beside those of others."""
        return self.samples is not None and self.samples == self.documents


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScores:
    """What was measured on tasks."""

    tasks: tuple[ScoredTask, ...]
    """In the order of the evaluation, never empty."""
    harness: str
    """Version of lm-evaluation-harness; untrusted text."""
    backends: Mapping[str, str]
    """What ran each model; untrusted text, by model."""
    date: str | None
    """When it was measured; untrusted text."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Of the models, where they are known, by name."""


def read_task_scores(values: object) -> TaskScores:
    """Read scores.

    Args:
        values: as `TaskResults.to_dict` gives them.

    Raises:
        InvalidRequestError: a value is missing or of another kind.
    """
    part = _mapping(values, "tasks")
    described = {_text(task, "task"): task for task in map(_as_mapping, _list(part, "tasks"))}
    models = [_as_mapping(model) for model in _list(part, "models")]
    found: dict[tuple[str, str, str], dict[str, Score]] = {}
    headlines: set[tuple[str, str, str]] = set()
    for score in map(_as_mapping, _list(part, "scores")):
        if "value" in score and score["value"] is None:  # was not finite
            continue
        key = (_text(score, "task"), _text(score, "metric"), _text(score, "filter"))
        model = _model(score)
        if model in found.setdefault(key, {}):
            _refuse(f"two scores of {model} on {key[0][:80]!r} ({key[1][:40]})")
        found[key][model] = _score(score, key[1])
        headlines |= {key} if score.get("is_headline") is True else set()
    if not found:
        _refuse("no score")
    provenance = part.get("provenance")
    versions = provenance.get("versions") if isinstance(provenance, Mapping) else None
    settings = provenance.get("settings") if isinstance(provenance, Mapping) else None
    own = settings.get("task_files") if isinstance(settings, Mapping) else None
    own = own if isinstance(own, Mapping) else {}
    date = part.get("date")
    return TaskScores(
        tasks=tuple(
            _task(key, scores, key in headlines, described.get(key[0], {}), is_own=key[0] in own)
            for key, scores in found.items()
        ),
        harness=str(versions.get("lm-eval", "of unknown version")) if isinstance(versions, Mapping) else "unknown",
        backends={_model(model): _text(model, "backend") for model in models},
        date=date if isinstance(date, str) else None,
        parameters={
            _model(model): _count(model, "parameters") for model in models if model.get("parameters") is not None
        },
    )


def _score(score: Mapping[object, object], metric: str) -> Score:
    found = Score(value=_number(score, "value"), stderr=_number_or_none(score, "stderr"))
    if _SHARES.fullmatch(metric) and not 0 <= found.value <= 1:
        _refuse(f"{metric} = {found.value:g}, which is from 0 to 1")
    if found.stderr is not None and found.stderr < 0:
        _refuse(f"a standard error of {found.stderr:g}, which is at least 0")
    return found


def _task(
    key: tuple[str, str, str],
    scores: Mapping[str, Score],
    is_headline: bool,
    described: Mapping[object, object],
    *,
    is_own: bool,
) -> ScoredTask:
    num_fewshot = _count(described, "num_fewshot", least=0) if described else None
    samples = _count(described, "samples") if described else None
    documents = _count(described, "documents") if described else None
    if samples is not None and documents is not None and samples > documents:
        _refuse(f"{samples:,} questions measured of {key[0][:80]!r}, which has {documents:,}")
    dataset, revision = described.get("dataset"), described.get("dataset_revision")
    return ScoredTask(
        task=key[0],
        metric=key[1],
        filter=key[2],
        is_headline=is_headline,
        scores=scores,
        num_fewshot=num_fewshot,
        samples=samples,
        documents=documents,
        dataset=str(dataset) if is_hub_id(dataset) else None,
        dataset_config=_text_or_none(described, "dataset_config"),
        dataset_revision=revision if isinstance(revision, str) and _is_commit(revision) else None,
        split=_text_or_none(described, "split"),
        is_own=is_own,
    )


def _is_commit(text: str) -> bool:
    return len(text) == 40 and set(text) <= set("0123456789abcdef")


def _refuse(what: str) -> NoReturn:
    raise InvalidRequestError(f"The evaluation has {what}. Give the JSON that 'loram eval --json' prints.")


def _mapping(values: object, name: str) -> Mapping[object, object]:
    if not isinstance(values, Mapping):
        _refuse(f"{name} that are no object")
    return values


def _as_mapping(value: object) -> Mapping[object, object]:
    return _mapping(value, "an entry of its tasks")


def _list(values: Mapping[object, object], key: str) -> Sequence[object]:
    found = values.get(key)
    if not isinstance(found, list | tuple):
        _refuse(f"tasks without a list of {key}")
    return found


def _model(values: Mapping[object, object]) -> str:
    model = values.get("model")
    if model not in MODELS:
        _refuse(f"a score of {str(model)[:80]!r}, which is none of {', '.join(MODELS)}")
    return str(model)


def _text(values: Mapping[object, object], key: str) -> str:
    found = values.get(key)
    if not isinstance(found, str) or not found:
        _refuse(f"tasks with {key} = {str(found)[:80]!r}, where a text is needed")
    return found


def _text_or_none(values: Mapping[object, object], key: str) -> str | None:
    return None if values.get(key) is None else _text(values, key)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number that a float can hold; neither nan nor infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max


def _number(values: Mapping[object, object], key: str) -> float:
    found = values.get(key)
    if not is_number(found):
        _refuse(f"tasks with {key} = {str(found)[:80]!r}, where a number is needed")
    return float(found)


def _number_or_none(values: Mapping[object, object], key: str) -> float | None:
    return None if values.get(key) is None else _number(values, key)


def _count(values: Mapping[object, object], key: str, *, least: int = 1) -> int:
    found = values.get(key)
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found < 2**63:
        _refuse(f"tasks with {key} = {str(found)[:80]!r}, where a whole number from {least} is needed")
    return found
