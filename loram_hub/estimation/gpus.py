"""How much memory a GPU has: `20GB`, `20GiB`, or the name of a card.

Makers call 2^30 bytes a GB: a card sold with 24 GB has 24 GiB of memory chips. So `24GB` and `24GiB` are the same here,
24 * 2^30 bytes. Some cards show less, because error correction or firmware takes its part: the table has what
`nvidia-smi` shows as total. PyTorch sees one or two parts in a hundred less than that, and so `USABLE` of the table's
memory is what a named card has. A size is taken as it is given. What the CUDA context and kernels take is part of an
estimate (`Reserves`).

The table is what is commonly reported of these cards, and `USABLE` an assumption: this project has measured neither.
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
    "rtx4060ti-8gb": 8_188,
    "rtx4060ti-16gb": 16_380,
    "rtx4090": 24_564,
    "rtx5090": 32_607,
    "a6000": 49_140,
    "t4": 15_360,
    "l4": 23_034,
    "a10g": 23_028,
    "l40s": 46_068,
    "v100-16gb": 16_384,
    "v100-32gb": 32_768,
    "a100-40gb": 40_960,
    "a100-80gb": 81_920,
    "h100": 81_559,
    "h200": 143_771,
}
"""Total memory by name, in MiB, as `nvidia-smi` shows it."""
USABLE = 0.98
"""Share of a named card's total memory that PyTorch sees; an assumption: it differs by card and driver."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gb|gib|g|mb|mib|m)", re.IGNORECASE)
_LARGEST = 2**50
_SOLD_WITH = re.compile(r"\b(\d{1,4})\s*gi?b\b")
_NO_NAME = re.compile(r"nvidia|geforce|tesla|\bsxm\d*\b|\bpcie\b|\bhbm\d*e?\b|\brtx\W*(?=a\d)|[\s-]")
"""What drivers and shops write beside the name of a card: maker, series, socket, kind of memory."""
_SOLD_TO_SHOWN = 0.1
"""A card sold with 24 GB shows up to this share less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMemory:
    """The memory of a GPU."""

    name: str
    """As it was asked for."""
    nbytes: int
    """Memory that PyTorch has on it, in bytes."""


def gpu_memory(text: str) -> GpuMemory:
    """Read a size or the name of a card.

    Args:
        text: `20GB`, `20GiB`, `16384MiB`, or one of `CARDS`, as `nvidia-smi` or a shop writes it, too: case, spaces,
            hyphens, the maker's name, socket and kind of memory do not matter.

    Raises:
        InvalidRequestError: neither, or a card that is sold with different memory.

    Example:
        >>> gpu_memory("20GB").nbytes == 20 * 2**30
        True
        >>> gpu_memory("NVIDIA A100-SXM4-80GB").name
        'a100-80gb'
    """
    size = _SIZE.fullmatch(text.strip())
    if size is not None:
        nbytes = float(size[1]) * (2**30 if size[2].lower().startswith("g") else MIB)
        if not 1 <= nbytes <= _LARGEST:
            raise InvalidRequestError(f"A GPU of {text!r:.100} cannot be; give its memory as in 20GB.")
        return GpuMemory(name=text.strip(), nbytes=int(nbytes))
    name = _card(text)
    return GpuMemory(name=name, nbytes=int(USABLE * CARDS[name] * MIB))


def _card(text: str) -> str:
    """Find the card of a name; raises `InvalidRequestError` if there is none, or more than one."""
    plain = text.lower().replace("_", " ")
    sold = _SOLD_WITH.search(plain)
    model = _NO_NAME.sub("", _SOLD_WITH.sub(" ", plain))
    variants = [card for card in CARDS if model in (_model_of(card), card.replace("-", ""))]
    fitting = [card for card in variants if sold is None or _is_sold_with(card, int(sold[1]))]
    if len(fitting) == 1:
        return fitting[0]
    if variants:
        more = f"with {' or '.join(f'{_gib_of(card)} GB' for card in variants)}: {' or '.join(variants)}"
        raise InvalidRequestError(f"The GPU {text!r:.100} is known {more}. Name one, or give its memory as in 20GB.")
    near = difflib.get_close_matches(model, [_model_of(card) for card in CARDS], n=1, cutoff=0.7)
    meant = " or ".join(repr(card) for card in CARDS if _model_of(card) in near)
    hint = f"Did you mean {meant}? " if near else ""
    raise InvalidRequestError(
        f"The GPU {text!r:.100} is not known. {hint}Give its memory as in 20GB, or one of {', '.join(CARDS)}."
    )


def _model_of(card: str) -> str:
    return card.partition("-")[0]


def _gib_of(card: str) -> int:
    return round(CARDS[card] * MIB / 2**30)


def _is_sold_with(card: str, gigabytes: int) -> bool:
    return abs(CARDS[card] * MIB / 2**30 - gigabytes) <= _SOLD_TO_SHOWN * gigabytes
