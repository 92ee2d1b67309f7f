"""A model as the estimates see it, measured from its config and plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loram_hub.architecture import EMBEDDING, LM_HEAD, Architecture, LayerSizes, layer_tensor
from loram_hub.plan import parameter_counts

SIXTEEN_BIT = 2
"""Bytes of a weight in bf16 or fp16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """A model as the estimates see it: pruned or not."""

    parameters: int
    """Every parameter, tied embeddings counted once."""
    embedding: int
    """Parameters of the embeddings, V * H."""
    head: int
    """Parameters of an lm_head of its own; 0 if it is tied."""
    layers: tuple[int, ...]
    """Parameters of each decoder layer."""
    widths: tuple[tuple[int, int, int], ...]
    """Per layer: query rows, key rows, MLP channels."""
    hidden_size: int
    vocab_size: int
    largest_tensor: int
    """Elements of the largest tensor."""
    nf4_bytes: int
    """Bytes with the projections in NF4."""

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied with: all but embeddings that are only looked up."""
        return self.parameters - (self.embedding if self.head else 0)

    @property
    def bytes_16(self) -> int:
        """Bytes in 16 bit."""
        return SIXTEEN_BIT * self.parameters

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest layer."""
        return max(self.layers)


def model_size(architecture: Architecture, layers: Sequence[LayerSizes] | None = None) -> ModelSize:
    """Measure a model.

    Args:
        architecture: the base model's.
        layers: sizes of each layer, from `planned_sizes`; None for the base model.
    """
    sizes = [architecture.whole_layer] * architecture.num_hidden_layers if layers is None else list(layers)
    shapes = architecture.tensor_shapes(sizes)
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    return ModelSize(
        parameters=sum(counts.values()),
        embedding=counts[EMBEDDING],
        head=counts.get(LM_HEAD, 0),
        layers=tuple(
            sum(counts[layer_tensor(layer, weight.name)] for weight in architecture.layer_weights)
            for layer in range(len(sizes))
        ),
        widths=tuple(_widths(architecture, layer) for layer in sizes),
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        largest_tensor=max(counts.values()),
        nf4_bytes=parameter_counts(architecture, sizes).nf4_bytes,
    )


def _widths(architecture: Architecture, layer: LayerSizes) -> tuple[int, int, int]:
    return (
        architecture.unit_width("query", layer),
        architecture.unit_width("key_value", layer),
        architecture.unit_width("channel", layer),
    )
