"""Norms of an adapter's update; the definitions stand in the package's docstring."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from loram_hub.adapter import LM_HEAD_MODULE
from loram_hub.architecture import Architecture
from loram_hub.files import fsync_file, fsync_folder, resource_errors
from loram_hub.hub import ADAPTER_FILES, resolve
from loram_hub.plan import Plan
from loram_hub.updates.reading import StoredAdapter, find_plan, open_adapter
from loram_hub.updates.slices import (
    CHANNEL_PARTS,
    HEAD_PARTS,
    Part,
    Slice,
    item_count,
    lines_of,
    lines_per_item,
    places_of,
    slices_of,
)

Norms = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class UpdateNorms:
    """L2 norms of an update s B A, in the units of the weights; NaN where there is no LoRA."""

    heads: Mapping[Part, Norms]
    """For `q`, `k`, `v` and `o`: the norm of each head's part of the update, (layers, heads): num_attention_heads for
    q and o, num_key_value_heads for k and v. 0 for pruned heads."""
    channel_means: Mapping[Part, Norms]
    """For `gate`, `up` and `down`: the mean norm over a layer's active channels, (layers,); 0 if none is active."""
    active_channels: Mapping[Part, Counts]
    """For the same: how many channels are active, (layers,); 0 where there is no LoRA."""
    channels: Mapping[Part, Norms] | None
    """For the same: the norm of each channel, (layers, intermediate_size), 0 for pruned ones; None if not asked for."""
    lm_head: float
    """Norm of the lm_head's whole update."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, null for NaN. Norms per channel are left out: they are millions in a large model."""
        return {
            "heads": {part: _plain(norms) for part, norms in self.heads.items()},
            "channel_means": {part: _plain(norms) for part, norms in self.channel_means.items()},
            "active_channels": {part: counts.tolist() for part, counts in self.active_channels.items()},
            "lm_head": None if math.isnan(self.lm_head) else self.lm_head,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all arrays to a safetensors file, which appears whole or not at all and replaces what is there.

        They are `heads.q`, ..., `channel_means.gate`, ..., `active_channels.gate`, ..., `channels.gate`, ... if there
        are any, and `lm_head`, of one number.

        Raises:
            ResourceError: the disk is full or not writable.
        """
        groups: dict[str, Mapping[Part, npt.NDArray[Any]]] = {
            "heads": self.heads,
            "channel_means": self.channel_means,
            "active_channels": self.active_channels,
            "channels": self.channels or {},
        }
        arrays = {f"{group}.{part}": values for group, parts in groups.items() for part, values in parts.items()}
        file = Path(path).expanduser()
        aside = file.with_name(f".{file.name}.partial")
        with resource_errors(f"Writing {file}"):
            aside.write_bytes(save({**arrays, "lm_head": np.array([self.lm_head])}))
            fsync_file(aside)
            aside.replace(file)
            fsync_folder(file.parent)


def update_norms(
    adapter: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    per_channel: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> UpdateNorms:
    """Measure what an adapter adds to each attention head and MLP channel: where training went, and how far.

    Pruned, recovered and ordinary adapters are measured alike, so that LoRAM and LoRA on the base model can be laid
    side by side. Factors are read one module at a time; no weights are needed.

    Args:
        adapter: PEFT folder or Hub id.
        base: the model that the adapter is for, as folder, `config.json` or Hub id: the release that a pruned adapter
            was trained on, the base model of any other. Only its config and, of a release, the mask indexes are read.
            None for the one that the adapter names.
        per_channel: give the norm of every channel as well (8 bytes each).
        revision: of `base` on the Hub; None for the one that the adapter names.
        token: of the Hub.

    Returns:
        The norms, at the places that heads and channels have in the base model.

    Raises:
        InvalidRequestError: nothing says which model the adapter is for.
        CheckpointError: a file is missing, or what is named is no model.
        VerificationError: a file is torn, or holds NaN or infinity.
        UnsupportedAdapterError: it is more than plain LoRA, or lacks factors that it declares.
        PlanMismatchError: the adapter does not have the model's shapes, or was trained on another release.
        AccessError: the Hub refused or could not be reached.

    Example:
        >>> from loram_hub import update_norms  # doctest: +SKIP
        >>> update_norms("my-adapter", base="org/model").heads["q"].shape  # doctest: +SKIP
        (80, 64)
    """
    opened = open_adapter(resolve(adapter, token=token, files=ADAPTER_FILES).folder)
    plan = find_plan(opened, base, revision, token)
    found = _Collected(plan.architecture)
    for module in opened.pairs:
        if module == LM_HEAD_MODULE:
            found.lm_head = math.sqrt(_lines(opened, module, axis=0)[0].sum())
        else:
            found.add(opened, plan, module)
    return UpdateNorms(
        heads={part: found.norms[part] for part in HEAD_PARTS},
        channel_means=found.means,
        active_channels=found.active,
        channels={part: found.norms[part] for part in CHANNEL_PARTS} if per_channel else None,
        lm_head=found.lm_head,
    )


class _Collected:
    """Norms as they come in, module by module."""

    def __init__(self, architecture: Architecture) -> None:
        layers = architecture.num_hidden_layers
        self._slices = slices_of(architecture)
        self.norms = {
            part: np.full((layers, item_count(architecture, part)), np.nan) for part in (*HEAD_PARTS, *CHANNEL_PARTS)
        }
        self.means = {part: np.full(layers, np.nan) for part in CHANNEL_PARTS}
        self.active = {part: np.zeros(layers, dtype=np.int64) for part in CHANNEL_PARTS}
        self.lm_head = math.nan

    def add(self, adapter: StoredAdapter, plan: Plan, module: str) -> None:
        """Take in the norms of a projection."""
        place = plan.architecture.weight_of(f"{module}.weight")
        assert place is not None  # find_plan refused it otherwise
        layer, weight = place
        pieces = self._slices[weight.module]
        squares, is_active = _lines(adapter, module, axis=pieces[0].axis)
        for piece in pieces:
            lines = lines_of(plan, layer, piece)
            items = squares[lines].reshape(-1, lines_per_item(plan.architecture, piece)).sum(axis=1)
            row = self.norms[piece.part][layer]
            row[:] = 0.0  # what was pruned away gains nothing
            row[places_of(plan, layer, piece)] = np.sqrt(items)
            if piece.part in CHANNEL_PARTS:
                self._add_mean(piece, layer, np.sqrt(items), is_active[lines])

    def _add_mean(self, piece: Slice, layer: int, norms: Norms, is_active: npt.NDArray[np.bool_]) -> None:
        count = int(is_active.sum())
        self.active[piece.part][layer] = count
        self.means[piece.part][layer] = norms[is_active].mean() if count else 0.0


def _lines(adapter: StoredAdapter, module: str, *, axis: int) -> tuple[Norms, npt.NDArray[np.bool_]]:
    """Return the squared norm of each row (axis 0) or column (1) of a module's update, and which lines are active."""
    lora_A, lora_B = (factor.astype(np.float64) for factor in adapter.factors(module))
    if axis == 0:
        squares = np.einsum("or,or->o", lora_B @ (lora_A @ lora_A.T), lora_B)
    else:
        squares = np.einsum("ri,ri->i", (lora_B.T @ lora_B) @ lora_A, lora_A)
    is_active: npt.NDArray[np.bool_] = (lora_B != 0).any(axis=1) if axis == 0 else (lora_A != 0).any(axis=0)
    squares *= adapter.pairs[module].scale ** 2
    return np.maximum(squares, 0.0), is_active  # rounding can leave a square of 0 below it


def _plain(norms: Norms) -> list[Any]:
    """Return nested lists, None for NaN."""
    values = norms.astype(object)
    values[np.isnan(norms)] = None
    listed: list[Any] = values.tolist()
    return listed
