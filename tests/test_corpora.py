"""Run with: pytest tests/test_corpora.py"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from builders import save_tokenizer
from hub_client import python
from hub_server import Fault, HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loram_hub.corpora import (
    DEFAULT_CORPORA,
    Consumed,
    Corpus,
    PackedSequence,
    PackedStream,
    check_enough,
    parse_corpus,
)
from loram_hub.corpora.encoding import TextEncoder
from loram_hub.corpora.stream import next_corpus
from loram_hub.errors import AccessError, IncompatibleError, InvalidRequestError, LoramError, VerificationError

BOS, EOS, VOCAB = 1, 2, 53
LENGTH = 16

Document = tuple[int, ...]
"""A document as the ids of its words."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def opening_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """One that, as some do, puts a token before a text and one behind it."""
    folder = save_tokenizer(tmp_path_factory.mktemp("opening-tokenizer"))
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    inner.save(str(folder / "tokenizer.json"))
    return AutoTokenizer.from_pretrained(folder)


def text_of(document: Document) -> str:
    return " ".join(f"w{word}" for word in document)


def some_documents(count: int, *, seed: int = 0) -> list[Document]:
    """Documents that all differ."""
    rng = random.Random(seed)
    made = {tuple(rng.randrange(4, VOCAB) for _ in range(rng.randrange(3, 20))): None for _ in range(count)}
    assert len(made) == count
    return list(made)


def write(path: Path, documents: Sequence[Document], *, column: str = "text") -> Path:
    """Write documents to a file of the kind that its name says, or a folder of texts."""
    texts = [text_of(document) for document in documents]
    lines = "".join(json.dumps({column: text, "number": idx}) + "\n" for idx, text in enumerate(texts))
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".jsonl":
            path.write_text(lines, encoding="utf-8")
        case ".gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".json":
            path.write_text(json.dumps([{column: text} for text in texts]), encoding="utf-8")
        case ".parquet":
            path.write_bytes(parquet(texts, column=column))
        case _:
            path.mkdir()
            for idx, text in enumerate(texts):
                (path / f"{idx:04}.txt").write_text(text, encoding="utf-8")
    return path


def parquet(texts: Sequence[str | None], *, column: str = "text", rows: int = 7) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({column: pa.array(texts, pa.string()), "number": list(range(len(texts)))})
    pq.write_table(table, buffer, row_group_size=rows)
    return buffer.getvalue()


def open_stream(*sources: Path | Corpus, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PackedStream:
    corpora = [source if isinstance(source, Corpus) else Corpus(source=str(source)) for source in sources]
    return PackedStream(corpora, tokenizer, **{"sequence_length": LENGTH, "vocab_size": VOCAB} | settings)


def tokens_of(sequences: Sequence[PackedSequence]) -> list[int]:
    return [int(token) for sequence in sequences for token in sequence.ids]


def documents_in(tokens: Sequence[int]) -> list[Document]:
    """Split tokens at the ends of documents; what stands behind the last one is left out."""
    found, current = list[Document](), list[int]()
    for token in tokens:
        if token == EOS:
            found.append(tuple(current))
            current = []
        else:
            current.append(token)
    return found


def all_of(stream: PackedStream) -> list[PackedSequence]:
    """Read a stream that is not repeated to its end."""
    found: list[PackedSequence] = []
    with pytest.raises(InvalidRequestError, match="is at its end"):
        found.extend(iter(lambda: next(stream), None))
    return found


def same(left: Sequence[PackedSequence], right: Sequence[PackedSequence]) -> bool:
    def plain(sequences: Sequence[PackedSequence]) -> list[tuple[int, int, list[int]]]:
        return [(one.index, one.corpus, one.ids.tolist()) for one in sequences]

    return plain(left) == plain(right)


# --- encoding


def learned_tokenizer(folder: Path, kind: str) -> PreTrainedTokenizerBase:
    """A BPE tokenizer with control tokens, of bytes as GPT-2's or of pieces with byte fallback as Llama's."""
    texts = ["the cat sat on the mat", "a </s> b <|end|> c", "naïve façade, 数学"] * 20
    inner = Tokenizer(models.BPE(unk_token=None, byte_fallback=kind == "pieces"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    specials = ["</s>", "<|end|>", *([f"<0x{byte:02X}>" for byte in range(256)] if kind == "pieces" else [])]
    if kind == "bytes":
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials[:2], initial_alphabet=alphabet)
    inner.train_from_iterator([text.replace("</s>", "").replace("<|end|>", "") for text in texts], trainer)
    inner.add_tokens(specials[2:])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", additional_special_tokens=["<|end|>"]
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_control_tokens_that_a_text_spells_out_are_text(tmp_path: Path, kind: str) -> None:
    tokenizer = learned_tokenizer(tmp_path / kind, kind)
    eos, end = tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"])
    plain, spelled = "the cat, naïve\n 数学 x", "the </s> cat <|end|> sat"
    assert eos in tokenizer(spelled)["input_ids"], "the tokenizer itself would read it"

    ids, starts = TextEncoder(tokenizer).encode([plain, spelled])

    first, second = ids[: starts[1]].tolist(), ids[starts[1] :].tolist()
    assert first == [*tokenizer(plain, add_special_tokens=False)["input_ids"], eos]
    assert (second.count(eos), second[-1], second.count(end)) == (1, eos, 0)


# --- packing


words = st.integers(4, VOCAB - 1)


@settings(max_examples=15)
@given(
    documents=st.lists(st.lists(words, min_size=1, max_size=40).map(tuple), min_size=1, max_size=30),
    length=st.integers(2, 40),
)
def test_a_corpus_is_packed_as_the_plain_concatenation_of_its_documents(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerBase,
    opening_tokenizer: PreTrainedTokenizerBase,
    documents: list[Document],
    length: int,
) -> None:
    path = write(tmp_path_factory.mktemp("corpus") / "a.jsonl", documents)

    for which, opening in ((tokenizer, []), (opening_tokenizer, [BOS])):
        stream = open_stream(path, tokenizer=which, sequence_length=length, shuffle_window=1)
        found = all_of(stream)

        plain = [token for document in documents for token in (*opening, *document, EOS)]
        assert tokens_of(found) == plain[: len(plain) // length * length]
        assert all(one.ids.shape == (length,) and one.ids.dtype == np.int32 for one in found)
        assert [one.index for one in found] == list(range(len(found)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "folder", "several [1]*/b.parquet"])
def test_every_kind_of_file_gives_the_same_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    documents = some_documents(40)
    path = write(tmp_path / name, documents)

    found = all_of(open_stream(path, tokenizer=tokenizer, shuffle_window=1))

    assert documents_in(tokens_of(found)) == documents[: len(documents_in(tokens_of(found)))]
    assert len(tokens_of(found)) > sum(len(document) + 1 for document in documents) - LENGTH


def test_a_folder_is_read_file_after_file_and_hidden_and_empty_files_are_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = some_documents(30)
    write(tmp_path / "corpus" / "b" / "a.jsonl", documents[20:])
    write(tmp_path / "corpus" / "a.jsonl", documents[:20])
    write(tmp_path / "corpus" / ".cache" / "c.jsonl", some_documents(5, seed=1))
    (tmp_path / "corpus" / "empty.jsonl").write_bytes(b"")
    (tmp_path / "corpus" / "README.md").write_text("not a corpus")

    found = documents_in(tokens_of(all_of(open_stream(tmp_path / "corpus", tokenizer=tokenizer, shuffle_window=1))))

    assert len(found) >= 28
    assert found == documents[: len(found)]


def test_blank_texts_and_nulls_are_passed_over(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(["w4", None, "", " \n", "w5"] * 10))

    found = documents_in(tokens_of(all_of(open_stream(tmp_path / "a.parquet", tokenizer=tokenizer, shuffle_window=1))))

    assert found[:4] == [(4,), (5,), (4,), (5,)]


# --- shuffling


def test_documents_are_shuffled_inside_their_window_and_none_is_lost(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = some_documents(100)
    path = write(tmp_path / "a.jsonl", documents)

    def read(seed: int) -> list[Document]:
        stream = open_stream(path, tokenizer=tokenizer, sequence_length=2, shuffle_window=20, seed=seed)
        return documents_in(tokens_of(all_of(stream)))

    orders = [read(seed) for seed in (0, 0, 1)]

    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    for order in orders:
        assert order != documents
        for start in range(0, 80, 20):  # the last window may lack the tokens of half a sequence
            window = slice(start, start + 20)
            assert sorted(order[window]) == sorted(documents[window])
            assert order[window] != documents[window]


def test_a_corpus_that_is_repeated_comes_whole_in_each_epoch_and_in_another_order(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = some_documents(50)
    path = write(tmp_path / "a.jsonl", documents)
    tokens = sum(len(document) + 1 for document in documents)

    stream = open_stream(path, tokenizer=tokenizer, shuffle_window=200, repeat=True)
    found = documents_in(tokens_of(list(islice(stream, 4 * tokens // LENGTH))))

    epochs = [found[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(epoch) == sorted(documents) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


# --- several corpora


@given(
    weights=st.lists(st.floats(0.01, 100, allow_nan=False), min_size=2, max_size=2),
    count=st.integers(1, 200),
)
def test_the_shares_of_two_corpora_are_exact_at_every_point(weights: list[float], count: int) -> None:
    counts = [0, 0]
    for taken in range(1, count + 1):
        counts[next_corpus(weights, counts)] += 1

        assert sum(counts) == taken
        for weight, found in zip(weights, counts, strict=True):
            assert abs(found - weight / sum(weights) * taken) <= 1 + 1e-9  # less than one sequence, but for rounding


def test_every_corpus_gets_its_share_of_the_sequences(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    corpora = [
        Corpus(source=str(write(tmp_path / f"{idx}.jsonl", some_documents(60, seed=idx))), weight=weight)
        for idx, weight in enumerate((3.0, 2.0, 1.0))
    ]

    stream = open_stream(*corpora, tokenizer=tokenizer, repeat=True)
    found = list(islice(stream, 60))

    assert [sum(one.corpus == idx for one in found) for idx in range(3)] == [30, 20, 10]
    for start in range(0, 60, 6):
        assert sorted(one.corpus for one in found[start : start + 6]) == [0, 0, 0, 1, 1, 2]
    alone = open_stream(Corpus(source=corpora[0].source), tokenizer=tokenizer, repeat=True)
    mixed = [one.ids.tolist() for one in found if one.corpus == 0]
    assert mixed == [one.ids.tolist() for one in islice(alone, 30)], "the others change nothing about a corpus"


def test_what_was_consumed_is_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    paths = [write(tmp_path / f"{idx}.jsonl", some_documents(60, seed=idx)) for idx in range(2)]
    stream = open_stream(*paths, tokenizer=tokenizer, shuffle_window=1)

    found = list(islice(stream, 13))

    for idx, consumed in enumerate(stream.consumed):
        tokens = tokens_of([one for one in found if one.corpus == idx])
        begun = 1 + tokens[:-1].count(EOS)  # one begins behind each end
        assert consumed == Consumed(sequences=len(tokens) // LENGTH, tokens=len(tokens), documents=begun)


def test_ranks_that_each_open_the_stream_read_the_same_sequences(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    paths = [write(tmp_path / f"{idx}.jsonl", some_documents(80, seed=idx)) for idx in range(2)]

    def by_ranks(ranks: int, batch: int = 4) -> list[PackedSequence]:
        streams = [list(islice(open_stream(*paths, tokenizer=tokenizer, seed=3), 40)) for _ in range(ranks)]
        taken = [streams[index % batch % ranks][index] for index in range(40)]
        return sorted(taken, key=lambda one: one.index)

    assert same(by_ranks(1), by_ranks(2))
    assert same(by_ranks(1), by_ranks(4))


# --- resuming


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus, Corpus]:
    """Three kinds of corpora; the smallest one is at its end soon."""
    folder = tmp_path_factory.mktemp("mixed")
    write(folder / "rows" / "a.parquet", some_documents(50, seed=1))
    write(folder / "rows" / "b.parquet", some_documents(70, seed=2))
    return (
        Corpus(source=str(folder / "rows"), weight=0.5),
        Corpus(source=str(write(folder / "lines.jsonl", some_documents(150, seed=3))), weight=0.3),
        Corpus(source=str(write(folder / "texts", some_documents(12, seed=4))), weight=0.2),
    )


@settings(max_examples=12)
@given(stops=st.lists(st.integers(0, 40), min_size=1, max_size=4), window=st.sampled_from([1, 9, 64, 1000]))
def test_a_stream_goes_on_from_any_state_as_if_nothing_had_happened(
    mixed: tuple[Corpus, ...], tokenizer: PreTrainedTokenizerBase, stops: list[int], window: int
) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "shuffle_window": window, "held_out": 1, "repeat": True}
    undisturbed = open_stream(*mixed, **options)
    wanted = list(islice(undisturbed, sum(stops) + 30))

    found, state = list[PackedSequence](), None
    for count in (*stops, 30):
        stream = open_stream(*mixed, **options)
        if state is not None:
            stream.load_state_dict(json.loads(state))
        found += islice(stream, count)
        state = json.dumps(stream.state_dict())

    assert same(found, wanted)
    assert json.loads(state or "") == undisturbed.state_dict()
    assert stream.consumed == undisturbed.consumed


def test_a_state_stays_small(mixed: tuple[Corpus, ...], tokenizer: PreTrainedTokenizerBase) -> None:
    stream = open_stream(*mixed, tokenizer=tokenizer, sequence_length=64, repeat=True)

    sizes = [len(json.dumps(stream.state_dict())) for _ in islice(stream, 40)]

    assert max(sizes) < 5_000


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"sequence_length": LENGTH + 1}, "sequence_length"),
        ({"shuffle_window": 3}, "shuffle_window"),
        ({"held_out": 1}, "held_out"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_of_a_stream_with_other_settings_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, changes: dict[str, Any], named: str
) -> None:
    path = write(tmp_path / "a.jsonl", some_documents(20))
    state = open_stream(path, tokenizer=tokenizer).state_dict()

    with pytest.raises(IncompatibleError, match=f"these differ: {named}"):
        open_stream(path, tokenizer=tokenizer, **changes).load_state_dict(state)


def test_a_state_of_other_corpora_or_another_tokenizer_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, opening_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "a.jsonl", some_documents(20))
    stream = open_stream(path, tokenizer=tokenizer)
    state = stream.state_dict()

    with pytest.raises(IncompatibleError, match="these differ: tokenizer"):
        open_stream(path, tokenizer=opening_tokenizer).load_state_dict(state)
    with pytest.raises(IncompatibleError, match="these differ: corpora"):
        open_stream(path, path, tokenizer=tokenizer).load_state_dict(state)
    with pytest.raises(IncompatibleError, match="format 7; this version reads 1"):
        stream.load_state_dict(state | {"format": 7})
    write(path, some_documents(21))
    with pytest.raises(IncompatibleError, match="these differ: corpora"):
        open_stream(path, tokenizer=tokenizer).load_state_dict(state)


def test_the_digest_follows_the_tokens_and_nothing_else(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, opening_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "here" / "a.jsonl", some_documents(20))
    elsewhere = write(tmp_path / "there" / "a.jsonl", some_documents(20))
    stream = open_stream(path, tokenizer=tokenizer)
    digest = stream.stream_digest
    next(stream)

    assert digest == stream.stream_digest
    assert digest == open_stream(elsewhere, tokenizer=tokenizer, repeat=True).stream_digest
    others = [
        open_stream(path, tokenizer=opening_tokenizer),
        open_stream(path, tokenizer=tokenizer, seed=1),
        open_stream(path, tokenizer=tokenizer, sequence_length=8),
        open_stream(path, path, tokenizer=tokenizer),
        open_stream(write(path, some_documents(20, seed=1)), tokenizer=tokenizer),
    ]
    assert len({digest, *(other.stream_digest for other in others)}) == 6


# --- held-out text


def test_held_out_documents_and_their_copies_are_never_trained_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = some_documents(60)
    path = write(tmp_path / "a.jsonl", [*documents[:30], documents[0], *documents[30:], documents[1]])

    stream = open_stream(path, tokenizer=tokenizer, held_out=3, repeat=True)
    (held_out,) = stream.held_out
    trained = set(documents_in(tokens_of(list(islice(stream, 200)))))

    plain = [token for document in documents for token in (*document, EOS)]
    assert held_out.shape == (3, LENGTH)
    assert held_out.dtype == np.int32
    assert held_out.reshape(-1).tolist() == plain[: 3 * LENGTH]
    touched = 1 + held_out.reshape(-1).tolist()[:-1].count(EOS)
    assert trained == set(documents[touched:])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_one_corpus_holds_out_no_other_is_trained_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, order: tuple[int, int]
) -> None:
    documents = some_documents(60)
    own, other = documents[:30], documents[30:]
    paths = [write(tmp_path / "a.jsonl", own), write(tmp_path / "b.jsonl", [*other, *own])]

    stream = open_stream(*(paths[number] for number in order), tokenizer=tokenizer, held_out=3, repeat=True)
    trained = set[Document]()
    sequences = list(islice(stream, 300))
    for corpus in (0, 1):
        trained |= set(documents_in(tokens_of([one for one in sequences if one.corpus == corpus])))

    touched = {
        number: 1 + held_out.reshape(-1).tolist()[:-1].count(EOS)
        for number, held_out in zip(order, stream.held_out, strict=True)
    }
    assert trained == {*own[touched[0] :], *other[touched[1] :]}


def test_without_held_out_sequences_the_arrays_are_empty(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    stream = open_stream(write(tmp_path / "a.jsonl", some_documents(5)), tokenizer=tokenizer)

    assert [held_out.shape for held_out in stream.held_out] == [(0, LENGTH)]


# --- memory


GROWTH = """
import itertools, json, psutil, sys
from transformers import AutoTokenizer
from loram_hub.corpora import Corpus, PackedStream

