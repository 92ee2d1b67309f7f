"""What stands in for parts of a model, and for memory, while the rest is streamed."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast


class Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it is called with and passes the hidden states through."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._stands_for = [layer]  # in a list, so that it is no submodule
        self.hidden_states: torch.Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (as nn.Module's)
        """Answer for the layer, for models that ask one for its attention type."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"][0], name)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 (any layer's)
        """Keep the arguments, return the hidden states as they are."""
        self.hidden_states, self.kwargs = hidden_states, kwargs
        return hidden_states


class HiddenStates(nn.Module):
    """Stands in for a model's body: its last hidden states are given."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.hidden_states: torch.Tensor | None = None

    def forward(self, **_: Any) -> BaseModelOutputWithPast:  # noqa: ANN401 (any model's)
        """Return the final norm of the given hidden states."""
        return BaseModelOutputWithPast(last_hidden_state=self.norm(self.hidden_states))


def first_output(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return a decoder layer's hidden states, whether or not it returns more than them."""
    return output[0] if isinstance(output, tuple) else output


class TensorFile:
    """Equal tensors in a temporary file: layer inputs cost disk, not memory (70B, 10 x 64 tokens: 1.7 GB)."""

    def __enter__(self) -> TensorFile:
        self._file = tempfile.TemporaryFile(prefix="loram-layers-")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, slot: int, tensor: torch.Tensor) -> None:
        """Store a CPU tensor; all have the shape and type of the first."""
        self._like = torch.empty_like(tensor, device="meta")
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.seek(slot * data.nbytes)
        self._file.write(data.data)

    def read(self, slot: int) -> torch.Tensor:
        """Read a tensor back."""
        nbytes = self._like.numel() * self._like.element_size()
        self._file.seek(slot * nbytes)
        data = bytearray(nbytes)
        self._file.readinto(data)
        return torch.frombuffer(data, dtype=self._like.dtype).view(self._like.shape)


def return_freed_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps blocks of up to 32 MB in its heap once one of that size was freed. Matrices, gradients and activations
    come and go in sizes that do not fit each other's holes: some 10 MB of each layer of 50 MB would stay behind.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and needs none
        if trim is not None:
            trim(0)
