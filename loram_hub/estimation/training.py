"""What a LoRA training step holds in the memory of a GPU, component by component.

Of what is there all the time `standing` tells.

Of a step, at its highest moment, which is either the loss or the backward pass of one layer (see `layers`):

    inputs        with activation checkpointing, 2 H bytes per token of each layer up to the one that goes back;
                  without, what all those layers keep. TRL's offloading leaves five tensors
    activations   of the layer, computed again
    logits        TRL's loss computes a tile of at most 4,096 tokens x 32,768 words in 16 bit, whatever the vocabulary;
                  beside it are the final norm's input in fp32, the hidden states of the scored tokens, and their
                  gradients in fp32 and 16 bit. A compressed lm_head is decompressed in pieces of `HEAD_PIECE`
    workspace     a dequantized weight, or what attention's kernel takes; cuBLAS has 32 MiB at most

and what is not derived but set aside, in `Reserves`: what driver, CUDA context and kernels take, and a share of what
is allocated and freed during a step for what the allocator cannot use again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from loram_hub.architecture import Architecture, LayerSizes
from loram_hub.errors import InvalidRequestError
from loram_hub.estimation.layers import COMPUTED, Batch, LayerActivations, layer_activations
from loram_hub.estimation.options import HEAD_PIECE
from loram_hub.estimation.settings import MIB, TrainingShape, chosen_targets
from loram_hub.estimation.standing import standing_memory

_FP32 = 4
_TILE_TOKENS, _TILE_WORDS = 4096, 32_768
_OFFLOADED_STAY = 5
_CUBLAS_BYTES = 32 * MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBreakdown:
    """Bytes on the GPU at the highest moment of a training step."""

    projections: int
    """Matrices of the layers: NF4 codes, or 16 bit."""
    scales: int
    """Of NF4, with code tables."""
    embedding: int
    """Input embedding, and the lm_head if it is tied."""
    lm_head: int
    """An lm_head of its own."""
    rest: int
    """Norms and biases."""
    masks: int
    """Of masked LoRA, a bit per weight; 0 if it is not masked."""
    adapter: int
    """LoRA factors."""
    gradients: int
    """Of the adapter."""
    optimizer: int
    """Moments of AdamW."""
    inputs: int
    """What earlier layers keep for the backward pass."""
    activations: int
    """Of the layer that goes back, or of the final norm."""
    logits: int
    """What the loss computes with; 0 if the highest moment is in a layer."""
    workspace: int
    """A dequantized weight, attention's and cuBLAS' workspace."""
    context: int
    """Set aside for driver, CUDA context and kernels."""
    fragmentation: int
    """Set aside for what the allocator cannot use again."""
    moment: str
    """The highest moment."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(nbytes for _, nbytes in self.components())

    @property
    def tensors(self) -> int:
        """What tensors take: all but what is set aside, and cuBLAS' workspace."""
        return self.total - self.context - self.fragmentation - _CUBLAS_BYTES

    @property
    def standing(self) -> int:
        """What is there all the time."""
        return sum(getattr(self, name) for name in _STANDING)

    def components(self) -> Iterator[tuple[str, int]]:
        """Yield name and bytes of every component."""
        for each in fields(self):
            if each.name != "moment":
                yield each.name, getattr(self, each.name)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dict(self.components()), "total": self.total, "moment": self.moment}


_STANDING = (
    "projections", "scales", "embedding", "lm_head", "rest", "masks", "adapter", "gradients", "optimizer", "context",
)  # fmt: skip


