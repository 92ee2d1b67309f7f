"""AutoLoramModel: open a release as a stock transformers model.

A release is a base model whose layers have their own widths. We subclass the stock model, shrink its linear layers to
the plan after its own constructor ran (on the meta device: no memory), and leave the rest to transformers'
`from_pretrained`: shards, NF4, `device_map`, low memory. What comes back is a `PreTrainedModel` that PEFT, TRL and
`generate` take as it is. A sparse release has the base's widths, and zeros: nothing is shrunk.
"""

from __future__ import annotations

import copy
import copyreg
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from loram_hub.adapter.marking import mark_adapters_, name_marks_
from loram_hub.architecture import LAYER_PREFIX
from loram_hub.checkpoint import CONFIG, INDEX_FILE, weight_files
from loram_hub.errors import IncompatibleError, InvalidRequestError, VerificationError
from loram_hub.files import dump_json
from loram_hub.hub import fetch_release
from loram_hub.manifest import NF4_DESCRIPTION, Manifest
from loram_hub.masks import WEIGHT_MASKS
from loram_hub.release import (
    MASK_INDEX,
    Release,
    base_config_of,
    is_nonzero,
    release_config,
    seal_release,
)
from loram_hub.shaping import shrink_layer_

logger = logging.getLogger(__name__)

# What transformers raises for a config that it takes nothing from, or whose model cannot be built.
_CANNOT_BUILD = (
    StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, AssertionError, ArithmeticError,
    RuntimeError,
)  # fmt: skip


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
            dtype: of the unquantized weights, and what NF4 computes in; None picks bf16 where the device multiplies
            it in
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
        if taken := {"config", "output_loading_info", "trust_remote_code", "state_dict"} & set(kwargs):
            raise InvalidRequestError(f"{sorted(taken)} cannot be given: a release decides them itself.")
        source, opened = fetch_release(
            release, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        chosen = _chosen_dtype(kwargs.pop("torch_dtype", None) if dtype is None else dtype, device_map)
        config = _model_config(opened)
        _set_compute_dtype(config, chosen)
        model_class = _pruned_class(opened)
        model: PreTrainedModel = model_class.from_pretrained(
            source.folder, config=config, dtype=chosen, device_map=device_map, local_files_only=True, **kwargs
        )
        # PEFT writes this name into adapters: a Hub id, or a path that means the same from every folder.
        name = str(release) if source.commit else os.path.abspath(source.folder)
        model.config._name_or_path = model.name_or_path = name
        # Tensors load under the names they are stored with; what transformers recorded is its NF4 reader, which it
        # cannot reverse (5.23: NotImplementedError from save_pretrained on any prequantized bitsandbytes model).
        vars(model)["_weight_conversions"] = []
        _cast_unquantized_(model, chosen)
        if getattr(model, "is_loaded_in_4bit", False):
            from loram_hub.cpu_nf4 import mend_cpu_layers_  # bitsandbytes, which 16-bit releases do without

            mend_cpu_layers_(model)
        return model


def model_on_meta(release: Release) -> PreTrainedModel:
    """Build the model of a release in its pruned shapes on the meta device, for whoever brings the weights himself."""
    config = _model_config(release)
    with torch.device("meta"):
        return _pruned_class(release)(config)


def _model_config(release: Release) -> PreTrainedConfig:
    """Make the base's config, and a model of it without weights: what transformers cannot build, it says here."""
    model_type = release.architecture.family.model_type
    try:
        config: PreTrainedConfig = _config_class(model_type).from_dict(base_config_of(release.config))
        base_class = cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]])
        with torch.device("meta"):
            base_class(copy.deepcopy(config))
    except _CANNOT_BUILD as err:
        raise IncompatibleError(
            f"transformers cannot build a model from {release.folder / CONFIG}: {type(err).__name__}: {err!s:.300}. "
            "Prune the base again."
        ) from err
    return config


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
    if dtype is None or dtype == "auto":
        return supported_dtype(_device_type(device_map))
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise InvalidRequestError(f"dtype {dtype!r} is no floating-point type; 'bfloat16' or 'float32' are.")
    return named


def _device_type(device_map: str | Mapping[str, int | str] | None) -> str:
    if device_map is None:
        return "cpu"
    places = [device_map] if isinstance(device_map, str | int | torch.device) else list(device_map.values())
    kinds = {"cuda" if isinstance(place, int) else str(place).split(":")[0] for place in places} - {
        "cpu",
        "disk",
        "meta",
    }
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


class _ReleaseConfig(PreTrainedConfig):
    """Mixin: a config that is a release's on disk and the base's in memory.

    In memory `model_type` stays the base's: PEFT, Liger and chat code look models up by it.
    """

    def to_json_string(self, use_diff: bool = True) -> str:
        values = json.loads(super().to_json_string(use_diff))
        return dump_json(release_config(values, quantization_config=values.get("quantization_config")))

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ANN401
        values, rest = super().get_config_dict(*args, **kwargs)
        return (base_config_of(values) if "loram" in values else values), rest


class _MadeToMeasure(type):
    """Metaclass of classes made at run time: pickled by how they are made, since no module holds them by name."""


@cache
def _config_class(model_type: str) -> type[PreTrainedConfig]:
    base_class = CONFIG_MAPPING[model_type]
    name, attributes = f"Loram{base_class.__name__}", {"model_type": model_type, "__module__": __name__}
    return cast("type[PreTrainedConfig]", _MadeToMeasure(name, (_ReleaseConfig, base_class), attributes))


