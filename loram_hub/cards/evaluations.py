"""What was measured: the JSON that `loram eval --json` prints, read with suspicion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loram_hub.cards.escaping import is_hub_id
from loram_hub.cards.task_scores import MODELS as MODELS
from loram_hub.cards.task_scores import TaskScores, is_number, read_task_scores
from loram_hub.errors import InvalidRequestError

_PROTOCOLS = frozenset({"paper"})


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredLoss:
    """One model's line."""

    model: str
    """One of `MODELS`."""
    loss: float
    """Mean held-out loss in nats per token."""
    perplexity: float | None
    """exp(loss); None where that is too large for a float."""
    parameters: int
    """Parameters of the model, adapter included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Held-out losses of one or more models on the same tokens, scores on tasks, or both."""

    rows: tuple[MeasuredLoss, ...]
    """In the order of `MODELS`; empty where no loss was measured."""
    examples: int
    """Sequences scored."""
    tokens: int
    """Tokens scored, the same for every row."""
    dataset: str | None
    """Hub id of the data; None if it is not on the Hub, or not said."""
    protocol: str | None = None
    """Protocol that the losses follow; None for the data as they are."""
    tasks: TaskScores | None = None
    """None where no task was measured."""

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters of the models, by name, as far as they are known."""
        known = {} if self.tasks is None else dict(self.tasks.parameters)
        return known | {row.model: row.parameters for row in self.rows}

    def row(self, model: str) -> MeasuredLoss | None:
        """Return a model's line; None if it was not measured."""
        return next((row for row in self.rows if row.model == model), None)


def read_evaluation(values: Mapping[str, object], *, parameters: Mapping[str, int]) -> Evaluation:
    """Read an evaluation and check that it is one of these models.

    Args:
        values: `rows`, `examples` and `tokens` as `EvaluationTable.to_dict` gives them, `dataset` (a Hub id) if known;
            `tasks` as `TaskResults.to_dict` gives them; one of both at least.
        parameters: of the models that are known, by name: an evaluation of another model is refused.

    Raises:
        InvalidRequestError: a value is missing, no number, belongs to another model, or contradicts another.
    """
    tasks = None if values.get("tasks") is None else read_task_scores(values["tasks"])
    rows = values.get("rows")
    if tasks is not None and rows is None:
        read: list[MeasuredLoss] = []
    elif not isinstance(rows, list | tuple) or not rows:
        raise InvalidRequestError("The evaluation has no rows. Give the JSON that 'loram eval --json' prints.")
    else:
        read = sorted((_row(row) for row in rows), key=lambda row: MODELS.index(row.model))
    if len({row.model for row in read}) != len(read):
        raise InvalidRequestError(f"The evaluation has a model twice: {', '.join(row.model for row in read)}.")
    _check_rows({row.model: row for row in read})
    dataset, protocol = values.get("dataset"), values.get("protocol")
    named = protocol.get("name") if isinstance(protocol, Mapping) else None
    evaluation = Evaluation(
        rows=tuple(read),
        examples=_count(values, "examples") if read else 0,
        tokens=_count(values, "tokens") if read else 0,
        dataset=dataset if isinstance(dataset, str) and is_hub_id(dataset) else None,
        protocol=named if isinstance(named, str) and named in _PROTOCOLS else None,
        tasks=tasks,
    )
    _check_sizes(evaluation, parameters)
    return evaluation


def _check_sizes(evaluation: Evaluation, parameters: Mapping[str, int]) -> None:
    """Compare the sizes of the models with those that are known, and with each other."""
    found = evaluation.parameters
    measured = {} if evaluation.tasks is None else evaluation.tasks.parameters
    for model, size in [*found.items(), *measured.items()]:
        expected = parameters.get(model, found[model])
        if size != expected:
            raise InvalidRequestError(
                f"The evaluation's {model!r} has {size:,} parameters; here it has {expected:,}. Give the evaluation of "
                "this model."
            )
    for alone, adapted in (("base", "base + recovered adapter"), ("pruned", "pruned + adapter")):
        if alone in found and adapted in found and found[adapted] <= found[alone]:
            raise InvalidRequestError(
                f"The evaluation's {adapted!r} has {found[adapted]:,} parameters, no more than {alone!r} without the "
                "adapter. Give the evaluation of this model."
            )


