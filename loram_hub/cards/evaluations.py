"""Measured losses: the JSON that `loram eval --json` prints, read with suspicion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loram_hub.cards.escaping import is_hub_id
from loram_hub.errors import InvalidRequestError

MODELS = ("base", "pruned", "pruned + adapter", "base + recovered adapter")
"""Rows of an evaluation, in their order."""


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
    """Held-out losses of one or more models on the same tokens."""

    rows: tuple[MeasuredLoss, ...]
    """In the order of `MODELS`, never empty."""
    examples: int
    """Sequences scored."""
    tokens: int
    """Tokens scored, the same for every row."""
    dataset: str | None
    """Hub id of the data; None if it is not on the Hub, or not said."""

    def row(self, model: str) -> MeasuredLoss | None:
        """Return a model's line; None if it was not measured."""
        return next((row for row in self.rows if row.model == model), None)


def read_evaluation(values: Mapping[str, object], *, parameters: Mapping[str, int]) -> Evaluation:
    """Read an evaluation and check that it is one of these models.

    Args:
        values: `rows`, `examples` and `tokens` as `EvaluationTable.to_dict` gives them; `dataset` (a Hub id) if known.
        parameters: of the models that are known, by name: an evaluation of another model is refused.

    Raises:
        InvalidRequestError: a value is missing, no number, belongs to another model, or contradicts another.
    """
    rows = values.get("rows")
    if not isinstance(rows, list | tuple) or not rows:
        raise InvalidRequestError("The evaluation has no rows. Give the JSON that 'loram eval --json' prints.")
    read = sorted((_row(row) for row in rows), key=lambda row: MODELS.index(row.model))
    if len({row.model for row in read}) != len(read):
        raise InvalidRequestError(f"The evaluation has a model twice: {', '.join(row.model for row in read)}.")
    for row in read:
        if parameters.get(row.model, row.parameters) != row.parameters:
            raise InvalidRequestError(
                f"The evaluation's {row.model!r} has {row.parameters:,} parameters; here it has "
                f"{parameters[row.model]:,}. Give the evaluation of this model."
            )
    _check_rows({row.model: row for row in read})
    dataset = values.get("dataset")
    return Evaluation(
        rows=tuple(read),
        examples=_count(values, "examples"),
        tokens=_count(values, "tokens"),
        dataset=dataset if isinstance(dataset, str) and is_hub_id(dataset) else None,
    )


def check_adapter_size(evaluation: Evaluation, parameters: int) -> None:
    """Check that an evaluation can be one of an adapter, by what the adapter adds to its base.

    Args:
        evaluation: from `read_evaluation`.
        parameters: of the adapter.

    Raises:
        InvalidRequestError: the base with the adapter has another number of parameters than both together.
    """
    base, recovered = evaluation.row("base"), evaluation.row("base + recovered adapter")
    if recovered is None:
        return
    added = None if base is None else recovered.parameters - base.parameters
    if added not in (None, parameters) or recovered.parameters <= parameters:
        found = f"{recovered.parameters:,} parameters" if added is None else f"{added:,} parameters more than the base"
        raise InvalidRequestError(
            f"The evaluation's {recovered.model!r} has {found}; this adapter has {parameters:,}. Give the evaluation "
            "of this adapter."
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
    for alone, adapted in (("base", "base + recovered adapter"), ("pruned", "pruned + adapter")):
        if alone in rows and adapted in rows and rows[adapted].parameters <= rows[alone].parameters:
            raise InvalidRequestError(
                f"The evaluation's {adapted!r} has {rows[adapted].parameters:,} parameters, no more than {alone!r} "
                "without the adapter. Give the evaluation of this model."
            )


def _row(values: object) -> MeasuredLoss:
    if not isinstance(values, Mapping) or values.get("model") not in MODELS:
        raise InvalidRequestError(f"The evaluation has a row for none of {', '.join(MODELS)}: {str(values)[:80]!r}.")
    perplexity = values.get("perplexity")
    return MeasuredLoss(
        model=str(values["model"]),
        loss=_number(values, "loss"),
        perplexity=None if perplexity is None else _number(values, "perplexity"),
        parameters=_count(values, "parameters"),
    )


def _number(values: Mapping[str, object], key: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise InvalidRequestError(f"The evaluation has {key} = {str(value)[:80]!r}; a number from 0 is needed.")
    return float(value)


def _count(values: Mapping[str, object], key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**63:
        raise InvalidRequestError(f"The evaluation has {key} = {str(value)[:80]!r}; a whole number is needed.")
    return value
