"""One QLoRA training step, timed and weighed: forward, backward, clipping, AdamW, as `loram finetune` has TRL do it.

LoRA of rank 8, alpha 16, dropout 0.05 on the seven projections; adapters in bf16 on NF4 (as TRL casts them), bf16
autocast, gradient checkpointing without re-entrance, sequences without padding of which every token is scored. The
loss is TRL's fused lm_head, which never holds whole logits; where TRL is not installed, loram-hub's own chunked loss,
and the line says which. On CUDA the optimizer is bitsandbytes' paged 8-bit AdamW, elsewhere torch's AdamW.

Time is taken by CUDA events around each step after the warm-up. Memory is the allocator's peak over all steps, warm-up
included, what it has reserved, and what the whole device has in use (total - free, the figure of nvidia-smi), which has
the CUDA context in it and whatever else runs there.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from loram_hub.alignment.objective import token_losses
from loram_hub.architecture import Architecture, LayerSizes
from loram_hub.estimation import MemoryOptions, TrainingShape, training_memory
from loram_hub.lowmemory import reduce_memory_

RANK, ALPHA, DROPOUT = 8, 16, 0.05
LEARNING_RATE, MAX_NORM = 1e-3, 1.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CHUNK = 256
"""Positions whose logits are whole at a time in the loss without TRL."""


class Steps:
    """A model with its adapter and optimizer, ready to be stepped."""

    def __init__(self, model: PreTrainedModel, options: MemoryOptions) -> None:
        self.device = next(parameter.device for parameter in model.model.layers.parameters())
        self.vocabulary: int = model.config.vocab_size
        if options != MemoryOptions():
            reduce_memory_(model, options)
        self.has_trl = importlib.util.find_spec("trl") is not None
        if self.has_trl:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(model)
        self.adapted: PeftModel = get_peft_model(
            model,
            LoraConfig(
                r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(TARGETS), task_type="CAUSAL_LM"
            ),
        )
        self.factors = [parameter for parameter in self.adapted.parameters() if parameter.requires_grad]
        for parameter in self.factors:
            parameter.data = parameter.data.to(torch.bfloat16)
        self.adapted.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.adapted.train()
        optimizer: Callable[..., torch.optim.Optimizer] = (
            bnb.optim.PagedAdamW8bit if self.device.type == "cuda" else torch.optim.AdamW
        )
        self.optimizer = optimizer(self.factors, lr=LEARNING_RATE)
        self.offloading: Any = nullcontext()
        if options.activation_offloading:
            from trl.models import get_act_offloading_ctx_manager

            self.offloading = get_act_offloading_ctx_manager(model=self.adapted)

    def step(self, ids: torch.Tensor) -> float:
        """Train on a micro-batch of token ids, (B, T) int64; return the loss in nats per token."""
        with self.offloading:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = self._loss(ids)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.factors, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        if self.has_trl:
            found: torch.Tensor = self.adapted(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).loss
            return found
        model: Any = self.adapted.get_base_model()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return token_losses(model.lm_head, hidden, ids, chunk=_CHUNK)[0].sum() / ids[:, 1:].numel()


def measure(
    make: Callable[[], PreTrainedModel],
    *,
    options: Mapping[str, Any],
    micro_batches: Sequence[int],
    sequence_length: int,
    warm_up: int,
    steps: int,
) -> dict[str, Any]:
    """Make a model and step it at several micro-batches; what does not fit says so and ends the list."""
    found: dict[str, Any] = {}
    ready = None
    for micro_batch in micro_batches:
        try:
            ready = ready or Steps(make(), MemoryOptions(**options))
            found[str(micro_batch)] = _measured(ready, micro_batch, sequence_length, warm_up, steps)
        except torch.OutOfMemoryError:
            found[str(micro_batch)] = {"out_of_memory": True}
            break
    loss = "trl" if ready is not None and ready.has_trl else "chunked"
    return {"device": device_of(ready), "loss": loss, "micro_batches": found}


def _measured(ready: Steps, micro_batch: int, sequence_length: int, warm_up: int, steps: int) -> dict[str, Any]:
    on_gpu = ready.device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for number in range(warm_up + steps):
        ids = torch.randint(0, ready.vocabulary, (micro_batch, sequence_length), generator=generator).to(ready.device)
        with _Clock(on_gpu=on_gpu) as clock:
            losses.append(ready.step(ids))
        if number >= warm_up:
            seconds.append(clock.seconds)
    median = statistics.median(seconds)
    return {
        "ms_per_step": 1e3 * median,
        "ms_fastest": 1e3 * min(seconds),
        "ms_slowest": 1e3 * max(seconds),
        "tokens_per_second": micro_batch * sequence_length / median,
        "loss_is_finite": all(map(math.isfinite, losses)),
        **(_gpu_memory() if on_gpu else {}),
    }


class _Clock:
    """Seconds of a block, by CUDA events where there is CUDA."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self.seconds = 0.0

    def __enter__(self) -> _Clock:
        self._start = time.perf_counter()
        if self._events:
            self._events[0].record()
        return self

    def __exit__(self, *_: object) -> None:
        if self._events:
            self._events[1].record()
            self._events[1].synchronize()
            self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
        else:
            self.seconds = time.perf_counter() - self._start


def _gpu_memory() -> dict[str, int]:
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "device_used": total - free,
    }


def device_of(ready: Steps | None) -> dict[str, Any]:
    """Name and memory of the GPU; of a CPU the kind alone."""
    if not torch.cuda.is_available() or (ready is not None and ready.device.type == "cpu"):
        return {"kind": "cpu"}
    return cuda_device()


def cuda_device() -> dict[str, Any]:
    """Name and memory of the GPU in bytes, and the CUDA that torch was built for."""
    properties = torch.cuda.get_device_properties(0)
    return {"kind": "cuda", "name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}


def predicted(
    architecture: Architecture,
    layers: Sequence[LayerSizes],
    *,
    options: Mapping[str, Any],
    micro_batch: int,
    sequence_length: int,
) -> dict[str, Any]:
    """What `loram_hub.estimation` says of the same step: `allocated` is what the allocator's peak should be."""
    shape = TrainingShape(
        sequence_length=sequence_length, micro_batch=micro_batch, rank=RANK, dropout=DROPOUT, padded=False,
        options=MemoryOptions(**options),
    )  # fmt: skip
    found = training_memory(architecture, layers, shape)
    return {**found.to_dict(), "allocated": found.total - found.context - found.fragmentation}
