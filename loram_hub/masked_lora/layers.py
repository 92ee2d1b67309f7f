"""PEFT's LoRA layers, masked.

A layer that was masked is an instance of a subclass of PEFT's own, with the same factors, names and state dict: saved
adapters are those of plain LoRA. Each of its adapters has a `LoraVariant`, PEFT's way to compute an update otherwise,
and so has each that is added later. Where one adapter is active and nothing else interferes, which is how one trains,
the subclass multiplies the base weight and the update at once. The variant alone could not: it is given the base
layer's output when that is computed. Everywhere else (several active adapters, batches with an adapter per row, hooks
on the base layer, base weights that are trained) PEFT computes as always, and the variant adds its part.

Dropout differs from PEFT's: what is dropped is an input feature of the update for all tokens of a micro-batch. Dropped
per token, the update could not be added to the weight.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from torch import nn
from torch.distributed.tensor import DTensor

from loram_hub.adapter.live import MaskedModule
from loram_hub.errors import IncompatibleError, UnsupportedAdapterError
from loram_hub.masked_lora.product import KeptWeights, MaskedUpdate, masked_product

if TYPE_CHECKING:
    from peft import LoraConfig

    class _LoraModule(nn.Module, LoraLayer):
        """What PEFT's LoRA layers are, in the order of their bases."""
else:
    _LoraModule = nn.Module  # with any other first base, Python would not let a layer become one of the subclass

SHARDED = (
    "The LoRA of this model is masked and its parameters are shared out among processes (FSDP, tensor parallelism), "
    "which masked updates do not support. Train with DistributedDataParallel, or leave the masks away."
)


class MaskedVariant(LoraVariant):
    """An adapter whose update is (B A) o M."""

    def supports_lora_conversion(self) -> bool:
        """Say no: the update has no low rank."""
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **_: object) -> None:
        """Take an adapter whose factors are there; there is no more to it."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with the update, and zeros where it was pruned."""
        return orig_weight + _masked(module).get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Add the update to the weight."""
        orig_weight.data += _masked(module).get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Return the weight without the update."""
        return orig_weight - _masked(module).get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: object
    ) -> torch.Tensor:
        """Add the product of the update to the base layer's output."""
        return result + _masked(module).masked_product(active_adapter, x.to(result.dtype), with_weight=False)


def _masked(module: LoraLayer) -> MaskedLayer:
    assert isinstance(module, MaskedLayer), "the variant is put on no other"
    return module


class MaskedLayer(_LoraModule, MaskedModule):
    """What masked layers share, whatever holds their base weight."""

    kept_weights: KeptWeights
    """The mask of the base weight."""

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant:  # noqa: ANN401
        """Mask an adapter that is added later.

        Raises:
            UnsupportedAdapterError: it is no plain LoRA.
        """
        if super().resolve_lora_variant(config=config, **kwargs) is not None or config.lora_bias:
            raise UnsupportedAdapterError(
                "The layers of this model are masked, which goes with plain LoRA alone: no DoRA, no lora_bias, no "
                "other variant. Take plain LoRA, or a model that is not masked."
            )
        return MaskedVariant()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return s (B A) o M."""
        dense: torch.Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]  # of the other base class
        return dense * self.kept_weights(dense.device)

    def masked_product(self, adapter: str, x: torch.Tensor, *, with_weight: bool) -> torch.Tensor:
        """Multiply with what an adapter adds, and with the base weight if that is asked for.

        Args:
            adapter: its name.
            x: (..., in_features), in the type that is computed in.
            with_weight: whether to add the base layer's product, without its bias.

        Raises:
            IncompatibleError: FSDP or tensor parallelism has shared out the factors.
        """
        update = MaskedUpdate(
            kept=self.kept_weights,
            scale=self.scaling[adapter],
            inputs=self._draw_inputs(adapter, x.device),
            weight=self.base_weight if with_weight else None,
        )
        lora_A, lora_B = (cast("nn.Linear", factors[adapter]).weight for factors in (self.lora_A, self.lora_B))
        if isinstance(lora_A, DTensor) or isinstance(lora_B, DTensor):
            raise IncompatibleError(SHARDED)
        return masked_product(x, lora_A, lora_B, update)

    def _draw_inputs(self, adapter: str, device: torch.device) -> torch.Tensor | None:
        """Draw the input features that dropout leaves in an update."""
        dropout = self.lora_dropout[adapter]
        if not isinstance(dropout, nn.Dropout) or not dropout.training or not dropout.p:
            return None
        assert self.in_features is not None
        return torch.empty(self.in_features, device=device).bernoulli_(1 - dropout.p).div_(1 - dropout.p)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 (as in PEFT)
        """Compute base and update at once if nothing speaks against it."""
        adapter = None if args or kwargs else self._lone_adapter()
        dtype = None if adapter is None else self._compute_dtype(x)
        if adapter is None or dtype is None:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        product = self.masked_product(adapter, x.to(dtype), with_weight=True)
        bias = cast("nn.Linear", self.get_base_layer()).bias
        return product if bias is None else product + bias.to(dtype)

    def base_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the base weight in a type, (out_features, in_features)."""
        raise NotImplementedError

    def _compute_dtype(self, x: torch.Tensor) -> torch.dtype | None:
        """Return what the base layer would compute in; None if it must do so itself."""
        raise NotImplementedError

    def _lone_adapter(self) -> str | None:
        """Return the one active adapter, if there is nothing that only PEFT's own forward knows of."""
        base = cast("nn.Linear", self.get_base_layer())
        hooked = "forward" in vars(base) or base._forward_hooks or base._forward_pre_hooks or base._backward_hooks
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or hooked or len(active) != 1 or base.weight.requires_grad:
            return None
        return str(active[0])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: ANN401 (as in torch)
        """Move the mask with the layer. It is no buffer: DistributedDataParallel would send those at every step."""
        self.kept_weights.bits = fn(self.kept_weights.bits)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class MaskedLinear(MaskedLayer, Linear):
    """A masked layer on a weight of 16 or 32 bits."""

    def base_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the base weight in a type."""
        return cast("nn.Linear", self.get_base_layer()).weight.to(dtype)

    def _compute_dtype(self, x: torch.Tensor) -> torch.dtype | None:
        base = self.get_base_layer()
        if type(base) is not nn.Linear:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype if x.dtype == base.weight.dtype else None


def put_mask_(layer: LoraLayer, kept: KeptWeights) -> None:
    """Mask one of PEFT's LoRA layers, with all adapters it has.

    Args:
        layer: of a kind that `masked_class_of` knows; changed in place.
        kept: the mask of its base weight.
    """
    layer.__class__ = masked_class_of(type(layer))  # type: ignore[assignment]  # of the same kind
    assert isinstance(layer, MaskedLayer)
    layer.kept_weights = kept
    layer.lora_variant.update({adapter: MaskedVariant() for adapter in layer.lora_A})


@cache
def masked_class_of(layer_class: type) -> type[MaskedLayer] | None:
    """Return the masked subclass of one of PEFT's LoRA layers; None if there is none."""
    if layer_class is Linear:
        return MaskedLinear
    if layer_class.__module__ == "peft.tuners.lora.bnb":  # bitsandbytes, which 16-bit releases do without
        from loram_hub.masked_lora.nf4 import MaskedLinear4bit

        return MaskedLinear4bit if issubclass(MaskedLinear4bit, layer_class) else None
    return None