folder, first, file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
next(iter(PackedStream([Corpus(source=first)], tokenizer, sequence_length=8, repeat=True)))  # what libraries load
process = psutil.Process()
before = process.memory_info().rss
stream = PackedStream([Corpus(source=file)], tokenizer, sequence_length=64, shuffle_window=50)
grown = [process.memory_info().rss - before for _ in itertools.islice(stream, 2100)]
print(json.dumps([stream.consumed[0].documents, grown]))
"""


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    rng = random.Random(0)
    texts = [f"w4 w5 w6 w7 w8 w9 {rng.randbytes(2_000).hex()}" for _ in range(18_000)]  # 8 tokens with the end
    if name == "a.jsonl":
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        (tmp_path / name).write_bytes(parquet(texts, rows=500))
    del texts
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    first = write(tmp_path / "first" / name, some_documents(9))

    # In a process of its own: what other tests have left in this one's memory is no part of this. With one thread:
    # Arrow has as many as OpenMP, and keeps some 10 MB for each, however large the corpus is.
    command = [sys.executable, "-c", GROWTH, tmp_path / "tokenizer", first, tmp_path / name]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), env=one_thread, capture_output=True, text=True, check=True, timeout=300
    )

    documents, grown = json.loads(done.stdout)
    assert documents > 16_000, "most of the file was read"
    assert max(grown[100:]) - grown[100] < 24_000_000
    assert max(grown) < 32_000_000 < (tmp_path / name).stat().st_size


# --- what is wrong with it


def fails(source: Path | Corpus, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> LoramError:
    """Open a stream and read it, which goes wrong."""
    with pytest.raises(LoramError) as caught:
        for _ in open_stream(source, tokenizer=tokenizer, **settings):
            pass
    return caught.value


def test_the_end_of_a_corpus_is_told_with_numbers(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    documents = some_documents(20)
    tokens = sum(len(document) + 1 for document in documents)

    error = fails(write(tmp_path / "a.jsonl", documents), tokenizer)

    assert isinstance(error, InvalidRequestError)
    assert f"its {tokens:,} tokens make {tokens // LENGTH} sequences of {LENGTH}, and one more was asked for" in str(
        error
    )
    assert "a.jsonl" in str(error)
    assert "repeat" in str(error)


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        ("a.jsonl", b'{"txt": "w4"}\n', InvalidRequestError, "no column 'text'; its columns are: txt. Did you mean"),
        ("a.parquet", parquet(["w4"], column="body"), InvalidRequestError, "columns are: body, number. Name the one"),
        ("a.json", b'[{"body": "w4"}]', InvalidRequestError, "no column 'text'; its columns are: body"),
        ("a.jsonl", b'{"text": 5}\n', InvalidRequestError, "holds int64, not text"),
        ("a.jsonl", b'{"text": ["w4"]}\n', InvalidRequestError, "holds List, not text"),
        ("a.jsonl", b'{"text": "w4"}\n{"text": 5}\n', InvalidRequestError, "not text"),
        ("a.json", b'[{"text": 5}]', InvalidRequestError, "holds int, not text"),
        ("a.jsonl", b"", InvalidRequestError, "is empty: its files hold not one byte"),
        ("a.parquet", parquet([]), InvalidRequestError, "holds no rows"),
        ("a.jsonl", b'{"text": " "}\n{"text": ""}\n', InvalidRequestError, "2 rows, and nothing but blanks"),
        ("a.txt", b" \n", InvalidRequestError, "1 rows, and nothing but blanks"),
        ("a.csv", b"text\nw4\n", InvalidRequestError, "no file of a known kind: .parquet, .jsonl, .json, .txt"),
        ("a.jsonl", b'{"text": "w4"}\n{"text": "w', VerificationError, "is damaged"),
        ("a.jsonl", b"\x00\x01\x02", VerificationError, "is damaged"),
        ("a.jsonl", '{"text": "é"}\n'.encode("latin-1"), VerificationError, "can't decode byte 0xe9"),
        ("a.txt", "é".encode("latin-1"), VerificationError, "can't decode byte 0xe9"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "w4"}\n' * 9, mtime=0)[:-9], VerificationError, "is damaged"),
        ("a.parquet", parquet(["w4"] * 9)[:-9], VerificationError, "is damaged"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("repeat", [False, True])
def test_a_corpus_that_is_no_good_is_refused_with_the_reason(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    content: bytes,
    kind: type[LoramError],
    words: str,
    repeat: bool,
) -> None:
    (tmp_path / name).write_bytes(content)

    error = fails(tmp_path / name, tokenizer, repeat=repeat)

    assert type(error) is kind
    assert words in str(error)
    assert name in str(error)


def test_a_damaged_file_in_a_folder_is_named_and_what_stands_before_it_is_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write(tmp_path / "corpus" / "a.jsonl", some_documents(30))
    (tmp_path / "corpus" / "b.jsonl").write_bytes(b'{"text": "w4"}\n{"text": "w')
    stream = open_stream(tmp_path / "corpus", tokenizer=tokenizer, shuffle_window=10)

    for _ in range(5):
        next(stream)
    with pytest.raises(VerificationError, match=r"is damaged, in b\.jsonl"):
        for _ in stream:
            pass


def test_a_folder_of_two_kinds_of_files_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    write(tmp_path / "corpus" / "a.jsonl", some_documents(3))
    write(tmp_path / "corpus" / "b.parquet", some_documents(3))

    assert "1 of json, 1 of parquet" in str(fails(tmp_path / "corpus", tokenizer))


@pytest.mark.parametrize(
    "corpus",
    [Corpus(source="nothing/here.jsonl"), Corpus(source="./nothing"), Corpus(source="a/b/c"), Corpus(source="a b")],
    ids=lambda corpus: corpus.source,
)
def test_a_source_that_does_not_exist_is_told(tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> None:
    error = fails(corpus, tokenizer)

    assert isinstance(error, InvalidRequestError)
    assert f"{corpus.source!r} is no existing file or folder" in str(error)


def test_a_hub_dataset_is_not_read_offline(tokenizer: PreTrainedTokenizerBase) -> None:
    error = fails(DEFAULT_CORPORA[0], tokenizer)

    assert isinstance(error, AccessError)
    assert "HuggingFaceFW/fineweb" in str(error)
    assert "offline mode" in str(error)


def test_a_local_corpus_has_no_configuration(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "a.jsonl", some_documents(3))

    for changes in ({"config": "x"}, {"split": "test"}, {"revision": "main"}):
        assert "are for datasets on the Hub" in str(fails(Corpus(source=str(path), **changes), tokenizer))  # type: ignore[arg-type]


def test_more_held_out_than_there_is_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    documents = some_documents(20)
    path = write(tmp_path / "a.jsonl", documents)
    tokens = sum(len(document) + 1 for document in documents)

    assert f"has {tokens:,} tokens in all; 100 sequences of 16" in str(fails(path, tokenizer, held_out=100))
    full = write(
        tmp_path / "full.jsonl", [(4, *range(5, 19)), (19, *range(20, 34))]
    )  # each one a sequence with its end
    assert "nothing but what is held out" in str(fails(full, tokenizer, held_out=2, repeat=True))


def test_another_models_tokenizer_is_noticed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "a.jsonl", [(4, 5, 6), (7, 52, 9), (4, 4, 4)] * 9)

    error = fails(path, tokenizer, vocab_size=52)

    assert isinstance(error, IncompatibleError)
    assert "the token id 52, and the model has 52 embeddings" in str(error)
    assert "the token id 2, and the model has 2" in str(fails(path, tokenizer, vocab_size=2))


def test_a_tokenizer_without_end_of_sequence_is_refused(tmp_path: Path) -> None:
    other = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "tokenizer"))
    other.eos_token = None

    error = fails(write(tmp_path / "a.jsonl", some_documents(3)), other)

    assert isinstance(error, InvalidRequestError)
    assert "no end-of-sequence token" in str(error)


def test_settings_out_of_range_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "a.jsonl", some_documents(3))

    for settings_, words in (
        ({"sequence_length": 1}, "sequence_length is 1; the least is 2"),
        ({"held_out": -1}, "held_out is -1"),
        ({"shuffle_window": 0}, "shuffle_window is 0"),
    ):
        assert words in str(fails(path, tokenizer, **settings_))
    with pytest.raises(InvalidRequestError, match="No corpus was given"):
        open_stream(tokenizer=tokenizer)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive_numbers(weight: float) -> None:
    with pytest.raises(InvalidRequestError, match=f"has the weight {weight}"):
        Corpus(source="a/b", weight=weight)


# --- as written on a command line


def test_a_corpus_can_be_written_in_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd=2:x.txt").write_text("w4")

    assert parse_corpus("HuggingFaceFW/fineweb:sample-10BT=0.5") == DEFAULT_CORPORA[0]
    assert parse_corpus("open-web-math/open-web-math=0.5") == DEFAULT_CORPORA[1]
    assert parse_corpus("a/b:c") == Corpus(source="a/b", config="c")
    assert parse_corpus("texts.jsonl") == Corpus(source="texts.jsonl")
    assert parse_corpus("a/b=2") == Corpus(source="a/b", weight=2.0)
    assert parse_corpus("odd=2:x.txt") == Corpus(source="odd=2:x.txt")
    assert parse_corpus("odd=2:x.txt=3") == Corpus(source="odd=2:x.txt", weight=3.0)
    for text, words in (("a/b=c", "no number"), ("=2", "empty source"), ("a/b=-1", "weight -1"), ("a/b=nan", "nan")):
        with pytest.raises(InvalidRequestError, match=words):
            parse_corpus(text)


# --- told in advance


def test_too_short_a_corpus_is_told_before_it_is_read(tmp_path: Path) -> None:
    large = Corpus(source=str(write(tmp_path / "large.jsonl", some_documents(200))))
    small = Corpus(source=str(write(tmp_path / "small.jsonl", some_documents(10))))
    packed = Corpus(source=str(write(tmp_path / "packed.jsonl.gz", some_documents(10))))

    check_enough([large, small], sequences=20, sequence_length=LENGTH)
    check_enough([packed, Corpus(source="org/name")], sequences=10**9, sequence_length=LENGTH)
    with pytest.raises(InvalidRequestError, match=r"small\.jsonl holds .* tokens at the most; 100 sequences of 16"):
        check_enough([large, small], sequences=200, sequence_length=LENGTH)
    with pytest.raises(InvalidRequestError, match="100 held out"):
        check_enough([small], sequences=1, sequence_length=LENGTH, held_out=100)


def test_nothing_that_suffices_is_refused_in_advance(
    tmp_path: Path, opening_tokenizer: PreTrainedTokenizerBase
) -> None:
    documents: list[Document] = [(4,), (5,), (6,)] * 20
    for name in ("a.jsonl", "a.json", "a"):
        path = write(tmp_path / name, documents)
        stream = open_stream(path, tokenizer=opening_tokenizer, sequence_length=3)

        found = all_of(stream)

        check_enough([Corpus(source=str(path))], sequences=len(found), sequence_length=3)


# --- on the Hub


CARD = b"""---
configs:
- config_name: small
  data_files: small/*.parquet
- config_name: other
  data_files: other/*.parquet
---
"""

CLIENT = """
import time
time.sleep = lambda seconds: None  # what is tried again is tried again at once
import datasets
datasets.config.STREAMING_READ_MAX_RETRIES = 2
from itertools import islice
from transformers import AutoTokenizer
from loram_hub.corpora import Corpus, PackedStream
from loram_hub.errors import LoramError

def open_stream(**changes):
    corpus = Corpus(**{"source": "org/texts", "config": "small"} | changes)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    return PackedStream([corpus], tokenizer, sequence_length=16, shuffle_window=10, held_out=1)

def refusal(**changes):
    try:
        next(open_stream(**changes))
    except LoramError as err:
        return [type(err).__name__, str(err)]
"""


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    with HubServer(tmp_path / "hub") as hub:
        yield hub


def hub_files(documents: Sequence[Document]) -> dict[str, bytes]:
    texts = [text_of(document) for document in documents]
    half = len(texts) // 2
    return {
        "README.md": CARD,
        "small/a.parquet": parquet(texts[:half]),
        "small/b.parquet": parquet(texts[half:]),
        "other/a.parquet": parquet(["w4"]),
    }


def test_a_hub_dataset_is_streamed_from_the_commit_it_was_opened_at(
    hub: HubServer, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = some_documents(80)
    files = hub_files(documents)
    commit = hub.add_repo("org/texts", files, kind="datasets")
    words = save_tokenizer(tmp_path / "tokenizer")
    opened = python(
        hub,
        tmp_path / "home",
        CLIENT
        + """
stream = open_stream()
first = [one.ids.tolist() for one in islice(stream, 7)]
bad = [{"config": None}, {"config": "smal"}, {"split": "test"}, {"column": "txt"}, {"column": "number"},
       {"source": "org/nothing"}, {"revision": "nothing"}, {"source": "org/bare", "config": None}]
print(json.dumps([stream.pinned[0].revision, first, stream.held_out[0].tolist(), stream.state_dict(),
                  [refusal(**changes) for changes in bad]]))
""",
        words,
    )
    hub.add_repo("org/bare", {"README.md": b"# Nothing"}, kind="datasets")
    hub.add_repo("org/texts", hub_files(some_documents(80, seed=1)), kind="datasets")
    before = hub.count("GET /get/")
    second = hashlib.sha256(files["small/b.parquet"]).hexdigest()
    cut = hub.faults.add(Fault(pattern=f"GET /get/{second}", times=12, drop_after=100))
    resumed = python(
        hub,
        tmp_path / "another-home",
        CLIENT
        + """
stream = open_stream()
pinned = [stream.pinned[0].revision]
stream.load_state_dict(json.loads(sys.argv[2]))
pinned.append(stream.pinned[0].revision)
rest, refusals = [], []
while len(refusals) < 9:
    try:
        rest.append(next(stream).ids.tolist())
    except LoramError as err:
        refusals.append([len(rest), type(err).__name__, str(err)])
        if "is at its end" in str(err):
            break
print(json.dumps([pinned, rest, refusals, stream.held_out[0].tolist()]))
""",
        words,
        json.dumps(opened[3]),
    )

    revision, first, held_out, _, refused = opened
    pinned, rest, refusals, held_out_later = resumed
    here = write(tmp_path / "local" / "a.jsonl", documents)
    wanted = all_of(open_stream(here, tokenizer=tokenizer, shuffle_window=10, held_out=1))
    assert revision == commit == pinned[1] != pinned[0]
    assert [*first, *rest] == [one.ids.tolist() for one in wanted]
    assert held_out == held_out_later
    assert hub.count("GET /get/") > before
    assert cut.hits == 12, "the connection broke in the middle"
    assert [kind for _, kind, _ in refusals[:-1]] == ["AccessError"] * (len(refusals) - 1)
    assert len(refusals) > 1
    assert 0 < refusals[0][0] < len(rest)
    assert all("goes on where it stopped" in text and "signature" not in text for _, _, text in refusals[:-1])
    assert [kind for kind, _ in refused] == [*["InvalidRequestError"] * 5, *["AccessError"] * 3]
    for (_, text), words_ in zip(
        refused,
        ("['small', 'other']", "'smal' not found", "Bad split: test", "Did you mean 'text'", "holds int64, not text",
         "does not exist, or you have no access", "no such revision", "org/bare"),
        strict=True,
    ):  # fmt: skip
        assert words_ in text
