"""How much memory a GPU has: `20GB`, `20GiB`, or the name of a card.

Makers call 2^30 bytes a GB: a card sold with 24 GB has 24 GiB of memory chips. So `24GB` and `24GiB` are the same here,
24 * 2^30 bytes. Some cards show less, because error correction or firmware takes its part; for these the table has what
`nvidia-smi` shows as total. What the driver and the CUDA context take of it is part of an estimate (`Reserves`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from loram_hub.errors import InvalidRequestError

MIB = 2**20
CARDS: Mapping[str, int] = {
    "rtx3060": 12_288,
    "rtx3090": 24_576,
    "rtx4060ti-16gb": 16_380,
    "rtx4090": 24_564,
    "rtx5090": 32_607,
    "a6000": 49_140,
    "t4": 15_360,
    "l4": 23_034,
    "a10g": 23_028,
    "l40s": 46_068,
    "v100-16gb": 16_384,
    "a100-40gb": 40_960,
    "a100-80gb": 81_920,
    "h100": 81_559,
    "h200": 143_771,
}
"""Total memory by name, in MiB, as `nvidia-smi` shows it."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gb|gib|g|mb|mib|m)", re.IGNORECASE)
_LARGEST = 2**50


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMemory:
    """The memory of a GPU."""

    name: str
    """As it was asked for."""
    nbytes: int
    """Total memory in bytes."""


def gpu_memory(text: str) -> GpuMemory:
    """Read a size or the name of a card.

    Args:
        text: `20GB`, `20GiB`, `16384MiB`, or one of `CARDS`; case, spaces and the maker's name do not matter.

    Raises:
        InvalidRequestError: neither.

    Example:
        >>> gpu_memory("20GB").nbytes == 20 * 2**30
        True
        >>> gpu_memory("RTX 4090").nbytes == 24_564 * 2**20
        True
    """
    size = _SIZE.fullmatch(text.strip())
    if size is not None:
        unit = 2**30 if size[2].lower().startswith("g") else MIB
        nbytes = int(float(size[1]) * unit)
        if not 0 < nbytes <= _LARGEST:
            raise InvalidRequestError(f"A GPU of {text!r:.100} cannot be; give its memory as in 20GB.")
        return GpuMemory(name=text.strip(), nbytes=nbytes)
    key = re.sub(r"nvidia|geforce|tesla|[\s_]", "", text.lower())
    if key in CARDS:
        return GpuMemory(name=key, nbytes=CARDS[key] * MIB)
    near = difflib.get_close_matches(key, CARDS, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise InvalidRequestError(
        f"The GPU {text!r:.100} is not known. {hint}Give its memory as in 20GB, or one of {', '.join(CARDS)}."
    )
