"""The product of masked LoRA, x (W_P + s (B A) o M)^T, and its gradients.

O, I: out_features and in_features; n: tokens; D = s (B A) o M, of the size of the weight, (O, I).

    y    = x W_P^T + x D^T
    dx   = g (W_P + D)
    dD   = (g^T x) o M            exactly zero where a weight was pruned
    dB   = s dD A^T,    dA = s B^T dD

Memory: x, A, B and the mask, one bit per weight, are kept for the backward pass, which forms D anew. So only one layer
at a time has tensors of the size of its weight: D, or dD in its place, in the type that is computed in, and beside it

- while the mask is unpacked, 1.5 bytes per weight, and then
- where W_P is not at hand in that type (NF4, autocast of weights in 32 bit), W_P as a second tensor of D's size, until
  it is added to D. A forward pass in 16 bit, which does not add them, has one after the other.

Time: in 32 bit W_P + D is formed once and multiplied once, and the backward pass has two products, where unmasked LoRA
has one and one. In 16 bit such a sum would lose the update: what is less than half a unit in the last place of a weight
(a 512th of it in bfloat16) rounds to nothing, so the forward pass multiplies twice. The backward pass does not: there
the same rounding is no larger than that of the gradients g and dx themselves, which are of that type too. A linear
layer so takes up to 2x the time of the unmasked one in 16 bit, four products against two, and up to 1.5x in 32 bit. The
target of 1.6x in `benchmarks/masked_step.py` is for the whole training step, in which attention, norms, the lm_head and
the loss cost what they did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.function import once_differentiable

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_EXACT_BYTES = 4
"""Bytes of a number from which on a weight and its update can be added up."""


class KeptWeights:
    """Which weights of a matrix were kept, one bit each."""

    def __init__(self, kept: npt.NDArray[np.bool_], *, device: torch.device | None = None) -> None:
        """Pack a mask (O, I), True for kept, and put it on a device."""
        self.shape = torch.Size(kept.shape)
        self.bits = torch.from_numpy(np.packbits(kept, axis=1)).to(device or torch.device("cpu"))

    def __call__(self, device: torch.device) -> torch.Tensor:
        """Unpack the mask on a device: bool, (O, I)."""
        bits = self.bits.to(device)  # not kept: DataParallel's replicas, on several devices, share this object
        rows, columns = self.shape
        octets = torch.index_select(_octets(device), 0, bits.reshape(-1).int())
        return octets.view(torch.bool).view(rows, -1)[:, :columns]

    def zero_pruned_(self, dense: torch.Tensor) -> torch.Tensor:
        """Put zeros into a floating-point matrix (O, I) where weights were pruned, whatever is there."""
        # As integers: the product is exact, also of infinities, and several times faster than masked_fill_ on a CPU.
        dense.view(_INTEGERS[dense.element_size()]).mul_(self(dense.device).view(torch.int8))
        return dense


@cache
def _octets(device: torch.device) -> torch.Tensor:
    """For each byte the eight truth values of its bits, in the order of `numpy.packbits`, as one number."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    return torch.from_numpy(bits.view(np.int64).reshape(-1).copy()).to(device)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class MaskedUpdate:
    """All of an update that has no gradient."""

    kept: KeptWeights
    """The mask."""
    scale: float
    """s."""
    inputs: torch.Tensor | None = None
    """(I,): what each input feature of the update is multiplied by, 0 where it is dropped; None for ones."""
    weight: Callable[[torch.dtype], torch.Tensor] | None = None
    """Gives W_P (O, I) in a type; None if its part of the product is computed elsewhere."""

    def to_dense(self, lora_A: torch.Tensor, lora_B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Form D, (O, I)."""
        scaled = lora_B.to(dtype) * self.scale
        return self.kept.zero_pruned_(scaled @ self.drop(lora_A.to(dtype)))

    def drop(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the dropout to rows of inputs, (r, I)."""
        return rows if self.inputs is None else rows * self.inputs.to(rows.dtype)


def masked_product(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, update: MaskedUpdate) -> torch.Tensor:
    """Return x (W_P + D)^T, or x D^T for an update without a weight, in the type of x.

    Args:
        x: (..., I), in the type that is computed in.
        lora_A: (r, I), of any floating-point type.
        lora_B: (O, r), likewise.
        update: the rest.
    """
    product: torch.Tensor = _MaskedProduct.apply(x, lora_A, lora_B, update)  # type: ignore[no-untyped-call]
    return product


class _MaskedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (as in torch)
        x: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        update: MaskedUpdate,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, lora_A, lora_B)
        ctx.update = update
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            if update.weight is None:
                product = flat @ update.to_dense(lora_A, lora_B, x.dtype).t()
            elif x.element_size() >= _EXACT_BYTES:
                product = flat @ update.to_dense(lora_A, lora_B, x.dtype).add_(update.weight(x.dtype)).t()
            else:
                product = flat @ update.weight(x.dtype).t()  # before D is formed: they need not be alive together
                product.addmm_(flat, update.to_dense(lora_A, lora_B, x.dtype).t())
        return product.view(*x.shape[:-1], product.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        x, lora_A, lora_B = ctx.saved_tensors
        update: MaskedUpdate = ctx.update
        grad_x = grad_A = grad_B = None
        with torch.autocast(x.device.type, enabled=False):
            flat = gradient.reshape(-1, gradient.shape[-1])
            if ctx.needs_input_grad[0]:
                dense = update.to_dense(lora_A, lora_B, x.dtype)
                if update.weight is not None:
                    dense.add_(update.weight(x.dtype))
                grad_x = (flat @ dense).view_as(x)
                del dense
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                dense = update.kept.zero_pruned_(flat.t() @ x.reshape(-1, x.shape[-1]))
                grad_A = update.drop((lora_B.to(x.dtype) * update.scale).t() @ dense).to(lora_A.dtype)
                grad_B = ((dense @ update.drop(lora_A.to(x.dtype)).t()) * update.scale).to(lora_B.dtype)
        return grad_x, grad_A, grad_B, None
