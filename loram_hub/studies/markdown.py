"""Tables in Markdown, as GitHub reads it."""

from __future__ import annotations

from loram_hub.studies.aggregation import Spread
from loram_hub.studies.cells import Entry
from loram_hub.studies.tables import Table

_ESCAPES = str.maketrans(
    {char: f"\\{char}" for char in "\\`*_[]|~$"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ", "\r": " "}
)


def markdown_table(table: Table) -> str:
    """Return a table with its caption above it and its note below."""
    head = f"| {' | '.join(markdown_text(column) for column in table.columns)} |"
    rule = "|---|" + "---:|" * (len(table.columns) - 1)
    body = [f"| {' | '.join(_entry(entry) for entry in row)} |" for row in table.rows]
    return "\n".join([f"**{markdown_text(table.caption)}**", "", head, rule, *body, "", markdown_text(table.note)])


def markdown_text(text: str) -> str:
    """Escape what Markdown would take for marks; line breaks become spaces."""
    return text.translate(_ESCAPES)


def _entry(entry: Entry) -> str:
    if entry.value is None:
        return "missing"
    if isinstance(entry.value, str):
        return markdown_text(entry.value)
    text = spread_text(entry)
    return f"**{text}**" if entry.bold else text


def spread_text(entry: Entry) -> str:
    """Write numbers as mean ± deviation, with the number of seeds where it is not the row's."""
    assert isinstance(entry.value, Spread)
    mean, deviation, seeds = entry.parts
    return mean + (f" ± {deviation}" if deviation else "") + (f" ({seeds} seeds)" if seeds else "")
