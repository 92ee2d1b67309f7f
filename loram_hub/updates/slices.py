"""Which rows or columns of which weight belong to which head or channel, read off the table of the model's family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from loram_hub.architecture import SPACE_OF_UNIT, Architecture, Unit
from loram_hub.plan import Plan

Part = Literal["q", "k", "v", "o", "gate", "up", "down"]
HEAD_PARTS: tuple[Part, ...] = ("q", "k", "v", "o")
"""Parts with a norm per head."""
CHANNEL_PARTS: tuple[Part, ...] = ("gate", "up", "down")
"""Parts with a norm per MLP channel."""

# In the order in which every family's table has them; a fused projection has several units on one axis.
_PARTS: Mapping[tuple[Unit, int], tuple[Part, ...]] = {
    ("query", 0): ("q",),
    ("key_value", 0): ("k", "v"),
    ("query", 1): ("o",),
    ("channel", 0): ("gate", "up"),
    ("channel", 1): ("down",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Neighbouring lines of one weight that are one part."""

    part: Part
    """What they compute."""
    unit: Unit
    """`query`, `key_value` or `channel`."""
    axis: Literal[0, 1]
    """0 if the lines are rows (of B), 1 if they are columns (of A)."""
    before: tuple[Unit, ...]
    """Units that come before it on the axis."""


def slices_of(architecture: Architecture) -> dict[str, tuple[Slice, ...]]:
    """Return the slices of every projection of a layer, by the projection's module inside the layer."""
    left = {key: list(parts) for key, parts in _PARTS.items()}
    found: dict[str, tuple[Slice, ...]] = {}
    for weight in architecture.projections:
        found[weight.module] = tuple(
            Slice(part=left[unit, axis].pop(0), unit=unit, axis=axis, before=weight.axes[axis][:position])
            for axis in (0, 1)
            for position, unit in enumerate(weight.axes[axis])
            if unit in SPACE_OF_UNIT
        )
    return found


def item_count(architecture: Architecture, part: Part) -> int:
    """Heads, or channels, that a part has in a whole layer."""
    if part in CHANNEL_PARTS:
        return architecture.intermediate_size
    return architecture.num_attention_heads if part in ("q", "o") else architecture.num_key_value_heads


def lines_of(plan: Plan, layer: int, piece: Slice) -> slice:
    """Return where on its axis a slice lies in a layer of the sizes that the plan gives it."""
    architecture, sizes = plan.architecture, plan.layers[layer]
    start = sum(architecture.unit_width(unit, sizes) for unit in piece.before)
    return slice(start, start + architecture.unit_width(piece.unit, sizes))


def lines_per_item(architecture: Architecture, piece: Slice) -> int:
    """Rows (or columns) of one head or channel."""
    return 1 if piece.unit == "channel" else architecture.head_dim


def places_of(plan: Plan, layer: int, piece: Slice) -> npt.NDArray[np.int64] | slice:
    """Return which heads or channels of the base model the items of a slice are, ascending; all of a whole layer."""
    if layer not in plan.kept:
        return slice(None)
    groups = plan.kept[layer][SPACE_OF_UNIT[piece.unit]].astype(np.int64)
    architecture = plan.architecture
    per_group = architecture.group_rows[piece.unit] // lines_per_item(architecture, piece)
    return (groups[:, None] * per_group + np.arange(per_group)).reshape(-1)
