"""Random checkpoints of a given shape, written tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loram_hub.architecture import architecture_of
from loram_hub.checkpoint import CONFIG, ShardWriter
from loram_hub.files import dump_json


def llama_config(**sizes: int) -> dict[str, Any]:
    """`config.json` of an untied Llama with the given sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **sizes,
    }


def write_checkpoint(folder: Path, config: dict[str, Any], *, dtype: torch.dtype, seed: int = 0) -> None:
    """Write a sharded checkpoint: matrices N(0, 0.02^2), norms 1; a layer's tensors lie together, as in real ones."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(dump_json({**config, "dtype": str(dtype).removeprefix("torch.")}), encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)
    writer = ShardWriter(folder)
    for name, shape in architecture_of(config).tensor_shapes().items():
        if len(shape) == 1:
            writer.add(name, torch.ones(shape, dtype=dtype))
        else:
            writer.add(name, torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator))
    writer.finish()
