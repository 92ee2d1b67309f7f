"""What was read, what is learned of it, and what was left out and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loram_hub.instructions.examples import Kind, Reason
from loram_hub.instructions.sources import DataSource, Format

SHOWN_PLACES = 3
"""Places that are named of each reason."""
_BARS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRecord:
    """What a source was, so that the same data can be had again."""

    source: DataSource
    """The source; one on the Hub names its commit."""
    format: Format
    """What its records were read as; never `auto`."""
    commit: str | None
    """Commit of a Hub dataset; None for files."""
    sha256: str | None
    """SHA-256 of the file, or of names and hashes of a folder's files; None for a Hub dataset."""
    rows: int
    """Records that were read; the source's limit counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """What was left out for one reason."""

    reason: Reason
    """Why."""
    count: int
    """Examples; records, where no example could be made of one."""
    places: tuple[str, ...]
    """Where the first ones stand."""
    detail: str
    """What the first one was, where there is more to say."""

    def joined(self, other: Dropped) -> Dropped:
        """Return both as one; the first places are these."""
        places = (*self.places, *other.places)[:SHOWN_PLACES]
        return Dropped(
            reason=self.reason, count=self.count + other.count, places=places, detail=self.detail or other.detail
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """How a number of tokens is spread over the examples of a set."""

    least: int
    """The shortest."""
    median: float
    """Half of the examples are at most this long."""
    mean: float
    """Mean."""
    greatest: int
    """The longest."""
    edges: tuple[int, ...]
    """Edges of the bars of a histogram, one more than bars; each bar holds its lower edge, the last one both."""
    counts: tuple[int, ...]
    """Examples in each bar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetReport:
    """One set of examples, as it is trained or evaluated on."""

    name: str
    """`train`, `held_out`, or the name of an evaluation source."""
    kind: Kind
    """Columns of its rows: `prompt-completion`, `chat` (both lists of messages), `whole-chat` (messages) or `text`."""
    examples: int
    """Rows."""
    tokens: int
    """Tokens of one pass over the set, cut at `max_length`."""
    learned_tokens: int
    """Those of them that count in the loss."""
    truncated: int
    """Rows that are cut at `max_length`."""
    lengths: Lengths
    """Tokens per row, before any cut."""
    learned_lengths: Lengths
    """Tokens per row that count in the loss, after the cut."""
    repeated: int
    """Rows whose question stands in an earlier row of the set."""
    shared_with_training: int
    """Rows whose question is trained on; 0 for the training set itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """What `read_instructions` found; `to_dict` is its JSON."""

    sets: tuple[SetReport, ...]
    """The training set, then those to evaluate on."""
    records: tuple[DataRecord, ...]
    """The sources, in the order in which they were named."""
    dropped: tuple[Dropped, ...]
    """What was left out, of all sources."""
    max_length: int
    """Longest sequence, tokens."""
    seed: int
    """Of samples and of what is held out."""
    tokenizer_sha256: str
    """`tokenizer_digest` of the tokenizer."""
    template_text: str
    """What the chat template writes in front of every conversation by itself; empty where none is used."""
    warnings: tuple[str, ...]
    """What should be looked at before hours are spent on training; sentences."""

    @property
    def train(self) -> SetReport:
        """The training set."""
        return self.sets[0]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Yield the report as lines to read, warnings last."""
        for record in self.records:
            yield f"{record.source.label}: {record.rows:,} records of {record.source.source}, read as {record.format}"
        for one in self.sets:
            yield (
                f"{one.name}: {one.examples:,} examples, {one.tokens:,} tokens, {one.learned_tokens:,} learned; "
                f"length {one.lengths.median:.0f} (median) to {one.lengths.greatest:,}"
            )
        yield from (f"warning: {warning}" for warning in self.warnings)


def lengths_of(values: npt.NDArray[np.uint32]) -> Lengths:
    """Summarize lengths, (examples,); at least one."""
    counts, edges = np.histogram(values, bins=_edges(int(values.max())))
    return Lengths(
        least=int(values.min()),
        median=float(np.median(values)),
        mean=float(values.mean()),
        greatest=int(values.max()),
        edges=tuple(int(edge) for edge in edges),
        counts=tuple(int(count) for count in counts),
    )


def _edges(greatest: int) -> Sequence[int]:
    width = -(-(greatest + 1) // _BARS)
    return [number * width for number in range(_BARS + 1)]
