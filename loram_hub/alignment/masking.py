"""Zeros of a sparse release stay zeros: where a weight was removed, its gradient is removed too.

AdamW leaves a weight of 0 at 0 if its gradient is 0 in every step: both moments stay 0, and so the update, and so does
the decay (8-bit moments have a code for 0). Nothing has to be done to the weights, and the norm that gradients are
clipped to is that of the weights that are trained.

Each process has the masks of its own rows, one bit per weight, and unpacks one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.tensor import DTensor

from loram_hub.alignment.launch import Ranks
from loram_hub.alignment.model import local_of, local_rows
from loram_hub.release import Release

if TYPE_CHECKING:
    from loram_hub.masked_lora.product import KeptWeights


class GradientMasks:
    """Which gradients a process keeps; of a structured release all of them."""

    def __init__(self, kept: Mapping[str, KeptWeights]) -> None:
        """Take the masks of this process's rows by the name of their weight."""
        self.kept = kept

    def apply_(self, parameters: Mapping[str, DTensor]) -> None:
        """Set the gradients of removed weights to 0, whatever they are.

        Args:
            parameters: trained ones by name, sharded.
        """
        for name, kept in self.kept.items():
            gradient = parameters[name].grad
            if gradient is not None:
                kept.zero_pruned_(local_of(gradient))


def gradient_masks(release: Release, model: nn.Module, ranks: Ranks) -> GradientMasks:
    """Read the masks of the rows that this process trains.

    Args:
        release: what is trained.
        model: sharded, with the names of the release; what needs no gradient needs no mask.
        ranks: the processes.

    Raises:
        VerificationError: the masks are damaged.
    """
    masks = release.weight_masks
    kept: dict[str, KeptWeights] = {}
    if masks is None:
        return GradientMasks(kept)
    from loram_hub.masked_lora.product import KeptWeights  # PEFT comes with it, which nothing else here needs

    for name in masks.names:
        parameter = model.get_parameter(name)
        rows = local_rows(parameter.shape[0], ranks)
        if parameter.requires_grad and rows.start < rows.stop:
            kept[name] = KeptWeights(masks.read_rows(name, rows.start, rows.stop), device=ranks.device)
    return GradientMasks(kept)
