"""Model families as data: which weight axes live and die together.

A decoder layer is a list of `Weight`s; each axis of a weight is a sequence of `Unit`s. Two of the units can be pruned:

    kv_heads   one KV head with all its query heads: `query` rows of q, `key_value` rows of k and v, `query` columns
               of o
    channels   one MLP channel: a row of gate, a row of up, a column of down

Pruning, recovery, parameter counts and the shapes of a pruned model are all read off this one table, so they cannot
disagree. Fused projections (Phi-3) are axes of several units in a row; a family is a table entry, never a class.

Sizes come from `config.json` alone (no torch, no transformers). Names of weights appear in this module and nowhere
else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from loram_hub.errors import InvalidRequestError, PlanMismatchError, UnsupportedModelError

Unit = Literal["hidden", "head_dim", "query", "key_value", "channel"]
Space = Literal["kv_heads", "channels"]
Indices = npt.NDArray[np.int32]

SPACE_OF_UNIT: Mapping[str, Space] = {"query": "kv_heads", "key_value": "kv_heads", "channel": "channels"}
LAYER_PREFIX = "model.layers"
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

# Bounds on what an untrusted config may claim, well above any model known in 2026.
_LARGEST: Mapping[str, int] = {
    "hidden_size": 131_072,
    "intermediate_size": 1_048_576,
    "num_hidden_layers": 1_024,
    "num_attention_heads": 8_192,
    "num_key_value_heads": 8_192,
    "head_dim": 8_192,
    "vocab_size": 2_097_152,
}
_LAYER_TENSOR = re.compile(rf"{re.escape(LAYER_PREFIX)}\.(\d{{1,6}})\.(.+)$")
# Buffers that older exports of these families still carry; they hold no parameters.
_IGNORED_TENSORS = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One tensor of a decoder layer."""

    name: str
    """Name inside the layer, as in `self_attn.q_proj.weight`."""
    axes: tuple[tuple[Unit, ...], ...]
    """Units along each axis, outermost first; a matrix is (out_features, in_features)."""
    only_if: str | None = None
    """Config flag that must be true for the tensor to exist (`attention_bias`, `mlp_bias`)."""

    @property
    def module(self) -> str:
        """Path of the owning module inside the layer: `self_attn.q_proj`."""
        return self.name.rpartition(".")[0]

    @property
    def is_projection(self) -> bool:
        """Whether this is the matrix of a linear layer: what LoRA targets and NF4 quantizes."""
        return len(self.axes) == 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A model family: its decoder layer as data."""

    model_type: str
    """`model_type` in config.json."""
    weights: tuple[Weight, ...]
    """Every tensor of one decoder layer."""
    default_head_dim: int | None = None
    """Used when the config has no `head_dim`; None means hidden_size // num_attention_heads."""
    default_num_key_value_heads: int | None = None
    """Used when the config does not name them; None means as many as attention heads (as does an explicit null)."""
    ties_embeddings: bool = False
    """Value of `tie_word_embeddings` when the config does not say."""
    reads_heads_from_config: bool = False
    """Whether the attention code slices a fused projection by the config's head count instead of the tensor's width."""


def _linear(name: str, out: Unit | tuple[Unit, ...], in_: Unit, *, bias: bool | str = False) -> tuple[Weight, ...]:
    rows = out if isinstance(out, tuple) else (out,)
    matrix = Weight(name=f"{name}.weight", axes=(rows, (in_,)))
    if bias is False:
        return (matrix,)
    return (matrix, Weight(name=f"{name}.bias", axes=(rows,), only_if=bias if isinstance(bias, str) else None))


def _norms(*names: str, over: Unit = "hidden") -> tuple[Weight, ...]:
    return tuple(Weight(name=f"{name}.weight", axes=((over,),)) for name in names)


def _attention(*, qkv_bias: bool | str = False, out_bias: bool | str = False) -> tuple[Weight, ...]:
    return (
        *_linear("self_attn.q_proj", "query", "hidden", bias=qkv_bias),
        *_linear("self_attn.k_proj", "key_value", "hidden", bias=qkv_bias),
        *_linear("self_attn.v_proj", "key_value", "hidden", bias=qkv_bias),
        *_linear("self_attn.o_proj", "hidden", "query", bias=out_bias),
    )


