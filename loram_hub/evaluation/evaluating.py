"""Each model in turn: load it, measure it, measure it with its adapter, forget it."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from torch import nn

from loram_hub.errors import InvalidRequestError
from loram_hub.evaluation.encoding import EncodedExample, encode_examples
from loram_hub.evaluation.losses import held_out_loss
from loram_hub.evaluation.opening import (
    MODELS,
    find_subjects,
    open_base,
    open_pruned,
    open_tokenizer,
    placement,
    removed_weights,
    with_adapter,
)
from loram_hub.evaluation.protocols import protocol_named, read_by_protocol
from loram_hub.evaluation.provenance import Provenance, provenance_of
from loram_hub.files import sha256_of
from loram_hub.hub import Source
from loram_hub.hub.revisions import dataset_commit
from loram_hub.texts import SUFFIXES, Example, Specification, dataset_id, read_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_MAX_TOKENS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """One model's line of the table."""

    model: str
    """`base`, `pruned`, `pruned + adapter` or `base + recovered adapter`; one of `MODELS`."""
    loss: float
    """Mean held-out loss in nats per completion token; infinite or nan where the model's numbers overflow."""
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
    protocol: Mapping[str, Any] | None = None
    """Protocol that was followed, and what it read; None: the data as they are."""
    provenance: Provenance | None = None
    """What was measured and with what; None where it was not asked for."""

    def loss_of(self, model: str) -> float | None:
        """Return the loss of a row by its name; None if it was not evaluated."""
        return next((row.loss for row in self.rows if row.model == model), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a loss that is not finite becomes null."""
        values = {"rows": [_finite(row) for row in self.rows], "examples": self.examples, "tokens": self.tokens}
        values |= {"cut_examples": self.cut_examples, "dataset": self.dataset}
        values |= {} if self.protocol is None else {"protocol": dict(self.protocol)}
        return values | ({} if self.provenance is None else {"provenance": self.provenance.to_dict()})


def _finite(row: EvaluationRow) -> dict[str, Any]:
    return asdict(row) | ({} if math.isfinite(row.loss) else {"loss": None, "perplexity": None})


def evaluate(
    data: Specification,
    *,
    base: str | os.PathLike[str] | None = None,
    release: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    recovered: str | os.PathLike[str] | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    limit: int | None = None,
    allow_base_mismatch: bool = False,
    protocol: str | None = None,
    identify: bool = False,
) -> EvaluationTable:
    """Compare base, pruned, pruned + adapter, and base + recovered adapter on held-out data; name those that you have.

    Args:
        data: texts or prompt/completion tasks: a list, file, folder or Hub dataset id, see `loram_hub.texts`.
        base: the original model, folder or Hub id.
        release: the pruned model, folder or Hub id.
        adapter: the adapter trained on the release; masked, as it was trained, if its record says so.
        recovered: the recovered adapter, for the base.
        max_tokens: longer texts are split, longer tasks lose the start of their prompt; None for 1,024.
        batch_size: sequences per forward pass at most; the result does not depend on it.
        device: where the models run; None for the CPU, `auto` to spread each over all GPUs.
        dtype: that the models compute in; None for the best the device has in hardware.
        limit: read at most this many records of the data.
        allow_base_mismatch: take another state of the base than the one that the recovered adapter was made for.
        protocol: follow one of `loram_hub.evaluation.PROTOCOLS`, which fixes how much is read, in which layout, and
            how it is cut; `paper` is LoRAM's.
        identify: also record what was measured, so that it can be repeated: commits and hashes (for a local base its
            weights are read once more), settings, versions. A dataset on the Hub is read at one commit, except in
            offline mode, where none can be asked for.

    Returns:
        One row per model.

    Raises:
        InvalidRequestError: no model, an adapter without its model, no data, or a protocol together with a limit or
            length of your own.
        IncompatibleError: the base is not at the commit that the recovered adapter names.
        MissingDependencyError: an adapter is given and peft is not installed.

    Example:
        >>> from loram_hub import evaluate  # doctest: +SKIP
        >>> evaluate("held_out.jsonl", base="org/model", recovered="out/recovered").to_dict()  # doctest: +SKIP
    """
    check_losses(data, protocol=protocol, max_tokens=max_tokens, limit=limit, batch_size=batch_size)
    subjects = find_subjects(
        base=base, release=release, adapter=adapter, recovered=recovered, allow_base_mismatch=allow_base_mismatch
    )
    where = placement(device, dtype)
    pinned, commit = _pinned(data) if identify and protocol is None else (data, None)
    read = _read(pinned, protocol, max_tokens=max_tokens, limit=limit)
    encoded, cut_examples = encode_examples(
        read.examples,
        open_tokenizer(subjects),
        max_tokens=read.max_tokens,
        cut="start of prompt" if protocol is None else "end",
    )
    settings = {
        **_data_settings(data, commit if read.protocol is None else read.protocol["commit"], read.examples),
        "max_tokens": read.max_tokens, "limit": limit, "batch_size": batch_size, "device": device or "cpu",
        "dtype": str(where.dtype).removeprefix("torch."), "allow_base_mismatch": allow_base_mismatch,
    }  # fmt: skip
    rows: list[EvaluationRow] = []
    if subjects.base is not None:
        load = partial(open_base, subjects.base.folder, where)
        rows += _rows(load, subjects.recovered, ("base", "base + recovered adapter"), encoded, batch_size)
    if subjects.release is not None:
        load = partial(open_pruned, subjects.release.folder, where)
        rows += _rows(load, subjects.adapter, ("pruned", "pruned + adapter"), encoded, batch_size)
    return EvaluationTable(
        rows=tuple(sorted(rows, key=lambda row: MODELS.index(row.model))),
        examples=len(encoded),
        tokens=sum(example.scored_tokens for example in encoded),
        cut_examples=cut_examples,
        dataset=dataset_id(data),
        protocol=read.protocol,
        provenance=provenance_of(subjects, settings) if identify else None,
    )


def check_losses(
    data: Specification, *, protocol: str | None, max_tokens: int | None, limit: int | None, batch_size: int
) -> None:
    """Refuse what `evaluate` could not measure, before anything is read; arguments and errors are its own."""
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InvalidRequestError(f"batch_size is {batch_size} and limit {limit}; both are at least 1.")
    followed = None if protocol is None else protocol_named(protocol)
    if followed is not None and (max_tokens is not None or limit is not None):
        raise InvalidRequestError(
            f"The protocol {protocol!r} itself says how much is read: {followed.records:,} records, "
            f"{followed.max_tokens} tokens. Leave out max_tokens and limit, or the protocol."
        )
    if _is_missing_file(data):
        raise InvalidRequestError(f"{data} is no file or folder that exists.")


def _is_missing_file(data: Specification) -> bool:
    return (
        isinstance(data, str | os.PathLike) and Path(data).suffix in SUFFIXES and not Path(data).expanduser().exists()
    )


def _pinned(data: Specification) -> tuple[Specification, str | None]:
    """Name a dataset on the Hub by its commit, so that what is recorded is what is read."""
    dataset = dataset_id(data)
    if dataset is None or constants.HF_HUB_OFFLINE:
        return data, None
    revision = str(data).partition("@")[2]
    commit = dataset_commit(dataset.partition(":")[0], revision=revision or None)
    return f"{dataset}@{commit}", commit


def _data_settings(data: Specification, commit: str | None, examples: Sequence[Example]) -> dict[str, str | None]:
    """Name the data: a Hub id as it was given and its commit, a file by its name and hash; and what was read of it."""
    told = hashlib.sha256()
    for example in examples:
        told.update(json.dumps([example.prompt, example.completion]).encode() + b"\n")
    settings: dict[str, str | None] = {"examples_sha256": told.hexdigest()}
    if not isinstance(data, str | os.PathLike):
        return settings
    path = Path(data).expanduser()
    if not path.exists():
        return {"data": str(data), "data_commit": commit, **settings}
    return {"data": path.name, **({"data_sha256": sha256_of(path)} if path.is_file() else {}), **settings}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """Examples, and how long their sequences may be."""

    examples: list[Example]
    max_tokens: int
    protocol: Mapping[str, Any] | None


def _read(data: Specification, protocol: str | None, *, max_tokens: int | None, limit: int | None) -> _Read:
    if protocol is None:
        examples = read_examples(data, limit=limit)
        return _Read(examples=examples, max_tokens=_MAX_TOKENS if max_tokens is None else max_tokens, protocol=None)
    followed = protocol_named(protocol)
    found = read_by_protocol(data, followed)
    return _Read(examples=found.examples, max_tokens=followed.max_tokens, protocol=found.origin)


def _rows(
    load: Callable[[], PreTrainedModel],
    adapter: Source | None,
    names: tuple[str, str],
    encoded: Sequence[EncodedExample],
    batch_size: int,
) -> list[EvaluationRow]:
    """Measure a model without and with an adapter; nothing of it stays in memory afterwards."""
    gc.collect()  # a model wrapped by PEFT refers to itself, so the last one may still be there
    model = load()
    removed = removed_weights(model)
    rows = [_row(names[0], model, encoded, batch_size, removed)]
    if adapter is not None:
        rows.append(_row(names[1], with_adapter(model, adapter.folder), encoded, batch_size, removed))
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
        parameters=stored_parameters(model, removed=removed),
        memory_bytes=memory_bytes(model),
        seconds=seconds,
    )


def stored_parameters(model: nn.Module, *, removed: int = 0) -> int:
    """Count the parameters of a loaded model, those packed as NF4 by their shapes.

    Args:
        model: with or without adapter.
        removed: weights that are zero in a sparse release, from `removed_weights` of the model without adapter.
    """
    return sum(math.prod(_shape(parameter)) for parameter in model.parameters()) - removed


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
