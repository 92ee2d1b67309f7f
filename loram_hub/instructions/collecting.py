"""From the records of sources to one set of examples: converted, encoded, judged, stored and counted as they come."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from huggingface_hub.utils import tqdm

from loram_hub.errors import InvalidRequestError
from loram_hub.instructions.encoding import Encoded, Encoder
from loram_hub.instructions.examples import Drop, Example, Kind, Reason, examples_of
from loram_hub.instructions.files import PlacedRecord
from loram_hub.instructions.layouts import content_of, recognised
from loram_hub.instructions.opening import OpenSource
from loram_hub.instructions.reports import SHOWN_PLACES, DataRecord, Dropped
from loram_hub.instructions.sampling import Keys
from loram_hub.instructions.sources import DataSource, Format
from loram_hub.instructions.storing import ExampleWriter

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]  # ships no types

TooLong = Literal["drop", "truncate", "error"]
"""What becomes of an example that is longer than `max_length`."""
BadRecords = Literal["drop", "error"]
"""What becomes of a record that is not laid out as its format says."""

_BATCH = 256
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What is kept."""

    max_length: int
    """Longest sequence, tokens; at least 2."""
    too_long: TooLong | None
    """None: drop answers, cut texts."""
    bad_records: BadRecords
    """What becomes of malformed records."""
    seed: int
    """Of samples."""

    def for_kind(self, kind: Kind) -> TooLong:
        """Return what becomes of an example of a kind that is too long."""
        return self.too_long or ("truncate" if kind == "text" else "drop")


