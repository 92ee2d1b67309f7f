"""How LoRA factors are named and stored in `adapter_model.safetensors`."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import ml_dtypes  # makes safetensors' numpy side read and write BF16
import numpy as np
import numpy.typing as npt

from loram_hub.adapter.config import VOCABULARY_REMEDY
from loram_hub.architecture import EMBEDDING, LM_HEAD
from loram_hub.errors import UnsupportedAdapterError, VerificationError
from loram_hub.tensors import is_finite as are_finite

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR_NAME = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

DtypeName = Literal["bfloat16", "float16", "float32"]
Factor = npt.NDArray[np.generic]
DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
CODES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Names of the same in a safetensors header."""

MARK = "lora_pruned_adapter_run_loram_recover_first"
"""Last part of the name of the tensor that marks a pruned adapter. Older PEFT saves what has `lora_` in its name."""
MARK_HOLDER = "loram_mark"
"""The part before that. PEFT's hotswap_adapter finds the layer by taking three parts off the name: these two, and the
adapter's own. An adapter should not be called so: PEFT does not save names that have another adapter's in them."""

_MARK_NAME = re.compile(rf"(?:{re.escape(PREFIX)})?.+\.{MARK}")
_MAX_TENSORS = 100_000
_MAX_NAME = 500
"""Letters of a tensor's name; a full path in the largest models has fewer than 100."""
# PEFT's default save copies the frozen weight of a targeted lm_head or embedding into the adapter (peft#2092).
FROZEN_COPIES = frozenset(f"{PREFIX}{name.removesuffix('.weight')}.base_layer.weight" for name in (LM_HEAD, EMBEDDING))


def factor_name(module: str, factor: Literal["A", "B"]) -> str:
    """Return the name under which a module's factor is stored."""
    return f"{PREFIX}{module}.lora_{factor}.weight"


def mark_names(names: Iterable[str]) -> list[str]:
    """Return the names of marks among those of an adapter's tensors, sorted; a pruned adapter has one."""
    return sorted(name for name in names if _MARK_NAME.fullmatch(name))


def factor_names(names: Collection[str], *, source: str) -> list[str]:
    """Return the names of the factors among an adapter's tensors, sorted.

    Raises:
        UnsupportedAdapterError: there is a tensor that is neither a factor nor a mark nor a copy of a frozen weight.
        VerificationError: absurdly many tensors.
    """
    if len(names) > _MAX_TENSORS:
        raise VerificationError(f"{source} has {len(names):,} tensors; at most {_MAX_TENSORS:,} are read.")
    longest = max(names, key=len, default="")
    if len(longest) > _MAX_NAME:
        raise VerificationError(
            f"Tensor {longest!r:.100} of {source} has a name of {len(longest):,} letters; at most {_MAX_NAME} are read."
        )
    copies = FROZEN_COPIES & set(names)
    for name in sorted(copies):
        logger.info("Leaving out %s: a copy of a frozen weight, not part of the adapter", name)
    factors = sorted(set(names) - copies - set(mark_names(names)))
    for name in factors:
        if FACTOR_NAME.fullmatch(name) is None:
            raise UnsupportedAdapterError(
                f"Tensor {name!r} of {source} is no lora_A or lora_B of a linear layer: {_why_foreign(name)}."
            )
    return factors


def _why_foreign(name: str) -> str:
    if ".lora_embedding_" in name:
        return (
            "the embedding was a target, and not everything that serves adapters takes LoRA there. "
            "Train again without it in target_modules"
        )
    if name.removeprefix(PREFIX) in (LM_HEAD, EMBEDDING):
        return f"a whole weight was saved, as PEFT does when the vocabulary was resized. {VOCABULARY_REMEDY}"
    return "it has no full-size equivalent. Save the adapter again with PEFT, from plain LoRA"


def is_finite(values: Factor) -> bool:
    """Whether a contiguous array of factors holds neither NaN nor infinity."""
    return are_finite(values.reshape(-1).view(np.uint8).data, CODES[values.dtype.name])


def convert(values: Factor, dtype: DtypeName, *, scale: float = 1.0, name: str) -> Factor:
    """Multiply in fp32 and round once; the array itself if there is nothing to do.

    Raises:
        VerificationError: a number overflows `dtype`; `name` names the array.
    """
    rounded = values
    with np.errstate(over="ignore"):  # reported below, with the tensor's name
        if scale != 1.0:
            rounded = rounded.astype(np.float32) * np.float32(scale)
        rounded = rounded.astype(DTYPES[dtype], copy=False)
    if rounded is not values and not is_finite(rounded):
        raise VerificationError(f"{name} does not fit into {dtype}: a number overflows. Ask for dtype='float32'.")
    return rounded
