"""NF4 layers on CPUs, where bitsandbytes 0.50 has three faults that pruned widths meet.

- On the first eval forward it repacks weights for AVX512-BF16 as if in_features were a multiple of the block size, 64
  (`functional._convert_weight_packed_for_cpu`): a reshape error where a layer keeps another number of channels.
- Its AVX512 kernel dequantizes row by row and takes a wrong scale where a block goes on in the next row: wrong weights,
  without an error, for in_features that are multiples of 16 and not of 64.
- For odd in_features it goes without its kernel, by torch operations that it has torch.compile compile anew for every
  shape.

As one long row the same codes come out right, and fast.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from torch.nn import functional


def mend_cpu_layers_(model: nn.Module) -> None:
    """Let the NF4 layers of a model compute what their codes say; layers that are sound, or on GPUs, stay as they are.

    Args:
        model: with its weights, before PEFT.
    """
    for module in model.modules():
        if not isinstance(module, Linear4bit):
            continue
        vars(module)["support_avx512bf16_for_cpu"] = False
        if module.weight.device.type == "cpu" and _is_one_row_better(module.in_features):
            module.__class__ = _OneRowLinear4bit


@cache
def _is_one_row_better(width: int) -> bool:
    """Try a small matrix of this width both ways: upstream may have been mended, or this CPU may have no AVX512."""
    if width % 2:
        return True
    weight = torch.linspace(-1, 1, 64 * width).reshape(64, width)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return not torch.equal(dequantize_4bit(codes, state), _dequantized(codes, state, weight.dtype))


def _dequantized(codes: torch.Tensor, state: QuantState, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight (out, in) of its codes, dequantized as one row, in the type that is computed in."""
    flat = copy.copy(state)
    flat.shape, flat.dtype = torch.Size([state.shape.numel()]), dtype
    return dequantize_4bit(codes.reshape(-1, 1), flat).reshape(state.shape)


class _OneRowLinear4bit(Linear4bit):
    """A layer whose weight is dequantized as one row; all else, its name in PEFT's eyes too, is the library's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            elsewhere: torch.Tensor = super().forward(x)
            return elsewhere
        if not self.compute_type_is_set:
            self.set_compute_type(x)  # type: ignore[no-untyped-call]
            self.compute_type_is_set = True
        computed = x if self.compute_dtype is None else x.to(self.compute_dtype)
        state: QuantState = self.weight.quant_state  # type: ignore[attr-defined]  # of Params4bit
        product: torch.Tensor = _Product.apply(computed, self.weight, state)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            product += self.bias.to(product.dtype)
        return product.to(x.dtype)


class _Product(torch.autograd.Function):
    """x W^T; like the library's, it keeps the codes for the backward pass and not the dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, state: QuantState) -> torch.Tensor:  # noqa: ANN401
        ctx.save_for_backward(codes)
        ctx.state = state
        return functional.linear(x, _dequantized(codes, state, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # noqa: ANN401
        (codes,) = ctx.saved_tensors
        return gradient @ _dequantized(codes, ctx.state, gradient.dtype), None, None


__all__ = ["mend_cpu_layers_"]
