"""NF4 as bitsandbytes stores it, checked part by part: bitsandbytes itself believes what a file says.

It takes shapes, types and block sizes from a piece of JSON beside the codes and reads past the end of arrays that are
too short. Of eight tampered files that we tried, five ran. So nothing of it is believed here: lengths follow from the
plan, and the two code tables have one value each. No torch, no bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from loram_hub.errors import PlanMismatchError, VerificationError
from loram_hub.files import parse_json
from loram_hub.manifest import FLOAT_TYPES
from loram_hub.plan import NF4_BLOCK, NF4_NESTED_BLOCK
from loram_hub.tensors import TensorInfo, read_array

NF4_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
"""What bitsandbytes stores beside the codes of an NF4 matrix."""

_STATE = ".quant_state.bitsandbytes__nf4"
_MAX_STATE_BYTES = 4096
# QLoRA (arXiv 2305.14314), appendix E: quantiles of the normal distribution, scaled to [-1, 1].
_NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_LARGEST_SCALE: Mapping[str, float] = {
    "bfloat16": float(np.finfo(np.float32).max),
    "float16": float(np.finfo(np.float16).max),
    "float32": float(np.finfo(np.float32).max),
}


def bitsandbytes_config(dtype: str) -> dict[str, Any]:
    """Return the `quantization_config` of an NF4 release, in the keys that transformers writes.

    Args:
        dtype: 16-bit type of the unquantized weights, `bfloat16` or `float16`; the loader picks what the device
            computes in.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


@cache
def nf4_table() -> npt.NDArray[np.float32]:
    """The 16 values that NF4 codes stand for."""
    return np.array(_NF4_VALUES, dtype=np.float32)


@cache
def dynamic_table() -> npt.NDArray[np.float32]:
    """The 256 values that 8-bit codes of the scales stand for: bitsandbytes' signed dynamic type.

    A code is a sign, a run of zeros that counts powers of ten down from 1, and a fraction with the bits that are left
    (8-bit Approximations for Parallelism in Deep Learning, arXiv 1511.04561): in the k-th of 7 decades 2^k values lie
    at the middles of equal parts of [0.1, 1] times 10^(k-6). Zero and 1 complete them.
    """
    middles = []
    for decade in range(7):
        bounds = np.linspace(0.1, 1, 2**decade + 1)
        middles.append((bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (decade - 6))
    positive = np.concatenate(middles)
    return np.sort(np.concatenate([-positive, positive, [0.0, 1.0]])).astype(np.float32)


def check_parts(name: str, shape: tuple[int, ...], found: Mapping[str, TensorInfo]) -> None:
    """Check type and length of each part of an NF4 matrix against its planned shape, from the headers alone.

    Raises:
        PlanMismatchError: a part is missing, or of another type or length.
    """
    elements = math.prod(shape)
    scales = -(-elements // NF4_BLOCK)
    expected = {
        name: ("U8", (-(-elements // 2), 1)),
        f"{name}.absmax": ("U8", (scales,)),
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.nested_absmax": ("F32", (-(-scales // NF4_NESTED_BLOCK),)),
        f"{name}.nested_quant_map": ("F32", (256,)),
    }
    for part, (dtype, part_shape) in expected.items():
        info = found.get(part)
        if info is None or (info.dtype, info.shape) != (dtype, part_shape):
            has = "is missing" if info is None else f"is {info.dtype} {info.shape}"
            raise PlanMismatchError(f"{part!r} {has}; NF4 of the planned {shape} has {dtype} {part_shape} there.")


def check_states(packed: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorInfo]) -> None:
    """Check what bitsandbytes takes its shapes, types and block sizes from.

    Args:
        packed: planned shape of every NF4 matrix.
        found: every tensor of the release.

    Raises:
        VerificationError: a state is missing, no small JSON, or has other keys than it should.
        PlanMismatchError: a value is not the one that plan and format give.
    """
    for name, shape in packed.items():
        _check_state(_state_of(name, found), shape, name)


def _state_of(name: str, found: Mapping[str, TensorInfo]) -> dict[str, Any]:
    info = found.get(f"{name}{_STATE}")
    if info is None or info.dtype != "U8" or not 0 < math.prod(info.shape) <= _MAX_STATE_BYTES:
        raise VerificationError(f"{name + _STATE!r} is missing, or not the small piece of JSON that it should be.")
    text = read_array(info).tobytes().decode("utf-8", "replace")
    return parse_json(text, source=f"{info.file}: {name}{_STATE}")


def _check_state(state: Mapping[str, Any], shape: tuple[int, ...], name: str) -> None:
    fixed = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK,
        "nested_blocksize": NF4_NESTED_BLOCK,
        "nested_dtype": "float32",
        "shape": list(shape),
    }
    for key, value in fixed.items():
        if type(state.get(key)) is not type(value) or state[key] != value:
            raise PlanMismatchError(
                f"The quantization state of {name!r} has {key} {state.get(key)!r:.100}; {value!r} is needed."
            )
    if set(state) != {*fixed, "dtype", "nested_offset"} or not isinstance(state["nested_offset"], float):
        raise VerificationError(
            f"The quantization state of {name!r} has missing, unknown or ill-typed keys: {sorted(state)!r:.200}."
        )
    if not isinstance(state["dtype"], str) or state["dtype"] not in FLOAT_TYPES:
        raise VerificationError(
            f"The quantization state of {name!r} has dtype {state['dtype']!r:.100}; one of {FLOAT_TYPES} is needed."
        )
    if not 0 <= state["nested_offset"] <= _LARGEST_SCALE[state["dtype"]]:
        raise VerificationError(
            f"The quantization state of {name!r} has nested_offset {state['nested_offset']!r}, which is no mean of "
            "scales."
        )


def check_values(names: Iterable[str], found: Mapping[str, TensorInfo]) -> None:
    """Check code tables and scales of NF4 matrices, which are small; codes and quantized scales may have any value.

    Raises:
        VerificationError: a table is not the one of its type, or a scale is not finite, negative or too large.
    """
    for name in names:
        if not np.array_equal(read_array(found[f"{name}.quant_map"]), nf4_table()):
            raise VerificationError(f"'{name}.quant_map' is not the code table of NF4.")
        # torch divides an interval with another rounding on processors with wider vectors.
        nested = read_array(found[f"{name}.nested_quant_map"])
        if not np.allclose(nested, dynamic_table(), rtol=1e-6, atol=0):
            raise VerificationError(f"'{name}.nested_quant_map' is not the code table of 8-bit scales.")
        scales = read_array(found[f"{name}.nested_absmax"])
        state = _state_of(name, found)
        limit = _LARGEST_SCALE[state["dtype"]]
        if not np.all(np.isfinite(scales)):
            raise VerificationError(f"'{name}.nested_absmax' holds NaN or infinity.")
        if scales.min() < 0 or float(scales.max()) + state["nested_offset"] > limit:
            raise VerificationError(
                f"'{name}.nested_absmax' runs from {scales.min():g} to {scales.max():g}; scales are not negative, and "
                f"with the offset at most {limit:g}."
            )
