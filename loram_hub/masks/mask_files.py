"""`weight_masks.safetensors`: one mask per projection, `<weight name>.mask`, U8 (out_features, bytes of a row).

Apart from the mask index, which is small and fetched by whoever recovers an adapter: masks are a bit per weight, eight
gigabytes for 68 billion. They are written and read a few megabytes at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from loram_hub.errors import CheckpointError, InvalidRequestError, PlanMismatchError, VerificationError
from loram_hub.files import resource_errors
from loram_hub.masks.codes import Mask, decode_mask, encode_mask, row_bytes
from loram_hub.masks.patterns import Pattern
from loram_hub.tensors import TensorInfo, read_headers, read_rows

WEIGHT_MASKS = "weight_masks.safetensors"

_SUFFIX = ".mask"
_ALIGNMENT = 8
_PIECE = 8 * 1024 * 1024  # weights whose mask is in memory at a time


class MaskWriter:
    """Write `weight_masks.safetensors` mask by mask, in any order: a context manager.

    Every place follows from the shapes alone, so the header comes first and the bytes are a function of the masks.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], pattern: Pattern) -> None:
        """Prepare to write; the file is created on entering.

        Args:
            path: the file.
            shapes: (out_features, in_features) by the full name of each projection's weight.
            pattern: of all masks.

        Raises:
            InvalidRequestError: the columns of a matrix do not divide into groups of the pattern.
        """
        self._path = path
        self._shapes = dict(shapes)
        self._pattern = pattern
        self._missing = set(shapes)
        self._header, self._starts = _layout(self._shapes, pattern)
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Create the file with its header."""
        with resource_errors(f"Writing {self._path}"):
            self._file = self._path.open("wb")
            self._file.write(self._header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; raises `InvalidRequestError` if a mask was never added, and removes what is incomplete."""
        assert self._file is not None
        with resource_errors(f"Writing {self._path}"):
            self._file.close()
        if self._missing or kind is not None:
            self._path.unlink(missing_ok=True)
        if self._missing and kind is None:
            raise InvalidRequestError(
                f"{self._path} lacks {len(self._missing)} masks, first that of {min(self._missing)!r}. Add them all."
            )

    def add(self, name: str, mask_OI: Mask) -> None:
        """Write the mask of one weight.

        Args:
            name: full name of the weight.
            mask_OI: bool (out_features, in_features), true where a weight is kept.

        Raises:
            InvalidRequestError: the weight has no place here or has its mask already, or the mask has another shape or
                does not follow the pattern.
            ResourceError: the disk is full.
        """
        assert self._file is not None
        if name not in self._missing:
            what = "has its mask already" if name in self._shapes else "is no projection of the model"
            raise InvalidRequestError(f"No mask of {name!r:.200} can be added to {self._path}: it {what}.")
        if mask_OI.shape != self._shapes[name]:
            raise InvalidRequestError(f"The mask of {name!r} is {mask_OI.shape}; its weight is {self._shapes[name]}.")
        rows = mask_OI.shape[0]
        step = max(1, _PIECE // mask_OI.shape[1])
        with resource_errors(f"Writing {self._path}"):
            self._file.seek(self._starts[name])
            for first in range(0, rows, step):
                self._file.write(encode_mask(mask_OI[first : first + step], self._pattern).data)
        self._missing.discard(name)


class MaskFile:
    """A `weight_masks.safetensors` that is read row by row; untrusted."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], pattern: Pattern) -> None:
        """Check the header: exactly the masks that the model needs, each of its type and shape.

        Args:
            path: the file.
            shapes: (out_features, in_features) by the full name of each projection's weight.
            pattern: of all masks.

        Raises:
            CheckpointError: there is no such file.
            VerificationError: its header is damaged.
            PlanMismatchError: a mask is missing, has no place in the model, or has another type or shape.
        """
        if not path.is_file():
            raise CheckpointError(f"{path.parent} has no {path.name}: the masks of its weights are not here.")
        self.path = path
        self.pattern = pattern
        self._shapes = dict(shapes)
        self._infos = _checked_infos(path, self._shapes, pattern)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights that have a mask, sorted."""
        return tuple(sorted(self._shapes))

    def __contains__(self, name: object) -> bool:
        """Whether a tensor, by its full name, has a mask."""
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """(out_features, in_features) of a weight."""
        return self._shapes[name]

    def read(self, name: str) -> Mask:
        """Read the mask of a weight as bool (out_features, in_features); raises as `read_rows`."""
        return self.read_rows(name, 0, self._shapes[name][0])

    def read_rows(self, name: str, start: int, stop: int) -> Mask:
        """Read the rows `start` to `stop` (excluded) of a weight's mask.

        Args:
            name: full name of the weight.
            start: first row.
            stop: end of the rows, more than `start` and at most out_features.

        Returns:
            bool (stop - start, in_features), true where a weight is kept.

        Raises:
            InvalidRequestError: the weight has no mask, or no such rows.
            VerificationError: the bits are none of a mask of this pattern.
        """
        if name not in self:
            raise InvalidRequestError(f"{self.path} has no mask of {name!r:.200}: it is no projection of the model.")
        rows, columns = self._shapes[name]
        if not 0 <= start < stop <= rows:
            raise InvalidRequestError(f"The mask of {name!r} has rows 0 to {rows:,}; {start:,} to {stop:,} were asked.")
        mask = f"The mask of {name!r} in {self.path}"
        return decode_mask(read_rows(self._infos[name], start, stop), columns, self.pattern, source=mask)

    def kept(self, name: str) -> int:
        """Count the weights that a mask keeps, a few megabytes in memory; raises as `read_rows`.

        Of an n:m mask nothing is read: it keeps n of every m by definition, and whoever reads its rows checks that.
        """
        rows, columns = self._shapes[name]
        if not self.pattern.is_unstructured:
            n, m = self.pattern.group
            return rows * columns // m * n
        step = max(1, _PIECE // columns)
        return sum(
            int(np.count_nonzero(self.read_rows(name, first, min(first + step, rows))))
            for first in range(0, rows, step)
        )


def _layout(shapes: Mapping[str, tuple[int, ...]], pattern: Pattern) -> tuple[bytes, dict[str, int]]:
    """Return the file's first bytes, length and header, and where each mask begins."""
    entries: dict[str, dict[str, object]] = {}
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(shapes):
        rows, columns = shapes[name]
        pattern.check_columns(columns, name=name)
        shape = [rows, row_bytes(columns, pattern)]
        offsets[name], end = end, end + shape[0] * shape[1]
        entries[f"{name}{_SUFFIX}"] = {"dtype": "U8", "shape": shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    header = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    start = 8 + len(header)
    return len(header).to_bytes(8, "little") + header, {name: start + offset for name, offset in offsets.items()}


def _checked_infos(path: Path, shapes: Mapping[str, tuple[int, ...]], pattern: Pattern) -> dict[str, TensorInfo]:
    found = read_headers(path)
    expected = {f"{name}{_SUFFIX}": name for name in shapes}
    foreign = sorted(set(found) - set(expected))
    if foreign:
        raise PlanMismatchError(f"{path} holds {foreign[0]!r:.200}, which is no mask of a projection of the model.")
    for tensor, name in expected.items():
        rows, columns = shapes[name]
        try:
            shape = (rows, row_bytes(columns, pattern))
        except InvalidRequestError as err:  # nobody asked for anything: the file's pattern is at fault
            raise VerificationError(f"{path} cannot be a mask file of the pattern {pattern}: {err}") from err
        info = found.get(tensor)
        if info is None or (info.dtype, info.shape) != ("U8", shape):
            has = "is missing" if info is None else f"is {info.dtype} {info.shape}"
            raise PlanMismatchError(
                f"{tensor!r} {has} in {path}; the mask of {(rows, columns)} with the pattern {pattern} is U8 {shape}."
            )
    return {name: found[tensor] for tensor, name in expected.items()}
