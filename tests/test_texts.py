"""Run with: pytest tests/test_texts.py"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import save_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loram_hub.errors import AccessError, InvalidRequestError, VerificationError
from loram_hub.texts import Example, calibration_ids, dataset_id, read_examples, read_texts

RECORDS: list[dict[str, str]] = [
    {"text": "first"},
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"text": "third\u2028line"},
]
EXAMPLES = [
    Example(prompt="", completion="first"),
    Example(prompt="2 + 2 =", completion=" 4"),
    Example(prompt="", completion="third\u2028line"),
]
EOS = 2


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture
def tokenizer_with_bos(tmp_path: Path) -> PreTrainedTokenizerBase:
    folder = save_tokenizer(tmp_path / "tokenizer-with-bos")
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.save(str(folder / "tokenizer.json"))
    return AutoTokenizer.from_pretrained(folder)


def write_records(path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n\n" for record in RECORDS), encoding="utf-8"
        )
    elif path.suffix == ".json":
        path.write_text(json.dumps(RECORDS), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([{"text": example.completion} for example in EXAMPLES]), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_file_gives_its_texts_and_tasks(tmp_path: Path, suffix: str) -> None:
    path = write_records(tmp_path / f"data{suffix}")

    assert read_examples(path) == EXAMPLES
    assert read_texts(str(path)) == ["first", "2 + 2 = 4", "third\u2028line"]


def test_a_parquet_file_gives_its_rows(tmp_path: Path) -> None:
    path = write_records(tmp_path / "data.parquet")

    assert read_texts(path) == ["first", " 4", "third\u2028line"]


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")

    assert read_texts(tmp_path / "a.txt") == ["one\n\ntwo\n"]


def test_a_folder_gives_its_files_in_order_and_passes_over_others(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.txt").write_text("b", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "README.md").write_text("no data", encoding="utf-8")

    assert read_texts(tmp_path) == ["a", "b"]


def test_a_list_may_mix_strings_records_and_examples() -> None:
    found = read_examples(["plain", RECORDS[1], EXAMPLES[1]])

    assert found == [Example(prompt="", completion="plain"), EXAMPLES[1], EXAMPLES[1]]


def test_blank_texts_are_left_out_and_the_limit_counts_records() -> None:
    assert read_texts(["a", "  \n", "b", "c"]) == ["a", "b", "c"]
    assert read_texts(["a", "b", "c"], limit=2) == ["a", "b"]


def test_a_hub_dataset_is_streamed_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def endless() -> Iterator[dict[str, str]]:
        number = 0
        while True:
            yield {"text": f"text {number}"}
            number += 1

    def load_dataset(path: str, name: str | None, **options: Any) -> Iterator[dict[str, str]]:
        asked.update(path=path, name=name, **options)
        return endless()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)

    assert read_texts("org/data:config", split="test", limit=3) == ["text 0", "text 1", "text 2"]
    assert asked == {"path": "org/data", "name": "config", "split": "test", "streaming": True}


def test_a_hub_dataset_that_cannot_be_reached_is_an_access_error() -> None:
    with pytest.raises(AccessError, match="org/data is no file or folder"):
        read_texts("org/data")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing/folder", "a/b/c"])
def test_a_missing_path_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        read_texts(name)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"text": "a"}\n{"body": "b"}\n', InvalidRequestError, r"data.jsonl:2 has fields \['body'\]"),
        ('{"text": 3}\n', InvalidRequestError, "each a string"),
        ('{"prompt": "a"}\n', InvalidRequestError, "'prompt' and 'completion'"),
        ('{"text": "a"}\n{"text": \n', VerificationError, "data.jsonl:2 is not valid JSON"),
        ("\n", InvalidRequestError, "holds no text"),
        (b"\xff\xfe", VerificationError, "not UTF-8"),
    ],
)
def test_a_bad_file_is_refused_with_the_line(
    tmp_path: Path, content: str | bytes, error: type[Exception], message: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(error, match=message):
        read_texts(path)


def test_a_json_file_must_hold_a_list(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"text": "a"}', encoding="utf-8")

    with pytest.raises(InvalidRequestError, match="a list of records"):
        read_texts(tmp_path / "data.json")


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1 no parquet")

    with pytest.raises(VerificationError, match="as parquet"):
        read_texts(tmp_path / "data.parquet")


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text\na\n", encoding="utf-8")

    with pytest.raises(InvalidRequestError, match="of no known kind"):
        read_texts(tmp_path / "data.csv")


def test_calibration_rows_hold_every_text_once_with_eos_between(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["w4 w5 w6", "w7", "w8 w9"]

    rows = calibration_ids(texts, tokenizer, samples=3, tokens=3, seed=1)

    assert rows.shape == (3, 3)
    assert sorted(rows.flatten().tolist()) == [EOS, EOS, EOS, 4, 5, 6, 7, 8, 9]
    flat = rows.flatten().tolist()
    assert flat[flat.index(4) : flat.index(4) + 4] == [4, 5, 6, EOS]


def test_calibration_is_a_function_of_the_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [f"w{number}" for number in range(4, 53)]

    first, again, other = (calibration_ids(texts, tokenizer, samples=4, tokens=6, seed=seed) for seed in (0, 0, 1))

    assert first.equal(again)
    assert not first.equal(other)


def test_calibration_rows_open_like_the_inputs_of_the_model(tokenizer_with_bos: PreTrainedTokenizerBase) -> None:
    rows = calibration_ids(["w4 w5 w6 w7 w8"], tokenizer_with_bos, samples=2, tokens=4)

    assert rows.tolist() == [[1, 4, 5, 6], [1, 7, 8, EOS]]


def test_calibration_that_is_too_short_says_how_much_is_missing(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidRequestError, match="have 5 tokens; 2 samples x 4 tokens need 8"):
        calibration_ids(["w4 w5", "w6"], tokenizer, samples=2, tokens=4)


@pytest.mark.parametrize(("samples", "tokens"), [(0, 8), (1, 1), (-1, 8)])
def test_calibration_of_nothing_is_refused(tokenizer: PreTrainedTokenizerBase, samples: int, tokens: int) -> None:
    with pytest.raises(InvalidRequestError, match="1 x 2 is the least"):
        calibration_ids(["w4 w5"], tokenizer, samples=samples, tokens=tokens)


def test_only_what_is_neither_list_nor_path_is_a_dataset_id(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("{}")

    assert dataset_id("org/tasks") == "org/tasks"
    assert dataset_id(str(tmp_path / "texts.jsonl")) is None
    assert dataset_id(tmp_path) is None
    assert dataset_id(["a text"]) is None
