"""Untrusted values in Markdown: names, paths and texts from a manifest or an adapter that anyone may have written.

They are shown as code spans. Inside one there is no markup, no HTML and no automatic link, in any Markdown dialect, so
that one rule does for all of them; backslashes and entities are read differently by different renderers. The few
characters that have a meaning even there are replaced by look-alikes. Exact values are in `loram.json`.
"""

from __future__ import annotations

import json
import unicodedata

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

MAX_TEXT = 200
"""Characters of an untrusted value that a card shows."""
MAX_BLOCK = 20_000
"""Characters of JSON that a card shows."""

# The Hub renders $$ and \\( as formulas before it reads Markdown, code spans included; | ends a table cell.
_LOOK_ALIKES = str.maketrans({"`": "'", "|": "¦", "<": "‹", ">": "›", "\\": "∖", "$": "＄"})
_JSON_ESCAPES = str.maketrans({char: f"\\u{ord(char):04x}" for char in "`<>&$"})
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})  # controls, direction marks, surrogates, line breaks


class Markdown(str):
    """Text that may go into a card as it is: our own, or already escaped."""

    __slots__ = ()


def visible(value: object) -> str:
    """Return a value as one line of visible characters, at most `MAX_TEXT` of them."""
    text = str(value)[: 4 * MAX_TEXT]
    shown = "".join("\ufffd" if unicodedata.category(char) in _HIDDEN and not char.isspace() else char for char in text)
    line = " ".join(shown.split())
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "…"


def code(value: object) -> Markdown:
    """Show an untrusted value as a code span, safe in running text and in table cells."""
    return Markdown(f"`{visible(value).translate(_LOOK_ALIKES) or '-'}`")


def json_block(value: object) -> Markdown | None:
    """Show untrusted JSON values as a code block that parses back to them; None if that would be too long."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False).translate(_JSON_ESCAPES)
    return Markdown(f"```json\n{text}\n```") if len(text) <= MAX_BLOCK else None


def is_hub_id(name: object) -> bool:
    """Whether a value is the id of a repository on the Hub, owner included; such an id needs no escaping."""
    if not isinstance(name, str) or name.count("/") != 1 or not name.isascii():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_link(name: str, *, kind: str = "") -> Markdown:
    """Link a repository on the Hub; anything that is no id becomes a code span.

    Args:
        name: the id, untrusted.
        kind: `datasets/` for a dataset.
    """
    return Markdown(f"[{code(name)}](https://huggingface.co/{kind}{name})") if is_hub_id(name) else code(name)
