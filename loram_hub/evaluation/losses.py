"""The held-out loss of one model that is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig

from loram_hub.evaluation.encoding import EncodedExample

_IGNORED = -100
_LARGEST_LOGITS = 2**28
"""Most logits computed at once (1 GiB in fp32): a vocabulary of 128k times 2,048 positions."""


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
