"""An adapter that is still in memory, on a `PeftModel`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from loram_hub.adapter.config import VOCABULARY_REMEDY, parse_config
from loram_hub.adapter.mark import digest_of_mark
from loram_hub.adapter.modules import LM_HEAD_MODULE
from loram_hub.adapter.reading import Adapter, build_adapter
from loram_hub.adapter.tensors import DTYPES, Factor, factor_names, mark_names
from loram_hub.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


class MaskedModule:
    """Base of LoRA layers whose update is masked, which `masked_lora` makes: what they are known by here."""

    __slots__ = ()


def is_masked(model: nn.Module | None) -> bool:
    """Whether the active adapters of a model, perhaps wrapped by a trainer, are masked on every projection they adapt.

    Layers that a further adapter brought after `mask_lora_` are not masked before it is called again, and a model in
    which such an adapter is active is not either. No mask is for the lm_head.

    Args:
        model: with LoRA or without; None for none.
    """
    from peft.tuners.lora.layer import LoraLayer

    layers = [
        layer
        for path, layer in (() if model is None else model.named_modules())
        if isinstance(layer, LoraLayer) and path.rpartition(".")[2] != LM_HEAD_MODULE
        if any(name in layer.lora_A for name in layer.active_adapters)
    ]
    return bool(layers) and all(isinstance(layer, MaskedModule) for layer in layers)


def read_model(model: PeftModel) -> Adapter:
    """Take the active adapter of a model as `save_pretrained` would write it.

    Raises:
        UnsupportedAdapterError: several adapters are active, or this one has no full-size equivalent.
        VerificationError: a factor holds NaN or infinity.
    """
    from peft import get_peft_model_state_dict

    _refuse_resized(model)
    names = model.active_adapters
    if len(names) != 1:
        raise UnsupportedAdapterError(f"The model has the adapters {names} active; choose one with set_adapter.")
    source = f"the adapter {names[0]!r}"
    values = json.loads(json.dumps(model.peft_config[names[0]].to_dict(), default=sorted))  # PEFT holds names in sets
    config = parse_config(values, source=source)
    state = get_peft_model_state_dict(model, adapter_name=names[0], save_embedding_layers=False)
    tensors = ((name, _to_numpy(state[name], name)) for name in factor_names(list(state), source=source))
    adapter = build_adapter(config, tensors, source=source, record={})
    marks = {digest_of_mark(state[name].cpu().numpy()) for name in mark_names(state)}
    return replace(
        adapter,
        marked_plan=marks.pop() if len(marks) == 1 else None,
        was_masked=is_masked(model),
    )


def _refuse_resized(model: PeftModel) -> None:
    base = model.get_base_model()
    release = getattr(base, "loram", None)
    rows = cast("nn.Embedding", cast("PreTrainedModel", base).get_input_embeddings()).weight.shape[0]
    if release is not None and rows != release.architecture.vocab_size:
        raise UnsupportedAdapterError(
            f"The model's embedding has {rows:,} rows, its release's {release.architecture.vocab_size:,}. "
            f"{VOCABULARY_REMEDY}"
        )


def _to_numpy(tensor: torch.Tensor, name: str) -> Factor:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has none of its own
        return tensor.view(torch.int16).numpy().view(DTYPES["bfloat16"])
    if tensor.dtype not in (torch.float16, torch.float32):
        raise UnsupportedAdapterError(f"{name} is {tensor.dtype}; float32, float16 or bfloat16 is needed.")
    found: Factor = tensor.numpy()
    return found
