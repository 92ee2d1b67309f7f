"""Have stock PEFT mark the adapters that it saves from a pruned model; see `mark`.

PEFT (0.21) saves what lies on its LoRA layers. So the first LoRA layer of each adapter gets a submodule that puts the
mark into the state dict. It has neither parameters nor buffers: optimizers, casts, moves between devices and
DistributedDataParallel do not see it, and where there is no adapter there is no mark. It is put there when the whole
model is asked for its state dict, as PEFT does.

It does not reach what PEFT writes without the model's state dict (DeepSpeed ZeRO-3), adapters of the embedding alone,
and what `save_pretrained(path_initial_model_for_weight_conversion=...)` makes of PiSSA and OLoRA: PEFT keeps nothing
but factors there. A new adapter gets the mark of the release it is on, also one that `add_weighted_adapter` combined
from adapters of another release. `hotswap_adapter` takes adapters whose first layer is that of the one they replace;
others it refuses.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import nn

from loram_hub.adapter.mark import DIGEST_BYTES, digest_of_mark, malformed_mark
from loram_hub.adapter.tensors import MARK, MARK_HOLDER, mark_names

logger = logging.getLogger(__name__)

_HELD = "_mark_of_pruned_adapter"


class PrunedMark(nn.Module):
    """On a LoRA layer: the mark of each of its adapters.

    A mark is kept on the adapter's own lora_A, so that it goes where the adapter goes, and an adapter that gets the
    name of a deleted one does not get its mark.
    """

    def __init__(self, factors: nn.ModuleDict, plan: str) -> None:
        super().__init__()
        self._factors = (factors,)  # lora_A of the layer, in a tuple: it is no submodule of this one
        self._plan = plan
        self._adapters: tuple[str, ...] = ()

    def set_adapters(self, adapters: list[str]) -> None:
        """Mark these adapters and no others; what was loaded with a mark keeps it."""
        self._adapters = tuple(adapters)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (as in torch)
        """Resolve `mark.<adapter>`: torch.distributed and hot-swapping look up every key of a state dict."""
        there = name in self.__dict__.get("_adapters", ()) and name in self._factors[0]
        return self._mark_of(name) if there else super().__getattr__(name)

    def _mark_of(self, adapter: str) -> torch.Tensor:
        """Return an adapter's mark; hot-swapping writes into it, zeros if the new adapter has none."""
        factor = self._factors[0][adapter]
        mark = cast("torch.Tensor | None", getattr(factor, _HELD, None))
        if mark is None or not mark.any():
            mark = torch.tensor(list(bytes.fromhex(self._plan)), dtype=torch.uint8, device="cpu")
            setattr(factor, _HELD, mark)
        return mark

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: ANN401
        for name in self._adapters:
            # A deleted adapter is still in the list until the whole model is asked for its state dict. Accelerate reads
            # the state dict of a model on meta to distribute it, and can do so with parameters only.
            if name in self._factors[0] and not self._factors[0][name].weight.is_meta:
                destination[prefix + name] = self._mark_of(name)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:  # noqa: ANN401
        """Remember what an adapter was marked with; one without a mark is loaded all the same."""
        for name in self._adapters:
            found = state_dict.get(prefix + name)
            if found is not None and name in self._factors[0]:
                self._remember(name, found)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take the mark of a loaded adapter from transformers, which assigns what it loads."""
        if param is not None and name in self._adapters:
            self._remember(name, param)
        else:
            super().register_parameter(name, param)

    def _remember(self, adapter: str, mark: torch.Tensor) -> None:
        if mark.is_meta:
            return
        if mark.dtype != torch.uint8 or mark.shape != (DIGEST_BYTES,):
            dtype = str(mark.dtype).removeprefix("torch.")
            raise malformed_mark(MARK, dtype, mark.shape, source=f"the adapter {adapter!r}")
        mark = mark.detach().to("cpu", copy=True)
        setattr(self._factors[0][adapter], _HELD, mark)
        if (found := digest_of_mark(mark.numpy())) != self._plan:
            logger.warning(
                "The adapter %r was trained on a release with plan %s, this one has plan %s: it fits in shape at best. "
                "Load it on the release it was trained on; what is combined from it here would be marked as this one's",
                adapter,
                found[:12],
                self._plan[:12],
            )


def mark_adapters_(model: nn.Module, digest: str) -> None:
    """Give each LoRA adapter on a pruned model its mark, on the first layer that it adapts.

    Args:
        model: of a release, perhaps with LoRA layers by PEFT; one of a sparse release, with shapes that are whole, is
            left as it is.
        digest: SHA-256 of the plan, hexadecimal.
    """
    release = getattr(model, "loram", None)
    if release is not None and release.manifest.is_sparse:
        return
    seen: set[str] = set()
    for layer in list(model.modules()):
        factors = getattr(layer, "lora_A", None)
        if not isinstance(factors, nn.ModuleDict):
            continue
        first = [name for name in factors if name not in seen]
        seen.update(first)
        holder = getattr(layer, MARK_HOLDER, None)
        if holder is None and first:
            # No ModuleDict: in one of these on its layers, PEFT looks for adapters.
            holder = nn.Module()
            holder.add_module(MARK, PrunedMark(factors, digest))
            layer.add_module(MARK_HOLDER, holder)
        if holder is not None:
            getattr(holder, MARK).set_adapters(first)


def name_marks_(state_dict: dict[str, Any]) -> None:
    """Put the adapter's name into keys of marks that lack it.

    PEFT looks for what is on its layers before it asks a model for its state dict, and so before there is a mark.

    Args:
        state_dict: what is about to be loaded into a pruned model.
    """
    for key in mark_names(state_dict):
        layer = key.removesuffix(f"{MARK_HOLDER}.{MARK}")
        factors = [other for other in state_dict if other.startswith(f"{layer}lora_A.") and other.endswith(".weight")]
        names = {other.removeprefix(f"{layer}lora_A.").removesuffix(".weight") for other in factors}
        if len(names) == 1:
            state_dict[f"{key}.{names.pop()}"] = state_dict.pop(key)
