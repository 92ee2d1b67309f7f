"""What a measurement of tasks found, with everything that is needed to repeat it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loram_hub.downstream.programs import Confinement
from loram_hub.evaluation import Provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """One number of one model."""

    model: str
    """One of `loram_hub.evaluation.MODELS`."""
    task: str
    """Task, group, or mean of several."""
    metric: str
    """As the harness calls it: `acc`, `exact_match`, ...; `pass@k` of programs."""
    filter: str
    """How the answer was taken out of what was generated; `none` where nothing had to be."""
    value: float
    """Of the metric, in its own unit."""
    stderr: float | None
    """Standard error, same unit; None where there is none."""
    samples: int | None
    """Questions; None for groups and means."""
    is_headline: bool
    """Whether the task is known by this number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredTask:
    """A task as it was measured."""

    task: str
    """In the harness."""
    version: str | None
    """That the task file gives itself."""
    dataset: str | None
    """Hub id of the data; None for local files."""
    dataset_config: str | None
    """Configuration of the dataset."""
    dataset_revision: str | None
    """Commit of the dataset, where it is known."""
    split: str | None
    """Split that was measured."""
    num_fewshot: int
    """Solved examples in front of each question."""
    samples: int
    """Questions that were measured."""
    documents: int
    """Questions that there are."""
    generation: Mapping[str, Any] | None
    """How answers were generated; None where likelihoods were compared."""
    programs: int | None
    """Programs per problem; None where answers are no programs."""
    prompts_sha256: str
    """Of all questions, prompts and right answers, in order: equal where data, shots and templates are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredModel:
    """A model as it was measured."""

    model: str
    """One of `loram_hub.evaluation.MODELS`."""
    parameters: int | None
    """Adapter included, without what a sparse release removed; None of a merged model and under vLLM."""
    backend: str
    """`transformers`, `transformers, adapter`, `transformers, merged` or `vllm`."""
    seconds: float
    """Time of the measurement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResults:
    """What `evaluate_tasks` returns; `to_dict` is the `tasks` of the JSON of `loram eval`."""

    scores: tuple[TaskScore, ...]
    """In the order of models, then of tasks."""
    tasks: tuple[MeasuredTask, ...]
    """Without groups and means."""
    models: tuple[MeasuredModel, ...]
    """In the order of `loram_hub.evaluation.MODELS`."""
    confinement: Confinement | None
    """How far generated programs were shut in; None where none ran."""
    provenance: Provenance
    """Models, settings and versions."""
    date: str
    """When it began, UTC, ISO 8601."""

    def value_of(self, model: str, task: str) -> float | None:
        """Return the number that a task is known by; None if it was not measured on this model."""
        found = (
            score.value for score in self.scores if (score.model, score.task) == (model, task) and score.is_headline
        )
        return next(found, None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is not finite becomes null."""
        return {
            "scores": [_finite(asdict(score)) for score in self.scores],
            "tasks": [asdict(task) for task in self.tasks],
            "models": [asdict(model) for model in self.models],
            "confinement": None if self.confinement is None else asdict(self.confinement),
            "provenance": self.provenance.to_dict(),
            "date": self.date,
        }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
