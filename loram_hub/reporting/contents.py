"""What a page shows, before it is drawn or written: sections of paragraphs, tables and figures, all of plain text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table."""

    caption: str
    """What it shows, units included."""
    header: tuple[str, ...]
    """Of its columns; empty for a list of names and values."""
    rows: tuple[tuple[str, ...], ...]
    """As long as the header, each; the first cell names the row."""
    is_words: bool = False
    """Whether its cells are words, which wrap, and no numbers."""
    is_folded: bool = False
    """Whether it is shown only when it is asked for."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Figure:
    """A picture and what it says."""

    name: str
    """Stem of its file name."""
    alt: str
    """What it shows, in numbers, for those who cannot see it."""
    caption: str
    """How to read it."""
    table: Table
    """Its data."""
    draw: Callable[[], bytes]
    """Returns the PNG."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Part:
    """What one source adds to a section."""

    title: str | None = None
    """Its heading; shown where a section has several."""
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Section:
    """A section of the page."""

    id: str
    """Its anchor."""
    title: str
    parts: tuple[Part, ...]
    """Empty if there is nothing to show."""
    hint: str
    """What to give in order to fill it."""
    command: str | None = None
    """A command that makes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyFigure:
    """A number that stands at the top."""

    label: str
    value: str
    note: str
    """What it is compared with, or measured on."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Contents:
    """All that a page shows."""

    title: str
    lead: tuple[str, ...]
    """Sentences that say what it is about."""
    key_figures: tuple[KeyFigure, ...]
    sections: tuple[Section, ...]
    """Those that show something."""
    missing: tuple[Section, ...] = ()
    """Those that have nothing to show: they are listed at the end, with what would fill them."""
