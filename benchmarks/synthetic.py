"""Random checkpoints, plans and manifests of a given shape; weights are written tensor by tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loram_hub.architecture import architecture_of
from loram_hub.checkpoint import CONFIG, ShardWriter
from loram_hub.files import dump_json
from loram_hub.manifest import BaseModel, Manifest, Pruning
from loram_hub.plan import Plan, PruningSettings, parameter_counts, plan_from_scores, pruned_layers


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


def layer_bytes(config: dict[str, Any]) -> int:
    """Bytes of a whole decoder layer in fp32."""
    architecture = architecture_of(config)
    whole = architecture.whole_layer
    return 4 * sum(math.prod(architecture.shape(weight, whole)) for weight in architecture.layer_weights)


def random_plan(config: dict[str, Any], pruning_ratio: float, *, seed: int = 0) -> Plan:
    """Keep random groups; the first 4 and last 2 layers stay whole."""
    architecture, settings = architecture_of(config), PruningSettings(pruning_ratio=pruning_ratio)
    rng = np.random.default_rng(seed)
    scores = {
        layer: {
            "kv_heads": rng.random(architecture.num_key_value_heads, dtype=np.float32),
            "channels": rng.random(architecture.intermediate_size, dtype=np.float32),
        }
        for layer in pruned_layers(architecture, settings)
    }
    return plan_from_scores(architecture, settings, scores)


def manifest_of(plan: Plan, pruning_ratio: float) -> Manifest:
    """Manifest of an unquantized release with the given plan and an invented base."""
    counts = parameter_counts(plan.architecture, plan.layers)
    base = BaseModel(id="org/base", commit="0" * 40, config_sha256="0" * 64, parameters=counts.original_parameters)
    pruning = Pruning(
        method="structured",
        importance="random",
        pruning_ratio=pruning_ratio,
        keep_first=4,
        keep_last=2,
        round_to=None,
        seed=0,
        calibration=None,
        plan_sha256=plan.digest,
    )
    return Manifest(base=base, pruning=pruning, parameters=counts.pruned_parameters)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """N(0, 0.02^2) for a matrix, ones for a norm; on the generator's device."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=generator.device)
    return torch.empty(shape, dtype=dtype, device=generator.device).normal_(0, 0.02, generator=generator)


def write_checkpoint(
    folder: Path, config: dict[str, Any], *, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> None:
    """Write an unquantized, sharded checkpoint, drawn on a device; a layer's tensors lie together, as in real ones."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(dump_json({**config, "dtype": str(dtype).removeprefix("torch.")}), encoding="utf-8")
    generator = torch.Generator(device).manual_seed(seed)
    writer = ShardWriter(folder)
    for name, shape in architecture_of(config).tensor_shapes().items():
        writer.add(name, random_tensor(shape, dtype, generator).cpu())
    writer.finish()
