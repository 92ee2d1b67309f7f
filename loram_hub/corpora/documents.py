"""The documents of one corpus, shuffled window by window, from any place on.

`datasets` has a shuffle buffer of its own, whose content is lost when reading is interrupted. Here a window of rows is
read, ordered by a hash of (seed, corpus, epoch, window, row), and handed out; a place in the corpus is where the window
starts and how far into it one is. Coming back gives the same documents, and costs reading one window and what stands
before it in its file, which `datasets` reads again and passes over. The order is by hash because no library promises
that its random numbers stay the same from version to version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from loram_hub.corpora.opening import DatasetState, OpenCorpus
from loram_hub.errors import InvalidRequestError

_WINDOW_CHARACTERS = 32 * 1024 * 1024
"""A window of long documents ends early: 128 MiB at most, as Python stores text."""
_PORTION_DOCUMENTS = 64
_PORTION_CHARACTERS = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A place between two documents of a corpus. All of it is JSON."""

    epoch: int = 0
    """How often the corpus was read to its end before."""
    window: int = 0
    """Windows of this epoch before this one."""
    start: DatasetState | None = None
    """Where the window starts in the dataset; None: at its first row."""
    document: int = 0
    """Documents of the window that were handed out."""
    rows: int = 0
    """Rows of this epoch before this window."""
    documents: int = 0
    """Documents of this epoch before this window: rows whose text is not blank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Window:
    """Texts of one window in their shuffled order, and what lies behind it."""

    place: Place
    texts: tuple[str, ...]
    rows: int
    end: DatasetState
    is_last: bool


class ShuffledDocuments:
    """Hands out a corpus's documents in portions. Holds one window in memory, and nothing that a place does not say.

    Args:
        corpus: the corpus.
        number: which of the stream's corpora it is; corpora are shuffled differently.
        seed: of the shuffles.
        window: rows that are shuffled together.
    """

    def __init__(self, corpus: OpenCorpus, *, number: int, seed: int, window: int) -> None:
        self._corpus, self._number, self._seed, self._rows_per_window = corpus, number, seed, window
        self._held_out: Collection[str] = ()
        self.start = Place()
        self._window: _Window | None = None
        self._rows: Iterator[str | None] | None = None
        self._rows_at: DatasetState | None = None

    def in_order(self) -> Iterator[str]:
        """Yield the documents unshuffled, from the first on, for a held-out set."""
        self._rows = None
        for text in self._corpus.rows(None):
            if text is not None and text.strip():
                yield text

    def start_here(self) -> None:
        """Let the documents that `in_order` has yielded so far be no part of the rest."""
        self.start = Place(start=self._corpus.state())

    def leave_out(self, texts: Collection[str]) -> None:
        """Pass over every copy of the given documents."""
        self._held_out = texts

    def read(self, place: Place) -> tuple[list[str], Place]:
        """Return the next documents and the place behind them.

        Args:
            place: `start`, or what an earlier call has returned, in this process or another one.

        Returns:
            Some documents, none at the end of the corpus; the place behind them, at the end the next epoch's start.

        Raises:
            InvalidRequestError: there is not one document in the corpus.
            VerificationError: a file is damaged.
            AccessError: the network failed; the same call can be made again.
        """
        while True:
            window = self._window_at(place)
            if place.document < len(window.texts):
                texts = _portion(window.texts, place.document)
                return texts, replace(place, document=place.document + len(texts))
            rows, documents = place.rows + window.rows, place.documents + len(window.texts)
            if window.is_last:
                self._check_not_empty(rows, documents)
                return [], replace(self.start, epoch=place.epoch + 1)
            place = Place(epoch=place.epoch, window=place.window + 1, start=window.end, rows=rows, documents=documents)

    def _check_not_empty(self, rows: int, documents: int) -> None:
        if documents:
            return
        name = self._corpus.corpus.name
        if self.start.start is not None:
            found = "nothing but what is held out. Hold out less, or give more text"
        elif rows:
            found = f"{rows:,} rows, and nothing but blanks in the column {self._corpus.corpus.column!r}"
        else:
            found = "no rows"
        raise InvalidRequestError(f"The corpus {name} holds {found}.")

    def _window_at(self, place: Place) -> _Window:
        first = replace(place, document=0)
        if self._window is None or self._window.place != first:
            self._window = self._read_window(first)
        return self._window

    def _read_window(self, place: Place) -> _Window:
        if self._rows is None or self._rows_at != place.start:
            self._rows = self._corpus.rows(place.start)
        rows, self._rows = self._rows, None  # set again when the window is whole: a broken iterator is of no use
        count, characters, texts, is_last = 0, 0, [], False
        while count < self._rows_per_window and characters < _WINDOW_CHARACTERS:
            try:
                text = next(rows)
            except StopIteration:
                is_last = True
                break
            count += 1
            if text is not None and text.strip() and text not in self._held_out:
                characters += len(text)
                texts.append(text)
        end = self._corpus.state()
        self._rows, self._rows_at = rows, end
        order = sorted(range(len(texts)), key=lambda idx: self._key(place, idx))
        shuffled = tuple(texts[idx] for idx in order)
        return _Window(place=place, texts=shuffled, rows=count, end=end, is_last=is_last)

    def _key(self, place: Place, idx: int) -> bytes:
        name = f"{self._seed} {self._number} {place.epoch} {place.window} {idx}"
        return hashlib.blake2b(name.encode(), digest_size=16).digest()


def _portion(texts: tuple[str, ...], start: int) -> list[str]:
    """Return as many documents as are tokenized at once."""
    characters, end = 0, start
    while end < min(len(texts), start + _PORTION_DOCUMENTS) and characters < _PORTION_CHARACTERS:
        characters += len(texts[end])
        end += 1
    return list(texts[start:end])
