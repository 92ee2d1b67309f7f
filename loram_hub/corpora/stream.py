"""All corpora as one stream of training sequences.

Sequence n belongs to one corpus: the one that is furthest behind its share of the first n + 1. So shares are exact at
every point of the training, and nothing about them is random.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from loram_hub.corpora.corpus import Corpus
from loram_hub.corpora.documents import ShuffledDocuments
from loram_hub.corpora.encoding import Ids, TextEncoder
from loram_hub.corpora.opening import OpenCorpus
from loram_hub.corpora.packing import PackedCorpus
from loram_hub.errors import IncompatibleError, InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSequence:
    """A training sequence."""

    ids: npt.NDArray[np.int32]
    """Token ids, (sequence_length,)."""
    corpus: int
    """Which of the stream's corpora it is from."""
    index: int
    """Its number in the stream, from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Consumed:
    """What a stream has handed out of one corpus."""

    sequences: int
    """Sequences."""
    tokens: int
    """Tokens: sequences times their length."""
    documents: int
    """Documents whose beginning is in these sequences; one that is read again counts again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """What decides over the tokens besides corpora and tokenizer."""

    sequence_length: int
    seed: int
    held_out: int
    shuffle_window: int

    def __post_init__(self) -> None:
        least = {"sequence_length": 2, "held_out": 0, "shuffle_window": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; the least is {value}.")


class PackedStream:
    """An endless or finite iterator over training sequences of several corpora.

    The stream does not know of ranks: of batches of B sequences, step s consists of the sequences s*B to s*B + B - 1,
    and whoever trains hands them to ranks. Every process that opens the same stream reads the same sequences.

    Args:
        corpora: what to read, at least one.
        tokenizer: the base model's.
        sequence_length: tokens per sequence.
        seed: of the shuffles.
        held_out: sequences to hold out of each corpus: made of its first documents, which, with all copies of them in
            any of the corpora, are never trained on.
        shuffle_window: documents that are shuffled together; 1: read in order.
        repeat: read a corpus again when it ends, in another order; otherwise the end is an error.
        vocab_size: rows of the model's embedding, to notice another model's tokenizer; None: not checked.
        token: for private and gated datasets; None: the one that is logged in.

    Raises:
        InvalidRequestError: a setting is out of range; there is no such file, configuration, split or column; a corpus
            has no text, or not enough for the held-out sequences; the tokenizer has no end-of-sequence token.
        IncompatibleError: the tokenizer is another model's.
        VerificationError: a file is damaged.
        AccessError: a dataset does not exist or is closed, or the Hub cannot be reached.
        MissingDependencyError: `datasets` is not installed.

    Example:
        >>> stream = PackedStream([Corpus(source="texts.jsonl")], tokenizer, sequence_length=512)
        >>> next(stream).ids.shape
        (512,)
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        tokenizer: PreTrainedTokenizerBase,
        *,
        sequence_length: int,
        seed: int = 0,
        held_out: int = 0,
        shuffle_window: int = 1000,
        repeat: bool = False,
        vocab_size: int | None = None,
        token: str | bool | None = None,
    ) -> None:
        if not corpora:
            raise InvalidRequestError("No corpus was given, so there is nothing to train on. Name at least one.")
        self._settings = _Settings(
            sequence_length=sequence_length, seed=seed, held_out=held_out, shuffle_window=shuffle_window
        )
        self._encoder = TextEncoder(tokenizer, vocab_size=vocab_size)
        self._repeat, self._token = repeat, token
        self._parts = self._open(corpora)

    @property
    def pinned(self) -> tuple[Corpus, ...]:
        """The corpora, those on the Hub with the commit they are read from."""
        return tuple(part.opened.corpus for part in self._parts)

    @property
    def held_out(self) -> tuple[Ids, ...]:
        """Sequences held out of each corpus, (held_out, sequence_length) int32 each."""
        return tuple(part.held_out for part in self._parts)

    @property
    def consumed(self) -> tuple[Consumed, ...]:
        """What was handed out of each corpus."""
        length = self._settings.sequence_length
        return tuple(
            Consumed(
                sequences=part.packed.sequences,
                tokens=part.packed.sequences * length,
                documents=part.packed.documents,
            )
            for part in self._parts
        )

    @property
    def stream_digest(self) -> str:
        """A hash of everything that decides over the tokens: two streams with the same one give the same sequences.

        Files count by name, size, and first and last 64 KiB, datasets on the Hub by commit.
        """
        return hashlib.sha256(json.dumps(self._made_of(), sort_keys=True).encode()).hexdigest()

    def __iter__(self) -> Iterator[PackedSequence]:
        return self

    def __next__(self) -> PackedSequence:
        """Return the next sequence.

        Raises:
            InvalidRequestError: a corpus is at its end and is not to be repeated, or has no text.
            IncompatibleError: the tokenizer is another model's.
            VerificationError: a file is damaged.
            AccessError: the network failed; the same call can be made again, now or from a state.
        """
        counts = [part.packed.sequences for part in self._parts]
        corpus = next_corpus([part.opened.corpus.weight for part in self._parts], counts)
        ids = self._parts[corpus].packed.next_sequence()
        return PackedSequence(ids=ids, corpus=corpus, index=sum(counts))

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, as JSON of a few kB; a stream that loads it gives the sequences after it."""
        return {
            "format": _FORMAT,
            "made_of": self._made_of(),
            "corpora": [part.packed.state_dict() for part in self._parts],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the last sequence of the stream that the state is of.

        Datasets on the Hub are read from the commits of that stream, even if their branches have moved since.

        Args:
            state: from `state_dict`.

        Raises:
            IncompatibleError: the state is of a stream of other corpora, another tokenizer or other settings.
            VerificationError: a file is damaged.
            AccessError: a dataset cannot be had from the Hub.
        """
        if state.get("format") != _FORMAT:
            raise IncompatibleError(
                f"The state of the stream has the format {state.get('format')!r}; this version reads {_FORMAT}."
            )
        made_of = state["made_of"]
        commits = [described["revision"] for described in made_of["corpora"]]
        parts = self._parts
        if len(commits) == len(parts) and commits != [corpus.revision for corpus in self.pinned]:
            corpora = [replace(c, revision=commit) for c, commit in zip(self.pinned, commits, strict=True)]
            parts = self._open(corpora)
        self._check_same(made_of, self._made_of(parts))
        for part, place in zip(parts, state["corpora"], strict=True):
            part.packed.load_state_dict(place)
        self._parts = parts

    def _open(self, corpora: Sequence[Corpus]) -> list[_Part]:
        texts = set[str]()  # of all corpora: what one holds out, another may contain
        return [self._open_one(number, corpus, texts) for number, corpus in enumerate(corpora)]

    def _open_one(self, number: int, corpus: Corpus, texts: set[str]) -> _Part:
        """Open a corpus; adds the texts that it holds out to those that none of the corpora is to train on."""
        settings = self._settings
        opened = OpenCorpus(corpus, token=self._token)
        documents = ShuffledDocuments(opened, number=number, seed=settings.seed, window=settings.shuffle_window)
        documents.leave_out(texts)
        held_out, its_texts = hold_out(
            corpus, documents, self._encoder, sequences=settings.held_out, length=settings.sequence_length
        )
        texts.update(its_texts)
        packed = PackedCorpus(
            corpus.name, documents, self._encoder, sequence_length=settings.sequence_length, repeat=self._repeat
        )
        return _Part(opened=opened, packed=packed, held_out=held_out, described=_described(opened))

    def _made_of(self, parts: Sequence[_Part] | None = None) -> dict[str, Any]:
        described = [part.described for part in (self._parts if parts is None else parts)]
        return {"corpora": described, "tokenizer": self._encoder.digest, **asdict(self._settings)}

    def _check_same(self, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        differing = sorted(name for name in found if found[name] != wanted.get(name))
        if differing:
            raise IncompatibleError(
                f"The state is of another stream; these differ: {', '.join(differing)}. Go on with the same corpora, "
                "tokenizer and settings, or begin anew."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """One corpus of a stream."""

    opened: OpenCorpus
    packed: PackedCorpus
    held_out: Ids
    described: Mapping[str, Any]


def _described(opened: OpenCorpus) -> dict[str, Any]:
    """Return what decides over a corpus's tokens; of files their content, not where they lie."""
    corpus = asdict(opened.corpus)
    return corpus if opened.files is None else corpus | {"source": opened.files.digest}


def next_corpus(weights: Sequence[float], counts: Sequence[int]) -> int:
    """Return which corpus the next sequence is from: the one that is furthest behind its share, of equals the first.

    Args:
        weights: of the corpora.
        counts: sequences taken from each so far.
    """
    total, taken = sum(weights), sum(counts) + 1
    behind = [weight * taken - count * total for weight, count in zip(weights, counts, strict=True)]
    return behind.index(max(behind))


def hold_out(
    corpus: Corpus, documents: ShuffledDocuments, encoder: TextEncoder, *, sequences: int, length: int
) -> tuple[Ids, list[str]]:
    """Make sequences of a corpus's first documents, and let the rest start behind them.

    Returns:
        The sequences, and the documents they were made of.

    Raises:
        InvalidRequestError: the corpus is too short.
    """
    if sequences == 0:
        return np.empty((0, length), dtype=np.int32), []
    texts, pieces, tokens = list[str](), list[Ids](), 0
    for text in documents.in_order():
        texts.append(text)
        pieces.append(encoder.encode([text])[0])
        tokens += len(pieces[-1])
        if tokens >= sequences * length:
            documents.start_here()
            return np.concatenate(pieces)[: sequences * length].reshape(sequences, length), texts
    raise InvalidRequestError(
        f"The corpus {corpus.name} has {tokens:,} tokens in all; {sequences:,} sequences of {length:,} were to be held "
        "out of it. Hold out fewer, or give more text."
    )
