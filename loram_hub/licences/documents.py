"""Texts that come with a model: its licence, Notice and use policy files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from loram_hub.files import resource_errors

LICENCE_FILE = re.compile(r"(LICEN[SC]E|COPYING).*", re.IGNORECASE)
NOTICE_FILE = re.compile(r"NOTICE(\.txt|\.md)?", re.IGNORECASE)
POLICY_FILE = re.compile(r"USE_POLICY.*", re.IGNORECASE)

_MAX_DOCUMENT_BYTES = 1024 * 1024


def licence_documents(folder: Path) -> dict[str, str]:
    """Read the texts that `licence_of` and `duties` look at: LICENSE, Notice and USE_POLICY files, by name.

    Raises:
        ResourceError: one cannot be read.
    """
    patterns = (LICENCE_FILE, NOTICE_FILE, POLICY_FILE)
    with resource_errors(f"Reading {folder}"):
        return {
            path.name: path.read_bytes()[:_MAX_DOCUMENT_BYTES].decode("utf-8", "replace")
            for path in sorted(folder.iterdir())
            if path.is_file() and any(pattern.fullmatch(path.name) for pattern in patterns)
        }


def texts_named(documents: Mapping[str, str], pattern: re.Pattern[str]) -> dict[str, str]:
    """Return the texts whose name fits a pattern, in the order of their names."""
    return {name: documents[name] for name in sorted(documents) if pattern.fullmatch(name)}


def plain(text: str) -> str:
    """Make texts comparable: licences come as plain text and as Markdown, with one sign for copyright or another."""
    text = text.replace("©", "(c)").lower()
    return re.sub(r"\s+", " ", re.sub(r"[*_\\“”\"]", "", text))
