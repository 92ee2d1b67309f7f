"""The settings of a fine-tuning that decide what it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from loram_hub.architecture import Architecture
from loram_hub.errors import InvalidRequestError, UnsupportedAdapterError
from loram_hub.estimation.options import MemoryOptions

Optimizer = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Reserves:
    """What is set aside, because no formula gives it."""

    context_bytes: int = 768 * MIB
    """For the driver, the CUDA context and loaded kernels; an assumption, which differs by card and driver."""
    fragmentation: float = 0.1
    """Share of what a step allocates and frees that the allocator may not be able to use again; a margin."""

    def __post_init__(self) -> None:
        """Check ranges; raises `InvalidRequestError`."""
        if self.context_bytes < 0 or not 0 <= self.fragmentation < 1:
            raise InvalidRequestError(
                f"Reserves of {self.context_bytes} bytes and a share of {self.fragmentation}: bytes from 0 and a share "
                "in [0, 1) are needed."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingShape:
    """The settings of a fine-tuning that decide what it needs."""

    sequence_length: int = 512
    """Tokens of the longest sequence."""
    micro_batch: int = 1
    """Sequences that go through the model at a time."""
    rank: int = 8
    """Of LoRA."""
    targets: tuple[str, ...] | None = None
    """Last names of the modules that have LoRA (`q_proj`, `v_proj`); None for every projection of the layers."""
    dropout: float = 0.05
    """Of LoRA, in [0, 1)."""
    optimizer: Optimizer = "paged_adamw_8bit"
    """By the Trainer's name."""
    checkpointing: bool = True
    """Whether activations are computed again in the backward pass."""
    padded: bool | None = None
    """Whether batches have padding, and thus a mask; None where they have more than one sequence."""
    masked_lora: bool = False
    """Whether LoRA on a sparse release is masked: each update is formed as a whole, and zero where the weight is."""
    options: MemoryOptions = field(default_factory=MemoryOptions)
    """Where embedding and lm_head are."""
    processes: int = 1
    """GPUs that train together, each with the whole release."""
    reserves: Reserves = field(default_factory=Reserves)
    """What is set aside."""

    def __post_init__(self) -> None:
        """Check ranges; raises `InvalidRequestError`."""
        for name in ("sequence_length", "micro_batch", "rank", "processes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**31:
                raise InvalidRequestError(f"{name} is {value!r}; a whole number from 1 is needed.")
        if not 0 <= self.dropout < 1:
            raise InvalidRequestError(f"dropout is {self.dropout}; a share in [0, 1) is needed.")
        if self.optimizer not in get_args(Optimizer):
            raise InvalidRequestError(f"optimizer is {self.optimizer!r}; one of {', '.join(get_args(Optimizer))}.")
        if self.targets is not None and not self.targets:
            raise InvalidRequestError("targets is empty; name modules, or leave it out for every projection.")

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.sequence_length


def chosen_targets(architecture: Architecture, targets: tuple[str, ...] | None) -> frozenset[str]:
    """Return the last names of the modules that have LoRA.

    Raises:
        InvalidRequestError: one of them is none of the model's.
        UnsupportedAdapterError: one of them is the lm_head.
    """
    known = {weight.module.rpartition(".")[2] for weight in architecture.projections}
    if targets is None:
        return frozenset(known)
    if "lm_head" in targets:
        raise UnsupportedAdapterError(
            "targets names the lm_head. TRL computes the loss from its weight directly, so that an adapter on it would "
            "never be trained, and servers refuse one. Leave it out."
        )
    unknown = sorted(set(targets) - known)
    if unknown:
        raise InvalidRequestError(
            f"targets names {unknown[0]!r}, which a {architecture.family.model_type} model does not have; "
            f"it has {', '.join(sorted(known))}."
        )
    return frozenset(targets)
