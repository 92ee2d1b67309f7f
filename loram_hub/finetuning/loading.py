"""The model of a run: the release on this process's device, with what saves memory, ready for PEFT."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import torch

from loram_hub.auto import AutoLoramModel
from loram_hub.errors import IncompatibleError
from loram_hub.estimation.options import MemoryOptions
from loram_hub.finetuning.materials import Materials
from loram_hub.finetuning.processes import Processes
from loram_hub.finetuning.recipe import FinetuneRecipe
from loram_hub.lowmemory import reduce_memory_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def open_model(
    recipe: FinetuneRecipe, materials: Materials, processes: Processes, *, token: str | bool | None = None
) -> PreTrainedModel:
    """Open the release for training; each process takes it whole onto its own device, where FSDP then shares it out.

    Args:
        recipe: what is asked for.
        materials: the release, opened.
        processes: of the run.
        token: of the Hub.

    Raises:
        VerificationError: the weights were altered or torn.
        IncompatibleError: memory options do not fit the model, or its NF4 codes cannot be shared out by FSDP.
        AccessError: the Hub refused or could not be reached.
    """
    model = AutoLoramModel.from_pretrained(
        materials.name,
        revision=materials.source.commit,
        token=token,
        device_map={"": processes.device} if processes.on_cuda else None,
        dtype=recipe.dtype,
    )
    if recipe.memory_options != MemoryOptions():
        reduce_memory_(model, recipe.memory_options)
    if recipe.distributed.sharding == "fsdp":
        store_as_(model, model.dtype)
    return model


def store_as_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Have NF4 codes lie in tensors of a floating-point type, in place; not a bit of them changes.

    FSDP2 shares out no integers: accelerate would leave each process all of the uint8 codes. And the tensors of a layer
    that it shares out together must be of one type, that of the adapter and the norms.

    Args:
        model: with NF4 projections, as the release holds them; one without any stays what it is.
        dtype: type of the unquantized weights.

    Raises:
        IncompatibleError: the codes of a layer are no whole number of such elements.
    """
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    packed = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    for name, module in packed.items():
        weight = cast("Params4bit", module.weight)
        codes = weight.data
        if codes.nbytes % dtype.itemsize:
            raise IncompatibleError(
                f"{name} has {codes.nbytes:,} bytes of NF4 codes, no multiple of {dtype.itemsize}, so that FSDP cannot "
                "share them out. Say distributed.sharding: ddp, or prune the base again with --round-to 64."
            )
        weight.data = codes.reshape(-1).view(dtype).reshape(-1, 1)
        weight.quant_storage = module.quant_storage = dtype
        module.quant_state = weight.quant_state  # FSDP puts a plain tensor in place of the weight
    if packed:
        model.config.quantization_config.bnb_4bit_quant_storage = dtype
        logger.info("NF4 codes of %d layers lie in %s tensors, for FSDP", len(packed), dtype)
