"""An embedding whose table stays in main memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn


class HostEmbedding(nn.Module):
    """Look rows up in main memory and send them to where the token ids are.

    The embedding that it stands for does the looking up, so what a family adds to it (Gemma 3 scales its rows) stays.
    Its table is neither parameter nor buffer of the model: moves to a device leave it, distributed training does not
    send it, and `model.device` means the rest. Only its type follows the model's, and `state_dict` has it under its
    usual name. 2,048 rows of Llama-3.1-70B are 32 MiB, which is little beside what a step of 2,048 tokens computes; a
    pinned copy of the table would take twice the main memory and save no copy, for the rows of a batch are gathered
    first.

    Args:
        embedding: of the model, on any device; it is moved to main memory, and frozen.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        vars(self)["_embedding"] = embedding.to("cpu").requires_grad_(False)  # past nn.Module, which would register it

    _embedding: nn.Embedding

    @property
    def weight(self) -> torch.Tensor:
        """The table, (num_embeddings, embedding_dim), on the CPU."""
        return self._embedding.weight

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self._embedding.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self._embedding.embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of ids (int64, any shape), on the device of the ids."""
        rows: torch.Tensor = self._embedding(ids.to("cpu"))
        return rows.to(ids.device)

    def extra_repr(self) -> str:
        """Show the size."""
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Follow changes of type and no others: what `to`, `cuda`, `half` and the like come down to."""
        self._embedding.to(fn(self.weight.new_empty(0)).dtype)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: ANN401
        self._embedding._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:  # noqa: ANN401
        self._embedding._load_from_state_dict(*args)


__all__ = ["HostEmbedding"]
