"""Time and memory of a training step with masked LoRA against one with plain LoRA, on the same sparse release.

SmolLM2-135M (of `loram demo`) without half of the weights of each projection, 4:8 by magnitude; LoRA as recipes have it
by default: rank 8 on every projection, dropout 0.05. Both models take the same batches in turn, in one process, so that
both meet the same machine; a step is forward, backward and AdamW. Its time is CPU time of the process, which others on
the machine change least; a figure is the median over the steps but the first. Memory is what a process of its own comes
to in one step with one of the two: its largest resident size less what it has after its imports, the same for both.

Cells: weights in fp32 computed in fp32, weights in bfloat16 under autocast, and NF4 under autocast, as TRL has it, each
with activation checkpointing and without. The target is set for a whole step, in which attention, norms, the lm_head
and the loss cost alike; beside it stands the time of one linear layer, which is not judged: `masked_lora.product` says
why it is about twice that of plain LoRA in 16 bit.

    python benchmarks/masked_step.py [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import measured, peak_rss, report, scratch_folder, serve_actions

if TYPE_CHECKING:
    from peft import PeftModel

SHAPE = {"batch": 2, "tokens": 256, "steps": 2}
QUICK_SHAPE = {"batch": 2, "tokens": 16, "steps": 2}
QUICK_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}
SETTINGS = tuple(
    {"dtype": dtype, "nf4": nf4, "checkpointing": checkpointing}
    for dtype, nf4 in (("float32", False), ("bfloat16", False), ("bfloat16", True))
    for checkpointing in (True, False)
)
LAYER_SHAPE = {"width": 1024, "tokens": 1024, "steps": 10}
QUICK_LAYER_SHAPE = {"width": 64, "tokens": 16, "steps": 2}
IMPORTS = (
    "bitsandbytes",
    "loram_hub.auto",
    "loram_hub.masked_lora.nf4",
    "peft",
    "transformers.integrations.bitsandbytes",
    "transformers.models.llama.modeling_llama",
)
TIME_TARGET, MEMORY_TARGET = 1.6, 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description="A masked LoRA step against a plain one.")
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that the script works, no more")
    parser.add_argument("--work-dir", help="where to put the temporary release; default: the system's own")
    options = parser.parse_args()
    shape = QUICK_SHAPE if options.quick else SHAPE

    cells = []
    with scratch_folder("masked-step", options.work_dir) as work:
        measured(__file__, "make_release", folder=str(work), quick=options.quick)
        for setting in SETTINGS[:1] if options.quick else SETTINGS:
            cells.append({**setting, **measure({"folder": str(work), "shape": shape, **setting})})
        layers = measured(__file__, "time_layers", shape=QUICK_LAYER_SHAPE if options.quick else LAYER_SHAPE)["layers"]
    worst = {name: max(cell[name] for cell in cells) for name in ("time_ratio", "memory_ratio")}
    report(
        "masked_step",
        quick=options.quick,
        figures={"shape": shape, "cells": cells, "one_layer": layers, **worst},
        target=f"at most {TIME_TARGET} of the time and {MEMORY_TARGET} of the memory, in every cell",
        met=worst["time_ratio"] <= TIME_TARGET and worst["memory_ratio"] <= MEMORY_TARGET,
    )


def measure(given: dict[str, Any]) -> dict[str, Any]:
    """Compare the two ways to train in one setting."""
    timed = measured(__file__, "time_steps", **given)
    seconds = {name: timed[name] for name in ("plain", "masked")}
    peaks = {}
    for name in seconds:
        found = measured(__file__, "take_step", masked=name == "masked", **given)
        peaks[name] = found["peak_rss"] - found["imported"]
    return {
        "cpu_seconds": seconds,
        "peak_memory_less_imports": peaks,
        "time_ratio": seconds["masked"] / seconds["plain"],
        "memory_ratio": peaks["masked"] / peaks["plain"],
    }


def make_release(folder: str, quick: bool) -> dict[str, Any]:
    """Remove half of a model's weights, and quantize what is left."""
    from loram_hub import SparsitySettings, quantize, sparsify

    if quick:
        import torch
        from synthetic import llama_config, write_checkpoint

        base = Path(folder) / "base"
        write_checkpoint(base, llama_config(**QUICK_SIZES), dtype=torch.float32)
    else:
        from loram_hub.demo.base_model import base_model

        base = base_model()
    sparsify(base, Path(folder) / "16-bit", settings=SparsitySettings(method="magnitude", pattern="4:8"))
    quantize(Path(folder) / "16-bit", Path(folder) / "nf4")
    return {}


