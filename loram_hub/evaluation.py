"""Held-out loss of every model that LoRAM touches: did training on the pruned model help the original one?

Four models can be compared on the same tokens: the base, the pruned model (a release), the pruned model with the
adapter trained on it, and the base with the recovered adapter. The loss is the mean over completion tokens of
-ln p(token | what stands before it), in nats; prompt tokens are read but not scored. Everything is deterministic;
models are loaded one after another, never two at once.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from loram_hub.adapter import check_base, pinned_revision
from loram_hub.auto import AutoLoramModel, supported_dtype
from loram_hub.errors import InvalidRequestError, MissingDependencyError
from loram_hub.hub import ADAPTER_FILES, resolve
from loram_hub.texts import Example, Specification, dataset_id, read_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MODELS = ("base", "pruned", "pruned + adapter", "base + recovered adapter")
"""Names of the rows, in their order."""
_IGNORED = -100
_LARGEST_LOGITS = 2**28
"""Most logits computed at once (1 GiB in fp32): a vocabulary of 128k times 2,048 positions."""


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example as token ids, ready for any of the models."""

    ids: tuple[int, ...]
    """Prompt, completion and (for a task) the end-of-sequence token."""
    scored_from: int
    """Position of the first scored token, at least 1: nothing predicts the first token of a sequence."""

    @property
    def scored_tokens(self) -> int:
        """Tokens that count in the loss."""
        return len(self.ids) - self.scored_from


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutLoss:
    """Loss of one model on one set of examples."""

    loss: float
    """Mean over all scored tokens, in nats."""
    tokens: int
    """Scored tokens."""

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


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
    """Parameters of the model, adapter included."""
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
        adapter: the adapter trained on the release.
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


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = 1024
) -> tuple[list[EncodedExample], int]:
    """Turn examples into token ids with the tokens that count marked.

    Prompt and completion are tokenized together, as TRL does in training; what the prompt alone already determines is
    not scored. A task ends with the end-of-sequence token, which is scored: when to stop is part of the task. A plain
    text does not.

    Args:
        examples: tasks and texts.
        tokenizer: of the models to be compared.
        max_tokens: longest sequence, at least 2.

    Returns:
        The sequences, and how many examples were longer than `max_tokens`.

    Raises:
        InvalidRequestError: nothing is left to score, or `max_tokens` is below 2.
    """
    opening = len(tokenizer("")["input_ids"])
    if max_tokens < opening + 2:
        raise InvalidRequestError(f"max_tokens is {max_tokens}; at least {opening + 2} are needed to score one token.")
    encoded: list[EncodedExample] = []
    cut_examples = 0
    for example in examples:
        encode = _encode_task if example.prompt else _encode_text
        sequences, is_cut = encode(example, tokenizer, opening, max_tokens)
        encoded += [sequence for sequence in sequences if sequence.scored_tokens > 0]
        cut_examples += is_cut
    if not encoded:
        raise InvalidRequestError(f"None of the {len(examples):,} examples has a token to score.")
    return encoded, cut_examples


def _encode_task(
    example: Example, tokenizer: PreTrainedTokenizerBase, opening: int, max_tokens: int
) -> tuple[list[EncodedExample], bool]:
    prompt = tokenizer(example.prompt)["input_ids"]
    ids = tokenizer(example.prompt + example.completion)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    scored_from = _common_prefix(prompt, ids)
    excess = max(0, len(ids) - max_tokens)
    dropped = min(excess, scored_from - opening)
    ids = (ids[:opening] + ids[opening + dropped :])[:max_tokens]
    return [EncodedExample(tuple(ids), max(1, scored_from - dropped))], excess > 0


def _encode_text(
    example: Example, tokenizer: PreTrainedTokenizerBase, opening: int, max_tokens: int
) -> tuple[list[EncodedExample], bool]:
    ids = tokenizer(example.completion)["input_ids"]
    width = max_tokens - opening
    windows = [ids[:opening] + ids[start : start + width] for start in range(opening, len(ids), width)]
    return [EncodedExample(tuple(window), max(1, opening)) for window in windows], len(windows) > 1


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((idx for idx, (a, b) in pairs if a != b), min(len(left), len(right)))


def held_out_loss(model: nn.Module, encoded: Sequence[EncodedExample], *, batch_size: int = 8) -> HeldOutLoss:
    """Measure a loaded model, a `PeftModel` included; what `evaluate` does for each of its rows.

    The head runs on scored positions only: with a small model and a large vocabulary it costs more than the layers.

    Args:
        model: causal language model of transformers, on the device it is to run on.
        encoded: sequences from `encode_examples`.
        batch_size: sequences per forward pass at most.

    Returns:
        The mean over all scored tokens, summed in double precision.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for batch in _batches(encoded, batch_size, vocabulary=_vocabulary(model)):
            total += _summed_loss(model, batch, device)
    model.train(was_training)
    tokens = sum(example.scored_tokens for example in encoded)
    return HeldOutLoss(loss=total / tokens, tokens=tokens)


def _vocabulary(model: nn.Module) -> int:
    config = model.config
    assert isinstance(config, PreTrainedConfig)
    vocabulary: int = config.vocab_size
    return vocabulary


def _batches(encoded: Sequence[EncodedExample], batch_size: int, *, vocabulary: int) -> Iterator[list[EncodedExample]]:
    """Group sequences of similar length, longest first: if memory does not suffice, it shows at once."""
    batch: list[EncodedExample] = []
    first = last = 0
    for example in sorted(encoded, key=lambda item: (len(item.ids), item.scored_from), reverse=True):
        first, last = min(first, example.scored_from), max(last, len(example.ids))
        logits = (len(batch) + 1) * (last - first) * vocabulary
        if not batch or len(batch) == batch_size or logits > _LARGEST_LOGITS:
            if batch:
                yield batch
            batch, first, last = [], example.scored_from, len(example.ids)
        batch.append(example)
    if batch:
        yield batch


def _summed_loss(model: nn.Module, batch: Sequence[EncodedExample], device: torch.device) -> float:
    """Return the summed loss of the scored tokens of a right-padded batch."""
    width = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, _IGNORED)
    for row, example in enumerate(batch):
        sequence = torch.tensor(example.ids)
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
        labels[row, example.scored_from : len(sequence)] = sequence[example.scored_from :]
    predicting = torch.arange(min(example.scored_from for example in batch) - 1, width - 1)
    logits = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=predicting.to(device), use_cache=False
    ).logits
    targets = labels[:, predicting + 1].to(device)
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return losses.double().sum().item()


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
    return PeftModel.from_pretrained(model, str(resolve(adapter, files=ADAPTER_FILES).folder))


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
    rows = [_row(names[0], model, encoded, batch_size)]
    if adapter is not None:
        rows.append(_row(names[1], _with_adapter(model, adapter), encoded, batch_size))
    return rows


def _row(name: str, model: nn.Module, encoded: Sequence[EncodedExample], batch_size: int) -> EvaluationRow:
    start = time.perf_counter()
    measured = held_out_loss(model, encoded, batch_size=batch_size)
    seconds = time.perf_counter() - start
    logger.info("%s: %.4f nats per token on %s tokens, %.1f s", name, measured.loss, f"{measured.tokens:,}", seconds)
    return EvaluationRow(
        model=name,
        loss=measured.loss,
        perplexity=measured.perplexity if math.isfinite(measured.perplexity) else None,
        parameters=sum(math.prod(_shape(parameter)) for parameter in model.parameters()),
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