@dataclass(frozen=True, kw_only=True, slots=True)
class Notes:
    """How many examples of a set show something that should be told."""

    split: int = 0
    """Those whose prompt alone ends in other tokens than in front of its completion."""
    had_bos: int = 0
    """Those that spelled out the begin-of-sequence token."""
    has_control: int = 0
    """Those that spell out a control token."""
    without_end: int = 0
    """Those without a control token at their end."""

    def with_one_more(self, encoded: Encoded) -> Notes:
        """Return the counts with an example added."""
        return Notes(
            split=self.split + encoded.is_split,
            had_bos=self.had_bos + encoded.had_bos,
            has_control=self.has_control + encoded.has_control,
            without_end=self.without_end + (not encoded.has_end),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """A set of examples."""

    dataset: Dataset
    """Its rows."""
    kind: Kind
    """Which columns they have."""
    lengths: npt.NDArray[np.uint32]
    """Tokens of each row before any cut, (rows,)."""
    learned: npt.NDArray[np.uint32]
    """Tokens of each row that count in the loss, after the cut, (rows,)."""
    keys: Keys
    """`content_key` of each row's question, (rows,)."""
    records: tuple[DataRecord, ...]
    """The sources."""
    dropped: tuple[Dropped, ...]
    """What was left out."""
    notes: Notes
    """What should be told."""


class Collector:
    """Makes one set of examples; holds a batch of records, and three numbers for each example.

    Args:
        name: of the set, for messages.
        encoder: of the model.
        policy: what is kept.
    """

    def __init__(self, name: str, encoder: Encoder, policy: Policy) -> None:
        self._name, self._encoder, self._policy = name, encoder, policy
        self._kind: Kind | None = None
        self._lengths, self._learned, self._keys = array("I"), array("I"), array("Q")
        self._records: list[DataRecord] = []
        self._drops: dict[Reason, list[Drop]] = {}
        self._dropped = Counter[Reason]()
        self._notes = Notes()
        self._longest = 0
        self._writer: ExampleWriter | None = None
        self._closing = ExitStack()

    def collect(self, sources: Iterable[OpenSource]) -> Collected:
        """Read sources, one after another, into a set.

        Raises:
            InvalidRequestError: a record is malformed, examples are too long and may not be, their kinds differ, or
                none is left.
            IncompatibleError: the tokenizer is another model's.
            VerificationError: a file is damaged.
        """
        with self._closing:
            for source in sources:
                self._read(source)
            if self._writer is None or self._kind is None:
                raise self._nothing_left()
            self._refuse_too_long()
            dataset = self._writer.finish()
        return Collected(
            dataset=dataset,
            kind=self._kind,
            lengths=np.array(self._lengths, dtype=np.uint32),
            learned=np.array(self._learned, dtype=np.uint32),
            keys=np.array(self._keys, dtype=np.uint64),
            records=tuple(self._records),
            dropped=self._told_drops(),
            notes=self._notes,
        )

    def _read(self, opened: OpenSource) -> None:
        source, rows = opened.source, 0
        form: Format = source.format
        with tqdm(desc=f"Reading {source.label}", unit=" records") as progress:
            for batch in _batches(opened.records(seed=self._policy.seed), _BATCH):
                if form == "auto":
                    form = recognised(*batch[0], source)
                made = [one for record in batch for one in self._convert(record, source, form)]
                self._take(made)
                rows += len(batch)
                progress.update(len(batch))
        if rows == 0:
            raise InvalidRequestError(f"{source.source} holds no records.")
        self._records.append(
            DataRecord(source=source, format=form, commit=opened.commit, sha256=opened.sha256, rows=rows)
        )

    def _convert(self, record: PlacedRecord, source: DataSource, form: Format) -> list[Example | Drop]:
        place, values = record
        try:
            content = content_of(place, values, source, form=form)
        except InvalidRequestError as err:
            if self._policy.bad_records == "error":
                raise
            return [Drop(place=place, reason="malformed", detail=str(err))]
        return examples_of(place, content, chat=source.style != "plain", turns=source.turns)

    def _take(self, made: list[Example | Drop]) -> None:
        """Encode a batch, keep what can be learned, and count the rest."""
        for drop in made:
            if isinstance(drop, Drop):
                self._drop(drop)
        kept: list[Example] = []
        for one in self._encoder.encode([example for example in made if isinstance(example, Example)]):
            judged = one if isinstance(one, Drop) else self._judge(one)
            if isinstance(judged, Drop):
                self._drop(judged)
            else:
                self._count(judged)
                kept.append(judged.example)
        if kept:
            self._store(kept)

    def _judge(self, encoded: Encoded) -> Encoded | Drop:
        length, limit, place = len(encoded.ids), self._policy.max_length, encoded.example.place
        if length <= max(encoded.learned_from, 1):  # the first token of all has nothing to be predicted from
            return Drop(place=place, reason="nothing to learn", detail=f"{length:,} tokens")
        if length <= limit:
            return encoded
        self._longest = max(self._longest, length)
        if self._policy.for_kind(encoded.example.kind) != "truncate":
            return Drop(place=place, reason="longer than max_length", detail=f"{length:,} tokens")
        if encoded.learned_from >= limit:
            return Drop(place=place, reason="prompt fills max_length", detail=f"{encoded.learned_from:,} tokens")
        return encoded

    def _count(self, encoded: Encoded) -> None:
        self._lengths.append(len(encoded.ids))
        self._learned.append(min(len(encoded.ids), self._policy.max_length) - encoded.learned_from)
        self._keys.append(encoded.example.key)
        self._notes = self._notes.with_one_more(encoded)

    def _drop(self, drop: Drop) -> None:
        self._dropped[drop.reason] += 1
        first = self._drops.setdefault(drop.reason, [])
        if len(first) < SHOWN_PLACES:
            first.append(drop)

    def _store(self, kept: list[Example]) -> None:
        if self._writer is None:
            self._kind = kept[0].kind
            self._writer = self._closing.enter_context(ExampleWriter(self._kind))
        for example in kept:
            if example.kind != self._kind:
                raise InvalidRequestError(
                    f"{example.place} gives a {example.kind} example, those before it in {self._name} are "
                    f"{self._kind}; what is learned of an example is decided by its kind, so a set has one. Give all "
                    "sources the same style and turns, or train on one kind alone."
                )
        self._writer.write(kept)

    def _refuse_too_long(self) -> None:
        count = self._dropped["longer than max_length"]
        if count and self._policy.too_long == "error":
            places = ", ".join(drop.place for drop in self._drops["longer than max_length"])
            raise InvalidRequestError(
                f"{count:,} examples of {self._name} are longer than {self._policy.max_length:,} tokens, the longest "
                f"has {self._longest:,} (first: {places}). Raise max_length, or set too_long to drop or truncate."
            )

    def _nothing_left(self) -> InvalidRequestError:
        reasons = "; ".join(
            f"{drop.count:,} × {drop.reason} ({drop.places[0]}{f': {drop.detail}' if drop.detail else ''})"
            for drop in self._told_drops()
        )
        return InvalidRequestError(
            f"Nothing of {self._name} can be learned: {reasons}. Mend the data, or change format, style or max_length."
        )

    def _told_drops(self) -> tuple[Dropped, ...]:
        return tuple(
            Dropped(
                reason=reason,
                count=self._dropped[reason],
                places=tuple(drop.place for drop in first),
                detail=first[0].detail,
            )
            for reason, first in sorted(self._drops.items())
        )


def _batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
