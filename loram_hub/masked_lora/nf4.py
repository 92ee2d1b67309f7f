"""Masked LoRA on NF4 weights."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft.tuners.lora import bnb

from loram_hub.masked_lora.layers import MaskedLayer


class MaskedLinear4bit(MaskedLayer, bnb.Linear4bit):
    """A masked layer on NF4 codes, which are dequantized anew in each pass."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 (as in PEFT)
        """Return the type that is given, as bitsandbytes does."""
        return super().forward(x, *args, **kwargs).to(x.dtype)

    def base_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Dequantize the weight as one row, in which no width is one that bitsandbytes gets wrong (`cpu_nf4`)."""
        weight = cast("Params4bit", cast("Linear4bit", self.get_base_layer()).weight)
        state = copy.copy(cast("QuantState", weight.quant_state))
        shape, state.shape, state.dtype = state.shape, torch.Size([state.shape.numel()]), dtype
        return dequantize_4bit(weight.data.reshape(-1, 1), state).reshape(shape)

    def _compute_dtype(self, x: torch.Tensor) -> torch.dtype | None:
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        declared: torch.dtype | None = cast("Linear4bit", self.get_base_layer()).compute_dtype
        return x.dtype if declared is None else declared