def check_adapter_size(evaluation: Evaluation, parameters: int) -> None:
    """Check that an evaluation can be one of an adapter, by what the adapter adds to its base.

    Args:
        evaluation: from `read_evaluation`.
        parameters: of the adapter.

    Raises:
        InvalidRequestError: the base with the adapter has another number of parameters than both together.
    """
    found = evaluation.parameters
    base, recovered = found.get("base"), found.get("base + recovered adapter")
    if recovered is None:
        return
    added = None if base is None else recovered - base
    if added not in (None, parameters) or recovered <= parameters:
        told = f"{recovered:,} parameters" if added is None else f"{added:,} parameters more than the base"
        raise InvalidRequestError(
            f"The evaluation's 'base + recovered adapter' has {told}; this adapter has {parameters:,}. Give the "
            "evaluation of this adapter."
        )


def check_identity(values: Mapping[str, object], part: str, hashes: Mapping[str, str]) -> None:
    """Check that an evaluation is one of these very files, where it says of which files it is.

    Args:
        values: what `read_evaluation` reads.
        part: `release` or `recovered`.
        hashes: SHA-256 of the files that the card describes, by name.

    Raises:
        InvalidRequestError: it was measured on other files.
    """
    for measured in (values, values.get("tasks")):
        provenance = measured.get("provenance") if isinstance(measured, Mapping) else None
        parts = provenance.get("parts") if isinstance(provenance, Mapping) else None
        for found in parts if isinstance(parts, list | tuple) else ():
            if not isinstance(found, Mapping) or found.get("part") != part:
                continue
            files = found.get("files")
            for name, digest in files.items() if isinstance(files, Mapping) else ():
                if hashes.get(str(name)) != digest:
                    raise InvalidRequestError(
                        f"The evaluation's {part} has a {str(name)[:80]!r} with the SHA-256 {str(digest)[:12]}...; "
                        f"here it has {hashes.get(str(name), 'none')[:12]}. Measure this one: loram eval."
                    )


def _check_rows(rows: Mapping[str, MeasuredLoss]) -> None:
    """Check what holds between the numbers of any evaluation."""
    for row in rows.values():
        if row.perplexity is not None and not math.isclose(
            math.log(max(row.perplexity, 1e-300)), row.loss, abs_tol=0.01
        ):
            raise InvalidRequestError(
                f"The evaluation's {row.model!r} has loss {row.loss:g} and perplexity {row.perplexity:g}, which is not "
                "exp(loss). Give the JSON that 'loram eval --json' prints."
            )


def _row(values: object) -> MeasuredLoss:
    if not isinstance(values, Mapping) or values.get("model") not in MODELS:
        raise InvalidRequestError(f"The evaluation has a row for none of {', '.join(MODELS)}: {str(values)[:80]!r}.")
    perplexity = values.get("perplexity")
    if "loss" in values and values["loss"] is None:
        raise InvalidRequestError(
            f"The loss of {values['model']!r} was not finite: the model's numbers overflowed. Measure it in another "
            "dtype, or find out what is wrong with it; no card shows this."
        )
    return MeasuredLoss(
        model=str(values["model"]),
        loss=_number(values, "loss"),
        perplexity=None if perplexity is None else _number(values, "perplexity"),
        parameters=_count(values, "parameters"),
    )


def _number(values: Mapping[str, object], key: str) -> float:
    value = values.get(key)
    if not is_number(value) or value < 0:
        raise InvalidRequestError(f"The evaluation has {key} = {str(value)[:80]!r}; a number from 0 is needed.")
    return float(value)


def _count(values: Mapping[str, object], key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**63:
        raise InvalidRequestError(f"The evaluation has {key} = {str(value)[:80]!r}; a whole number is needed.")
    return value
