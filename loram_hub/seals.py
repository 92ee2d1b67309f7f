"""JSON that seals itself: `loram.json` holds the SHA-256 of its own content and is written in one way only.

A hash inside a file stops nobody who writes the whole file anew. It finds what accidents do: a flipped bit, a torn
copy, an editor that saved. Since the text has one spelling, every byte of it counts, white space included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loram_hub.errors import VerificationError
from loram_hub.files import dump_json

SEAL = "sha256"
"""Key of the hash."""
MAX_DEPTH = 32
"""Levels of nesting in a JSON file here; real configs have about five."""
MAX_VALUES = 200_000
"""Values in a JSON file here; a tokenizer's settings with every added token have some ten thousand."""


def seal(values: Mapping[str, Any]) -> str:
    """Return the text of a sealed file: `values` with their hash, in the one spelling of `dump_json`."""
    return dump_json({**values, SEAL: hashlib.sha256(dump_json(values).encode()).hexdigest()})


def check_seal(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check a sealed file that was read as JSON.

    Args:
        path: the file.
        values: its content, as `read_json` gave it.

    Returns:
        The values without the seal.

    Raises:
        VerificationError: the content is not what was sealed, or is spelt in another way.
    """
    check_depth(values, source=str(path))
    content = {key: value for key, value in values.items() if key != SEAL}
    sealed = seal(content)
    if SEAL not in values:
        raise VerificationError(f"{path} has no {SEAL} of its own. It was made by other means; make it again.")
    if values[SEAL] != hashlib.sha256(dump_json(content).encode()).hexdigest():
        raise VerificationError(f"{path} was changed: it is not what its own {SEAL} says. Download or copy it again.")
    if path.read_bytes() != sealed.encode():
        raise VerificationError(f"{path} was rewritten: same values, other text. Download or copy it again.")
    return content


def check_depth(values: object, *, source: str) -> None:
    """Raise `VerificationError` if untrusted JSON is deeper or wider than what handles it may safely follow."""
    level: list[object] = [values]
    count = 0
    for _ in range(MAX_DEPTH):
        count += sum(len(value) for value in level if isinstance(value, dict | list))
        if count > MAX_VALUES:
            raise VerificationError(f"{source} has more than {MAX_VALUES:,} values. Is it the right file?")
        level = [child for value in level if isinstance(value, dict | list) for child in _children(value)]
        if not level:
            return
    raise VerificationError(f"{source} nests deeper than {MAX_DEPTH} levels. Is it the right file?")


def _children(value: dict[str, object] | list[object]) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value
