"""What can leave the memory of a small GPU besides the projections, which are NF4 already: embedding and lm_head.

For Llama-3.1-70B at a ratio of 0.85 these two are 3.9 of 11.5 GiB in 16 bit. `loram_hub.lowmemory` applies the options
to a model; the sizes here are those that it leaves, to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from loram_hub import plan
from loram_hub.errors import InvalidRequestError

EmbeddingPlace = Literal["device", "cpu", "int8"]
HeadPlace = Literal["device", "int8", "nf4"]

HEAD_PIECE = 2**25
"""Weights of a compressed lm_head that are decompressed at a time (64 MiB in 16 bit)."""
_SCALE_BYTES = 4
_NF4_TABLE_BYTES = 4 * (16 + 256 + 1)  # code tables of values and of scales, and the mean of the scales


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryOptions:
    """How to train in less memory than NF4 projections alone need. The default changes nothing."""

    embedding: EmbeddingPlace = "device"
    """`cpu`: in main memory, only the rows of a batch go to the device, values are unchanged. `int8`: 8 bits per weight
    and a scale per row. A tied embedding can leave 16 bit only together with the lm_head."""
    lm_head: HeadPlace = "device"
    """`int8`: 8 bits per weight and a scale per row. `nf4`: as the projections of an NF4 release."""
    activation_offloading: bool = False
    """Keep what the backward pass needs in main memory: TRL's own option, for GPUs. Together with gradient
    checkpointing that is one hidden state per layer."""

    def __post_init__(self) -> None:
        """Check values; raises `InvalidRequestError`."""
        for name, allowed in (("embedding", get_args(EmbeddingPlace)), ("lm_head", get_args(HeadPlace))):
            if getattr(self, name) not in allowed:
                raise InvalidRequestError(f"{name} is {getattr(self, name)!r}; one of {', '.join(allowed)} is needed.")
        if not isinstance(self.activation_offloading, bool):
            raise InvalidRequestError(f"activation_offloading is {self.activation_offloading!r}; true or false.")

    def check_tied(self) -> None:
        """Check the options for a model whose lm_head is its embedding.

        Raises:
            InvalidRequestError: one of the two would stay as it is and keep the weight that they share on the device.
        """
        if (self.embedding == "device") != (self.lm_head == "device"):
            raise InvalidRequestError(
                f"embedding={self.embedding!r} with lm_head={self.lm_head!r} saves nothing: this model's lm_head is "
                "its embedding, one weight for both. Change both, or neither."
            )

    def device_bytes(self, *, vocab_size: int, hidden_size: int, tied: bool, weight_bytes: int = 2) -> tuple[int, int]:
        """Return the bytes of embedding and lm_head that stay on the device.

        Args:
            vocab_size: rows.
            hidden_size: columns.
            tied: whether the lm_head is the embedding; what they share is counted with the embedding.
            weight_bytes: of a weight that is not compressed.

        Raises:
            InvalidRequestError: the options do not fit tied embeddings.
        """
        if tied:
            self.check_tied()
        nbytes = {
            "device": weight_bytes * vocab_size * hidden_size,
            "cpu": 0,
            "int8": int8_bytes(vocab_size, hidden_size),
            "nf4": nf4_bytes(vocab_size, hidden_size),
        }
        is_shared = tied and self.embedding == self.lm_head
        return nbytes[self.embedding], 0 if is_shared else nbytes[self.lm_head]


def int8_bytes(rows: int, columns: int) -> int:
    """Bytes of a matrix with 8 bits per weight and an fp32 scale per row."""
    return rows * columns + _SCALE_BYTES * rows


def nf4_bytes(rows: int, columns: int) -> int:
    """Bytes of a matrix in NF4 with double quantization, its code tables included."""
    return plan.nf4_bytes(rows * columns) + _NF4_TABLE_BYTES


__all__ = ["HEAD_PIECE", "MemoryOptions", "int8_bytes", "nf4_bytes"]