class _PrunedModel(PreTrainedModel):
    """Mixin: a stock model whose layers get the widths of the class's release once they are built."""

    loram: Release
    """The release, its manifest and plan."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(config, *args, **kwargs)
        architecture = self.loram.architecture
        for layer, sizes in enumerate(self.loram.plan.layers):
            if sizes != architecture.whole_layer:
                shrink_layer_(self.get_submodule(f"{LAYER_PREFIX}.{layer}"), architecture, sizes)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (as in torch)
        """Mark the adapters on this model as pruned, so that what PEFT saves is not taken for a recovered adapter."""
        mark_adapters_(self, self.loram.plan.digest)
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any) -> None:  # noqa: ANN401 (as in torch)
        mark_adapters_(self, self.loram.plan.digest)  # before the layers look for what is theirs
        name_marks_(state_dict)
        super()._load_from_state_dict(state_dict, *args)

    def save_pretrained(  # type: ignore[override]  # every keyword of transformers' is passed on
        self,
        save_directory: str | os.PathLike[str],
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Save as a release: weights and config as transformers does, then mask indexes and manifest.

        A sparse release gets its masks again, and is refused with a `VerificationError` before anything is written if
        training has filled its zeros: it would be no sparse release any more.

        With an adapter of transformers' own `add_adapter`, that is saved instead, as transformers does.
        """
        if kwargs.get("push_to_hub"):
            raise InvalidRequestError(
                "push_to_hub would upload the release before its manifest is written. Save it to a folder first."
            )
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, **kwargs)
            return
        _refuse_adapted(self)
        manifest = _manifest_of_saved(self)
        if self.loram.is_sparse:
            _refuse_filled_zeros(self, kwargs.get("state_dict"))
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            folder = Path(save_directory)
            if self.loram.is_sparse:
                _copy_masks(self.loram, folder)
            # Others may write here too, a Trainer its optimizer: they are no part of the release.
            own = {
                CONFIG,
                MASK_INDEX,
                WEIGHT_MASKS,
                INDEX_FILE,
                "generation_config.json",
                *(f.name for f in weight_files(folder)),
            }
            seal_release(folder, manifest=manifest, plan=self.loram.plan, only=own)


def _pruned_class(release: Release) -> type[_PrunedModel]:
    config_class = CONFIG_MAPPING[release.architecture.family.model_type]
    base_class = cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[config_class])
    name, attributes = f"Loram{base_class.__name__}", {"loram": release, "__module__": __name__}
    return cast("type[_PrunedModel]", _MadeToMeasure(name, (_PrunedModel, base_class), attributes))


def _how_made(made: _MadeToMeasure) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if issubclass(made, _PrunedModel):
        return _pruned_class, (made.loram,)
    return _config_class, (vars(made)["model_type"],)


copyreg.pickle(_MadeToMeasure, _how_made)


def _refuse_adapted(model: _PrunedModel) -> None:
    """Refuse to save layers that PEFT wraps: their weights have other names, and no release opens with those."""
    adapted = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if adapted is not None:
        raise InvalidRequestError(
            f"{adapted} is wrapped by a PEFT adapter, so this is no release to save. Save the PeftModel for its "
            "adapter, or take the adapter off first: release = peft_model.unload()."
        )


def _refuse_filled_zeros(model: _PrunedModel, given: Mapping[str, torch.Tensor] | None) -> None:
    """Refuse to save a sparse model that has weights where its masks have none.

    Args:
        model: opened from a sparse release.
        given: what is to be saved of it instead of its own weights, as a Trainer may have gathered it.
    """
    masks = model.loram.weight_masks
    assert masks is not None
    weights = dict(model.named_parameters()) if given is None else given
    for name in masks.names:
        weight = weights.get(name)
        if weight is None or weight.is_meta:  # offloaded by accelerate, so never trained; or not of this process
            continue
        kept = masks.read(name)
        if (is_nonzero(_stored(weight))[: kept.size].reshape(kept.shape) > kept).any():
            raise VerificationError(
                f"{name!r} is not zero where the masks of {model.loram.folder} remove its weights: it was trained "
                f"without them, or quantized in another way than 'loram quantize' does. Save it as a plain model, or "
                "keep the zeros: 'loram align' does."
            )


def _stored(weight: torch.Tensor) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Return the bits of a weight, or its packed NF4 codes, as a file has them."""
    data = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # numpy has no bf16
    return cast("npt.NDArray[np.unsignedinteger[Any]]", data.view(f"u{weight.element_size()}"))


def _copy_masks(release: Release, folder: Path) -> None:
    source, target = release.folder / WEIGHT_MASKS, folder / WEIGHT_MASKS
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)


def _manifest_of_saved(model: _PrunedModel) -> Manifest:
    """Describe a model that was opened, perhaps trained or quantized on the way in, and saved again."""
    opened = model.loram.manifest
    manifest = replace(opened, recipe={**opened.recipe, "saved": "save_pretrained"})
    if getattr(model, "is_loaded_in_4bit", False):
        made = model.config.quantization_config
        if made.bnb_4bit_quant_type != "nf4" or not made.bnb_4bit_use_double_quant:
            raise InvalidRequestError(
                "A release holds NF4 with double quantization; this model was quantized in another way."
            )
        dtype = str(model.dtype).removeprefix("torch.")
        manifest = replace(manifest, quantization={**NF4_DESCRIPTION, "dtype": dtype})
    return manifest


def _cast_unquantized_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring embeddings, lm_head and norms to the compute type.

    transformers (5.23) leaves them as they are stored when the checkpoint is prequantized, whatever `dtype` asks for;
    on a CPU without bf16 instructions the lm_head alone would then take most of a step.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(dtype)


__all__ = ["AutoLoramModel", "model_on_meta", "supported_dtype"]
