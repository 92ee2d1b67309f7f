"""The mark of a pruned adapter: one tensor that servers refuse by its name, and the name says what to do.

vLLM copies factors that are too small into the corner of its buffers and answers wrongly, without an error. What it
does refuse are tensors it does not know, with their names in its message (0.32: "... is unsupported LoRA weight");
llama.cpp's converter does the same. So an adapter that PEFT saves from a release carries a tensor named `tensors.MARK`.
It holds the digest of the plan, which tells `recover` which release the adapter belongs to; a recovered adapter does
not have it. `marking` makes PEFT write it, and says what it does not reach.

Adapters of sparse releases are not marked. Their factors have full size, and on the original model they do what they
should: recovery changes nothing but the name of the base. Their plan is known from the record that our callbacks write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from loram_hub.adapter.tensors import mark_names
from loram_hub.errors import VerificationError
from loram_hub.tensors import TensorInfo, read_array

DIGEST_BYTES = 32


def marked_plan(tensors: Mapping[str, TensorInfo], *, source: str) -> str | None:
    """Read from an untrusted adapter which plan it was trained on.

    Args:
        tensors: from `read_headers`.
        source: names the adapter in errors.

    Returns:
        SHA-256 of the plan in hexadecimal digits; None if the adapter has no mark.

    Raises:
        VerificationError: a mark that is no digest, or two that differ.
    """
    digests = set()
    for name in mark_names(tensors):
        entry = tensors[name]
        if (entry.dtype, entry.shape) != ("U8", (DIGEST_BYTES,)):
            raise malformed_mark(name, entry.dtype, entry.shape, source=source)
        digests.add(digest_of_mark(read_array(entry)))
    if len(digests) > 1:
        raise VerificationError(
            f"{source} was marked by releases with different plans ({', '.join(sorted(d[:12] for d in digests))}). "
            "Save or copy the adapter again."
        )
    return digests.pop() if digests else None


def digest_of_mark(values: npt.NDArray[np.generic]) -> str:
    """Return the plan's SHA-256 that a mark (32 bytes) holds, in hexadecimal digits."""
    return values.tobytes().hex()


def malformed_mark(name: str, dtype: str, shape: Sequence[int], *, source: str) -> VerificationError:
    """Say that a tensor has the name of a mark and is none, as when a whole file was cast to another type."""
    return VerificationError(
        f"Tensor {name!r:.200} of {source} is {dtype:.20} of shape {tuple(shape)}; the mark of a pruned adapter is "
        f"{DIGEST_BYTES} bytes. Save or copy the adapter again."
    )
