"""What an adapter's weight file holds, by its header alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loram_hub.tensors import TensorInfo, read_headers

TensorEntry = TensorInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The header of a safetensors file."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    """Type, shape and place by name."""


def read_header(path: Path) -> Header:
    """Read and check a header; raises `VerificationError` if it is damaged."""
    return Header(path=path, tensors=read_headers(path))
