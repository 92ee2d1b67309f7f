"""Masks as bits: a bitmap, or where that is smaller a code for every n:m group.

A bitmap has one bit per weight in the order of `np.packbits` (the first weight is the highest bit of the first byte).
Of the 2^m ways to fill m bits only C(m, n) keep n of them, so a group needs ceil(log2 C(m, n)) bits: 7 of 8 for 4:8,
3 of 4 for 2:4. The code is the mask's rank in the combinatorial number system: with kept positions
c_1 < ... < c_n (from 0) it is C(c_1, 1) + ... + C(c_n, n), below C(m, n). Codes follow each other highest bit first.
Every row ends at a whole byte, so that rows can be read by themselves; what is left of that byte is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

from loram_hub.errors import InvalidRequestError, VerificationError
from loram_hub.masks.patterns import Pattern

Mask = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]

_PIECE = 1024 * 1024
"""Weights that are coded at a time: temporaries take some ten bytes each."""
_LARGEST_TABLE = 2**16
"""Codes that are looked up; of more (16:32) each is worked out, at a fifth of the speed."""


def row_bytes(columns: int, pattern: Pattern) -> int:
    """Bytes of one row of a mask on disk.

    Args:
        columns: in_features of the matrix.
        pattern: of the mask.

    Raises:
        InvalidRequestError: the columns do not divide into groups.
    """
    bitmap = -(-columns // 8)
    if pattern.is_unstructured:
        return bitmap
    pattern.check_columns(columns, name="A matrix")
    return min(bitmap, -(-_code_bits(pattern) * (columns // pattern.group[1]) // 8))


def encode_mask(mask_OI: Mask, pattern: Pattern) -> Bytes:
    """Encode a mask for the disk.

    Args:
        mask_OI: bool (out_features, in_features), true where a weight is kept.
        pattern: that the mask follows.

    Returns:
        uint8 (out_features, `row_bytes`).

    Raises:
        InvalidRequestError: it is no such mask, or a group does not keep n of m.
    """
    if mask_OI.dtype != np.bool_ or mask_OI.ndim != 2 or 0 in mask_OI.shape:
        raise InvalidRequestError(f"A mask is {mask_OI.dtype} {mask_OI.shape}; bool (out, in) is needed.")
    rows, columns = mask_OI.shape
    encoded = np.empty((rows, row_bytes(columns, pattern)), dtype=np.uint8)
    for piece in _row_pieces(rows, columns):
        kept = mask_OI[piece]
        row = _uneven_row(kept, pattern)
        if row is not None:
            raise InvalidRequestError(f"Row {piece.start + row} of a mask does not keep {pattern} in every group.")
        encoded[piece] = _pack_codes(kept, pattern) if _has_codes(columns, pattern) else np.packbits(kept, axis=1)
    return encoded


def decode_mask(rows: Bytes, columns: int, pattern: Pattern, *, source: str = "A mask") -> Mask:
    """Decode rows of a mask, which are untrusted.

    Args:
        rows: uint8 (n, `row_bytes`).
        columns: in_features of the matrix.
        pattern: of the mask.
        source: names the mask in errors.

    Returns:
        bool (n, columns), true where a weight is kept.

    Raises:
        VerificationError: the rows have another length, a code is out of range, a bit is set behind the last column,
            or a group does not keep n of m.
    """
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != row_bytes(columns, pattern):
        raise VerificationError(
            f"{source} is {rows.dtype} {rows.shape}; rows of {row_bytes(columns, pattern)} bytes are needed."
        )
    mask = np.empty((rows.shape[0], columns), dtype=np.bool_)
    for piece in _row_pieces(rows.shape[0], columns):
        bits = np.unpackbits(rows[piece], axis=1)
        if _has_codes(columns, pattern):
            mask[piece] = _unpack_codes(bits, columns, pattern, source)
            continue
        _check_padding(bits, columns, source)
        mask[piece] = bits[:, :columns]
        if _uneven_row(mask[piece], pattern) is not None:
            raise VerificationError(f"{source} does not keep {pattern} in every group.")
    return mask


def _row_pieces(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _PIECE // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _has_codes(columns: int, pattern: Pattern) -> bool:
    return not pattern.is_unstructured and row_bytes(columns, pattern) < -(-columns // 8)


def _code_bits(pattern: Pattern) -> int:
    n, m = pattern.group
    return (math.comb(m, n) - 1).bit_length()


def _uneven_row(mask: Mask, pattern: Pattern) -> int | None:
    """Number of the first row with a group that does not keep n of m; None if there is none."""
    if pattern.is_unstructured:
        return None
    n, m = pattern.group
    uneven = (mask.reshape(len(mask), -1, m).sum(axis=2, dtype=np.uint8) != n).any(axis=1)
    return int(uneven.argmax()) if uneven.any() else None


def _pack_codes(mask: Mask, pattern: Pattern) -> Bytes:
    width = _code_bits(pattern)
    codes = _rank(mask.reshape(-1, pattern.group[1]), pattern).astype(">u4")
    bits = np.unpackbits(codes.view(np.uint8).reshape(-1, 4), axis=1)[:, 32 - width :]
    return np.packbits(bits.reshape(len(mask), -1), axis=1)


def _unpack_codes(bits: Bytes, columns: int, pattern: Pattern, source: str) -> Mask:
    n, m = pattern.group
    groups, width, whole = columns // m, _code_bits(pattern), 32
    _check_padding(bits, groups * width, source)
    if width <= 16:
        whole = 8 if width <= 8 else 16
    filled = np.zeros((len(bits), groups, whole), dtype=np.uint8)
    filled[:, :, whole - width :] = bits[:, : groups * width].reshape(len(bits), groups, width)
    codes = np.packbits(filled.reshape(-1)).view(f">u{whole // 8}").astype(np.intp)
    if codes.max() >= math.comb(m, n):
        raise VerificationError(f"{source} has the code {codes.max()}; {pattern} has {math.comb(m, n):,} codes from 0.")
    known = _masks_by_code(pattern) if math.comb(m, n) <= _LARGEST_TABLE else None
    mask = _unrank(codes, pattern) if known is None else known.take(codes, axis=0)
    return mask.reshape(len(bits), columns)


def _check_padding(bits: Bytes, used: int, source: str) -> None:
    if bits[:, used:].any():
        raise VerificationError(f"{source} has a bit set behind the end of a row.")


@cache
def _masks_by_code(pattern: Pattern) -> Mask:
    return _unrank(np.arange(math.comb(*reversed(pattern.group)), dtype=np.intp), pattern)


@cache
def _binomials(pattern: Pattern) -> npt.NDArray[np.int64]:
    """C(position, count) for positions 0 to m - 1 and counts 0 to n."""
    n, m = pattern.group
    return np.array([[math.comb(position, count) for count in range(n + 1)] for position in range(m)], dtype=np.int64)


def _rank(groups: Mask, pattern: Pattern) -> npt.NDArray[np.int64]:
    """Codes of masks of m weights each that keep n."""
    binomials = _binomials(pattern)
    codes = np.zeros(len(groups), dtype=np.int64)
    count = np.zeros(len(groups), dtype=np.intp)
    for position in range(groups.shape[1]):
        kept = groups[:, position]
        count += kept
        codes += binomials[position].take(count) * kept
    return codes


def _unrank(codes: npt.NDArray[np.intp], pattern: Pattern) -> Mask:
    """Masks of m weights each by their codes: the last kept position is the largest whose binomial fits, and so on."""
    binomials = _binomials(pattern)
    n, m = pattern.group
    mask = np.empty((len(codes), m), dtype=np.bool_)
    rest = codes.astype(np.int64)
    left = np.full(len(codes), n, dtype=np.intp)
    for position in reversed(range(m)):
        fits = binomials[position].take(left)
        kept = rest >= fits
        rest -= fits * kept
        left -= kept
        mask[:, position] = kept
    return mask
