"""What an alignment run takes, told before it starts.

A process of W holds, of every tensor with d_0 rows of e elements each, ceil(d_0 / W) rows. With the sums S over all
tensors and S_t over the trained ones of ceil(d_0 / W) * e, it holds in bytes

    weights    w * S            w = 4 (`fp32`, `mixed`) or 2 (`bf16`)
    gradients  w * S_t
    optimizer  2 w * S_t        AdamW; 8-bit: 2 + 8/256 bytes per element (8 for tensors of less than 4,096)
    masks      S_p / 8          of a sparse release; S_p is S_t over the projections alone

so that N parameters, all trained in mixed precision, take 16 N / W bytes: 17.85 B parameters on 8 GPUs 35.7 GB each.
Besides, while it computes, it holds at most two gathered layers, the gathered embeddings, final norm and lm_head (R
elements), and one gathered gradient before and after it is converted; with L elements in the largest layer, c bytes
per element in arithmetic (4, 2, 2) and g in gradients that are added up (4, 4, 2)

    working    c * (R + 2 L) + (c + g) * max(R, L)

and the activations, which depend on `micro_batch_size`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loram_hub.alignment.settings import AlignmentSettings, Precision, is_trained
from loram_hub.architecture import LAYER_PREFIX
from loram_hub.masks import mask_bytes, projection_shapes
from loram_hub.plan import Plan

_STORED_BYTES: Mapping[str, int] = {"fp32": 4, "mixed": 4, "bf16": 2}
_COMPUTED_BYTES: Mapping[str, int] = {"fp32": 4, "mixed": 2, "bf16": 2}
_EIGHT_BIT_BLOCK = 256
_EIGHT_BIT_LEAST = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentEstimate:
    """What a run trains and what each of its processes holds."""

    processes: int
    """Processes that the bytes are for."""
    precision: str
    """`fp32`, `mixed` or `bf16`."""
    parameters: int
    """Parameters of the pruned model; zeros of a sparse one are counted, for they take as much memory."""
    trained_parameters: int
    """Those that are trained, zeros included."""
    tokens: int
    """Tokens that are trained on."""
    weight_bytes: int
    """Weights that a process holds."""
    gradient_bytes: int
    """Gradients that a process holds."""
    optimizer_bytes: int
    """Optimizer state that a process holds."""
    mask_bytes: int
    """Masks of a sparse release that a process holds."""
    working_bytes: int
    """Gathered weights and gradients while it computes, at most; activations not counted."""
    checkpoint_bytes: int
    """Size of a checkpoint: trained weights and optimizer state of all processes."""

    @property
    def process_bytes(self) -> int:
        """What a process holds besides activations."""
        held = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.mask_bytes
        return held + self.working_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON values."""
        return {**asdict(self), "process_bytes": self.process_bytes}


def estimate(plan: Plan, settings: AlignmentSettings, *, precision: Precision, processes: int) -> AlignmentEstimate:
    """Estimate a run from the plan alone.

    Args:
        plan: the release's, which gives every shape.
        settings: of the run.
        precision: the one that `auto` stands for.
        processes: how many.
    """
    shapes = plan.tensor_shapes()
    trained = {name: shape for name, shape in shapes.items() if is_trained(name, settings.trainable)}
    stored, computed = _STORED_BYTES[precision], _COMPUTED_BYTES[precision]
    summed = 4 if precision == "mixed" else stored
    held = {name: -(-shape[0] // processes) * math.prod(shape[1:]) for name, shape in shapes.items()}
    optimizer = sum(_optimizer_bytes(held[name], settings, stored) for name in trained)
    by_group: dict[str, int] = {}
    for name, shape in shapes.items():
        group = ".".join(name.split(".")[:3]) if name.startswith(LAYER_PREFIX) else ""
        by_group[group] = by_group.get(group, 0) + math.prod(shape)
    root = by_group.pop("")
    largest = max(by_group.values())
    trained_count = sum(math.prod(shape) for shape in trained.values())
    return AlignmentEstimate(
        processes=processes,
        precision=precision,
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        trained_parameters=trained_count,
        tokens=settings.tokens,
        weight_bytes=stored * sum(held.values()),
        gradient_bytes=stored * sum(held[name] for name in trained),
        optimizer_bytes=optimizer,
        mask_bytes=_mask_bytes(plan, trained, processes),
        working_bytes=computed * (root + 2 * largest) + (computed + summed) * max(root, largest),
        checkpoint_bytes=stored * trained_count
        + sum(_optimizer_bytes(math.prod(shape), settings, stored) for shape in trained.values()),
    )


def _mask_bytes(plan: Plan, trained: Mapping[str, tuple[int, ...]], processes: int) -> int:
    if plan.masks_sha256 is None:
        return 0
    shapes = [trained[name] for name in projection_shapes(plan)]
    return sum(mask_bytes(-(-rows // processes), columns) for rows, columns in shapes)


def _optimizer_bytes(elements: int, settings: AlignmentSettings, stored: int) -> int:
    if settings.optimizer == "adamw":
        return 2 * stored * elements
    if elements < _EIGHT_BIT_LEAST:
        return 8 * elements
    return 2 * elements + 8 * -(-elements // _EIGHT_BIT_BLOCK)
