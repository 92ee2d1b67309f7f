"""Sizes of well-known base models, as their `config.json` gives them: for what follows from sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA_2 = {"model_type": "llama", "vocab_size": 32_000}
_LLAMA_3 = {"model_type": "llama", "vocab_size": 128_256}


def _sizes(
    kind: Mapping[str, Any], hidden: int, channels: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        **kind,
        "hidden_size": hidden,
        "intermediate_size": channels,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
        **more,
    }


BASES: Mapping[str, tuple[dict[str, Any], int]] = {
    "meta-llama/Llama-2-13b-hf": (_sizes(_LLAMA_2, 5120, 13_824, 40, 40, 40), 13_015_864_320),
    "meta-llama/Llama-2-70b-hf": (_sizes(_LLAMA_2, 8192, 28_672, 80, 64, 8), 68_976_648_192),
    "meta-llama/Llama-3.1-8B": (_sizes(_LLAMA_3, 4096, 14_336, 32, 32, 8), 8_030_261_248),
    "meta-llama/Llama-3.1-70B": (_sizes(_LLAMA_3, 8192, 28_672, 80, 64, 8), 70_553_706_496),
    "Qwen/Qwen2.5-72B": (
        _sizes({"model_type": "qwen2", "vocab_size": 152_064}, 8192, 29_568, 80, 64, 8),
        72_706_203_648,
    ),
    "Qwen/Qwen3-32B": (
        _sizes({"model_type": "qwen3", "vocab_size": 151_936}, 5120, 25_600, 64, 64, 8, head_dim=128),
        32_762_123_264,
    ),
    "mistralai/Mistral-Small-24B-Base-2501": (
        _sizes({"model_type": "mistral", "vocab_size": 131_072}, 5120, 32_768, 40, 32, 8, head_dim=128),
        23_572_403_200,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        _sizes({"model_type": "llama", "vocab_size": 49_152}, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
        134_515_008,
    ),
}
"""Config and number of parameters by Hub id; the number is the one that the model's page states."""
