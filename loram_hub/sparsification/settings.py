"""What a sparse model is asked for: the same on the command line, in a recipe and in Python."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from loram_hub.errors import InvalidRequestError
from loram_hub.masks import Pattern, parse_pattern

Method = Literal["sparsegpt", "wanda", "magnitude"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsitySettings:
    """Which weights of the projections are removed: a share of them, or all but n of every m."""

    method: Method = "sparsegpt"
    """`sparsegpt` (arXiv 2301.00774) updates the kept weights, `wanda` (arXiv 2306.11695) and `magnitude` do not."""
    sparsity: float | None = None
    """Share of the weights to remove, wherever they lie, in (0, 1); None if a pattern is given."""
    pattern: str | None = None
    """`n:m`: of every m consecutive inputs of an output, n are *kept*; None if a sparsity is given."""
    dampening: float = 0.01
    """Of SparseGPT: share of the Hessian's mean diagonal that is added to it; above 0."""
    block_size: int = 128
    """Of SparseGPT: columns that are pruned before the others are updated; rounded up to a multiple of m."""
    samples: int = 128
    """Rows of calibration, where texts are given."""
    tokens: int = 2048
    """Tokens in a row, where texts are given; at most the model's context."""

    def __post_init__(self) -> None:
        """Check types and ranges; raises `InvalidRequestError`."""
        if self.method not in get_args(Method):
            raise InvalidRequestError(f"method is {self.method!r}; choose one of {', '.join(get_args(Method))}.")
        if (self.sparsity is None) == (self.pattern is None):
            found = "neither" if self.sparsity is None else f"{self.sparsity} and {self.pattern}"
            raise InvalidRequestError(
                f"A sparsity (0.55: that share of the weights goes) or a pattern (4:8: 4 of every 8 are kept) is "
                f"needed, one of the two; found {found}."
            )
        if self.pattern is not None and (
            not isinstance(self.pattern, str) or parse_pattern(self.pattern).is_unstructured
        ):
            raise InvalidRequestError(
                f"pattern is {self.pattern!r}; n:m is needed, as in 4:8. Without a pattern, give a sparsity."
            )
        if self.sparsity is not None and not 0 < _number("sparsity", self.sparsity) < 1:  # also refuses NaN
            raise InvalidRequestError(
                f"sparsity is {self.sparsity}; it is the share removed and must lie between 0 and 1: 0.55, say."
            )
        if not 0 < _number("dampening", self.dampening) < math.inf:
            raise InvalidRequestError(f"dampening is {self.dampening}; it must be above 0, and finite. 0.01 is usual.")
        for name, least in (("block_size", 1), ("samples", 1), ("tokens", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidRequestError(f"{name} is {value!r}; a whole number from {least} is needed.")

    @property
    def mask_pattern(self) -> Pattern:
        """Where kept weights may lie."""
        return Pattern() if self.pattern is None else parse_pattern(self.pattern)

    @property
    def removed_share(self) -> float:
        """Share of the weights that goes, whichever way it was given."""
        share = self.sparsity if self.pattern is None else self.mask_pattern.sparsity
        assert share is not None
        return share

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at activations."""
        return self.method != "magnitude"

    @property
    def block_columns(self) -> int:
        """The block size, rounded up to whole groups of the pattern."""
        group = self.mask_pattern.of or 1
        return -(-self.block_size // group) * group


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(f"{name} is {value!r}; a number is needed.")
    return value
