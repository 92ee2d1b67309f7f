"""Metadata of a card by the Hub's rules, and the evaluation results that the Hub reads.

Only checked values get here (Hub ids, licence ids, numbers), so nothing can break out of the YAML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.utils import yaml_dump

from loram_hub.cards.escaping import is_hub_id
from loram_hub.cards.evaluations import Evaluation
from loram_hub.cards.task_scores import ScoredTask, TaskScores
from loram_hub.licences import Licence

LORAM_TAG = "loram"
PAPER_TAG = "arxiv:2502.13533"
"""Goes with `LORAM_TAG`: whatever else a card describes has nothing to do with the paper."""
EVAL_RESULTS = ".eval_results/held_out_loss.yaml"
"""Where the Hub looks for results on a dataset of its own."""
TASK_RESULTS = ".eval_results/tasks.yaml"
"""The same for downstream tasks."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,95}")
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|\+00:00)")

Relation = Literal["adapter", "finetune", "quantized"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """What the metadata say of one repository."""

    title: str
    """Name that evaluation results go by."""
    repo_id: str | None
    """Hub id, if it is known."""
    base_id: str
    """Base model; goes into the metadata only if it is a Hub id, as the Hub demands."""
    relation: Relation
    """How it comes from the base."""
    library: str
    """`library_name`."""
    licence: Licence
    """Of the base."""
    tags: Sequence[str]
    """Without the paper's, which `LORAM_TAG` brings."""
    datasets: Sequence[str] = ()
    """Hub ids of the data it was made with."""
    model: str
    """The row of an evaluation that is this repository."""


def card_data(described: Described, evaluation: Evaluation | None) -> ModelCardData:
    """Build the metadata; results only from what was measured."""
    has_base = is_hub_id(described.base_id)
    results = _results(described, evaluation)
    licence = described.licence.metadata
    return ModelCardData(
        base_model=described.base_id if has_base else None,
        base_model_relation=described.relation if has_base else None,
        library_name=described.library,
        pipeline_tag="text-generation",
        tags=[*described.tags, *([PAPER_TAG] if LORAM_TAG in described.tags else [])],
        datasets=list(described.datasets) or None,
        model_name=described.title if results else None,
        eval_results=results or None,
        license=licence["license"],
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )


def _results(described: Described, evaluation: Evaluation | None) -> list[EvalResult]:
    if evaluation is None:
        return []
    tasks = () if evaluation.tasks is None else evaluation.tasks.tasks
    return [*_loss_results(described, evaluation), *(_task_result(task, described) for task in _own(tasks, described))]


def _loss_results(described: Described, evaluation: Evaluation) -> list[EvalResult]:
    row = evaluation.row(described.model)
    if row is None:
        return []
    metrics = {"loss": row.loss} | ({} if row.perplexity is None else {"perplexity": row.perplexity})
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=evaluation.dataset or "held-out",
            dataset_name=evaluation.dataset or "held-out data that is not on the Hub",
            metric_type=metric,
            metric_name=f"{metric} of {described.model}, {evaluation.tokens} tokens",
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]


def _own(tasks: Sequence[ScoredTask], described: Described) -> list[ScoredTask]:
    """Choose the numbers that tasks are known by, of this repository's model, on all questions of a Hub dataset.

    Part of the questions, data that nobody else has, and tasks from files of one's own (which may be called as the
    harness's) are shown in the text: no leaderboard can compare them.
    """
    return [
        task
        for task in tasks
        if task.is_headline
        and task.is_whole
        and not task.is_own
        and task.dataset is not None
        and described.model in task.scores
        and all(_NAME.fullmatch(name) for name in (task.task, task.metric, task.filter))
    ]


def _task_result(task: ScoredTask, described: Described) -> EvalResult:
    assert task.dataset is not None
    return EvalResult(
        task_type="text-generation",
        dataset_type=task.dataset,
        dataset_name=task.dataset,
        dataset_config=_plain(task.dataset_config),
        dataset_split=_plain(task.split),
        dataset_revision=task.dataset_revision,
        metric_type=task.metric,
        metric_name=f"{task.task}, {_how(task)} of {described.model}",
        metric_value=task.scores[described.model].value,
    )


def _how(task: ScoredTask) -> str:
    taken = "" if task.filter == "none" else f" ({task.filter})"
    return f"{task.metric}{taken}, {task.num_fewshot}-shot"


def _plain(text: str | None) -> str | None:
    """Let a stranger's text into the metadata only if it is a plain name."""
    return text if text is not None and _NAME.fullmatch(text) else None


def eval_results_files(described: Described, evaluation: Evaluation | None) -> dict[str, bytes]:
    """Build the files in `.eval_results/`, of results on data that are on the Hub, which knows results by them."""
    if evaluation is None:
        return {}
    source = None if described.repo_id is None else f"https://huggingface.co/{described.repo_id}"
    entries: dict[str, list[EvalResultEntry]] = {}
    row = evaluation.row(described.model)
    if row is not None and evaluation.dataset is not None:
        entries[EVAL_RESULTS] = [
            EvalResultEntry(
                dataset_id=evaluation.dataset,
                task_id="held_out_loss",
                value=row.loss,
                source_url=source,
                notes=f"{described.model}: mean loss in nats per token over {evaluation.tokens} tokens",
            )
        ]
    if evaluation.tasks is not None:
        entries[TASK_RESULTS] = [
            _entry(task, evaluation.tasks, described, source) for task in _own(evaluation.tasks.tasks, described)
        ]
    return {
        name: yaml_dump(eval_result_entries_to_yaml(found), sort_keys=False).encode()
        for name, found in entries.items()
        if found
    }


def _entry(task: ScoredTask, tasks: TaskScores, described: Described, source: str | None) -> EvalResultEntry:
    assert task.dataset is not None
    harness = _plain(tasks.harness) or "of unknown version"
    backend = tasks.backends.get(described.model, "")
    ran = f", run as {backend}" if all(map(_NAME.fullmatch, backend.split(", "))) else ""
    return EvalResultEntry(
        dataset_id=task.dataset,
        task_id=task.task,
        value=task.scores[described.model].value,
        dataset_revision=task.dataset_revision,
        date=tasks.date if tasks.date is not None and _DATE.fullmatch(tasks.date) else None,
        source_url=source,
        notes=f"{described.model}: {_how(task)}, lm-evaluation-harness {harness}{ran}",
    )
