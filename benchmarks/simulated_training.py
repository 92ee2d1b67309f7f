"""A LoRA training step on tensors without memory, and a count of what is alive: peak memory without a GPU.

The step runs the real classes (transformers' model in a release's widths, bitsandbytes' Linear4bit, PEFT's LoRA, TRL's
fused lm_head, activation checkpointing, autocast) forward and backward on torch's fake tensors, which have shapes,
types and storages and no memory. Every storage counts from its first use until it is freed, in blocks of 512 bytes as
CUDA's allocator rounds. Kernels are the CPU's, so what CUDA's do otherwise is put in their place:

- `gemm_4bit` (bitsandbytes 0.50): above a few hundred tokens the weight is dequantized first, 2 bytes per element, and
  its scales in fp32, twice.
- attention: FlashAttention-2 keeps q, k, v, its output and fp32 sums of exponentials; its backward pass has the
  gradient of q in fp32, and of k and v for every query head where heads share them. A mask is kept in 16 bit.
- TRL's loss changes its tile of logits in place (Triton), and adds up gradients in fp32 without a copy (cuBLAS).
- dropout keeps a mask of one byte per element.

Masked LoRA runs the library's own layers (`loram_hub.masked_lora`), with masks of which only the sizes are known.

This is an account of live tensors, not a measurement on a GPU. CUDA's context, workspaces of libraries and
fragmentation are not in it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import numpy as np
import torch
import trl.kernels.chunked_logprob as chunked_logprob
from bitsandbytes.functional import QuantState
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from loram_hub.architecture import Architecture, LayerSizes, architecture_of
from loram_hub.estimation import TrainingShape, chosen_targets
from loram_hub.masked_lora.layers import MaskedLayer, put_mask_
from loram_hub.masked_lora.product import KeptWeights
from loram_hub.shaping import shrink_layer_

_DEVICE = "cpu"
_BLOCK = 512
_STEPS = 2
"""Of the second, gradients of the first are there to be added to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """What one step held, in bytes."""

    standing: int
    """Weights, scales and adapter, which are there before."""
    peak: int
    """The most at one moment, with gradients and without optimizer state."""
    operation: str
    """The operation at that moment."""


def simulate(
    config: Mapping[str, Any], layers: Sequence[LayerSizes], shape: TrainingShape, *, quantized: bool = True
) -> Simulated:
    """Run a step and count.

    Args:
        config: the base model's `config.json`.
        layers: sizes of each layer.
        shape: how it is trained; its memory options and optimizer are not simulated.
        quantized: whether projections are NF4.
    """
    architecture = architecture_of(config)
    model = get_peft_model(
        _model(config, architecture, layers, quantized=quantized),
        LoraConfig(
            r=shape.rank,
            lora_alpha=16,
            lora_dropout=shape.dropout,
            target_modules=sorted(chosen_targets(architecture, shape.targets)),
            task_type="CAUSAL_LM",
        ),
    )
    if quantized:  # as TRL does
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    if shape.checkpointing:
        model.enable_input_require_grads()
        model.base_model.model.activation_checkpointing_enable()
    if shape.masked_lora:
        _mask_(model)
    model.train()
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    padded = shape.micro_batch > 1 if shape.padded is None else shape.padded
    with FakeTensorMode(allow_non_fake_inputs=True), _as_on_cuda(padded=padded):
        _make_fake_(model)
        return _count(model, shape.micro_batch, shape.sequence_length, padded=padded)


def _count(model: nn.Module, batch: int, tokens: int, *, padded: bool) -> Simulated:
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=_DEVICE)
    mask = {"attention_mask": torch.ones_like(ids)} if padded else {}
    counter = _LiveBytes()
    for tensor in _standing(model):
        counter.add(tensor)
    standing = counter.live
    with counter:
        for _ in range(_STEPS):
            with torch.autocast(_DEVICE, dtype=torch.bfloat16):
                out = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True, **mask)
                loss = -out.log_probs.sum() / ids.numel()
            loss.backward()
            del out, loss
    return Simulated(standing=standing, peak=counter.peak, operation=counter.operation)


