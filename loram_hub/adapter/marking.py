"""Have stock PEFT mark the adapters that it saves from a pruned model; see `mark`.

PEFT (0.21) saves what lies on its LoRA layers. So the first LoRA layer of each adapter gets a submodule that puts the
mark into the state dict. It has neither parameters nor buffers: optimizers, casts, moves between devices and
DistributedDataParallel do not see it, and where there is no adapter there is no mark.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from loram_hub.adapter.mark import digest_of_mark
from loram_hub.adapter.tensors import MARK, mark_names

logger = logging.getLogger(__name__)


class PrunedMark(nn.Module):
    """On a LoRA layer: the mark of each of its adapters."""

    def __init__(self, factors: nn.ModuleDict) -> None:
        super().__init__()
        self._factors = (factors,)  # lora_A of the layer, in a tuple: it is no submodule of this one
        self._digests: dict[str, str] = {}

    def set_digests(self, adapters: list[str], digest: str) -> None:
        """Mark these adapters and no others; what was loaded with a mark keeps it."""
        self._digests = {name: self._digests.get(name, digest) for name in adapters}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (as in torch)
        """Resolve `mark.<adapter>`: torch.distributed looks up every key of a state dict."""
        digests = self.__dict__.get("_digests", {})
        return _tensor(digests[name]) if name in digests else super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: ANN401
        # Accelerate reads the state dict of a model on meta to distribute it, and can do so with parameters only.
        there = [name for name in self._digests if not self._factors[0][name].weight.is_meta]
        destination.update({prefix + name: _tensor(self._digests[name]) for name in there})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:  # noqa: ANN401
        """Remember what an adapter was marked with; one without a mark is loaded all the same."""
        for name, own in list(self._digests.items()):
            found = state_dict.get(prefix + name)
            if found is not None:
                self._remember(name, found, own)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take the mark of a loaded adapter from transformers, which assigns what it loads."""
        if param is not None and name in self._digests:
            self._remember(name, param, self._digests[name])
        else:
            super().register_parameter(name, param)

    def _remember(self, adapter: str, mark: torch.Tensor, own: str) -> None:
        if mark.is_meta:
            return
        self._digests[adapter] = found = digest_of_mark(mark.detach().cpu().numpy())
        if found != own:
            logger.warning(
                "The adapter %r was trained on a release with plan %s, this one has plan %s: it fits in shape at best. "
                "Load it on the release it was trained on",
                adapter,
                found[:12],
                own[:12],
            )


def mark_adapters_(model: nn.Module, digest: str) -> None:
    """Give each LoRA adapter on a pruned model its mark, on the first layer that it adapts.

    Args:
        model: in pruned shapes, perhaps with LoRA layers by PEFT.
        digest: SHA-256 of the plan, hexadecimal.
    """
    seen: set[str] = set()
    for layer in list(model.modules()):
        factors = getattr(layer, "lora_A", None)
        if not isinstance(factors, nn.ModuleDict):
            continue
        first = [name for name in factors if name not in seen]
        seen.update(first)
        mark = getattr(layer, MARK, None)
        if mark is None and first:
            mark = PrunedMark(factors)
            layer.add_module(MARK, mark)
        if mark is not None:
            mark.set_digests(first, digest)


def name_marks_(state_dict: dict[str, Any]) -> None:
    """Put the adapter's name into keys of marks that lack it.

    PEFT looks for what is on its layers before it asks a model for its state dict, and so before there is a mark.

    Args:
        state_dict: what is about to be loaded into a pruned model.
    """
    for key in mark_names(state_dict):
        layer = key.removesuffix(MARK)
        factors = [other for other in state_dict if other.startswith(f"{layer}lora_A.") and other.endswith(".weight")]
        names = {other.removeprefix(f"{layer}lora_A.").removesuffix(".weight") for other in factors}
        if len(names) == 1:
            state_dict[f"{key}.{names.pop()}"] = state_dict.pop(key)


def _tensor(digest: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
