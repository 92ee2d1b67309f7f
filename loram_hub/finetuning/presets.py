"""Presets: how a run fits a GPU, as data.

What is learnt is the same under every preset, that of the LoRAM paper (arXiv 2502.13533): rank 8, alpha 16, 512
tokens, 128 sequences a step, 400 steps, learning rate 1e-3. A preset decides what that costs in memory: `paper` keeps
everything on the device and in 16 bit, as the paper did; the others are named after the GPU that the run must fit, and
take from a small one what it needs most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from loram_hub.estimation.options import MemoryOptions

PresetName = Literal["paper", "16gb", "20gb", "24gb"]
OptimizerName = Literal["auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """What a recipe's section `memory` has where it says nothing itself."""

    gpu: str | None
    """GPU that the run must fit; None for the one that is there."""
    gradient_checkpointing: bool
    """Whether activations are computed anew for the backward pass."""
    optimizer: OptimizerName
    """`auto` is paged 8-bit AdamW on CUDA and torch's AdamW on a CPU."""
    options: MemoryOptions
    """Where embedding and lm_head are, and in which type."""


PRESETS: Mapping[PresetName, Preset] = {
    "paper": Preset(gpu=None, gradient_checkpointing=True, optimizer="auto", options=MemoryOptions()),
    "16gb": Preset(
        gpu="16GB",
        gradient_checkpointing=True,
        optimizer="auto",
        options=MemoryOptions(embedding="cpu", lm_head="nf4"),
    ),
    "20gb": Preset(gpu="20GB", gradient_checkpointing=True, optimizer="auto", options=MemoryOptions()),
    "24gb": Preset(gpu="24GB", gradient_checkpointing=True, optimizer="auto", options=MemoryOptions()),
}
"""By name. 20 and 24 GB differ in the micro-batch that the estimate finds for them."""