def training_memory(
    architecture: Architecture,
    layers: Sequence[LayerSizes],
    shape: TrainingShape,
    *,
    quantized: bool = True,
) -> MemoryBreakdown:
    """Estimate what a fine-tuning step holds.

    Args:
        architecture: the base model's.
        layers: sizes of each layer: a plan's, or `[architecture.whole_layer] * architecture.num_hidden_layers`.
        shape: how it is trained.
        quantized: whether the projections are NF4.

    Returns:
        Bytes by component at the highest moment.

    Raises:
        InvalidRequestError: a target is no module of the model, the memory options do not fit tied embeddings, or
            masked LoRA is to train a structured release.
        UnsupportedAdapterError: a target is the lm_head.
    """
    if shape.masked_lora and any(sizes != architecture.whole_layer for sizes in layers):
        raise InvalidRequestError(
            "Masked LoRA is for sparse releases; of a structured one, what was pruned is not there, so that there is "
            "nothing to mask."
        )
    targets = chosen_targets(architecture, shape.targets)
    standing = standing_memory(architecture, layers, shape, targets, quantized=quantized)
    moment = max(
        _moments(architecture, layers, shape, targets, quantized=quantized),
        key=lambda each: each.inputs + each.activations + each.logits + each.workspace,
    )
    in_step = moment.inputs + moment.activations + moment.logits + moment.workspace
    return MemoryBreakdown(
        **standing,
        inputs=moment.inputs,
        activations=moment.activations,
        logits=moment.logits,
        workspace=moment.workspace + _CUBLAS_BYTES,
        context=shape.reserves.context_bytes,
        fragmentation=math.ceil(shape.reserves.fragmentation * in_step),
        moment=moment.name,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _StepMoment:
    name: str
    inputs: int
    activations: int
    logits: int
    workspace: int


def _moments(
    architecture: Architecture,
    layers: Sequence[LayerSizes],
    shape: TrainingShape,
    targets: frozenset[str],
    *,
    quantized: bool,
) -> Iterator[_StepMoment]:
    """The loss, and the highest moment of each layer's backward pass, with what the layers before it keep."""
    batch = Batch(
        micro_batch=shape.micro_batch,
        sequence_length=shape.sequence_length,
        padded=shape.micro_batch > 1 if shape.padded is None else shape.padded,
        rank=shape.rank,
        dropout=shape.dropout,
        targets=targets,
        quantized=quantized,
        masked=shape.masked_lora,
    )
    hidden = COMPUTED * shape.tokens * architecture.hidden_size
    by_size: dict[LayerSizes, LayerActivations] = {
        sizes: layer_activations(architecture, sizes, batch) for sizes in set(layers)
    }
    stay = _OFFLOADED_STAY * (hidden if shape.checkpointing else _widest(architecture, layers, shape))
    limit = stay if shape.options.activation_offloading else None
    before = 0
    for number, sizes in enumerate(layers):
        found = by_size[sizes]
        highest = found.highest
        before += hidden if shape.checkpointing else found.kept
        own = 0 if shape.checkpointing else found.kept
        yield _StepMoment(
            name=f"layer {number}: {highest.name}",
            inputs=_at_most(before - own, limit),
            activations=highest.activations,
            logits=0,
            workspace=highest.workspace,
        )
    yield _loss(architecture, shape, hidden, _at_most(before, limit))


def _widest(architecture: Architecture, layers: Sequence[LayerSizes], shape: TrainingShape) -> int:
    """Bytes of the largest tensor that a layer keeps: MLP channels in 16 bit, or the input of a norm in fp32."""
    channels = max(architecture.unit_width("channel", sizes) for sizes in layers)
    return shape.tokens * max(COMPUTED * channels, _FP32 * architecture.hidden_size)


def _at_most(nbytes: int, limit: int | None) -> int:
    return nbytes if limit is None else min(nbytes, limit)


def _loss(architecture: Architecture, shape: TrainingShape, hidden: int, inputs: int) -> _StepMoment:
    tile = COMPUTED * min(shape.tokens, _TILE_TOKENS) * _TILE_WORDS
    gradients = _FP32 // COMPUTED * hidden + hidden
    compressed = shape.options.lm_head != "device"
    piece = COMPUTED * min(HEAD_PIECE, _TILE_WORDS * architecture.hidden_size) if compressed else 0
    return _StepMoment(
        name="loss",
        inputs=inputs,
        activations=_FP32 // COMPUTED * hidden + hidden,
        logits=tile + gradients,
        workspace=piece,
    )
