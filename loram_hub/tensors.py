"""Safetensors files as untrusted input: a strict header, single tensors by `pread`, and numbers that are numbers.

The safetensors package checks offsets, but takes a header in which a name occurs twice, hundreds of thousands of empty
tensors, axes of any length where another axis is 0, and NaN. Everything that is read from outside passes here first.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from loram_hub.errors import CheckpointError, VerificationError
from loram_hub.files import parse_json, sha256_of

MAX_HEADER_BYTES = 8 * 1024 * 1024
"""Parsed JSON can take thirty times the memory of its text; 70 B parameters in NF4 need a header of 0.5 MB."""
MAX_TENSORS = 100_000
MAX_AXES = 8
MAX_AXIS = 2**36
"""Longest axis that is believed: no tensor has so many numbers, and products of two still fit 128 bits."""

_DTYPES: Mapping[str, npt.DTypeLike] = {
    "F64": np.float64, "I64": np.int64, "U64": np.uint64, "F32": np.float32, "I32": np.int32, "U32": np.uint32,
    "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I16": np.int16, "U16": np.uint16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
# Unsigned integers of a float's width, and the bits of infinity: what is not finite compares as no less.
_INFINITY: Mapping[str, tuple[npt.DTypeLike, npt.DTypeLike, int]] = {
    "BF16": (np.int16, np.uint16, 0x7F80),
    "F16": (np.int16, np.uint16, 0x7C00),
    "F32": (np.int32, np.uint32, 0x7F800000),
    "F64": (np.int64, np.uint64, 0x7FF0000000000000),
}
_PIECE = 1024 * 1024  # fits the second-level cache of current processors, so the numbers are looked at while there


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is, from the header alone."""

    file: Path
    dtype: str
    """safetensors code: `BF16`, `F32`, `U8`, ..."""
    shape: tuple[int, ...]
    start: int
    """Position of the first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * item_bytes(self.dtype)


def item_bytes(dtype: str) -> int:
    """Bytes of one number of a safetensors type."""
    return np.dtype(_DTYPES[dtype]).itemsize


def read_headers(file: Path) -> dict[str, TensorInfo]:
    """Read name, type, shape and place of every tensor of a safetensors file, without its data.

    Raises:
        VerificationError: the file is truncated, its header is damaged, or claims more than any model has.
    """
    try:
        with file.open("rb") as opened:
            text, start, size = _header_text(opened, file)
    except (OSError, UnicodeDecodeError) as err:
        raise _unsound(file, str(err)) from err
    try:
        entries = parse_json(text, source=f"The header of {file}")
    except VerificationError as err:
        raise _unsound(file, str(err)) from err
    _check_metadata(entries.pop("__metadata__", {}), file)
    if len(entries) > MAX_TENSORS:
        raise _unsound(file, f"it lists {len(entries):,} tensors, at most {MAX_TENSORS:,} are read")
    infos = {name: _info(name, entry, file, start) for name, entry in entries.items()}
    _check_places(infos, file, start, size)
    return infos


def _header_text(opened: BinaryIO, file: Path) -> tuple[str, int, int]:
    """Return the header's text, where the data begins, and the size of the file."""
    size = os.fstat(opened.fileno()).st_size
    length = int.from_bytes(opened.read(8), "little")
    if size < 8 or length > size - 8:
        raise _unsound(file, f"it has {size:,} bytes, too few for the header it announces")
    if length > MAX_HEADER_BYTES:
        raise _unsound(file, f"its header has {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
    data = opened.read(length)
    if data[:1] != b"{":
        raise _unsound(file, "its header does not begin with an opening brace")
    return data.decode("utf-8"), 8 + length, size


def _unsound(file: Path, why: str) -> VerificationError:
    return VerificationError(f"{file} is not a sound safetensors file: {why}.")


def _check_metadata(values: object, file: Path) -> None:
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise _unsound(file, "its __metadata__ must map text to text")


def _info(name: str, entry: object, file: Path, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _unsound(file, f"the entry of {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _unsound(file, f"{name!r} has the unknown type {dtype!r:.100}")
    if not _are_counts(shape, MAX_AXIS) or len(shape) > MAX_AXES:
        raise _unsound(file, f"{name!r} has the shape {shape!r:.100}, which no tensor has")
    if not _are_counts(offsets, 2**63) or len(offsets) != 2:
        raise _unsound(file, f"{name!r} has the data_offsets {offsets!r:.100}")
    info = TensorInfo(file, dtype, tuple(shape), start + offsets[0])
    if info.nbytes != offsets[1] - offsets[0]:
        raise _unsound(
            file, f"{name!r} has {offsets[1] - offsets[0]:,} bytes where {dtype} {info.shape} needs {info.nbytes:,}"
        )
    return info


def _are_counts(values: object, largest: int) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest for value in values
    )


def _check_places(infos: Mapping[str, TensorInfo], file: Path, start: int, size: int) -> None:
    """Check that the tensors fill the file: no holes, where anything could hide, no overlaps, nothing after the end."""
    end = start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != end:
            raise _unsound(file, f"{'a hole lies before' if info.start > end else 'another tensor overlaps'} {name!r}")
        end += info.nbytes
    if end != size:
        raise _unsound(file, f"its tensors end at byte {end:,}, the file has {size:,}")


def read_rows(info: TensorInfo, first: int, last: int) -> npt.NDArray[Any]:
    """Read the rows `first` to `last` (excluded) of a tensor's first axis.

    Raises:
        CheckpointError: the file ends too early.
    """
    row = info.nbytes // info.shape[0]
    with info.file.open("rb") as file:
        data = _pread(file.fileno(), (last - first) * row, info.start + first * row)
    if len(data) != (last - first) * row:
        raise CheckpointError(f"{info.file} ends within a tensor. Download or copy it again.")
    return np.frombuffer(data, dtype=_DTYPES[info.dtype]).reshape(last - first, *info.shape[1:])


def _pread(descriptor: int, nbytes: int, start: int) -> bytes:
    """Read up to `nbytes`, in as many calls as it takes: Linux gives 2 GiB at a time at most."""
    first = os.pread(descriptor, nbytes, start)
    if len(first) in (0, nbytes):
        return first
    parts = [first]
    read = len(first)
    while read < nbytes and (part := os.pread(descriptor, nbytes - read, start + read)):
        parts.append(part)
        read += len(part)
    return b"".join(parts)


def read_array(info: TensorInfo) -> npt.NDArray[Any]:
    """Read a whole tensor; for small ones. Raises `CheckpointError` if the file ends too early."""
    if 0 in info.shape or not info.shape:
        with info.file.open("rb") as file:
            data = os.pread(file.fileno(), info.nbytes, info.start)
        return np.frombuffer(data, dtype=_DTYPES[info.dtype]).reshape(info.shape)
    return read_rows(info, 0, info.shape[0])


def is_finite(data: memoryview | bytes, dtype: str) -> bool:
    """Whether the numbers of a float type hold neither NaN nor infinity; without temporaries."""
    signed, unsigned, infinity = _INFINITY[dtype]
    bits = np.frombuffer(data, dtype=unsigned)
    sign = 1 << (8 * bits.itemsize - 1)
    # As signed integers the positive numbers come out on top, in their own order; as unsigned ones the negative.
    return bits.size == 0 or (int(bits.view(signed).max()) < infinity and int(bits.max()) < infinity + sign)


def sha256_of_finite(path: Path) -> str:
    """Hash a file and, if it is a safetensors file, look at its floating-point numbers in the same read.

    Returns:
        The SHA-256 as 64 hexadecimal digits.

    Raises:
        VerificationError: a tensor holds NaN or infinity; or the header is damaged.
    """
    if path.suffix != ".safetensors":
        return sha256_of(path)
    infos = read_headers(path)
    digest = hashlib.sha256()
    begin = 0
    with path.open("rb", buffering=0) as file:
        for dtype, piece in _pieces(file, _runs(infos, path.stat().st_size)):
            digest.update(piece)
            if dtype in _INFINITY and not is_finite(piece, dtype):
                raise VerificationError(
                    f"Tensor {_culprit(infos, begin, piece)!r} in {path} holds NaN or infinity. Nothing sound comes "
                    "of it; use another copy, or ask its publisher."
                )
            begin += len(piece)
    return digest.hexdigest()


def _runs(infos: Mapping[str, TensorInfo], size: int) -> list[tuple[str, int]]:
    """Divide a file into (type, bytes), neighbours of one type together; what comes before the tensors has no type."""
    tensors = sorted((info for info in infos.values() if info.nbytes), key=lambda info: info.start)
    runs = [("", tensors[0].start if tensors else size)]
    for info in tensors:
        if runs[-1][0] == info.dtype:
            runs[-1] = (info.dtype, runs[-1][1] + info.nbytes)
        else:
            runs.append((info.dtype, info.nbytes))
    return runs


def _pieces(file: RawIOBase, runs: list[tuple[str, int]]) -> Iterator[tuple[str, memoryview]]:
    """Read a file run by run, in pieces of whole numbers that lie in one buffer."""
    buffer = memoryview(bytearray(_PIECE))
    for dtype, length in runs:
        while length:
            piece = buffer[: min(length, _PIECE)]
            filled = 0
            while filled < len(piece):
                count = file.readinto(piece[filled:])
                if not count:
                    raise CheckpointError("A file became shorter while it was read.")
                filled += count
            length -= len(piece)
            yield dtype, piece


def _culprit(infos: Mapping[str, TensorInfo], begin: int, piece: memoryview) -> str:
    """Name the first tensor with a number that is none, within the piece of its file that begins at `begin`."""
    end = begin + len(piece)
    for name, info in sorted(infos.items(), key=lambda item: item[1].start):
        first, last = max(info.start, begin), min(info.start + info.nbytes, end)
        if first < last and not is_finite(piece[first - begin : last - begin], info.dtype):
            return name
    raise AssertionError("a piece is not finite only if a tensor in it is not")
