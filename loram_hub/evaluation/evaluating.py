"""Each model in turn: load it, measure it, measure it with its adapter, forget it."""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from loram_hub.adapter import MASKED_FIELD, RECORD, check_base, pinned_revision
from loram_hub.auto import AutoLoramModel, supported_dtype
from loram_hub.errors import InvalidRequestError, MissingDependencyError
from loram_hub.evaluation.encoding import EncodedExample, encode_examples
from loram_hub.evaluation.losses import held_out_loss
from loram_hub.files import read_json
from loram_hub.hub import ADAPTER_FILES, resolve
from loram_hub.release import Release
from loram_hub.texts import Specification, dataset_id, read_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MODELS = ("base", "pruned", "pruned + adapter", "base + recovered adapter")
"""Names of the rows, in their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """One model's line of the table."""

    model: str
    """`base`, `pruned`, `pruned + adapter` or `base + recovered adapter`; one of `MODELS`."""
    loss: float
    """Mean held-out loss in nats per completion token."""
    perplexity: float | None
    """exp(loss); None where that is too large for a float."""
    parameters: int
    """Parameters of the model, adapter included; without the weights that a sparse release removed."""
    memory_bytes: int
    """Bytes of its weights and buffers as loaded."""
    seconds: float
    """Time of the forward passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTable:
    """What `evaluate` returns; `to_dict` is the JSON of `loram eval`."""

    rows: tuple[EvaluationRow, ...]
    """One per model, in the order of `MODELS`."""
    examples: int
    """Sequences scored (a long text is several)."""
    tokens: int
    """Completion tokens scored, the same for every row."""
    cut_examples: int
    """Examples that were longer than `max_tokens`: tasks lost the start of their prompt, texts were split."""
    dataset: str | None = None
    """Hub id of the data; None if they are not from there."""

    def loss_of(self, model: str) -> float | None:
        """Return the loss of a row by its name; None if it was not evaluated."""
        return next((row.loss for row in self.rows if row.model == model), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}


def evaluate(
    data: Specification,
    *,
    base: str | os.PathLike[str] | None = None,
    release: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    recovered: str | os.PathLike[str] | None = None,
    max_tokens: int = 1024,
    batch_size: int = 8,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    limit: int | None = None,
    allow_base_mismatch: bool = False,
) -> EvaluationTable:
    """Compare base, pruned, pruned + adapter, and base + recovered adapter on held-out data; name those that you have.

    Args:
        data: texts or prompt/completion tasks: a list, file, folder or Hub dataset id, see `loram_hub.texts`.
        base: the original model, folder or Hub id.
        release: the pruned model, folder or Hub id.
        adapter: the adapter trained on the release; masked, as it was trained, if its record says so.
        recovered: the recovered adapter, for the base.
        max_tokens: longer texts are split, longer tasks lose the start of their prompt.
        batch_size: sequences per forward pass at most; the result does not depend on it.
        device: where the models run; None for the CPU, `auto` to spread each over all GPUs.
        dtype: that the models compute in; None for the best the device has in hardware.
        limit: read at most this many records of the data.
        allow_base_mismatch: take another state of the base than the one that the recovered adapter was made for.

    Returns:
        One row per model.

    Raises:
        InvalidRequestError: no model, an adapter without its model, or no data.
        IncompatibleError: the base is not at the commit that the recovered adapter names.
        MissingDependencyError: an adapter is given and peft is not installed.

    Example:
        >>> from loram_hub import evaluate  # doctest: +SKIP
        >>> evaluate("held_out.jsonl", base="org/model", recovered="out/recovered").to_dict()  # doctest: +SKIP
    """
    _check_models(base=base, release=release, adapter=adapter, recovered=recovered)
    if batch_size < 1:
        raise InvalidRequestError(f"batch_size is {batch_size}; at least 1 sequence is needed.")
    placement: str | dict[str, int | str] = "auto" if device == "auto" else {"": device or "cpu"}
    chosen = dtype or supported_dtype(_kind_of_device(device))
    recovered_folder = None if recovered is None else resolve(recovered, files=ADAPTER_FILES).folder
    base_folder = None if base is None else str(_resolve_base(base, recovered_folder, allow_base_mismatch))
    release_folder = None if release is None else str(resolve(release).folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base_folder or release_folder)
    encoded, cut_examples = encode_examples(read_examples(data, limit=limit), tokenizer, max_tokens=max_tokens)

    def load_base() -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base_folder or "", dtype=chosen, device_map=placement
        )
        return model

    def load_pruned() -> PreTrainedModel:
        return AutoLoramModel.from_pretrained(release_folder or "", device_map=placement, dtype=chosen)

    rows: list[EvaluationRow] = []
    if base_folder is not None:
        rows += _rows(load_base, recovered_folder, ("base", "base + recovered adapter"), encoded, batch_size)
    if release_folder is not None:
        rows += _rows(load_pruned, adapter, ("pruned", "pruned + adapter"), encoded, batch_size)
    return EvaluationTable(
        rows=tuple(sorted(rows, key=lambda row: MODELS.index(row.model))),
        examples=len(encoded),
        tokens=sum(example.scored_tokens for example in encoded),
        cut_examples=cut_examples,
        dataset=dataset_id(data),
    )


def _kind_of_device(device: str | None) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return (device or "cpu").partition(":")[0]


def _check_models(
    *,
    base: str | os.PathLike[str] | None,
    release: str | os.PathLike[str] | None,
    adapter: str | os.PathLike[str] | None,
    recovered: str | os.PathLike[str] | None,
) -> None:
    if base is None and release is None:
        raise InvalidRequestError("There is no model to evaluate: name a base model, a release, or both.")
    if adapter is not None and release is None:
        raise InvalidRequestError("An adapter that was trained on a release needs that release: name it, too.")
    if recovered is not None and base is None:
        raise InvalidRequestError("A recovered adapter needs the base model: name it, too.")


def _resolve_base(base: str | os.PathLike[str], recovered: Path | None, allow_mismatch: bool) -> Path:
    """Return the base's folder, at the commit that the recovered adapter names if there is one."""
    source = resolve(base, revision=None if recovered is None else pinned_revision(recovered, base))
    if recovered is not None and not allow_mismatch:
        check_base(recovered, source.folder, commit=source.commit)
    return source.folder


