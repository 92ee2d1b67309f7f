"""From scores of single weights to one number per channel group."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from loram_hub.architecture import SPACE_OF_UNIT, Architecture, Space, Weight

Scores = Mapping[int, Mapping[Space, npt.NDArray[np.float32]]]
"""Per pruned layer and space: one fp32 score per group."""


class GroupScores:
    """Sum element scores of a layer's matrices into one number per channel group, in fp32."""

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._sums: dict[Space, npt.NDArray[np.float32]] = {
            "kv_heads": np.zeros(architecture.num_key_value_heads, dtype=np.float32),
            "channels": np.zeros(architecture.intermediate_size, dtype=np.float32),
        }

    def add(self, weight: Weight, element_scores_OI: torch.Tensor, *, abs_after_sum: bool = False) -> None:
        """Add a matrix's element scores, (O, I) fp32, over the lines that belong to prunable units."""
        for axis, units in enumerate(weight.axes):
            if not any(unit in SPACE_OF_UNIT for unit in units):
                continue
            lines = element_scores_OI.sum(dim=1 - axis)
            if abs_after_sum:
                lines = lines.abs()
            start = 0
            for unit in units:
                width = self._architecture.unit_width(unit, self._architecture.whole_layer)
                rows = self._architecture.group_rows[unit]
                groups = lines[start : start + width].view(-1, rows).sum(dim=1)
                self._sums[SPACE_OF_UNIT[unit]] += groups.cpu().numpy()
                start += width

    def result(self) -> dict[Space, npt.NDArray[np.float32]]:
        """Return the sums: one number per KV head, one per channel."""
        return self._sums
