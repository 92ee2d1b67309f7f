"""Pruned widths for stock decoder layers: what transformers' own code needs to run with fewer heads and channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

from loram_hub.architecture import Architecture, LayerSizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def shrink_layer_(layer: nn.Module, architecture: Architecture, sizes: LayerSizes) -> None:
    """Give a whole decoder layer's modules the widths of a pruned one; weights are to be loaded afterwards."""
    for weight in architecture.layer_weights:
        shape = architecture.shape(weight, sizes)
        if shape == architecture.shape(weight, architecture.whole_layer):
            continue
        parent_path, _, leaf = weight.module.rpartition(".")
        parent = layer.get_submodule(parent_path)
        module = getattr(parent, leaf)
        if weight.is_projection:
            setattr(parent, leaf, _empty_linear_like(module, shape))
        elif not isinstance(module, nn.Linear):  # a norm over heads; a bias came with its matrix
            module.weight = nn.Parameter(module.weight.new_empty(shape))
    queries = sizes.kv_heads * (architecture.num_attention_heads // architecture.num_key_value_heads)
    _tell_head_counts_(layer.get_submodule("self_attn"), architecture, queries, sizes.kv_heads)


def _empty_linear_like(module: nn.Linear, shape: tuple[int, ...]) -> nn.Linear:
    weight = module.weight
    return nn.Linear(shape[1], shape[0], bias=module.bias is not None, device=weight.device, dtype=weight.dtype)


def _tell_head_counts_(attention: nn.Module, architecture: Architecture, queries: int, kv_heads: int) -> None:
    """Correct the head counts that attention code keeps; most families read them off tensor shapes instead."""
    counts = {"num_heads": queries, "num_attention_heads": queries, "num_key_value_heads": kv_heads}
    for name, count in counts.items():
        if hasattr(attention, name):
            setattr(attention, name, count)
    if architecture.family.reads_heads_from_config:
        config = cast("PreTrainedConfig", attention.config)
        vars(attention)["config"] = _LayerConfig(config, num_attention_heads=queries, num_key_value_heads=kv_heads)


class _LayerConfig:
    """A layer's view of the model's config: its own head counts, everything else (also later changes) the model's."""

    def __init__(self, config: PreTrainedConfig, **own: int) -> None:
        self.__dict__.update(own)
        self.__dict__["_model_config"] = config

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (as the config's)
        # copy and pickle ask for attributes before __dict__ is filled
        if name.startswith("__") or "_model_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_model_config"], name)
