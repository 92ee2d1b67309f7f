"""What a teacher pass is asked for, and what it takes. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from loram_hub.errors import InvalidRequestError

ComputeType = Literal["auto", "float32", "bfloat16"]

_LEAST = {
    "k": 1,
    "sequences": 1,
    "sequence_length": 2,
    "seed": 0,
    "held_out": 0,
    "shuffle_window": 1,
    "block_sequences": 1,
    "batch_size": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachingSettings:
    """Which targets are computed, and how.

    `sequence_length`, `seed`, `held_out`, `shuffle_window` and `repeat` are those of the alignment that the targets are
    for: they decide which tokens the stream gives.
    """

    k: int = 64
    """Most probable tokens kept for each position."""
    sequences: int = 204_800
    """Sequences of the stream, from its first: steps x batch size of the alignment, by default the paper's."""
    sequence_length: int = 512
    """Tokens of a sequence."""
    seed: int = 0
    """Seed of the order of texts."""
    held_out: int = 32
    """Sequences of each corpus that are kept for evaluation; they get no targets."""
    shuffle_window: int = 1000
    """Documents that are shuffled among each other."""
    repeat: bool = False
    """Whether a corpus that is used up starts again, in another order; otherwise that is an error."""
    block_sequences: int = 512
    """Sequences that go through the layers together, a multiple of `batch_size`: each block reads the weights once and
    holds its hidden states in memory. Changes speed and memory, not the targets."""
    batch_size: int = 8
    """Sequences in one forward pass of a layer."""
    dtype: ComputeType = "auto"
    """What layers compute in; `auto` is float32 on the CPU and the stored type elsewhere."""

    def __post_init__(self) -> None:
        """Check types and ranges; raises `InvalidRequestError`."""
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidRequestError(f"{name} is {value!r}; a whole number of at least {least} is needed.")
        if not isinstance(self.repeat, bool):
            raise InvalidRequestError(f"repeat is {self.repeat!r}; true or false is needed.")
        if self.dtype not in get_args(ComputeType):
            raise InvalidRequestError(f"dtype is {self.dtype!r}; choose one of {', '.join(get_args(ComputeType))}.")
        if self.block_sequences % self.batch_size:
            raise InvalidRequestError(
                f"block_sequences is {self.block_sequences}, which is no multiple of the batch_size {self.batch_size}: "
                "batches would be cut differently from block to block, and rounding with them."
            )

    @property
    def blocks(self) -> int:
        """Blocks, and so shards and passes over the weights."""
        return -(-self.sequences // self.block_sequences)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachingEstimate:
    """What a teacher pass would read, hold and write."""

    sequences: int
    """Sequences of the stream."""
    tokens: int
    """Positions that get targets."""
    blocks: int
    """Shards, and passes over the weights."""
    nbytes: int
    """Bytes of all shards."""
    weight_bytes: int
    """Bytes of weights that are read in all: the base's, once for each block."""
    hidden_bytes: int
    """Memory of one block's hidden states."""


def teacher_bytes(sequences: int, sequence_length: int, k: int) -> int:
    """Return the bytes of stored targets: for each position its token, and k tokens with a log-probability each.

    Args:
        sequences: of the stream.
        sequence_length: tokens of each.
        k: tokens kept for each position.
    """
    return sequences * sequence_length * (4 + k * (4 + 2))
