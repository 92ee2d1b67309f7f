"""Estimated memory of a training step against the live tensors of the real classes, at real sizes and without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("bitsandbytes")
pytest.importorskip("trl")

import torch
from bitsandbytes.optim import AdamW8bit

from loram_hub.architecture import FAMILIES, architecture_of
from loram_hub.estimation import TrainingShape, training_memory
from loram_hub.plan import PruningSettings, planned_sizes

LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {
    "long": TrainingShape(sequence_length=4096),
    "padded": TrainingShape(sequence_length=512, micro_batch=4),
    "everything kept": TrainingShape(sequence_length=1024, checkpointing=False, dropout=0.0, rank=32),
    "tied": TrainingShape(sequence_length=4096),
    "no dropout": TrainingShape(sequence_length=4096, dropout=0.0),
    "some targets": TrainingShape(sequence_length=4096, targets=("o_proj",)),
    "masked": TrainingShape(sequence_length=1024, masked_lora=True),
    "masked, everything kept": TrainingShape(sequence_length=1024, masked_lora=True, checkpointing=False),
}
UNLIKE_LLAMA = {"gemma2": "no dropout", "mistral": "tied", "phi3": "some targets"}
"""Cases of families that go another way through the formulas; mistral's layers are those of llama."""
CASES = [
    *(("llama", name, True) for name in ("long", "padded", "everything kept", "some targets")),
    *(("llama", name, False) for name in ("long", "everything kept")),
    ("llama", "masked", True),
    ("llama", "masked, everything kept", False),
    *((family, UNLIKE_LLAMA.get(family, "long"), True) for family in sorted(FAMILIES) if family != "llama"),
]


def load(name: str) -> ModuleType:
    """Import a script of benchmarks/, which is no package."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


simulated_training = load("simulated_training")


@pytest.mark.parametrize(("family", "case", "quantized"), CASES)
def test_an_estimate_is_close_to_what_the_tensors_of_a_real_step_take(family: str, case: str, quantized: bool) -> None:
    config, shape = {"model_type": family, **SIZES, "tie_word_embeddings": case == "tied"}, SHAPES[case]
    architecture = architecture_of(config)
    ratio = 0.0 if shape.masked_lora else 0.5  # masked is LoRA on sparse releases, which are whole
    layers = planned_sizes(architecture, PruningSettings(pruning_ratio=ratio, keep_first=1, keep_last=1))

    simulated = simulated_training.simulate(config, layers, shape, quantized=quantized)
    estimated = training_memory(architecture, layers, shape, quantized=quantized)

    standing = estimated.standing - estimated.gradients - estimated.optimizer - estimated.context
    assert standing == pytest.approx(simulated.standing, rel=1e-4)  # two tables of rotary frequencies are left out
    in_step = estimated.tensors - estimated.optimizer - standing
    assert in_step == pytest.approx(simulated.peak - simulated.standing, rel=0.06)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
def test_the_moments_are_those_that_the_optimizer_makes(optimizer: str) -> None:
    """Of small and large factors of an adapter in bf16, after one real step."""
    config = {"model_type": "llama", **SIZES, "hidden_size": 320, "intermediate_size": 1001, "vocab_size": 64}
    architecture = architecture_of(config)
    layers = [architecture.whole_layer] * LAYERS
    sides = [side for weight in architecture.projections for side in architecture.shape(weight, layers[0])]
    factors = [torch.nn.Parameter(torch.ones(8, side, dtype=torch.bfloat16)) for side in sides * LAYERS]
    for factor in factors:
        factor.grad = torch.ones_like(factor)

    made = (torch.optim.AdamW if optimizer == "adamw_torch" else AdamW8bit)(factors, lr=1e-3)
    made.step()

    kept = [
        value.nbytes
        for state in made.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name not in ("step", "qmap1", "qmap2")  # one table for all tensors
    ]
    expected = sum(-(-nbytes // 512) * 512 for nbytes in kept)
    found = training_memory(architecture, layers, TrainingShape(optimizer=optimizer))  # type: ignore[arg-type]
    assert found.optimizer == expected
