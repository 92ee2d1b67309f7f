"""Matrices with 8 or 4 bits per weight, read by rows.

A loss that never holds all logits asks an lm_head for one stretch of the vocabulary after the other, and an embedding
is asked for the rows of a batch. So rows can be decompressed without the others.

    int8:  w = code * scale[row] / 127,  scale[row] = max |w| of the row.  Error at most scale / 254.
    nf4:   bitsandbytes' NF4 with double quantization, over the matrix as one long row of blocks of 64.

bitsandbytes has 8-bit layers, too, which do not fit here (0.50.2): `Embedding8bit` and `Embedding4bit` refuse
`state_dict`, which PEFT calls to save an adapter, and would take the place of subclasses such as Gemma 3's scaled
embedding; `Linear8bitLt` rounds what it is given to 8 bits as well, and shows its codes as its `weight`: a loss that
multiplies by `lm_head.weight` in pieces, as TRL's does, takes them for weights without an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

from loram_hub.plan import NF4_BLOCK, NF4_NESTED_BLOCK

_LARGEST_CODE = 127


class Rows(Protocol):
    """A compressed matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""

    @property
    def device(self) -> torch.device:
        """Where the codes are."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What it consists of."""

    def read(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Decompress rows; (stop - start, columns)."""

    def cut(self, start: int, stop: int) -> Self:
        """Return a view of some rows."""

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> Self:
        """Return the same matrix made of other tensors: moved or copied ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Rows:
    """8 bits per weight, a scale per row."""

    codes: torch.Tensor
    """int8, (rows, columns)."""
    scales: torch.Tensor
    """fp32, (rows,): largest magnitude of each row divided by 127."""

    @classmethod
    def compress(cls, weight: torch.Tensor) -> Self:
        """Round a matrix, a stretch of rows at a time."""
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        step = max(1, 2**24 // weight.shape[1])
        for start in range(0, len(weight), step):
            piece = weight[start : start + step].detach().float()
            scale = piece.abs().amax(dim=1) / _LARGEST_CODE
            scales[start : start + step] = scale
            # A row of zeros has the scale 0, and any other number gives it the codes 0.
            codes[start : start + step] = (piece / torch.where(scale > 0, scale, 1.0)[:, None]).round_()
        return cls(codes=codes, scales=scales)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What it consists of."""
        return {"codes": self.codes, "scales": self.scales}

    def read(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Decompress rows; the product is computed in fp32 and rounded once."""
        return self.codes[start:stop].to(dtype).mul_(self.scales[start:stop, None])

    def gather(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Decompress single rows."""
        return self.codes[ids].to(dtype).mul_(self.scales[ids][..., None])

    def cut(self, start: int, stop: int) -> Self:
        """Return a view of some rows."""
        return replace(self, codes=self.codes[start:stop], scales=self.scales[start:stop])

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> Self:
        """Return the same matrix made of other tensors."""
        return replace(self, **tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class Nf4Rows:
    """NF4 with double quantization: what `quantize_4bit` returns, and which of its rows are meant."""

    codes: torch.Tensor
    """uint8, (ceil(weights / 2), 1): two codes each."""
    absmax: torch.Tensor
    """uint8, (ceil(weights / 64),): codes of the scales."""
    nested_absmax: torch.Tensor
    """fp32, (ceil(scales / 256),): scales of the scales."""
    offset: torch.Tensor
    """fp32, (): mean of the scales, which is taken off before they are rounded."""
    quant_map: torch.Tensor
    """fp32, (16,)."""
    nested_quant_map: torch.Tensor
    """fp32, (256,)."""
    columns: int
    first: int
    """Row of the whole matrix that is row 0 here."""
    count: int
    """Rows from there."""

    @classmethod
    def compress(cls, weight: torch.Tensor) -> Self:
        """Quantize a matrix with bitsandbytes."""
        codes, state = quantize_4bit(
            weight.detach().contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return cls(
            codes=codes,
            absmax=state.absmax,
            nested_absmax=state.state2.absmax,
            offset=state.offset,
            quant_map=state.code,
            nested_quant_map=state.state2.code,
            columns=weight.shape[1],
            first=0,
            count=len(weight),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.count, self.columns

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What it consists of."""
        return {
            "codes": self.codes,
            "absmax": self.absmax,
            "nested_absmax": self.nested_absmax,
            "offset": self.offset,
            "quant_map": self.quant_map,
            "nested_quant_map": self.nested_quant_map,
        }

    def read(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Decompress rows, with those around them that share a block of scales."""
        rows = self._rows_per_block
        begin = (self.first + start) // rows * rows
        end = self.first + stop
        weights = slice(begin * self.columns, end * self.columns)
        found = self._dequantized(weights, dtype).reshape(end - begin, self.columns)
        return found[self.first + start - begin :]

    def cut(self, start: int, stop: int) -> Self:
        """Return a view of some rows."""
        return replace(self, first=self.first + start, count=stop - start)

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> Self:
        """Return the same matrix made of other tensors."""
        return type(self)(**tensors, columns=self.columns, first=self.first, count=self.count)

    @property
    def _rows_per_block(self) -> int:
        """Least number of rows that end where a block of scales does."""
        block = NF4_BLOCK * NF4_NESTED_BLOCK
        return block // math.gcd(block, self.columns)

    def _dequantized(self, weights: slice, dtype: torch.dtype) -> torch.Tensor:
        """Decompress weights from the beginning of a block of scales on."""
        scales = slice(weights.start // NF4_BLOCK, math.ceil(weights.stop / NF4_BLOCK))
        nested = slice(scales.start // NF4_NESTED_BLOCK, math.ceil(scales.stop / NF4_NESTED_BLOCK))
        of_scales = QuantState(
            absmax=self.nested_absmax[nested],
            code=self.nested_quant_map,
            blocksize=NF4_NESTED_BLOCK,
            dtype=torch.float32,
        )
        state = QuantState(
            absmax=self.absmax[scales],
            # As one row: on CPUs with AVX512, bitsandbytes (0.50.2) decompresses matrices to wrong values whose columns
            # are a multiple of 16 and not of 64, as if every row had whole blocks of its own.
            shape=torch.Size((1, weights.stop - weights.start)),
            code=self.quant_map,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.offset,
            state2=of_scales,
        )
        codes = self.codes[weights.start // 2 : math.ceil(weights.stop / 2)]
        return dequantize_4bit(codes, state)
