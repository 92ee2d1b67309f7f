"""Held-out losses of one model after another, and the memory that training took."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from loram_hub.auto import AutoLoramModel
from loram_hub.evaluation import EncodedExample, HeldOutLoss, held_out_loss
from loram_hub.masked_lora import mask_lora_
from loram_hub.streaming import return_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sets = Mapping[str, list[EncodedExample]]
"""Held-out sets by name, as token ids."""


def base_losses(
    base: Path, sets: Sets, *, adapter: Path | None, device: str, dtype: torch.dtype
) -> dict[str, HeldOutLoss]:
    """Measure the base as stock transformers and PEFT load it.

    Args:
        base: its folder.
        sets: what to measure on.
        adapter: a full-size adapter to put on; None for none.
        device: where it runs.
        dtype: that it computes in.
    """
    gc.collect()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map={"": device})
    return _losses(model if adapter is None else PeftModel.from_pretrained(model, str(adapter)), sets)


def pruned_losses(
    release: Path, sets: Sets, *, adapter: Path, masked: bool, device: str, dtype: torch.dtype
) -> tuple[dict[str, HeldOutLoss], dict[str, HeldOutLoss]]:
    """Measure a release without and with the adapter that was trained on it.

    Args:
        release: its folder.
        sets: what to measure on.
        adapter: as trained.
        masked: whether it was trained masked; then it is measured masked.
        device: where it runs.
        dtype: that it computes in.
    """
    gc.collect()
    model = AutoLoramModel.from_pretrained(release, device_map={"": device}, dtype=dtype)
    without = _losses(model, sets)
    tuned = PeftModel.from_pretrained(model, str(adapter))
    if masked:
        mask_lora_(tuned)
    return without, _losses(tuned, sets)


def _losses(model: nn.Module, sets: Sets) -> dict[str, HeldOutLoss]:
    return {name: held_out_loss(model, encoded) for name, encoded in sets.items()}


class PeakMemory:
    """The highest memory since it was made: of the device on CUDA, else of this process where Linux can tell."""

    def __init__(self, device: str) -> None:
        self._on_cuda = device == "cuda"
        gc.collect()
        return_freed_memory()  # of an alignment before, say
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._is_known = True
        else:
            self._is_known = _reset_peak()

    @property
    def nbytes(self) -> int | None:
        """Bytes; None where it cannot be told."""
        if not self._is_known:
            return None
        return torch.cuda.max_memory_allocated() if self._on_cuda else _peak_of_process()


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: set the peak to what is resident now
    except OSError:
        return False
    return True


def _peak_of_process() -> int | None:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
