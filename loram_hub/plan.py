"""The pruning plan: which channel groups of which layers are kept, and what that costs in parameters and bytes.

Structured LoRAM (arXiv 2502.13533, LoRAM-Rand and LoRAM-Stru) leaves the first and last layers whole and prunes every
other layer by the same ratio r. With C = num_key_value_heads * head_dim, a pruned layer loses

    KV heads      (C - int(C * (1 - r))) // head_dim        (with all query heads of each)
    MLP channels  intermediate_size - int(intermediate_size * (1 - r))

which gives the parameter counts of the paper's tables 4 to 6 to the unit. From then on shapes come from the kept
indices, never from the ratio. M = 1 means *kept* throughout (the paper's eq. 3; its eqs. 5-6 use the opposite).

No torch, no weights: everything here follows from `config.json`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loram_hub.architecture import Architecture, Indices, LayerSizes, Space
from loram_hub.errors import InvalidRequestError, PlanMismatchError

PAPER_REDUCTION_OF_NF4 = 4
"""The paper multiplies the parameter ratio by 4 for NF4 (16 bits to 4), ignoring scales and the bf16 embeddings."""

NF4_BLOCK = 64
"""Weights that share one scale in bitsandbytes' NF4."""

NF4_NESTED_BLOCK = 256
"""8-bit scales that share one fp32 scale under double quantization."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruningSettings:
    """What a structured plan is asked for."""

    pruning_ratio: float
    """Share removed of each prunable dimension of each pruned layer, in [0, 1); 0.85 in `loram-0.85`."""
    keep_first: int = 4
    """Layers at the start that stay whole."""
    keep_last: int = 2
    """Layers at the end that stay whole."""
    round_to: int | None = None
    """Round the kept MLP channels up to a multiple of this (64 suits NF4); None keeps the paper's exact count."""

    def __post_init__(self) -> None:
        """Check types and ranges; raises `InvalidRequestError`."""
        whole = [self.keep_first, self.keep_last, *([] if self.round_to is None else [self.round_to])]
        if any(isinstance(count, bool) or not isinstance(count, int) for count in whole):
            raise InvalidRequestError(f"keep_first, keep_last and round_to must be whole numbers; found {whole}.")
        if isinstance(self.pruning_ratio, bool) or not isinstance(self.pruning_ratio, int | float):
            raise InvalidRequestError(f"pruning_ratio is {self.pruning_ratio!r}; a number is needed.")
        if not 0 <= self.pruning_ratio < 1:  # also refuses NaN
            raise InvalidRequestError(
                f"pruning_ratio is {self.pruning_ratio}; it is the share removed and must lie in [0, 1): 0.65, say."
            )
        if self.keep_first < 0 or self.keep_last < 0:
            raise InvalidRequestError(
                f"keep_first {self.keep_first} and keep_last {self.keep_last} must not be negative."
            )
        if self.round_to is not None and self.round_to < 1:
            raise InvalidRequestError(f"round_to is {self.round_to}; it must be a positive number of channels.")


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """Kept channel groups of every pruned layer.

    Built by `plan_from_scores` or read from a release; either way it has passed `__post_init__`. That of a sparse
    release keeps all groups and names the file with its masks, which may be gigabytes, by its hash.
    """

    architecture: Architecture
    kept: Mapping[int, Mapping[Space, Indices]]
    """Per pruned layer: kept `kv_heads` and `channels`, int32, strictly ascending. Layers not listed are whole."""
    masks_sha256: str | None = None
    """SHA-256 of `weight_masks.safetensors`, if single weights were removed instead of channel groups; `kept` is empty
    then, and every shape is the base's."""

    def __post_init__(self) -> None:
        """Check order, range and type of every index; raises `PlanMismatchError`."""
        if self.masks_sha256 is not None and self.kept:
            raise PlanMismatchError(
                f"The plan removes single weights and, of {len(self.kept)} layers, channel groups too; it is one or "
                "the other."
            )
        for layer, spaces in self.kept.items():
            if not 0 <= layer < self.architecture.num_hidden_layers:
                raise PlanMismatchError(
                    f"The plan prunes layer {layer}; the base model has {self.architecture.num_hidden_layers} layers."
                )
            whole = self.architecture.whole_layer
            limits: dict[Space, int] = {"kv_heads": whole.kv_heads, "channels": whole.channels}
            if set(spaces) != set(limits):
                raise PlanMismatchError(
                    f"Layer {layer} of the plan lists {sorted(spaces)}; {sorted(limits)} are needed."
                )
            for space, limit in limits.items():
                check_indices(spaces[space], limit, name=f"layer {layer} {space}")

    @property
    def layers(self) -> tuple[LayerSizes, ...]:
        """Sizes of every decoder layer after pruning."""
        whole = self.architecture.whole_layer
        return tuple(
            LayerSizes(kv_heads=self.kept[layer]["kv_heads"].size, channels=self.kept[layer]["channels"].size)
            if layer in self.kept
            else whole
            for layer in range(self.architecture.num_hidden_layers)
        )

    @property
    def digest(self) -> str:
        """SHA-256 over layer numbers and kept indices, or over masks: plans with the same digest keep the same."""
        digest = hashlib.sha256()
        if self.masks_sha256 is not None:
            digest.update(f"weight masks;{self.masks_sha256}".encode())
        for layer in sorted(self.kept):
            for space in ("kv_heads", "channels"):
                indices = self.kept[layer][space]
                digest.update(f"{layer}.{space}.{indices.size};".encode())
                digest.update(np.ascontiguousarray(indices, dtype="<i4").tobytes())
        return digest.hexdigest()

    def kept_on_axes(self, tensor: str) -> tuple[npt.NDArray[np.int64] | None, ...]:
        """Kept positions along each axis of a tensor of the base model; None where the axis stays whole.

        Raises:
            PlanMismatchError: the tensor lies in a decoder layer but is not part of the family.
        """
        found = self.architecture.weight_of(tensor)
        if found is None:
            return ()
        layer, weight = found
        if layer not in self.kept:
            return (None,) * len(weight.axes)
        return tuple(self.architecture.kept_on_axis(axis, self.kept[layer]) for axis in weight.axes)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the pruned model."""
        return self.architecture.tensor_shapes(self.layers)


def check_indices(indices: npt.NDArray[Any], limit: int, *, name: str) -> None:
    """Check kept indices from an untrusted source: int32, one axis, non-empty, strictly ascending, within [0, limit).

    Raises:
        PlanMismatchError: says which rule is broken, by which value.
    """
    if indices.dtype != np.int32 or indices.ndim != 1:
        raise PlanMismatchError(
            f"Mask index of {name} is {indices.dtype} with {indices.ndim} axes; int32 with one is needed."
        )
    if indices.size == 0:
        raise PlanMismatchError(f"Mask index of {name} keeps nothing; a layer needs at least one group.")
    steps = np.diff(indices.astype(np.int64))
    least, largest = int(indices.min()), int(indices.max())
    why = (
        f"{least} is negative"
        if least < 0
        else f"{largest} is beyond the last group"
        if largest >= limit
        else "an index follows a larger one"
        if np.any(steps < 0)
        else "an index is there twice"
        if np.any(steps == 0)
        else None
    )
    if why is not None:
        raise PlanMismatchError(
            f"Mask index of {name} must be strictly ascending within [0, {limit:,}); "
            f"it runs from {least} to {largest} over {indices.size} entries: {why}."
        )


def planned_sizes(architecture: Architecture, settings: PruningSettings) -> tuple[LayerSizes, ...]:
    """Sizes of every layer under the settings.

    Raises:
        InvalidRequestError: no layer is left to prune, or a pruned layer would have no KV head or no MLP channel.
    """
    pruned = pruned_layers(architecture, settings)
    whole = architecture.whole_layer
    share = 1 - settings.pruning_ratio
    kv_channels = architecture.num_key_value_heads * architecture.head_dim
    heads_removed = (kv_channels - int(kv_channels * share)) // architecture.head_dim
    channels = int(architecture.intermediate_size * share)  # in floats, like the paper's code: its counts depend on it
    if settings.round_to is not None:
        channels = min(-(-channels // settings.round_to) * settings.round_to, architecture.intermediate_size)
    small = LayerSizes(kv_heads=architecture.num_key_value_heads - heads_removed, channels=channels)
    if small.kv_heads < 1 or small.channels < 1:
        raise InvalidRequestError(
            f"pruning_ratio {settings.pruning_ratio} leaves {small.kv_heads} of {whole.kv_heads} KV heads and "
            f"{small.channels:,} of {whole.channels:,} MLP channels in a layer; each needs at least one. "
            "Use a smaller ratio."
        )
    return tuple(small if layer in pruned else whole for layer in range(architecture.num_hidden_layers))


def pruned_layers(architecture: Architecture, settings: PruningSettings) -> range:
    """Numbers of the layers that the settings prune.

    Raises:
        InvalidRequestError: keep_first and keep_last cover every layer.
    """
    first, end = settings.keep_first, architecture.num_hidden_layers - settings.keep_last
    if first >= end:
        raise InvalidRequestError(
            f"keep_first {settings.keep_first} and keep_last {settings.keep_last} leave none of the "
            f"{architecture.num_hidden_layers} layers to prune. Lower one of them."
        )
    return range(first, end)


def plan_from_scores(
    architecture: Architecture,
    settings: PruningSettings,
    scores: Mapping[int, Mapping[Space, npt.NDArray[np.float32]]],
) -> Plan:
    """Keep the most important groups of each pruned layer.

    Args:
        architecture: the base model's.
        settings: ratio and whole layers.
        scores: per pruned layer and space one fp32 score per group; higher is more important.

    Returns:
        The plan. Equal scores are settled by the lower index, so the plan is a pure function of its inputs.

    Raises:
        PlanMismatchError: a score is missing, has the wrong length, or is not finite.
    """
    sizes = planned_sizes(architecture, settings)
    kept: dict[int, dict[Space, Indices]] = {}
    for layer in pruned_layers(architecture, settings):
        counts: dict[Space, int] = {"kv_heads": sizes[layer].kv_heads, "channels": sizes[layer].channels}
        limits: dict[Space, int] = {
            "kv_heads": architecture.num_key_value_heads,
            "channels": architecture.intermediate_size,
        }
        kept[layer] = {}
        for space, count in counts.items():
            values = np.asarray(scores.get(layer, {}).get(space, ()))
            if values.shape != (limits[space],) or not np.isfinite(values).all():
                raise PlanMismatchError(
                    f"Importance of layer {layer} {space} must be {limits[space]:,} finite numbers, "
                    f"found shape {values.shape}{'' if np.isfinite(values).all() else ' with NaN or infinity'}."
                )
            best = np.argsort(-values, kind="stable")[:count]
            kept[layer][space] = np.sort(best).astype(np.int32)
    return Plan(architecture, kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """What pruning does to a model's size; the JSON of `loram plan`."""

    original_parameters: int
    """Parameters of the base model, tied embeddings counted once."""
    pruned_parameters: int
    """Parameters after pruning."""
    reduction: float
    """original / pruned."""
    paper_reduction: float
    """The paper's figure for QLoRAM: reduction x 4."""
    bf16_bytes: int
    """Bytes of the pruned weights in bf16."""
    nf4_bytes: int
    """Bytes of the pruned weights as QLoRAM holds them: projections in NF4 with double-quantized scales, the rest in
    bf16. Code tables and file headers (about 1.3 kB per projection) are not counted."""
    paper_nf4_gib: float
    """The paper's figure, in GiB: half a byte for every pruned parameter, embeddings included."""
    kept: tuple[LayerSizes, ...]
    """Channel groups kept in each decoder layer."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "kept": [{"layer": i, **asdict(sizes)} for i, sizes in enumerate(self.kept)]}


def parameter_counts(architecture: Architecture, layers: Sequence[LayerSizes]) -> ParameterCounts:
    """Count parameters and bytes of a model pruned to the given layer sizes."""
    original = sum(math.prod(shape) for shape in architecture.tensor_shapes().values())
    shapes = architecture.tensor_shapes(layers)
    pruned = sum(math.prod(shape) for shape in shapes.values())
    matrices = [math.prod(architecture.shape(weight, sizes)) for sizes in layers for weight in architecture.projections]
    return ParameterCounts(
        original_parameters=original,
        pruned_parameters=pruned,
        reduction=original / pruned,
        paper_reduction=original / pruned * PAPER_REDUCTION_OF_NF4,
        bf16_bytes=2 * pruned,
        nf4_bytes=sum(map(nf4_bytes, matrices)) + 2 * (pruned - sum(matrices)),
        paper_nf4_gib=pruned / 2 / 2**30,
        kept=tuple(layers),
    )


def nf4_bytes(elements: int) -> int:
    """Bytes of a matrix in NF4 with double quantization: packed codes, 8-bit scales, fp32 scales of the scales."""
    scales = -(-elements // NF4_BLOCK)
    return -(-elements // 2) + scales + 4 * -(-scales // NF4_NESTED_BLOCK)
