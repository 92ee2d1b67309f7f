"""Put the mask of a sparse release on the LoRA layers of a model that was opened from it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch.distributed.tensor import DTensor

from loram_hub.adapter.config import PLAIN_INITS
from loram_hub.adapter.live import is_masked
from loram_hub.errors import IncompatibleError, InvalidRequestError, PlanMismatchError, UnsupportedAdapterError
from loram_hub.masked_lora.layers import SHARDED, MaskedLayer, masked_class_of, put_mask_
from loram_hub.masked_lora.product import KeptWeights
from loram_hub.release import Release

if TYPE_CHECKING:
    import torch
    from torch import nn

    from loram_hub.masks import MaskFile

logger = logging.getLogger(__name__)


def mask_lora_(model: PeftModel, release: Release | None = None) -> None:
    """Train LoRA on a sparse release as LoRAM does: gradients reach the weights that were kept, and no others.

    Call it when the adapter is on the model and before training: after `get_peft_model`, or on `trainer.model` after
    `SFTTrainer(..., peft_config=...)`. Called again, it masks layers that a further adapter has brought. What PEFT
    saves stays plain LoRA, and `recover` writes the same factors: on the original model the adapter acts unmasked.
    LoRA on what no mask is for, the lm_head, stays as it is. Where an error is raised, so does the whole model.

    Args:
        model: with LoRA on an opened sparse release, in 16 or 32 bits or NF4; changed in place.
        release: the release; None for the one that `AutoLoramModel` opened.

    Raises:
        InvalidRequestError: there is no LoRA on the model, or no release is known, or it is not sparse.
        UnsupportedAdapterError: an adapter is no plain LoRA.
        IncompatibleError: a layer cannot be masked, or has an adapter merged into it.
        PlanMismatchError: the model was opened from another release, or differs from it in shape.
        VerificationError: the masks were altered or torn.

    Example:
        >>> from loram_hub import AutoLoramModel, mask_lora_  # doctest: +SKIP
        >>> model = get_peft_model(AutoLoramModel.from_pretrained("org/model-LoRAM-4-8"), lora)  # doctest: +SKIP
        >>> mask_lora_(model)  # doctest: +SKIP
    """
    masks = _masks_for(model, release)
    _check_starts(model)
    layers = _maskable_layers(model, masks)
    kept = {name: _kept_weights(masks, name, layer) for name, layer in layers.items()}  # all, before one is put on
    for name, layer in layers.items():
        put_mask_(layer, kept[name])
    logger.info("Masked the LoRA of %d layers", len(layers))


def refuse_sharded(model: nn.Module | None) -> None:
    """Refuse a masked model of which the processes have only shares, as FSDP makes them.

    Args:
        model: as it is trained, masked or not; None for none.

    Raises:
        IncompatibleError: it is masked and shared out.
    """
    if model is not None and is_masked(model) and any(isinstance(each, DTensor) for each in model.parameters()):
        raise IncompatibleError(SHARDED)


def _kept_weights(masks: MaskFile, name: str, layer: LoraLayer) -> KeptWeights:
    weight = cast("torch.Tensor", layer.get_base_layer().weight)
    return KeptWeights(masks.read(f"{name}.weight"), device=weight.device)


def _masks_for(model: PeftModel, release: Release | None) -> MaskFile:
    if not isinstance(model, PeftModel):
        raise InvalidRequestError(
            f"model is a {type(model).__name__} without an adapter. Put one on it first: get_peft_model(model, lora)."
        )
    opened = getattr(model.get_base_model(), "loram", None)
    found = opened if release is None else release
    if not isinstance(found, Release):
        raise InvalidRequestError(
            "The model was not opened with AutoLoramModel, so that nothing says which release it is. Give it: "
            "mask_lora_(model, release)."
        )
    if (masks := found.weight_masks) is None:
        raise InvalidRequestError(
            f"{found.folder} is a structured release: what was pruned is not there, so that there is nothing to mask. "
            "Train plain LoRA on it."
        )
    if isinstance(opened, Release) and opened.plan.digest != found.plan.digest:
        raise PlanMismatchError(
            f"The model was opened from {opened.folder}, which keeps other weights than {found.folder}. Give the "
            "release that the model was opened from, or none."
        )
    return masks


def _check_starts(model: PeftModel) -> None:
    """Refuse adapters whose start changes the base weights: what was pruned would no longer be zero."""
    for name, config in model.peft_config.items():
        start = getattr(config, "init_lora_weights", True)
        if not isinstance(start, bool) and str(start).lower() not in PLAIN_INITS:
            raise UnsupportedAdapterError(
                f"The adapter {name!r} starts with init_lora_weights={start!r:.100}, which changes the weights of the "
                "model, zeros too. Take init_lora_weights=True."
            )


def _maskable_layers(model: PeftModel, masks: MaskFile) -> dict[str, LoraLayer]:
    """Find the layers that have a mask and do not use it yet, by path; all are checked before one is changed."""
    adapted = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    found = {name: layer for name, layer in adapted.items() if f"{name}.weight" in masks}
    if not found:
        raise InvalidRequestError("No projection of the model has LoRA. Target some, or leave the masks away.")
    fresh = {name: layer for name, layer in found.items() if not isinstance(layer, MaskedLayer)}
    for name, layer in fresh.items():
        _check_layer(name, layer, masks.shape(f"{name}.weight"))
    return fresh


def _check_layer(name: str, layer: LoraLayer, shape: tuple[int, ...]) -> None:
    if shape != (layer.out_features, layer.in_features):
        raise PlanMismatchError(
            f"{name} of the model has shape {(layer.out_features, layer.in_features)}, its mask {shape}. Give the "
            "release that the model was opened from."
        )
    if layer.lora_variant or any(layer.lora_bias.values()):
        kinds = sorted({type(variant).__name__ for variant in layer.lora_variant.values()}) or ["lora_bias"]
        raise UnsupportedAdapterError(
            f"The adapter on {name} is no plain LoRA ({', '.join(kinds)}), and no other can be masked. Train plain "
            "LoRA, or leave the masks away."
        )
    if layer.merged:
        raise IncompatibleError(f"An adapter is merged into {name}. Take it out first: model.unmerge_adapter().")
    if masked_class_of(type(layer)) is None:
        raise IncompatibleError(
            f"{name} is a {type(layer).__module__}.{type(layer).__name__}; LoRA on weights of 16 or 32 bits and on NF4 "
            "can be masked."
        )
