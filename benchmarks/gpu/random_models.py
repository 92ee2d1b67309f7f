"""Models with random NF4 weights, made where they are to lie: 70 billion parameters in seconds, and never in bf16.

Codes are random bytes, scales are plausible ones. What a step takes, in memory and in time, depends on shapes and types
alone: no kernel here looks at a value. What it learns is meaningless, and nothing is said about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loram_hub.architecture import Architecture, LayerSizes
from loram_hub.plan import NF4_BLOCK, NF4_NESTED_BLOCK
from loram_hub.release.nf4 import dynamic_table, nf4_table
from loram_hub.shaping import shrink_layer_

DTYPE = torch.bfloat16
_SCALE, _SPREAD = 0.02, 0.005
"""Mean and spread of the largest weight in a block of 64."""


def random_model(
    config: Mapping[str, Any], architecture: Architecture, layers: Sequence[LayerSizes], *, device: str, seed: int = 0
) -> PreTrainedModel:
    """Make an NF4 model of the given widths on a device: what `AutoLoramModel` gives for a release of that plan."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)), dtype=DTYPE
        )
    model: PreTrainedModel = made
    generator = torch.Generator(device).manual_seed(seed)
    for layer, sizes in zip(model.model.layers, layers, strict=True):
        if sizes != architecture.whole_layer:
            shrink_layer_(layer, architecture, sizes)
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, random_nf4(module, generator))
    _fill_rest_(model, generator)
    model.requires_grad_(False)
    vars(model)["is_loaded_in_4bit"] = True  # by it PEFT knows NF4, as of a model that was loaded
    return model


def random_nf4(linear: nn.Linear, generator: torch.Generator) -> bnb.nn.Linear4bit:
    """Return an NF4 layer of a linear layer's size with random codes, on the generator's device."""
    rows, columns = linear.weight.shape
    device, scales = generator.device, -(-rows * columns // NF4_BLOCK)

    def random_bytes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)

    state = QuantState(
        absmax=random_bytes(scales),
        shape=torch.Size((rows, columns)),
        code=torch.from_numpy(nf4_table().copy()).to(device),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=DTYPE,
        offset=torch.tensor(_SCALE, device=device),
        state2=QuantState(
            absmax=torch.full((-(-scales // NF4_NESTED_BLOCK),), _SPREAD, device=device),
            code=torch.from_numpy(dynamic_table().copy()).to(device),
            blocksize=NF4_NESTED_BLOCK,
            dtype=torch.float32,
        ),
    )
    made = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=DTYPE, quant_type="nf4", device="meta")
    made.weight = bnb.nn.Params4bit.from_prequantized(  # what transformers does with a stored NF4 matrix
        random_bytes(-(-rows * columns // 2), 1), state.as_dict(packed=True), device=device, module=made
    )
    vars(made)["support_avx512bf16_for_cpu"] = False  # see loram_hub.auto
    return made


def _fill_rest_(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Give everything that is not NF4 its numbers: embedding, lm_head, norms, rotary frequencies."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                values = torch.ones(parameter.shape, dtype=DTYPE, device=generator.device)
                if parameter.ndim > 1:
                    values.normal_(0, 0.02, generator=generator)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(generator.device)
