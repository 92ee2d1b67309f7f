"""A compressed matrix that torch takes for a weight.

Whoever multiplies by `lm_head.weight` or looks rows up in `embed_tokens.weight` need not know of it: the stock layers,
PEFT, `generate`, and TRL's loss, which takes the weight of the head in pieces and never calls the head. A product with
the whole matrix goes through it piece by piece; an operation that nobody foresaw gets the decompressed matrix. What
would change the weight is refused, for the change would be lost.

The gradient of a product with respect to its other factor is a product, too, so autograd needs nothing of its own here.
Between forward and backward it keeps the compressed matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map, tree_map_only

from loram_hub.errors import InvalidRequestError
from loram_hub.estimation.options import HEAD_PIECE
from loram_hub.lowmemory.rows import Int8Rows, Rows

aten = torch.ops.aten


class CompressedWeight(torch.Tensor):
    """A frozen (rows, columns) matrix, or its transpose, of a floating type in name and 8 or 4 bits in memory.

    Args:
        rows: the matrix.
        dtype: what it is decompressed to.
        is_transposed: whether it is shown as (columns, rows).
    """

    _rows: Rows
    _is_transposed: bool
    # torch counts a tensor as an nn.Parameter by this mark, and loses it in copies. Whatever leaves parameters alone
    # (TRL's offloading of activations) would otherwise move a decompressed copy.
    _is_param = True
    # Without it torch would wrap every result in this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it

    def __new__(cls, rows: Rows, dtype: torch.dtype, is_transposed: bool = False) -> CompressedWeight:
        """Make a tensor of the shape, which has no memory of its own."""
        shape = rows.shape[::-1] if is_transposed else rows.shape
        made: CompressedWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=rows.device, requires_grad=False
        )
        return made

    def __init__(self, rows: Rows, dtype: torch.dtype, is_transposed: bool = False) -> None:
        """Keep the parts as attributes, too: torch asks for them by name."""
        self._rows = rows
        self._is_transposed = is_transposed
        vars(self).update(rows.tensors)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Rows, torch.dtype, bool]]:
        return list(self._rows.tensors), (self._rows, self.dtype, self._is_transposed)

    @staticmethod
    def __tensor_unflatten__(
        inner_tensors: dict[str, torch.Tensor],
        meta: tuple[Rows, torch.dtype, bool],
        outer_size: object,
        outer_stride: object,
    ) -> CompressedWeight:
        rows, dtype, is_transposed = meta
        return CompressedWeight(rows.with_tensors(inner_tensors), dtype, is_transposed)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as torch documents it
        cls,
        func: Any,  # noqa: ANN401 (torch has no public type for it)
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func in _OPERATIONS and (found := _OPERATIONS[func](func, *args, **kwargs)) is not None:
            return found
        _refuse_writing(func, args, kwargs)
        args, kwargs = tree_map_only(CompressedWeight, CompressedWeight.decompressed, (args, kwargs))
        return func(*args, **kwargs)

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # torch's is read-only as well
        """Bytes in memory."""
        return sum(part.nbytes for part in self._rows.tensors.values())

    def decompressed(self) -> torch.Tensor:
        """Return the whole matrix as a plain tensor."""
        whole = self._rows.read(0, self._rows.shape[0], self.dtype)
        return whole.t() if self._is_transposed else whole

    def requires_grad_(self, requires_grad: bool = True) -> CompressedWeight:
        """Refuse to be trained."""
        if requires_grad:
            raise InvalidRequestError(
                "A compressed embedding or lm_head cannot be trained: its weight is frozen. Leave it out of "
                "modules_to_save, or keep it in 16 bit (embedding='device', lm_head='device')."
            )
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # noqa: ANN401
        """Show no values: they would have to be decompressed."""
        return f"{type(self).__name__}({type(self._rows).__name__}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def _changed(
        self, *, rows: Rows | None = None, dtype: torch.dtype | None = None, transposed: bool = False
    ) -> CompressedWeight:
        return CompressedWeight(rows or self._rows, dtype or self.dtype, self._is_transposed != transposed)

    def _pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Decompress a stretch of rows after the other."""
        count, columns = self._rows.shape
        step = max(1, HEAD_PIECE // columns)
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield slice(start, stop), self._rows.read(start, stop, dtype)


def _refuse_writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401
    for position, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name) if argument.kwarg_only or position >= len(args) else args[position]
        if isinstance(value, CompressedWeight) and argument.alias_info is not None and argument.alias_info.is_write:
            raise InvalidRequestError(
                f"{func} would change a compressed embedding or lm_head, which is frozen. Keep it in 16 bit "
                "(embedding='device', lm_head='device') to merge an adapter into it or to load weights."
            )


