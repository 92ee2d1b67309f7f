"""The shapes that are measured, as data: no download and no access to gated models is needed to run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from synthetic import llama_config, random_plan

from loram_hub.architecture import Architecture, LayerSizes, architecture_of

_LLAMA_2 = {"vocab_size": 32_000, "head_dim": 128}
_LLAMA_3 = {"vocab_size": 128_256, "head_dim": 128, "num_key_value_heads": 8}
_70B = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64}

SHAPES: Mapping[str, Mapping[str, int]] = {
    "LLaMA-3.1-70B": {**_LLAMA_3, **_70B},
    "LLaMA-2-70B": {**_LLAMA_2, **_70B, "num_key_value_heads": 8},
    "LLaMA-2-13B": {
        **_LLAMA_2, "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40,
    },
    "LLaMA-3.1-8B": {
        **_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "tiny": {
        "vocab_size": 512, "head_dim": 16, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
}  # fmt: skip
"""Sizes by name. `tiny` shows that a script works, and proves nothing."""


def config_of(shape: str, *, layers: int | None = None) -> dict[str, Any]:
    """`config.json` of a shape, in bf16; with another number of layers if one is given."""
    depth = {} if layers is None else {"num_hidden_layers": layers}
    return llama_config(**{**SHAPES[shape], **depth})


def layers_of(config: Mapping[str, Any], ratio: float) -> tuple[Architecture, Sequence[LayerSizes]]:
    """Sizes of each layer at a pruning ratio; 0 for the whole model."""
    architecture = architecture_of(config)
    if ratio == 0:
        return architecture, [architecture.whole_layer] * architecture.num_hidden_layers
    return architecture, random_plan(dict(config), ratio).layers
