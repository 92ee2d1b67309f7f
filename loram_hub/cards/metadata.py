"""Metadata of a card by the Hub's rules, and the evaluation results that the Hub reads.

Only checked values get here (Hub ids, licence ids, numbers), so nothing can break out of the YAML.
"""

from __future__ import annotations

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
from loram_hub.licences import Licence

LORAM_TAG = "loram"
PAPER_TAG = "arxiv:2502.13533"
"""Goes with `LORAM_TAG`: whatever else a card describes has nothing to do with the paper."""
EVAL_RESULTS = ".eval_results/held_out_loss.yaml"
"""Where the Hub looks for results on a dataset of its own."""

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
    row = None if evaluation is None else evaluation.row(described.model)
    if evaluation is None or row is None:
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


def eval_results_file(described: Described, evaluation: Evaluation | None) -> dict[str, bytes]:
    """Build the file in `.eval_results/`; nothing if the data is not on the Hub, for the Hub knows results by it."""
    row = None if evaluation is None else evaluation.row(described.model)
    if evaluation is None or row is None or evaluation.dataset is None:
        return {}
    entry = EvalResultEntry(
        dataset_id=evaluation.dataset,
        task_id="held_out_loss",
        value=row.loss,
        source_url=None if described.repo_id is None else f"https://huggingface.co/{described.repo_id}",
        notes=f"{described.model}: mean loss in nats per token over {evaluation.tokens} tokens",
    )
    return {EVAL_RESULTS: yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False).encode()}