def open_model(folder: str, dtype: str, *, nf4: bool, masked: bool, checkpointing: bool) -> PeftModel:
    """Open the release with an adapter, ready to train."""
    from peft import LoraConfig, get_peft_model

    from loram_hub import AutoLoramModel, mask_lora_

    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    release = Path(folder) / ("nf4" if nf4 else "16-bit")
    model = get_peft_model(AutoLoramModel.from_pretrained(release, dtype=dtype), lora)
    if masked:
        mask_lora_(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


class Steps:
    """Training steps of one model, each timed."""

    def __init__(self, model: PeftModel, shape: dict[str, int]) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        size = (shape["batch"], shape["tokens"])
        self.ids = torch.randint(0, model.config.vocab_size, size, generator=generator)
        self.model = model
        self.optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
        self.seconds: list[float] = []

    def take(self) -> None:
        import torch

        is_16_bit = self.model.dtype == torch.bfloat16
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16) if is_16_bit else nullcontext():
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.process_time() - began)


def time_steps(folder: str, dtype: str, nf4: bool, checkpointing: bool, shape: dict[str, int]) -> dict[str, Any]:
    """Time steps of both models in turn."""
    models = {
        name: Steps(open_model(folder, dtype, nf4=nf4, masked=name == "masked", checkpointing=checkpointing), shape)
        for name in ("plain", "masked")
    }
    for _ in range(shape["steps"] + 1):
        for steps in models.values():
            steps.take()
    return {name: statistics.median(steps.seconds[1:]) for name, steps in models.items()}


def take_step(
    folder: str, dtype: str, nf4: bool, checkpointing: bool, shape: dict[str, int], masked: bool
) -> dict[str, Any]:
    """Take a step with one model; what counts is the memory of this process, beyond that of its imports."""
    for module in IMPORTS:
        importlib.import_module(module)
    imported = peak_rss()
    Steps(open_model(folder, dtype, nf4=nf4, masked=masked, checkpointing=checkpointing), shape).take()
    return {"imported": imported}


def time_layers(shape: dict[str, int]) -> dict[str, Any]:
    """Time forward and backward pass of one linear layer, masked and plain in turn."""
    return {"layers": {dtype: time_layer(dtype, shape) for dtype in ("float32", "bfloat16")}}


def time_layer(dtype: str, shape: dict[str, int]) -> dict[str, float]:
    """Time one linear layer whose inputs have a gradient, as all but a model's first ones do."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from loram_hub.masked_lora.layers import put_mask_
    from loram_hub.masked_lora.product import KeptWeights

    width = shape["width"]
    x = torch.randn(shape["tokens"], width, dtype=getattr(torch, dtype), requires_grad=True)
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["0"])
    layers = {}
    for name in ("plain", "masked"):
        model = get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), lora).to(x.dtype).train()
        layers[name] = model.base_model.model[0]
    put_mask_(layers["masked"], KeptWeights(np.random.default_rng(0).random((width, width)) < 0.5))
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(shape["steps"] + 1):
        for name, layer in layers.items():
            began = time.process_time()
            layer(x).sum().backward()
            seconds[name].append(time.process_time() - began)
    plain, masked = (statistics.median(seconds[name][1:]) for name in ("plain", "masked"))
    return {"plain": plain, "masked": masked, "time_ratio": masked / plain}


if __name__ == "__main__":
    serve_actions(make_release, time_steps, take_step, time_layers)
    main()
