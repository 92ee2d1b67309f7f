"""AutoLoramModel: open a release as a stock transformers model.

A release is a base model whose layers have their own widths. We subclass the stock model, shrink its linear layers to the plan after
its own constructor ran (on the meta device: no memory), and leave the rest to transformers' `from_pretrained`: shards, NF4,
`device_map`, low memory. What comes back is a `PreTrainedModel` that PEFT, TRL and `generate` take as it is.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from loram_hub.architecture import LAYER_PREFIX, Architecture, LayerSizes
from loram_hub.hub import resolve
from loram_hub.release import Release, base_config_of, open_release, release_config, seal_release

logger = logging.getLogger(__name__)


class AutoLoramModel:
    """Open releases; not meant to be instantiated, like transformers' Auto classes."""

    def __init__(self) -> None:
        """Refuse; raises `OSError` as transformers' Auto classes do."""
        raise OSError("AutoLoramModel is opened with AutoLoramModel.from_pretrained(release).")

    @classmethod
    def from_pretrained(
        cls,
        release: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        device_map: str | Mapping[str, int | str] | None = None,
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,  # noqa: ANN401 (passed on to transformers)
    ) -> PreTrainedModel:
        """Open a release, from the Hub or a folder.

        Args:
            release: Hub id or folder.
            revision: branch, tag or commit of a Hub id.
            token: of the Hub.
            cache_dir: of huggingface_hub.
            local_files_only: do not use the network.
            device_map: as in transformers; None loads on the CPU.
            dtype: of the unquantized weights, and what NF4 computes in; None picks bf16 where the device multiplies it in
                hardware and fp32 (on a CPU) or fp16 (on a GPU) where it does not.
            **kwargs: for transformers' `from_pretrained` (`attn_implementation`, `max_memory`, ...).

        Returns:
            A transformers causal language model in eval mode; `model.loram` is the `Release`.

        Raises:
            VerificationError: the release was altered or torn.
            IncompatibleError: its format is newer, or weights and plan do not fit.
            AccessError: the Hub refused or could not be reached.

        Example:
            >>> from loram_hub import AutoLoramModel  # doctest: +SKIP
            >>> model = AutoLoramModel.from_pretrained("org/Llama-3.1-70B-LoRAM-0.85")  # doctest: +SKIP
        """
        source = resolve(release, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        opened = open_release(source.folder)
        chosen = _chosen_dtype(dtype, device_map)
        config = _config_class(opened.architecture).from_dict(base_config_of(opened.config))
        _set_compute_dtype(config, chosen)
        model_class = _pruned_class(opened)
        model: PreTrainedModel = model_class.from_pretrained(
            source.folder, config=config, dtype=chosen, device_map=device_map, local_files_only=True, **kwargs
        )
        model.config._name_or_path = model.name_or_path = str(release)
        # Tensors load under the names they are stored with; what transformers recorded is its NF4 reader, which it cannot reverse
        # (5.23: NotImplementedError from save_pretrained on any prequantized bitsandbytes model).
        model._weight_conversions = []
        _disable_cpu_repacking(model)
        return model


def supported_dtype(device_type: str) -> torch.dtype:
    """Return the 16-bit or 32-bit type that a kind of device computes well in.

    bf16 on a CPU without bf16 instructions is emulated, some forty times slower than fp32.
    """
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device_type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if device_type in ("xpu", "npu", "hpu") else torch.float16


def _chosen_dtype(dtype: torch.dtype | str | None, device_map: str | Mapping[str, int | str] | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None and dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]  # a wrong name raises AttributeError that names it
    return supported_dtype(_device_type(device_map))


def _device_type(device_map: str | Mapping[str, int | str] | None) -> str:
    if device_map is None:
        return "cpu"
    places = [device_map] if isinstance(device_map, str | int | torch.device) else list(device_map.values())
    kinds = {"cuda" if isinstance(place, int) else str(place).split(":")[0] for place in places} - {"cpu", "disk", "meta"}
    if not kinds:
        return "cpu"
    kind = kinds.pop()
    if kind in ("auto", "balanced", "balanced_low_0", "sequential"):
        accelerator = torch.accelerator.current_accelerator()
        return "cpu" if accelerator is None else accelerator.type
    return kind


def _set_compute_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict):
        config.quantization_config = {**quantization, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}


def _config_class(architecture: Architecture) -> type[PreTrainedConfig]:
    """Subclass the base's config so that, written to disk, it is a release's config.

    In memory it stays the base's in every respect, `model_type` included: PEFT, Liger and chat code look models up by it.
    """
    base_class = CONFIG_MAPPING[architecture.family.model_type]

    def to_json_string(self: PreTrainedConfig, use_diff: bool = True) -> str:
        values = json.loads(base_class.to_json_string(self, use_diff))
        return json.dumps(release_config(values, quantization_config=values.get("quantization_config")), indent=2, sort_keys=True) + "\n"

    return type(f"Loram{base_class.__name__}", (base_class,), {"to_json_string": to_json_string, "__module__": __name__})


def _pruned_class(release: Release) -> type[PreTrainedModel]:
    """Subclass the stock model class with the release's widths."""
    architecture = release.architecture
    base_class: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[architecture.family.model_type]]

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        base_class.__init__(self, config, *args, **kwargs)
        for layer, sizes in enumerate(release.plan.layers):
            if sizes != architecture.whole_layer:
                _shrink_layer_(self.get_submodule(f"{LAYER_PREFIX}.{layer}"), architecture, sizes)

    def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # noqa: ANN401
        """Save as a release: weights and config as transformers does, then mask indexes and manifest."""
        base_class.save_pretrained(self, save_directory, **kwargs)
        seal_release(Path(save_directory), manifest=release.manifest, plan=release.plan)

    return type(
        f"Loram{base_class.__name__}",
        (base_class,),
        {"__init__": __init__, "save_pretrained": save_pretrained, "loram": release, "__module__": __name__},
    )


def _shrink_layer_(layer: nn.Module, architecture: Architecture, sizes: LayerSizes) -> None:
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
        attention.config = _LayerConfig(attention.config, num_attention_heads=queries, num_key_value_heads=kv_heads)


class _LayerConfig:
    """A layer's view of the model's config: its own head counts, everything else (also later changes) the model's."""

    def __init__(self, config: PreTrainedConfig, **own: int) -> None:
        self.__dict__.update(own)
        self.__dict__["_model_config"] = config

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (as the config's)
        if name.startswith("__") or "_model_config" not in self.__dict__:  # copy and pickle ask before __dict__ is filled
            raise AttributeError(name)
        return getattr(self.__dict__["_model_config"], name)


def _disable_cpu_repacking(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking NF4 weights for AVX512-BF16 on the first eval forward.

    Its repacking assumes that in_features is a multiple of the block size (64) and fails with a reshape error where a layer keeps
    another number of channels (bitsandbytes 0.50, functional._convert_weight_packed_for_cpu).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


__all__ = ["AutoLoramModel", "supported_dtype"]