def _with_adapter(model: PreTrainedModel, adapter: str | os.PathLike[str]) -> nn.Module:
    try:
        from peft import PeftModel
    except ImportError as err:
        raise MissingDependencyError("Evaluating an adapter needs peft: pip install peft") from err
    folder = resolve(adapter, files=ADAPTER_FILES).folder
    tuned = PeftModel.from_pretrained(model, str(folder))
    if _was_masked(folder, model):
        from loram_hub.masked_lora import mask_lora_

        mask_lora_(tuned)  # on the release it is the masked update that was trained
    return tuned


def _was_masked(adapter: Path, model: nn.Module) -> bool:
    """Whether an adapter's record says that it was trained masked; that of a recovered one does not count here."""
    if (adapter / RECORD).is_file():
        return read_json(adapter / RECORD).get(MASKED_FIELD) is True
    if _removed_weights(model):
        logger.warning("%s has no %s that says how it was trained, so it is not masked", adapter, RECORD)
    return False


def _removed_weights(model: nn.Module) -> int:
    """Weights that are zero in a sparse release; 0 of any other model."""
    release = getattr(model, "loram", None)
    if not isinstance(release, Release) or not release.is_sparse:
        return 0
    return release.manifest.base.parameters - release.manifest.parameters


def _rows(
    load: Callable[[], PreTrainedModel],
    adapter: str | os.PathLike[str] | None,
    names: tuple[str, str],
    encoded: Sequence[EncodedExample],
    batch_size: int,
) -> list[EvaluationRow]:
    """Measure a model without and with an adapter; nothing of it stays in memory afterwards."""
    gc.collect()  # a model wrapped by PEFT refers to itself, so the last one may still be there
    model = load()
    removed = _removed_weights(model)
    rows = [_row(names[0], model, encoded, batch_size, removed)]
    if adapter is not None:
        rows.append(_row(names[1], _with_adapter(model, adapter), encoded, batch_size, removed))
    return rows


def _row(
    name: str, model: nn.Module, encoded: Sequence[EncodedExample], batch_size: int, removed: int
) -> EvaluationRow:
    start = time.perf_counter()
    measured = held_out_loss(model, encoded, batch_size=batch_size)
    seconds = time.perf_counter() - start
    logger.info("%s: %.4f nats per token on %s tokens, %.1f s", name, measured.loss, f"{measured.tokens:,}", seconds)
    return EvaluationRow(
        model=name,
        loss=measured.loss,
        perplexity=measured.perplexity if math.isfinite(measured.perplexity) else None,
        parameters=sum(math.prod(_shape(parameter)) for parameter in model.parameters()) - removed,
        memory_bytes=memory_bytes(model),
        seconds=seconds,
    )


def memory_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers, the scales of quantized weights included."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [part for part in state.as_dict().values() if isinstance(part, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def _shape(parameter: nn.Parameter) -> Sequence[int]:
    """Return the shape of a weight, also of one that is packed as NF4."""
    state = getattr(parameter, "quant_state", None)
    shape: Sequence[int] = parameter.shape if state is None else state.shape
    return shape
