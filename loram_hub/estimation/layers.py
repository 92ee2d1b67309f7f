"""What a decoder layer holds while it is trained with LoRA: what autograd keeps, and the most at one moment.

Letters, for a layer of a pruned model: H hidden size, Q query rows, K key rows, C MLP channels, h query heads, n tokens
of a micro-batch (b sequences of T), r rank, p dropout of the adapter. Numbers are computed with in 16 bit (2 bytes).

Per token a layer keeps for its backward pass

    norms        4 H each, 4 (Q + K) for norms of heads: the input in fp32 (`LlamaRMSNorm` converts first)
    attention    4 Q + 4 K + 4 h: q, k, v, the output, fp32 sums of exponentials (FlashAttention, memory-efficient)
                 With a mask, as padding makes one, k and v are repeated for every query head, 8 Q, and the mask is kept
                 in 16 bit, 2 b T^2 bytes in all. `eager` attention (Gemma 2, which caps its scores) keeps probabilities
                 in 16 bit, in fp32, and the capped scores: 8 h T more
    MLP          6 C: gate, its activation, up
    LoRA         each target: 2 r, what `lora_A` gave. With p > 0: 2 I for its dropped input of I features, and I for
                 the mask, one byte each; without dropout 2 I once for targets that share their input. The adapter is
                 in 16 bit on an NF4 release (TRL converts it) and in fp32 on a 16-bit one, where each target converts
                 its input for itself

Masked LoRA on a sparse release (`loram_hub.masked_lora`) keeps the input of each target, which it shares, instead of
all this: no dropped copy, nothing of `lora_A`. While a matrix of E elements is multiplied, forward or backward, its
update is there as a whole, 2 E bytes, with what unpacks its mask, 3 E / 2, or with the dequantized weight, 2 E.

An NF4 matrix keeps nothing: bitsandbytes' backward pass dequantizes the codes again (`MatMul4Bit`). That takes a whole
weight in 16 bit and its scales in fp32, for one matrix at a time, and so does its forward pass above a few hundred
tokens.

The moments that can be the highest while a layer runs (once more, under checkpointing) and goes back: `down_proj`
forward; its LoRA; `down_proj` backward; the product of gate and up backward; `gate_proj`, `o_proj` and attention
backward; where outputs are normalized (Gemma 2 and 3, OLMo 2) that norm backward; LoRA of a fused gate and up (Phi-3).
FlashAttention's backward pass adds the gradient of q in fp32, and of k and v for every query head where heads share
them: 4 Q + 4 h + 4 Q. That of eager attention adds two gradients of the scores in fp32.

`benchmarks/memory_simulation.py` counts live tensors of the real classes and compares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from loram_hub.architecture import Architecture, LayerSizes, Weight
from loram_hub.plan import NF4_BLOCK

COMPUTED = 2
"""Bytes of a number that is computed with: bf16 or fp16."""
_FP32 = 4
_UNPACKED_MASK = 3
"""Half bytes per weight while a mask is unpacked: a truth value, and the index of its octet in 32 bit."""
_CAPS_SCORES = frozenset({"gemma2"})
"""Families whose attention is `eager`, for no kernel caps scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What goes through a layer at a time, and the adapter on it."""

    micro_batch: int
    """Sequences."""
    sequence_length: int
    """Tokens of each."""
    padded: bool
    """Whether a mask hides padding."""
    rank: int
    """Of LoRA."""
    dropout: float
    """Of LoRA, in [0, 1)."""
    targets: frozenset[str]
    """Last names of the projections that have LoRA."""
    quantized: bool
    """Whether projections are NF4."""
    masked: bool = False
    """Whether LoRA is masked."""

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.micro_batch * self.sequence_length


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What a layer holds at one moment, in bytes."""

    name: str
    """What is happening."""
    activations: int
    """Kept tensors, and those that are being computed."""
    workspace: int
    """A dequantized weight, or what a kernel of attention takes."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerActivations:
    """What a decoder layer holds while it is trained, in bytes."""

    kept: int
    """What autograd keeps for the backward pass when every activation stays."""
    moments: tuple[Moment, ...]
    """Those that can be the highest."""

    @property
    def highest(self) -> Moment:
        """The moment that holds most."""
        return max(self.moments, key=lambda moment: moment.total)


def layer_activations(architecture: Architecture, sizes: LayerSizes, batch: Batch) -> LayerActivations:
    """Count what one layer holds.

    Args:
        architecture: the base model's.
        sizes: of the layer.
        batch: what goes through it.
    """
    layer = _Layer(architecture, sizes, batch)
    return LayerActivations(kept=layer.kept, moments=tuple(layer.moments()))


class _Layer:
    """The sums of the module's docstring for one layer."""

    def __init__(self, architecture: Architecture, sizes: LayerSizes, batch: Batch) -> None:
        self.batch = batch
        self.architecture = architecture
        self.sizes = sizes
        n = batch.tokens
        self.hidden = COMPUTED * n * architecture.hidden_size
        self.query = COMPUTED * n * architecture.unit_width("query", sizes)
        self.key = COMPUTED * n * architecture.unit_width("key_value", sizes)
        self.channels = COMPUTED * n * architecture.unit_width("channel", sizes)
        self.heads = architecture.unit_width("query", sizes) // architecture.head_dim
        self.shares_heads = architecture.num_attention_heads > architecture.num_key_value_heads
        self.norms = self._norms()
        self.attention = self._attention()
        self.lora = {each.module.rpartition(".")[2]: self._lora(each) for each in architecture.projections}
        self.attention_input = sum(size for name, size in self.lora.items() if name in _ATTENTION_INPUTS)
        self.mlp_input = sum(size for name, size in self.lora.items() if name in _MLP_INPUTS)
        self.shared = self.hidden * (self._keeps_input_of(_ATTENTION_INPUTS) + self._keeps_mlp_input)

    def _targets(self, name: str) -> bool:
        return name in self.batch.targets

    def _keeps_input_of(self, names: frozenset[str]) -> bool:
        """Whether targets keep the tensor itself that goes into them, which dropout and conversion copy."""
        makes_no_copy = self.batch.masked or (self.batch.quantized and not self.batch.dropout)
        return makes_no_copy and bool(self.batch.targets & names)

    @property
    def _keeps_mlp_input(self) -> bool:
        return self._keeps_input_of(_MLP_INPUTS)

    @property
    def kept(self) -> int:
        return self.norms + self.attention + 3 * self.channels + self.shared + sum(self.lora.values())

    def moments(self) -> Iterator[Moment]:
        """The candidates, from the last operation to the first."""
        before_down = self.kept - self.lora["down_proj"]
        down, down_scales = self._dequantized("down_proj")
        # The residual, the gradient of the layer's output, the same times LoRA's scaling, and the input of the MLP.
        running = self.channels + (2 + self._targets("down_proj") + (not self._keeps_mlp_input)) * self.hidden
        yield Moment(
            name="down_proj forward",
            activations=before_down + running + self.hidden,
            workspace=down + 2 * down_scales,
        )
        # A 16-bit release has its adapter in fp32: PEFT converts the input, which is dropped out in fp32.
        copies = (
            0
            if self.batch.quantized or self.batch.masked
            else self._targets("down_proj") * (1 + (self.batch.dropout > 0))
        )
        converted = copies * _FP32 // COMPUTED * self.channels
        yield Moment(name="LoRA of down_proj", activations=self.kept + running + self.hidden + converted, workspace=0)
        yield Moment(
            name="down_proj backward",
            activations=before_down + self.hidden + self.channels + max(self.channels, down_scales),
            workspace=down,
        )
        yield Moment(
            name="gate and up backward", activations=before_down + self.hidden + 3 * self.channels, workspace=0
        )
        if self.architecture.normalizes_outputs:
            normalizing = self.kept + self._norm_gradients
            yield Moment(name="norm of the output backward", activations=normalizing, workspace=0)
        if "gate_up_proj" in self.lora:
            # The product with the base, with the adapter, and the latter scaled: all of both halves.
            fused = before_down - 3 * self.channels + 3 * 2 * self.channels + running - self.channels
            yield Moment(name="LoRA of gate_up_proj", activations=fused, workspace=0)
        yield from self._earlier_moments(before_down)

    def _earlier_moments(self, before_down: int) -> Iterator[Moment]:
        before_gate = before_down - 3 * self.channels - self.mlp_input
        gate = max(sum(self._dequantized(name)) for name in self.lora if name in _MLP_INPUTS)
        yield Moment(
            name="gate_proj backward",
            activations=before_gate + self.mlp_input + 4 * self.hidden + self.channels,
            workspace=gate,
        )
        yield Moment(name="norm of the MLP backward", activations=before_gate + self._norm_gradients, workspace=0)
        yield Moment(
            name="o_proj backward",
            activations=before_gate - self.lora["o_proj"] + 2 * self.hidden + 2 * self.query,
            workspace=sum(self._dequantized("o_proj")),
        )
        yield Moment(
            name="attention backward",
            activations=before_gate - self.lora["o_proj"] + self.hidden + 2 * self.query + 2 * self._keys,
            workspace=self._attention_workspace(),
        )

    def _attention_workspace(self) -> int:
        n, tokens = self.batch.tokens, self.batch.sequence_length
        if self._is_eager:  # two gradients of the scores in fp32; the probabilities in 16 bit are gone by then
            return self.heads * n * tokens * (2 * _FP32 - COMPUTED)
        return 2 * self.query + 2 * self.query * self.shares_heads + _FP32 * self.heads * n

    @property
    def _norm_gradients(self) -> int:
        """The gradient of the residual, and those of a norm in fp32: its result's, and four for the mean of squares."""
        return self.hidden + 5 * _FP32 // COMPUTED * self.hidden

    @property
    def _modules(self) -> frozenset[str]:
        return frozenset(weight.module for weight in self.architecture.projections)

    @property
    def _repeats_keys(self) -> bool:
        return self.batch.padded and self.shares_heads

    @property
    def _keys(self) -> int:
        return self.query if self._repeats_keys or self._is_eager else self.key

    @property
    def _is_eager(self) -> bool:
        return self.architecture.family.model_type in _CAPS_SCORES

    def _norms(self) -> int:
        total = 0
        for weight in self.architecture.layer_weights:
            if weight.module.endswith("norm"):
                of_heads = weight.module in ("self_attn.q_norm", "self_attn.k_norm")
                width = self.query if weight.module == "self_attn.q_norm" else self.key if of_heads else self.hidden
                total += width // COMPUTED * _FP32
        return total

    def _attention(self) -> int:
        n, tokens = self.batch.tokens, self.batch.sequence_length
        if self._is_eager:
            scores = self.heads * n * tokens * (2 * COMPUTED + _FP32)
            return 2 * self.query + 2 * self._keys + scores
        mask = COMPUTED * n * tokens if self.batch.padded else 0
        # v is a part of a fused projection's output, which stays as a whole.
        fused = self.query + self.key if "self_attn.qkv_proj" in self._modules and not self._repeats_keys else 0
        return 2 * self.query + 2 * self._keys + _FP32 * self.heads * n + mask + fused

    def _lora(self, weight: Weight) -> int:
        """What LoRA on a projection keeps; an input that targets share without dropout is counted elsewhere."""
        name = weight.module.rpartition(".")[2]
        if name not in self.batch.targets:
            return 0
        _, columns = self.architecture.shape(weight, self.sizes)
        n = self.batch.tokens
        if self.batch.masked:
            return COMPUTED * n * columns if name == "down_proj" else 0
        if self.batch.dropout:
            return n * (COMPUTED * self.batch.rank + (COMPUTED + 1) * columns)
        is_there = self.batch.quantized and name != "down_proj"  # shared by targets, or what attention keeps
        own = 0 if is_there else COMPUTED * columns
        return n * (COMPUTED * self.batch.rank + own)

    def _dequantized(self, name: str) -> tuple[int, int]:
        """Bytes of a dequantized weight, with its update if LoRA on it is masked, and of its scales in fp32."""
        weight = next(each for each in self.architecture.projections if each.module.rpartition(".")[2] == name)
        elements = math.prod(self.architecture.shape(weight, self.sizes))
        dense = COMPUTED * elements if self.batch.quantized else 0
        if self.batch.masked and self._targets(name):
            dense = COMPUTED * elements + max(dense, _UNPACKED_MASK * elements // 2)
        return dense, _FP32 * -(-elements // NF4_BLOCK) if self.batch.quantized else 0


_ATTENTION_INPUTS = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj"})
_MLP_INPUTS = frozenset({"gate_proj", "up_proj", "gate_up_proj"})