def _same(_: object, weight: CompressedWeight) -> CompressedWeight:
    return weight._changed()


def _copied(_: object, weight: CompressedWeight, **kwargs: object) -> CompressedWeight:
    return weight._changed(rows=weight._rows.with_tensors(tree_map(torch.clone, weight._rows.tensors)))


def _moved(
    _: object,
    weight: CompressedWeight,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **kwargs: object,
) -> CompressedWeight:
    rows = weight._rows
    if device is not None and torch.device(device) != rows.device:
        rows = rows.with_tensors({name: part.to(device) for name, part in rows.tensors.items()})
    return weight._changed(rows=rows, dtype=dtype)


def _turned(_: object, weight: CompressedWeight) -> CompressedWeight:
    return weight._changed(transposed=True)


def _cut(
    _: object,
    weight: CompressedWeight,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> CompressedWeight | None:
    if dim % 2 != int(weight._is_transposed) or step != 1:
        return None
    first, last, _step = slice(start, end).indices(weight._rows.shape[0])
    return weight._changed(rows=weight._rows.cut(first, max(first, last)))


def _looked_up(_: object, weight: CompressedWeight, ids: torch.Tensor, *args: object) -> torch.Tensor | None:
    rows = weight._rows
    if weight._is_transposed or not isinstance(rows, Int8Rows):
        return None
    return rows.gather(ids, weight.dtype)


def _product(_: object, left: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """Multiply: left @ weight; sums over pieces are kept in fp32."""
    if isinstance(left, CompressedWeight) or not isinstance(weight, CompressedWeight):
        return None
    if weight._is_transposed:
        out = left.new_empty(len(left), weight.shape[1])
        return _product_into(_, left, weight, out=out)
    total = left.new_zeros(len(left), weight.shape[1], dtype=torch.float32)
    for stretch, piece in weight._pieces(left.dtype):
        total += left[:, stretch] @ piece
    return total.to(left.dtype)


def _product_into(_: object, left: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor | None:
    if isinstance(left, CompressedWeight) or not isinstance(weight, CompressedWeight) or not weight._is_transposed:
        return None
    for stretch, piece in weight._pieces(left.dtype):
        torch.mm(left, piece.t(), out=out[:, stretch])
    return out


def _added_product(
    func: Callable[..., torch.Tensor],
    total: torch.Tensor,
    left: torch.Tensor,
    weight: torch.Tensor,
    *args: object,
    **kwargs: Any,  # noqa: ANN401
) -> torch.Tensor | None:
    """Add up: total += left @ weight, which is a sum over pieces as well."""
    adds_up = kwargs.get("out", total) is total and not {"alpha", "beta"} & set(kwargs)
    if not adds_up or not isinstance(weight, CompressedWeight) or weight._is_transposed:
        return None
    for stretch, piece in weight._pieces(weight.dtype):
        func(total, left[:, stretch], piece, *args, **kwargs)
    return total


def _linear(
    _: object, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Only inference mode asks for this; elsewhere it arrives as the products it consists of."""
    if isinstance(inputs, CompressedWeight) or not isinstance(weight, CompressedWeight) or bias is not None:
        return None
    return torch.mm(inputs.reshape(-1, inputs.shape[-1]), weight.t()).view(*inputs.shape[:-1], -1)


# What knows how to work on compressed matrices; None from it: not on these.
_OPERATIONS: dict[Any, Callable[..., torch.Tensor | None]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _copied,
    aten._to_copy.default: _moved,
    aten.t.default: _turned,
    aten.slice.Tensor: _cut,
    aten.embedding.default: _looked_up,
    aten.mm.default: _product,
    aten.mm.out: _product_into,
    aten.addmm_.default: _added_product,
    aten.addmm.out: _added_product,
    aten.linear.default: _linear,
}
if hasattr(aten.addmm, "dtype_out"):  # from torch 2.8 on; TRL adds up 16-bit products in fp32 with it on CUDA
    _OPERATIONS[aten.addmm.dtype_out] = _added_product