def _gated_mlp(*, bias: bool | str = False) -> tuple[Weight, ...]:
    return (
        *_linear("mlp.gate_proj", "channel", "hidden", bias=bias),
        *_linear("mlp.up_proj", "channel", "hidden", bias=bias),
        *_linear("mlp.down_proj", "hidden", "channel", bias=bias),
    )


_PRE_NORMS = _norms("input_layernorm", "post_attention_layernorm")
_SANDWICH_NORMS = _norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_HEAD_NORMS = _norms("self_attn.q_norm", "self_attn.k_norm", over="head_dim")
_FLAGGED_ATTENTION = _attention(qkv_bias="attention_bias", out_bias="attention_bias")
_LLAMA_LIKE = (*_FLAGGED_ATTENTION, *_gated_mlp(bias="mlp_bias"), *_PRE_NORMS)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama", weights=_LLAMA_LIKE),
        Family(model_type="smollm3", weights=_LLAMA_LIKE, default_num_key_value_heads=4, ties_embeddings=True),
        Family(
            model_type="mistral",
            weights=(*_attention(), *_gated_mlp(), *_PRE_NORMS),
            default_num_key_value_heads=8,
        ),
        Family(
            model_type="qwen2",
            weights=(*_attention(qkv_bias=True), *_gated_mlp(), *_PRE_NORMS),
            default_num_key_value_heads=32,
        ),
        Family(
            model_type="qwen3",
            weights=(*_FLAGGED_ATTENTION, *_HEAD_NORMS, *_gated_mlp(), *_PRE_NORMS),
            default_head_dim=128,
            default_num_key_value_heads=32,
        ),
        Family(
            model_type="phi3",
            weights=(
                *_linear("self_attn.qkv_proj", ("query", "key_value", "key_value"), "hidden"),
                *_linear("self_attn.o_proj", "hidden", "query"),
                *_linear("mlp.gate_up_proj", ("channel", "channel"), "hidden"),
                *_linear("mlp.down_proj", "hidden", "channel"),
                *_PRE_NORMS,
            ),
            reads_heads_from_config=True,
        ),
        Family(
            model_type="gemma2",
            weights=(*_FLAGGED_ATTENTION, *_gated_mlp(), *_SANDWICH_NORMS),
            default_head_dim=256,
            default_num_key_value_heads=4,
            ties_embeddings=True,
        ),
        Family(
            model_type="gemma3_text",
            weights=(*_FLAGGED_ATTENTION, *_HEAD_NORMS, *_gated_mlp(), *_SANDWICH_NORMS),
            default_head_dim=256,
            default_num_key_value_heads=4,
            ties_embeddings=True,
        ),
        # OLMo 2 normalizes queries and keys over all heads at once, so these norms have one weight per row and are
        # pruned too.
        Family(
            model_type="olmo2",
            weights=(
                *_FLAGGED_ATTENTION,
                *_norms("self_attn.q_norm", over="query"),
                *_norms("self_attn.k_norm", over="key_value"),
                *_gated_mlp(),
                *_norms("post_attention_layernorm", "post_feedforward_layernorm"),
            ),
        ),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSizes:
    """How many channel groups a decoder layer has."""

    kv_heads: int
    """KV heads; each owns `num_attention_heads // num_key_value_heads` query heads."""
    channels: int
    """MLP channels (`intermediate_size` in a whole layer)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A family with the sizes of one model."""

    family: Family
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    layer_weights: tuple[Weight, ...]
    """The tensors that one decoder layer of this model has: the family's, less those its config leaves out."""

    @property
    def whole_layer(self) -> LayerSizes:
        """Sizes of an unpruned layer."""
        return LayerSizes(kv_heads=self.num_key_value_heads, channels=self.intermediate_size)

    @property
    def projections(self) -> tuple[Weight, ...]:
        """The matrices of a layer's linear layers."""
        return tuple(w for w in self.layer_weights if w.is_projection)

    @property
    def output_projections(self) -> tuple[Weight, ...]:
        """The matrices that write to the residual stream, attention's first: `o_proj` and `down_proj`."""
        return tuple(w for w in self.projections if w.axes[0] == ("hidden",))

    @property
    def normalizes_outputs(self) -> bool:
        """Whether what these matrices give passes a norm before it is added (Gemma 2 and 3, OLMo 2)."""
        return any(w.module == "post_feedforward_layernorm" for w in self.layer_weights)

    @property
    def group_rows(self) -> Mapping[str, int]:
        """Rows (or columns) that one channel group has in a unit."""
        queries_per_group = self.num_attention_heads // self.num_key_value_heads
        return {"query": queries_per_group * self.head_dim, "key_value": self.head_dim, "channel": 1}

    def unit_width(self, unit: Unit, sizes: LayerSizes) -> int:
        """Rows (or columns) of a whole unit in a layer of the given sizes."""
        if unit == "hidden":
            return self.hidden_size
        if unit == "head_dim":
            return self.head_dim
        groups = sizes.kv_heads if SPACE_OF_UNIT[unit] == "kv_heads" else sizes.channels
        return groups * self.group_rows[unit]

    def shape(self, weight: Weight, sizes: LayerSizes) -> tuple[int, ...]:
        """Shape of a layer's tensor when the layer has the given sizes."""
        return tuple(sum(self.unit_width(unit, sizes) for unit in axis) for axis in weight.axes)

    def kept_on_axis(self, axis: tuple[Unit, ...], kept: Mapping[Space, Indices]) -> npt.NDArray[np.int64] | None:
        """Expand kept channel groups to the kept positions on one axis of a weight.

        Args:
            axis: the units along the axis.
            kept: kept group indices per space, int32, strictly ascending.

        Returns:
            Positions on the axis, int64, ascending; None if nothing on this axis can be pruned.
        """
        if not any(unit in SPACE_OF_UNIT for unit in axis):
            return None
        offset, parts = 0, []
        for unit in axis:
            rows = self.group_rows[unit]
            firsts = kept[SPACE_OF_UNIT[unit]].astype(np.int64) * rows + offset
            parts.append(firsts if rows == 1 else (firsts[:, None] + np.arange(rows)).reshape(-1))
            offset += self.unit_width(unit, self.whole_layer)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def tensor_shapes(self, layers: Iterable[LayerSizes] | None = None) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the model.

        Args:
            layers: sizes of each layer; None for the base model.

        Returns:
            Shapes by full name. A tied lm_head is not listed: it has no tensor of its own.
        """
        sizes = [self.whole_layer] * self.num_hidden_layers if layers is None else list(layers)
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.vocab_size, self.hidden_size),
            FINAL_NORM: (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes[LM_HEAD] = (self.vocab_size, self.hidden_size)
        for layer, layer_sizes in enumerate(sizes):
            for weight in self.layer_weights:
                shapes[layer_tensor(layer, weight.name)] = self.shape(weight, layer_sizes)
        return shapes

    def weight_of(self, tensor: str) -> tuple[int, Weight] | None:
        """Return (layer, weight) for a full tensor name, or None for a tensor outside the decoder layers.

        Raises:
            PlanMismatchError: the name lies in a decoder layer but the family has no such tensor.
        """
        found = _LAYER_TENSOR.match(tensor)
        if found is None:
            return None
        layer, inner = int(found[1]), found[2]
        for weight in self.layer_weights:
            if weight.name == inner and layer < self.num_hidden_layers:
                return layer, weight
        raise PlanMismatchError(
            f"{tensor!r} is no tensor of this {self.family.model_type} model with {self.num_hidden_layers} layers."
        )

    def check_tensors(self, found: Mapping[str, tuple[int, ...]], *, source: str) -> None:
        """Check that a checkpoint has exactly the tensors of this architecture, in their whole shapes.

        Args:
            found: shapes by full tensor name.
            source: names the checkpoint in errors.

        Raises:
            UnsupportedModelError: names the first module that breaks the pattern, with what was expected.
        """
        expected = self.tensor_shapes()
        for name in sorted(found):
            if name not in expected and not _IGNORED_TENSORS.search(name) and name != LM_HEAD:
                raise UnsupportedModelError(
                    f"Module {name.rpartition('.')[0]!r} of {source} breaks the {self.family.model_type} pattern: "
                    f"tensor {name!r} of shape {found[name]} has no place in it."
                )
        for name, shape in expected.items():
            if name not in found:
                raise UnsupportedModelError(
                    f"Module {name.rpartition('.')[0]!r} of the {self.family.model_type} pattern is absent "
                    f"from {source}: tensor {name!r} of shape {shape} is expected."
                )
            if found[name] != shape:
                raise UnsupportedModelError(
                    f"Module {name.rpartition('.')[0]!r} of {source} breaks the {self.family.model_type} pattern: "
                    f"tensor {name!r} has shape {found[name]}, its config asks for {shape}."
                )


def layer_tensor(layer: int, name: str) -> str:
    """Full name of a decoder layer's tensor or module: `model.layers.3.mlp.up_proj.weight`."""
    return f"{LAYER_PREFIX}.{layer}.{name}"


