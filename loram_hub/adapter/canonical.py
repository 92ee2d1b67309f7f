"""The canonical form of an adapter: one rank and one alpha for all modules, whatever each of them was trained with.

Ranks are padded with zeros, which changes no product B A. If one whole alpha expresses every module's scale, B stays as
it is, bit for bit; otherwise alpha is r, and each B is multiplied by its module's scale, in fp32, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loram_hub.adapter.reading import LoraPair
from loram_hub.adapter.tensors import DtypeName, Factor, convert
from loram_hub.adapter.writing import CanonicalAdapter
from loram_hub.files import dump_json

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonScale:
    """One rank and one alpha that stand for those of every module."""

    r: int
    """Rank of every module."""
    lora_alpha: int
    """Scale of every module, times r."""
    factors: Mapping[str, float]
    """What multiplies each module's lora_B, by module path; 1.0 leaves it as it is."""


def common_scale(pairs: Mapping[str, LoraPair]) -> CommonScale:
    """Choose the one rank and alpha, and the number that multiplies each module's B."""
    rank = max(pair.rank for pair in pairs.values())
    scales = {module: pair.scale for module, pair in pairs.items()}
    alpha = round(next(iter(scales.values())) * rank)
    if alpha >= 1 and set(scales.values()) == {alpha / rank}:
        return CommonScale(r=rank, lora_alpha=alpha, factors=dict.fromkeys(scales, 1.0))
    return CommonScale(r=rank, lora_alpha=rank, factors=scales)


def exact_dtype(pairs: Mapping[str, LoraPair], scale: CommonScale) -> DtypeName:
    """Return the smallest type that takes the scaled factors without rounding; float32 if there is none smaller.

    A power of two moves a factor's exponent and leaves its digits; `convert` reports it if the exponent has no room.
    """
    stored = {factor.dtype.name for pair in pairs.values() for factor in (pair.lora_A, pair.lora_B)}
    moves_only_exponents = all(math.frexp(factor)[0] == 0.5 for factor in scale.factors.values())
    if stored == {"bfloat16"} and moves_only_exponents:
        return "bfloat16"  # as many exponents as float32 has
    if stored == {"float16"} and set(scale.factors.values()) == {1.0}:
        return "float16"
    return "float32"


def is_canonical_config(values: Mapping[str, object]) -> bool:
    """Whether an `adapter_config.json` is what `write_adapter` writes for its r, alpha, base and targets."""
    r, alpha, base, revision, targets = (
        values.get(key) for key in ("r", "lora_alpha", "base_model_name_or_path", "revision", "target_modules")
    )
    if type(r) is not int or type(alpha) is not int or not isinstance(targets, list):
        return False
    if not isinstance(base, str | None) or not isinstance(revision, str | None):
        return False
    written = CanonicalAdapter(
        base_id=base,
        revision=revision,
        r=r,
        lora_alpha=alpha,
        target_modules=tuple(sorted(targets)),
        dtype="bfloat16",  # the config does not depend on it
        shapes={},
    )
    return dump_json(written.to_config()) == dump_json(values)


def canonical_factors(
    module: str,
    pair: LoraPair,
    canonical: CanonicalAdapter,
    *,
    scale: float,
    rows: Positions | None = None,
    columns: Positions | None = None,
) -> tuple[Factor, Factor]:
    """Scale, pad and, if positions are given, scatter a pair of factors.

    Args:
        module: its path.
        pair: as it was trained.
        canonical: what is to be written: rank, type and shapes.
        scale: what multiplies lora_B.
        rows: rows of the weight that lora_B has, ascending; None for all.
        columns: columns of the weight that lora_A has, likewise.

    Returns:
        lora_A (r, in_features) and lora_B (out_features, r), zero elsewhere, in the canonical type.

    Raises:
        VerificationError: a number overflows the type.
    """
    out_features, in_features = canonical.shapes[module]
    lora_A = convert(pair.lora_A, canonical.dtype, name=f"lora_A of {module!r}")
    lora_B = convert(pair.lora_B, canonical.dtype, scale=scale, name=f"lora_B of {module!r}")
    rank = None if pair.rank == canonical.r else np.arange(pair.rank)
    return (
        _scatter(lora_A, (canonical.r, in_features), rank, columns),
        _scatter(lora_B, (out_features, canonical.r), rows, rank),
    )


def _scatter(values: Factor, shape: tuple[int, int], rows: Positions | None, columns: Positions | None) -> Factor:
    """Place values at the given rows and columns of zeros; None stands for all."""
    if rows is None and columns is None:
        return values
    full: Factor = np.zeros(shape, dtype=values.dtype)
    if columns is None:
        full[rows] = values
    elif rows is None:
        full[:, columns] = values
    else:
        full[np.ix_(rows, columns)] = values
    return full
