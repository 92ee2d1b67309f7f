"""What a refit is asked for: the same on the command line, in a recipe and in Python."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from loram_hub.errors import InvalidRequestError

Target = Literal["output", "residual"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitSettings:
    """How the kept columns of o_proj and down_proj are solved for."""

    target: Target = "residual"
    """`residual`: each sub-block lands the pruned model's residual stream on the base's. `output`: each matrix gives,
    on the base's activations, what the whole matrix gives."""
    ridge: float = 0.05
    """Pull toward the weights as they are, as a share of the mean square of an input; from 0."""
    samples: int = 64
    """Rows of calibration, where texts are given."""
    tokens: int = 128
    """Tokens in a row, where texts are given."""
    seed: int = 0
    """Of the choice of calibration texts."""

    def __post_init__(self) -> None:
        """Check types and ranges; raises `InvalidRequestError`."""
        if self.target not in get_args(Target):
            raise InvalidRequestError(
                f"The refit's target is {self.target!r}; choose one of {', '.join(get_args(Target))}."
            )
        if isinstance(self.ridge, bool) or not isinstance(self.ridge, int | float):
            raise InvalidRequestError(f"ridge is {self.ridge!r}; a number is needed.")
        if not 0 <= self.ridge < math.inf:  # also refuses NaN
            raise InvalidRequestError(f"ridge is {self.ridge}; it must be 0 or more, and finite. 0.05 is the default.")
        for name, least in (("samples", 1), ("tokens", 2), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidRequestError(f"{name} is {value!r}; a whole number from {least} is needed.")