def is_ignored_tensor(name: str) -> bool:
    """Whether a tensor is a leftover buffer without parameters that no pruned model needs."""
    return _IGNORED_TENSORS.search(name) is not None


def architecture_of(config: Mapping[str, Any], *, find_culprit: bool = True) -> Architecture:
    """Read the architecture from a transformers `config.json`.

    Args:
        config: the parsed file. Sizes that older files leave out take the family's defaults.
        find_culprit: name the module that breaks the pattern, where the family is unknown; that takes torch and
            transformers, if they are there, and seconds.

    Returns:
        The architecture.

    Raises:
        UnsupportedModelError: the family is unknown; the message names the module that breaks the pattern where it can
            be told.
        InvalidRequestError: a size is missing, not a positive integer, absurdly large, or the head counts do not
            divide.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedModelError(_why_unsupported(config, find_culprit=find_culprit))

    heads = _size(config, "num_attention_heads")
    unsaid = (None if "num_key_value_heads" in config else family.default_num_key_value_heads) or heads
    kv_heads = _size(config, "num_key_value_heads", default=unsaid)
    hidden = _size(config, "hidden_size")
    head_dim = _size(config, "head_dim", default=family.default_head_dim or hidden // heads)
    if heads % kv_heads:
        raise InvalidRequestError(f"The config has {heads} attention heads, which {kv_heads} KV heads do not divide.")
    return Architecture(
        family=family,
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size"),
        num_hidden_layers=_size(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_size(config, "vocab_size"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", family.ties_embeddings)),
        layer_weights=tuple(w for w in family.weights if w.only_if is None or config.get(w.only_if)),
    )


def _size(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST[key]:
        raise InvalidRequestError(
            f"config.json has {key} = {value!r:.100}; a whole number from 1 to {_LARGEST[key]:,} is needed."
        )
    return value


def _why_unsupported(config: Mapping[str, Any], *, find_culprit: bool) -> str:
    model_type = config.get("model_type")
    known = ", ".join(sorted(FAMILIES))
    if isinstance(model_type, str) and model_type.startswith("loram_"):
        return f"model_type {model_type!r:.100} is a release, which was pruned already; 'loram info' describes it."
    if isinstance(config.get("text_config"), Mapping):
        return (
            f"model_type {model_type!r:.100} wraps a language model in 'text_config' next to other modules (vision, "
            f"audio). Export the language model alone and prune that. Supported: {known}."
        )
    culprit = _module_outside_pattern(model_type) if find_culprit else None
    detail = f" Module {culprit!r} breaks the pattern of a gated MLP with q, k, v and o projections." if culprit else ""
    return f"model_type {model_type!r:.100} is not supported.{detail} Supported: {known}."


def _module_outside_pattern(model_type: object) -> str | None:
    """Build a model of an unknown type without weights, if transformers is there, and find its first foreign module.

    In its default sizes, which are as good as the file's own for this and cannot be a billion layers.
    """
    try:
        import torch
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    known_modules = {weight.module for family in FAMILIES.values() for weight in family.weights}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type]())
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, StrictDataclassError):
        return None  # no causal language model, or one that needs a package of its own
    return next(_foreign_modules((name for name, _ in model.named_parameters()), known_modules), None)


def _foreign_modules(names: Iterable[str], known_modules: set[str]) -> Iterator[str]:
    outside = {EMBEDDING, FINAL_NORM, LM_HEAD}
    for name in names:
        module = name.rpartition(".")[0]
        inner = re.sub(rf"^{re.escape(LAYER_PREFIX)}\.\d+\.", "", module)
        if name not in outside and inner not in known_modules:
            yield module