def _standing(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from chain(model.parameters(), model.buffers())
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.quant_state
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        if isinstance(module, MaskedLayer):
            yield module.kept_weights.bits


def _mask_(model: nn.Module) -> None:
    """Mask every LoRA layer; what a mask's bits are does not matter here."""
    KeptWeights(np.ones((1, 1), dtype=np.bool_))(torch.device(_DEVICE))  # makes the table that all masks share
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        kept = KeptWeights(np.ones((1, 1), dtype=np.bool_))
        kept.shape = torch.Size((layer.out_features, layer.in_features))
        kept.bits = _meta(layer.out_features, -(-layer.in_features // 8), dtype=torch.uint8)
        put_mask_(layer, kept)


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.operation = 0, 0, ""
        self._sizes: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = -(-storage.nbytes() // _BLOCK) * _BLOCK
            self.live += self._sizes[storage._cdata]
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 (torch has no public type for it)
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == _DEVICE:
                self.add(tensor)
        inside = 0
        if "gemm_4bit" in str(func):
            rows, columns = args[2]
            inside = 2 * rows * columns + 2 * 4 * -(-rows * columns // 64)
        if self.live + inside > self.peak:
            self.peak, self.operation = self.live + inside, str(func)
        return out


class _Attention(torch.autograd.Function):
    """What FlashAttention-2 keeps and allocates on CUDA; nothing is computed."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch's)
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, heads, tokens, width = query.shape
        out = query.new_empty(batch, tokens, heads, width).transpose(1, 2)
        sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        query, key, value, _, sums, _ = ctx.saved_tensors
        working = [torch.empty_like(query, dtype=torch.float32), torch.empty_like(sums)]
        if key.shape[1] != query.shape[1]:
            working += [torch.empty_like(query), torch.empty_like(query)]
        found = [torch.empty_like(each) for each in (query, key, value)]
        del working
        return (*found, None)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, **_: object
) -> torch.Tensor:
    mask = None if attn_mask is None else torch.empty_like(attn_mask, dtype=query.dtype)
    out: torch.Tensor = _Attention.apply(query, key, value, mask)
    return out


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _nothing(*args: object, **kwargs: object) -> None:
    """Stands for kernels that work in place, and for masks that CUDA's attention does not need."""


@contextmanager
def _as_on_cuda(*, padded: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
            stack.enter_context(mock.patch.object(chunked_logprob, name, _nothing))
        stack.enter_context(mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention))
        stack.enter_context(mock.patch.object(nn.functional, "dropout", _dropout))
        models = [module for name, module in sys.modules.items() if name.startswith("transformers.models.")]
        for module in models if not padded else ():  # fake tensors cannot tell transformers that nothing is padded
            for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, _nothing))
        yield


def _model(
    config: Mapping[str, Any], architecture: Architecture, layers: Sequence[LayerSizes], *, quantized: bool
) -> nn.Module:
    """The stock model on the meta device, in the widths of the layers and with NF4 projections."""
    values = {"max_position_embeddings": 131_072, **{key: config[key] for key in config if key != "model_type"}}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))
    finally:
        torch.set_default_dtype(default)
    for number, sizes in enumerate(layers):
        layer = model.model.layers[number]
        if sizes != architecture.whole_layer:
            shrink_layer_(layer, architecture, sizes)
        linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        for name, module in linears if quantized else ():
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, _four_bit(module))
    model.requires_grad_(False)
    model.is_loaded_in_4bit = quantized
    return model


def _four_bit(linear: nn.Linear) -> nn.Module:
    """bitsandbytes' layer in the shape of another; its own constructor would quantize real weights."""
    rows, columns = linear.weight.shape
    scales = -(-rows * columns // 64)
    state = QuantState(
        absmax=_meta(scales, dtype=torch.uint8),
        shape=torch.Size((rows, columns)),
        code=_meta(16),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=_meta(),
        state2=QuantState(absmax=_meta(-(-scales // 256)), code=_meta(256), blocksize=256, dtype=torch.float32),
    )
    weight = nn.Parameter(_meta(-(-rows * columns // 2), 1, dtype=torch.uint8), requires_grad=False)
    vars(weight).update(quant_state=state, compress_statistics=True, quant_type="nf4", bnb_quantized=True)
    has_bias = linear.bias is not None
    made = bnb.nn.Linear4bit(8, 8, has_bias, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    made.in_features, made.out_features = columns, rows
    made._parameters["weight"] = weight
    made.quant_state = state
    made.support_avx512bf16_for_cpu = False
    if has_bias:
        made.bias = nn.Parameter(_meta(rows, dtype=torch.bfloat16), requires_grad=False)
    return made


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _make_fake_(model: nn.Module) -> None:
    """Replace every tensor of the meta device by a fake one, shared ones once. Call it in a `FakeTensorMode`."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, MaskedLayer):
            module.kept_weights.bits = _fake(module.kept_weights.bits)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:
                made[parameter] = nn.Parameter(_fake(parameter), requires_grad=parameter.requires_grad)
                vars(made[parameter]).update(vars(parameter))
            module._parameters[name] = None if parameter is None else made[parameter]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else _fake(buffer)
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.quant_state
            for part, names in ((state, ("absmax", "code", "offset")), (state.state2, ("absmax", "code"))):
                for name in names:
                    setattr(part, name, _fake(getattr(part, name)))


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=_DEVICE)
