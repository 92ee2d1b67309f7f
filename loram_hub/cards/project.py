"""Where the files of this project are, for cards: whoever reads one on the Hub has not installed anything yet."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata

from loram_hub.cards.escaping import Markdown

NOTEBOOK = "consume/finetune.ipynb"
"""The consumer's notebook, relative to the project's repository."""
_ADDRESS = re.compile(r"https://[\w.-]+(?:/[\w.-]+)+")


def project_file(path: str) -> Markdown:
    """Name a file of the project's repository; a link, if the installed package says where that repository is.

    The address is `Repository` under `project.urls` in pyproject.toml.
    """
    address = _repository()
    return Markdown(f"`{path}`" if address is None else f"[`{path}`]({address}/blob/main/{path})")


def _repository() -> str | None:
    """Return the address of the project's repository; None if the package is not installed, or does not say."""
    try:
        stated = metadata("loram-hub").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    addresses = dict(entry.partition(", ")[::2] for entry in stated)
    found = str(addresses.get("Repository", "")).rstrip("/")
    return found if _ADDRESS.fullmatch(found) else None
