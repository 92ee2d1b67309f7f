"""Rewrite a loaded model so that its embedding and lm_head take less of the device."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Never, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from loram_hub.errors import IncompatibleError, InvalidRequestError
from loram_hub.estimation.options import MemoryOptions
from loram_hub.lowmemory.host import HostEmbedding
from loram_hub.lowmemory.rows import Int8Rows, Nf4Rows
from loram_hub.lowmemory.weight import CompressedWeight

logger = logging.getLogger(__name__)

_TYPES = (torch.bfloat16, torch.float16, torch.float32)
# Names that PEFT gives to the modules of a model: wrapped, and wrapped with the module itself adapted.
_PREFIXES = ("", "base_model.model.")
_SUFFIXES = ("weight", "base_layer.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySavings:
    """Bytes that a model no longer takes on its device."""

    embedding: int
    """Of the embedding; negative where a tied lm_head took the shared weight over."""
    lm_head: int
    """Of the lm_head."""

    @property
    def total(self) -> int:
        """Of both."""
        return self.embedding + self.lm_head


def reduce_memory_(model: PreTrainedModel, options: MemoryOptions) -> MemorySavings:
    """Make a model's embedding and lm_head smaller on its device, in place, before PEFT adapts it.

    Call it on what `AutoLoramModel` or a stock `from_pretrained` has loaded, in NF4 or in 16 bit. Training, `generate`
    and saving adapters work as before. The embedding and the lm_head are frozen afterwards. A model whose lm_head or
    embedding was compressed cannot be saved as a whole: its weights are not the release's any more.

    Args:
        model: causal language model, on one device or on several that do not split embedding and lm_head.
        options: what to change. `activation_offloading` is for the trainer (`SFTConfig(activation_offloading=True)`)
            and is only checked here.

    Returns:
        What is saved, as `memory_bytes` counts it.

    Raises:
        InvalidRequestError: the options save nothing with tied embeddings, or need a GPU that is not there.
        IncompatibleError: embedding or lm_head are no 16-bit or 32-bit layers of a model that nobody wrapped.

    Example:
        >>> from loram_hub import AutoLoramModel, MemoryOptions, reduce_memory_  # doctest: +SKIP
        >>> model = AutoLoramModel.from_pretrained(release, device_map={"": 0})  # doctest: +SKIP
        >>> reduce_memory_(model, MemoryOptions(embedding="cpu", lm_head="nf4"))  # doctest: +SKIP
    """
    embedding, head = _checked_layers(model)
    is_tied = embedding.weight is head.weight
    if is_tied:
        options.check_tied()
    if options.activation_offloading and head.weight.device.type == "cpu":
        raise InvalidRequestError(
            "activation_offloading moves activations from a GPU to main memory, and the model is on the CPU. Leave it "
            "out."
        )
    before = _device_bytes(embedding, head)
    _compress_(model, embedding, head, options)
    after = _device_bytes(model.get_input_embeddings(), head)
    if is_tied and options.embedding != options.lm_head:
        model.config.tie_word_embeddings = False  # or the next tie_weights() would undo it
    if options.embedding == "int8" or options.lm_head != "device":
        _mark_compressed_(model)
    if head.weight.device.type == "cuda":
        torch.cuda.empty_cache()
    savings = MemorySavings(embedding=before[0] - after[0], lm_head=before[1] - after[1])
    logger.info(
        "embedding: %s, lm_head: %s: %.2f GiB less on the device", options.embedding, options.lm_head,
        savings.total / 2**30,
    )  # fmt: skip
    return savings


def _checked_layers(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear]:
    if not isinstance(model, PreTrainedModel):
        raise IncompatibleError(
            f"{type(model).__name__} is no transformers model. Give the model to reduce_memory_ before get_peft_model "
            "wraps it."
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, layer, kind in (("embedding", embedding, nn.Embedding), ("lm_head", head, nn.Linear)):
        weight = getattr(layer, "weight", None)
        if (
            not isinstance(layer, kind)
            or not isinstance(weight, torch.Tensor)
            or isinstance(weight, CompressedWeight)
            or weight.dtype not in _TYPES
        ):
            raise IncompatibleError(
                f"The {name} is {layer!s:.100}, not a plain {kind.__name__} in 16 or 32 bit. Apply memory options "
                "once, to a model as it was loaded."
            )
        if weight.is_meta or hasattr(layer, "_hf_hook"):
            raise IncompatibleError(
                f"The {name} is offloaded or split by device_map. Load the model with device_map={{'': 0}}, or without."
            )
    return cast("nn.Embedding", embedding), cast("nn.Linear", head)


def _device_bytes(embedding: nn.Module, head: nn.Module) -> tuple[int, int]:
    """Return the bytes of embedding and lm_head in the model; a weight that both share belongs to the embedding."""

    def nbytes(layer: nn.Module) -> int:
        return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))

    return nbytes(embedding), 0 if embedding.weight is head.weight else nbytes(head)


def _compress_(model: PreTrainedModel, embedding: nn.Embedding, head: nn.Linear, options: MemoryOptions) -> None:
    whole, is_tied = head.weight, embedding.weight is head.weight
    if options.lm_head != "device":
        rows = (Int8Rows if options.lm_head == "int8" else Nf4Rows).compress(whole)
        head.weight = CompressedWeight(rows, whole.dtype)
    if options.embedding == "cpu":
        model.set_input_embeddings(HostEmbedding(embedding))
    elif options.embedding == "int8" and is_tied and options.lm_head == "int8":
        embedding.weight = head.weight
    elif options.embedding == "int8":
        embedding.weight = CompressedWeight(Int8Rows.compress(embedding.weight), embedding.weight.dtype)


def _mark_compressed_(model: PreTrainedModel) -> None:
    """Keep compressed weights out of what cannot hold them: checkpoints of the model, and DDP's first broadcast.

    Every process compresses the same weights, so there is nothing to send.
    """
    vars(model)["save_pretrained"] = partial(_refuse_saving, type(model).__name__)
    compressed = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), CompressedWeight)
    ]  # fmt: skip
    ignored = [f"{prefix}{name}.{suffix}" for name in compressed for prefix in _PREFIXES for suffix in _SUFFIXES]
    vars(model)["_ddp_params_and_buffers_to_ignore"] = ignored


def _refuse_saving(name: str, *args: object, **kwargs: object) -> Never:
    raise InvalidRequestError(
        f"This {name} has a compressed embedding or lm_head, which no checkpoint of transformers can hold. Save the "
        "adapter, or load the model without memory options to save it."
    )


__all__ = ["MemorySavings", "reduce_memory_"]
