"""Run with: pytest tests/test_instructions.py"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from builders import save_tokenizer
from hub_client import python
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loram_hub.errors import IncompatibleError, InvalidRequestError, LoramError, VerificationError
from loram_hub.instructions import (
    DataSource,
    Instructions,
    check_tokenizer,
    read_instructions,
    tokenizer_digest,
)
from loram_hub.instructions.encoding import Encoded, Encoder
from loram_hub.instructions.examples import Example
from loram_hub.instructions.sampling import hold_out
from loram_hub.recipes import section_from

Record = dict[str, Any]

BOS, EOS = "<s>", "</s>"
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture
def bare_tokenizer() -> PreTrainedTokenizerBase:
    """One whose template a test may set."""
    made = byte_tokenizer()
    made.chat_template = None
    return made


def byte_tokenizer(words: str = "the cat sat on the mat: what is two plus two, four of course") -> Any:
    """A byte-level BPE tokenizer that opens its inputs with <s>; it can write any text."""
    specials = ["<pad>", BOS, EOS, "<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [words] * 20, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    )
    inner.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BOS, eos_token=EOS, pad_token="<pad>", extra_special_tokens=specials[3:]
    )
    made.chat_template = CHATML
    return made


def write(path: Path, records: Sequence[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def pairs(count: int, *, start: int = 0) -> list[Record]:
    return [{"prompt": f"what is {n} plus {n}:", "completion": f" {2 * n}"} for n in range(start, start + count)]


def chat(*texts: str, system: str | None = None) -> Record:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}, *turns] if system is not None else turns}


def read(path: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Instructions:
    """Read one source; what is no argument of `read_instructions` describes the source."""
    asked = {"max_length": 256} | {name: changes.pop(name) for name in list(changes) if name in ARGUMENTS}
    return read_instructions([DataSource(source=str(path), **changes)], tokenizer, **asked)


ARGUMENTS = ("max_length", "held_out", "seed", "too_long", "bad_records", "vocab_size", "evaluations")


def refused(path: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> str:
    with pytest.raises(LoramError) as caught:
        read(path, tokenizer, **changes)
    return str(caught.value)


def trl_template(name: str) -> str:
    """A real chat template, as TRL ships it."""
    (folder,) = find_spec("trl").submodule_search_locations  # type: ignore[union-attr, misc]
    return (Path(folder) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


# --- the same tokens as TRL


def plain_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, whole: str, **options: Any) -> tuple[Any, Any]:
    """Ids, and labels that hide what the prompt alone already gives; written without the package."""
    before, ids = tokenizer(prompt, **options)["input_ids"], tokenizer(whole, **options)["input_ids"]
    start = 0
    while start < min(len(before), len(ids)) and before[start] == ids[start]:
        start += 1
    return ids, [-100] * start + ids[start:]


def test_trl_makes_of_every_kind_the_tokens_that_are_reported(tmp_path: Path, tokenizer: Any) -> None:
    from datasets import load_dataset  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, LlamaConfig
    from trl import SFTConfig, SFTTrainer

    tasks = [*pairs(6), {"prompt": "the ma", "completion": "t is four"}, {"prompt": "", "completion": "a mat"}]
    chats = [chat("what is two?", "four", "sure?", "of course", system="sit"), chat("cat?", "mat")]
    texts = [{"text": "the cat sat on the mat " * 30}, {"text": f"what is two{EOS}"}]
    tasks_file, texts_file = write(tmp_path / "tasks.jsonl", tasks), write(tmp_path / "texts.jsonl", texts)
    chats_file = write(tmp_path / "chats.jsonl", chats)
    data = read_instructions(
        [DataSource(source=str(tasks_file))],
        tokenizer,
        max_length=128,
        evaluations=[
            DataSource(source=str(chats_file), name="chat"),
            DataSource(source=str(chats_file), name="whole", turns="whole"),
            DataSource(source=str(texts_file), name="text"),
        ],
    )
    config = LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    args = SFTConfig(str(tmp_path), max_length=128, completion_only_loss=True, report_to=[], use_cpu=True, bf16=False)

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_config(config),
        args,
        train_dataset=data.train,
        eval_dataset=dict(data.evaluations),
        processing_class=tokenizer,
    )

    handwritten = load_dataset("json", data_files=str(tasks_file), split="train")
    assert data.train.to_list() == handwritten.to_list() == tasks
    prepared = {"train": trainer.train_dataset, **trainer.eval_dataset}  # type: ignore[dict-item]
    answered = [(chats[0], 2), (chats[0], 4), (chats[1], 1)]
    expected = {
        "train": [plain_tokens(tokenizer, one["prompt"], one["prompt"] + one["completion"] + EOS) for one in tasks],
        "chat": [
            plain_tokens(
                tokenizer,
                rendered(one["messages"][:number]) + "<|im_start|>assistant\n",
                rendered(one["messages"][: number + 1]),
                add_special_tokens=False,
            )
            for one, number in answered
        ],
        "whole": [plain_tokens(tokenizer, "", rendered(one["messages"]), add_special_tokens=False) for one in chats],
        "text": [(ids[:128], ids[:128]) for ids in tokenizer([texts[0]["text"] + EOS, texts[1]["text"]])["input_ids"]],
    }
    for one in data.report.sets:
        found = [(row["input_ids"], row["labels"]) for row in prepared[one.name]]
        assert found == [(list(ids), list(labels)) for ids, labels in expected[one.name]], one.name
        assert (one.tokens, one.learned_tokens, one.examples) == (
            sum(len(ids) for ids, _ in found),
            sum(label != -100 for _, labels in found for label in labels),
            len(found),
        )
        assert not any(left == right == tokenizer.bos_token_id for ids, _ in found for left, right in pairwise(ids))
    assert [one.truncated for one in data.report.sets] == [0, 0, 0, 1]


def rendered(messages: Sequence[dict[str, str]]) -> str:
    return BOS + "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)


texts = st.text(st.sampled_from("the cat,\n  é数\u2028:{}"), max_size=12)


@settings(max_examples=40)
@given(records=st.lists(st.tuples(texts, texts), min_size=3, max_size=12), held_out=st.sampled_from([0, 1, 0.5]))
def test_nothing_is_lost_or_doubled_and_exactly_completions_are_learned(
    records: list[tuple[str, str]], held_out: float, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any
) -> None:
    given = [{"prompt": prompt, "completion": completion} for prompt, completion in records]
    usable = [record for record in given if record["completion"].strip()]
    path = write(tmp_path_factory.mktemp("property") / "tasks.jsonl", given)
    if not usable:
        assert "Nothing of train" in refused(path, tokenizer)
        return
    try:
        data = read(path, tokenizer, held_out=held_out)
    except InvalidRequestError:
        data, held_out = read(path, tokenizer), 0  # too few questions to hold one out

    train = data.train.to_list()
    aside = data.evaluations["held_out"].to_list() if held_out else []
    assert sorted(map(repr, train + aside)) == sorted(map(repr, usable))
    assert [record for record in usable if record in train] == train
    questions = [
        {" ".join(record["prompt"].split()) for record in part if record["prompt"].strip()} for part in (train, aside)
    ]
    assert not questions[0] & questions[1]
    assert sum(drop.count for drop in data.report.dropped) == len(given) - len(usable)
    for record, one in zip(usable, encode(usable, tokenizer), strict=True):
        whole = record["prompt"] + record["completion"] + EOS
        start = one.learned_from
        assert list(one.ids) == tokenizer(whole)["input_ids"]
        assert tokenizer.decode(one.ids) == BOS + whole
        if one.is_split:
            assert record["prompt"].encode().startswith(as_bytes(tokenizer, one.ids[:start]).removeprefix(BOS.encode()))
        else:
            assert tokenizer.decode(one.ids[start:]) == record["completion"] + EOS


def encode(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    examples = [Example(place="", kind="prompt-completion", row=record, key=0) for record in records]
    found = list(Encoder(tokenizer, vocab_size=None).encode(examples))
    assert all(isinstance(one, Encoded) for one in found)
    return found  # type: ignore[return-value]


def as_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bytes:
    """Ids as bytes: a token may end inside of a letter."""
    letters = {letter: number for number, letter in BYTE_OF.items()}
    text = b""
    for token in tokenizer.convert_ids_to_tokens(ids):
        text += token.encode() if token == BOS else bytes(letters[letter] for letter in token)
    return text


def _byte_letters() -> dict[int, str]:
    """The letters that byte-level tokenizers write for bytes: printable ones for themselves, others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [number for number in range(256) if number not in printable]
    return {number: chr(number) for number in printable} | {one: chr(256 + n) for n, one in enumerate(others)}


BYTE_OF = _byte_letters()


# --- layouts of real datasets


LAYOUTS: dict[str, tuple[Record, list[Record]]] = {
    "openhermes-2.5": (
        {
            "custom_instruction": None, "topic": "maths", "title": None, "source": "camelai", "system_prompt": None,
            "conversations": [
                {"from": "system", "value": "Be short.", "weight": None},
                {"from": "human", "value": "1+1?", "weight": None},
                {"from": "gpt", "value": "2", "weight": None},
                {"from": "human", "value": "2+2?", "weight": None},
                {"from": "gpt", "value": "4", "weight": None},
                {"from": "human", "value": "3+3?", "weight": None},
                {"from": "gpt", "value": "9", "weight": 0.0},
            ],
        },
        [
            {"prompt": [("system", "Be short."), ("user", "1+1?")], "completion": [("assistant", "2")]},
            {
                "prompt": [("system", "Be short."), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?")],
                "completion": [("assistant", "4")],
            },
        ],
    ),
    "openorca": (
        {"id": "flan.1", "system_prompt": "", "question": "Translate.", "response": "Done."},
        [{"prompt": [("user", "Translate.")], "completion": [("assistant", "Done.")]}],
    ),
    "alpaca": (
        {"instruction": "Name {it}.", "input": "a cat", "output": "cat", "text": "Below is an instruction ..."},
        [
            {
                "prompt": "Below is an instruction that describes a task, paired with an input that provides further "
                "context. Write a response that appropriately completes the request.\n\n### Instruction:\nName {it}."
                "\n\n### Input:\na cat\n\n### Response:\n",
                "completion": "cat",
            }
        ],
    ),
    "gsm8k": (
        {"question": "Two cats and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        [{"prompt": "Question: Two cats and two?\nAnswer:", "completion": " 2+2=<<2+2=4>>4\n#### 4"}],
    ),
    "messages": (chat("a", "b"), [{"prompt": [("user", "a")], "completion": [("assistant", "b")]}]),
    "prompt-completion": ({"prompt": "a", "completion": "b", "id": 1}, [{"prompt": "a", "completion": "b"}]),
    "text": ({"text": "a b", "url": "c"}, [{"text": "a b"}]),
}  # fmt: skip


def rows_of(data: Instructions) -> list[Record]:
    """Rows, messages as pairs of role and content."""

    def short(value: Any) -> Any:
        return value if isinstance(value, str) else [(one["role"], one["content"]) for one in value]

    return [{name: short(value) for name, value in row.items()} for row in data.train.to_list()]


@pytest.mark.parametrize("form", LAYOUTS)
def test_every_layout_is_recognised_by_its_columns_and_becomes_what_trl_takes(
    form: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    record, expected = LAYOUTS[form]
    path = write(tmp_path / "data.jsonl", [record])

    recognised, named = read(path, tokenizer, max_length=1024), read(path, tokenizer, format=form, max_length=1024)

    assert rows_of(recognised) == rows_of(named) == expected
    assert recognised.report.records[0].format == form


def test_an_exchange_becomes_a_chat_or_plain_words_as_the_style_says(tmp_path: Path, tokenizer: Any) -> None:
    maths = write(tmp_path / "maths.jsonl", [LAYOUTS["gsm8k"][0]])
    hermes = write(tmp_path / "hermes.jsonl", [LAYOUTS["openhermes-2.5"][0]])
    listed = {"prompt": chat("a", "b", "c")["messages"], "completion": [{"role": "assistant", "content": "d"}]}
    lists = write(tmp_path / "lists.jsonl", [listed])
    tokenizer = byte_tokenizer()

    as_chat = rows_of(read(maths, tokenizer, style="chat"))
    from_lists = rows_of(read(lists, tokenizer))
    tokenizer.chat_template = None
    as_words = rows_of(read(hermes, tokenizer, style="plain", turns="last"))
    whole = rows_of(read(hermes, tokenizer, style="plain", turns="whole"))

    answer = "2+2=<<2+2=4>>4\n#### 4"
    assert as_chat == [{"prompt": [("user", "Two cats and two?")], "completion": [("assistant", answer)]}]
    assert from_lists == [
        {"prompt": [("user", "a"), ("assistant", "b"), ("user", "c")], "completion": [("assistant", "d")]}
    ]
    prompt = (
        "Be short.\n\n### Instruction:\n1+1?\n\n### Response:\n2\n\n### Instruction:\n2+2?\n\n### Response:\n"
    )  # fmt: skip
    assert as_words == [{"prompt": prompt, "completion": "4"}]
    assert whole == [{"text": f"{prompt}4"}]


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet", ""])
def test_every_kind_of_file_and_a_folder_give_the_same_rows(suffix: str, tmp_path: Path, tokenizer: Any) -> None:
    records = [*pairs(5), {"prompt": 'say "é",\nplease', "completion": "\u2028 yes,\r\n数"}]
    path = tmp_path / f"data{suffix}"
    match suffix:
        case ".json":
            path.write_text(json.dumps(records), encoding="utf-8")
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["prompt", "completion"])
                writer.writeheader()
                writer.writerows(records)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
        case _:
            path.mkdir()
            write(path / "b.jsonl", records[3:])
            write(path / "a.jsonl", records[:3])
            (path / "README.md").write_text("no data", encoding="utf-8")

    data = read(path, tokenizer)

    assert data.train.to_list() == records
    assert (data.report.records[0].rows, len(data.report.records[0].sha256 or "")) == (6, 64)


def test_other_names_of_columns_and_a_recipe_beside_its_data(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "data.jsonl", [{"q": "a", "a": "b"}])

    source = section_from(DataSource, {"source": str(path), "prompt_column": "q", "completion_column": "a"})
    unresolved = section_from(DataSource, {"source": "data.jsonl"})

    assert rows_of(read_instructions([source], tokenizer, max_length=9)) == [{"prompt": "a", "completion": "b"}]
    assert unresolved.source == "data.jsonl"  # a recipe resolves it later
    with pytest.raises(InvalidRequestError, match="is no existing file or folder, and no Hub dataset id"):
        read_instructions([unresolved], tokenizer, max_length=9)


# --- what is wrong with data


BAD: dict[str, tuple[str | bytes, str]] = {
    "number": ('{"prompt": "a", "completion": 3}', r"data.jsonl:1 holds 3 \(int\) in the column 'completion', where a"),
    "null": ('{"prompt": null, "completion": "b"}', "holds None .null. in the column 'prompt'"),
    "nan": ('{"prompt": "a", "completion": NaN}', "data.jsonl:1 holds NaN, which is not JSON"),
    "missing": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "data.jsonl:2 has no column 'completion'"),
    "mixed": (
        '{"prompt": "a", "completion": "b"}\n\n{"text": "a"}',
        "data.jsonl:3 has no column .*sources of their own",
    ),
    "typo": (
        '{"prompt": "a", "compleiton": "b"}',
        "data.jsonl:1 has the columns prompt, compleiton, .*no known format",
    ),
    "twice": ('{"prompt": "a", "prompt": "b"}', "has the key 'prompt' twice"),
    "torn": ('{"prompt": "a", ', "data.jsonl:1 is not valid JSON"),
    "ambiguous": ('{"question": "a", "answer": "b"}', "those of no known format"),
    "no list": ('{"messages": "hello"}', "holds 'hello' .str. in the column 'messages', where a list of messages"),
    "role": ('{"messages": [{"role": "robot", "content": "a"}]}', r"messages\[0\] with the role 'robot'"),
    "parts": (
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}',
        r"a list of 1 parts as the content of messages\[0\].* Join the texts",
    ),
    "surrogate": (
        '{"prompt": "a", "completion": "b\\ud83d"}',
        r"lone surrogate '\\ud83d' in the column 'completion' at",
    ),
    "surrogate in a message": (
        '{"messages": [{"role": "user", "content": "\\udc00"}]}',
        r"data.jsonl:1 holds the lone surrogate .* in messages\[0\] at character 1,",
    ),
    "tools": ('{"messages": [{"role": "assistant", "tool_calls": [1]}]}', "tool_calls, which are not read"),
    "unanswered": (
        '{"messages": [{"role": "user", "content": "a"}]}',
        "1 × no answer to a question .*data.jsonl:1",
    ),
    "empty answers": (
        '{"prompt": "a", "completion": " "}\n{"prompt": "b", "completion": null}',
        "2 × empty completion",
    ),
    "empty": ("", "holds no records"),
    "bytes": (b"\xff\xfe", "is not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_with_its_place(name: str, tmp_path: Path, tokenizer: Any) -> None:
    content, message = BAD[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises((InvalidRequestError, VerificationError), match=message):
        read(path, tokenizer)


def test_an_empty_cell_of_other_tools_is_named_and_malformed_records_can_be_left_out(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "data.parquet"
    columns = {"prompt": ["a", "b"], "completion": pa.array([math.nan, 1.0])}
    pq.write_table(pa.table(columns), path)
    cut = {"prompt": "a", "completion": "\ud83d"}
    mixed = write(tmp_path / "mixed.jsonl", [*pairs(3), {"prompt": 1, "completion": "b"}, {"text": "c"}, cut])

    assert "row 1 holds nan, which other tools write for an empty cell, in the column" in refused(path, tokenizer)
    data = read(mixed, tokenizer, bad_records="drop")

    (drop,) = data.report.dropped
    assert (len(data.train), drop.reason, drop.count) == (3, "malformed", 3)
    assert drop.places == (f"{mixed}:4", f"{mixed}:5", f"{mixed}:6")
    assert "3 × malformed, left out" in data.report.warnings[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", "prompt,completion\na,b,c\n", "another number of fields"),
        ("data.csv", 'prompt,completion\na,"b\n', "cannot be read as CSV"),
        ("data.json", '{"prompt": "a"}', "a list of records is needed"),
        ("data.json", '["a"]', "record 1 is a str"),
        ("data.json", '[{"prompt": NaN}]', "holds NaN"),
        ("data.parquet", "PAR1 but not really PAR1", "cannot be read as parquet"),
        ("data.xlsx", "", "no file of a known kind"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, tokenizer: Any, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")

    assert message in refused(tmp_path / name, tokenizer)


def test_requests_that_make_no_sense_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "data.jsonl", pairs(4))
    same = [DataSource(source=str(path), name="held_out")]

    assert "limit 0" in refused(path, tokenizer, limit=0)
    for name in ("", " ", "a\nb", "a/b", "x" * 65):
        assert f"has the name {name!r}" in refused(path, tokenizer, name=name)
    assert len(read(path, tokenizer, name="GSM8K_test v1.0-ä").train) == 4
    assert "subset and split are for datasets on the Hub" in refused(path, tokenizer, split="test")
    assert "format text and style chat" in refused(path, tokenizer, format="text", style="chat")
    assert "max_length is 1" in refused(path, tokenizer, max_length=1)
    assert "Two sets would be called 'held_out'" in refused(path, tokenizer, evaluations=same)
    assert "held_out is 1.5" in refused(path, tokenizer, held_out=1.5)
    assert "that makes 0" in refused(path, tokenizer, held_out=1e-9)
    assert "Some must be held out and some be left" in refused(path, tokenizer, held_out=9)
    with pytest.raises(InvalidRequestError, match="No data source was given"):
        read_instructions([], tokenizer, max_length=9)


def test_kinds_that_trl_would_confuse_are_not_mixed(tmp_path: Path, tokenizer: Any) -> None:
    paths = [write(tmp_path / "a.jsonl", pairs(2)), write(tmp_path / "b.jsonl", [{"text": "c"}])]

    with pytest.raises(InvalidRequestError, match=r"b.jsonl:1 gives a text example, those before it in train are"):
        read_instructions([DataSource(source=str(path)) for path in paths], tokenizer, max_length=64)


# --- too long


def test_what_is_too_long_is_dropped_truncated_or_refused(tmp_path: Path, tokenizer: Any) -> None:
    long_answer, long_prompt = {"prompt": "cat", "completion": "é" * 40}, {"prompt": "é" * 40, "completion": "cat"}
    path = write(tmp_path / "data.jsonl", [*pairs(2), long_answer, long_prompt])
    fits = write(tmp_path / "fits.jsonl", [{"prompt": "é" * 10, "completion": "é"}])
    exact = len(tokenizer("é" * 11 + EOS)["input_ids"])

    dropped, cut = read(path, tokenizer, max_length=32), read(path, tokenizer, max_length=32, too_long="truncate")

    assert dropped.train.to_list() == pairs(2)
    assert [(drop.reason, drop.count, drop.places[0]) for drop in dropped.report.dropped] == [
        ("longer than max_length", 2, f"{path}:3")
    ]
    assert cut.train.to_list() == [*pairs(2), long_answer]
    assert [(drop.reason, drop.places) for drop in cut.report.dropped] == [("prompt fills max_length", (f"{path}:4",))]
    longest = len(tokenizer(f"cat{'é' * 40}{EOS}")["input_ids"])
    assert (cut.report.train.truncated, cut.report.train.lengths.greatest) == (1, longest)
    assert cut.report.train.learned_lengths.greatest == 32 - len(tokenizer("cat")["input_ids"])
    told = refused(path, tokenizer, max_length=32, too_long="error")
    assert f"2 examples of train are longer than 32 tokens, the longest has {longest} (first: {path}:3" in told
    full = len(tokenizer(long_prompt["prompt"])["input_ids"])
    only = write(tmp_path / "only.jsonl", [long_prompt])
    assert "1 × prompt fills max_length" in refused(only, tokenizer, max_length=full, too_long="truncate")
    assert read(only, tokenizer, max_length=full + 1, too_long="truncate").report.train.learned_tokens == 1
    assert "1 × longer than max_length" in refused(
        write(tmp_path / "all.jsonl", [long_prompt]), tokenizer, max_length=32
    )
    assert len(read(fits, tokenizer, max_length=exact, too_long="error").train) == 1
    assert "longer than" in refused(fits, tokenizer, max_length=exact - 1, too_long="error")


def test_the_histogram_counts_every_example_once(tmp_path: Path, tokenizer: Any) -> None:
    records = [{"prompt": "é" * number, "completion": "a"} for number in range(60)]
    train = read(write(tmp_path / "data.jsonl", records), tokenizer).report.train

    lengths = [len(tokenizer(one["prompt"] + f"a{EOS}")["input_ids"]) for one in records]
    for low, high, count in zip(train.lengths.edges, train.lengths.edges[1:], train.lengths.counts, strict=False):
        assert count == sum(low <= length < high for length in lengths)
    assert sum(train.lengths.counts) == 60
    assert (train.lengths.least, train.lengths.greatest) == (min(lengths), max(lengths))
    assert train.lengths.mean == pytest.approx(sum(lengths) / 60)


def test_examples_of_which_no_token_is_learned_are_left_out(tmp_path: Path, bare_tokenizer: Any) -> None:
    chats = write(tmp_path / "chats.jsonl", [chat("a", "b")])
    bare_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    unanswered = refused(chats, bare_tokenizer)
    bare_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    lone = [{"prompt": "", "completion": EOS}, {"prompt": "a", "completion": EOS}]
    texts = [{"text": EOS}, {"text": f"a{EOS}"}]

    read_texts = read(write(tmp_path / "texts.jsonl", texts), bare_tokenizer)
    read_pairs = read(write(tmp_path / "pairs.jsonl", lone), bare_tokenizer)

    assert "1 × nothing to learn" in unanswered
    assert (read_texts.train.to_list(), read_pairs.train.to_list()) == (texts[1:], lone[1:])
    for data in (read_texts, read_pairs):
        (drop,) = data.report.dropped
        assert (drop.reason, drop.count) == ("nothing to learn", 1)
        assert "1 × nothing to learn, left out" in data.report.warnings[0]


# --- templates and special tokens


def test_a_tokenizer_without_a_template_says_what_to_do(tmp_path: Path, bare_tokenizer: Any) -> None:
    path = write(tmp_path / "data.jsonl", [chat("a", "b")])

    message = refused(path, bare_tokenizer)

    assert "data.jsonl:1 is a conversation" in message
    assert "Set the source's style to plain" in message
    assert len(read(path, bare_tokenizer, style="plain").train) == 1


def test_a_template_that_refuses_system_messages_drops_them_until_they_are_merged(
    tmp_path: Path, bare_tokenizer: Any
) -> None:
    bare_tokenizer.chat_template = trl_template("gemma")
    with_system = chat("a", "b", system="Be kind.")
    path = write(tmp_path / "data.jsonl", [chat("c", "d"), with_system])
    alone = write(tmp_path / "alone.jsonl", [with_system])

    kept, merged = read(path, bare_tokenizer), read(path, bare_tokenizer, system="merge")

    (drop,) = kept.report.dropped
    assert (len(kept.train), drop.reason, drop.detail) == (
        1,
        "refused by the chat template",
        "System role not supported",
    )
    assert any("set the source's system to merge" in warning for warning in kept.report.warnings)
    assert rows_of(merged)[1] == {"prompt": [("user", "Be kind.\n\na")], "completion": [("assistant", "b")]}
    assert "System role not supported" in refused(alone, bare_tokenizer)


@pytest.mark.parametrize(
    ("error", "expression"),
    [
        ("TypeError", "1 + m.content"),
        ("ValueError", "m.content.index('q')"),
        ("KeyError", "'{key}'.format()"),
        ("ZeroDivisionError", "1 / 0"),
    ],
)
def test_a_template_that_fails_over_a_conversation_refuses_it(
    error: str, expression: str, tmp_path: Path, bare_tokenizer: Any
) -> None:
    failing = "{% for m in messages if m.content == 'z' %}{{ EXPRESSION }}{% endfor %}"
    bare_tokenizer.chat_template = failing.replace("EXPRESSION", expression) + CHATML
    path = write(tmp_path / "data.jsonl", [chat("a", "b"), chat("z", "b")])

    data = read(path, bare_tokenizer)

    (drop,) = data.report.dropped
    assert (len(data.train), drop.reason, drop.places) == (1, "refused by the chat template", (f"{path}:2",))
    assert drop.detail.startswith(f"it fails with {error}: ")


def test_a_template_with_an_error_of_syntax_is_blamed_and_not_the_data(tmp_path: Path, bare_tokenizer: Any) -> None:
    path = write(tmp_path / "data.jsonl", [chat("a", "b")])

    for template, problem in (("{% for m in %}", "Expected"), ("{{ a | nonsense }}", "nonsense")):
        bare_tokenizer.chat_template = template
        message = refused(path, bare_tokenizer)
        assert "is no valid Jinja template" in message
        assert problem in message
        assert "data.jsonl" not in message


def test_a_template_that_rewrites_questions_once_they_are_answered_is_refused(
    tmp_path: Path, bare_tokenizer: Any
) -> None:
    bare_tokenizer.chat_template = (
        "{% for message in messages %}({{ loop.index }} of {{ loop.length }}) {{ message.content }}{{ eos_token }}"
        "{% endfor %}"
    )

    message = refused(write(tmp_path / "data.jsonl", [chat("a", "b")]), bare_tokenizer)

    assert "1 × changed by the chat template" in message
    assert "'1) a</s>' becomes '2) a</s>" in message


def test_a_template_that_opens_answers_with_thoughts_is_told_and_learned_from_where_it_differs(
    tmp_path: Path, bare_tokenizer: Any
) -> None:
    bare_tokenizer.chat_template = trl_template("deepseekv3")
    path = write(tmp_path / "data.jsonl", [chat("a", "b")])

    data = read(path, bare_tokenizer)

    assert any("opens an answer with other tokens than it leaves" in warning for warning in data.report.warnings)
    whole = bare_tokenizer.apply_chat_template(chat("a", "b")["messages"])["input_ids"]
    opened = bare_tokenizer.apply_chat_template(chat("a")["messages"], add_generation_prompt=True)["input_ids"]
    shared = next(n for n, (left, right) in enumerate(zip(whole, opened, strict=False)) if left != right)
    assert data.report.train.learned_tokens == len(whole) - shared


def test_text_that_a_template_adds_is_told(tmp_path: Path, bare_tokenizer: Any) -> None:
    path = write(tmp_path / "data.jsonl", [chat("a", "b")])

    def about(template: str) -> tuple[str, str]:
        bare_tokenizer.chat_template = template
        report = read(path, bare_tokenizer, max_length=2048).report
        return report.template_text, " ".join(report.warnings)

    assert about(CHATML) == ("", "")
    qwen, dated = about(trl_template("qwen2_5")), about(trl_template("llama3_2"))
    assert "You are Qwen, created by Alibaba Cloud" in qwen[0]
    assert "opens every conversation with a text of its own" in qwen[1]
    assert "Cutting Knowledge Date" in dated[0]
    assert "writes today's date" in dated[1]
    assert "does not learn where to stop" in about("{% for m in messages %}{{ m.content }}\n{% endfor %}")[1]


def test_a_begin_of_sequence_token_never_stands_twice(tmp_path: Path, bare_tokenizer: Any) -> None:
    records = [{"prompt": f"{BOS} {BOS}a", "completion": "b"}, {"prompt": "", "completion": f"{BOS}c"}]
    path, chats = write(tmp_path / "data.jsonl", records), write(tmp_path / "chats.jsonl", [chat("a", "b")])

    data = read(path, bare_tokenizer)
    bare_tokenizer.chat_template = "{{ bos_token }}" + CHATML

    assert rows_of(data) == [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "c"}]
    assert "2 of 2 examples spelled out the begin-of-sequence token" in data.report.warnings[0]
    with pytest.raises(IncompatibleError, match=r"stands twice in front of .*chats\.jsonl:1"):
        read(chats, bare_tokenizer)


def test_texts_that_end_a_turn_by_themselves_and_prompts_that_end_in_a_token_are_told(
    tmp_path: Path, tokenizer: Any
) -> None:
    spelled = write(tmp_path / "spelled.jsonl", [chat("a<|im_end|>", "b")])
    merging = write(tmp_path / "merging.jsonl", [{"prompt": "the ca", "completion": "t sat"}, *pairs(2)])

    assert "1 of 1 examples spell out control tokens" in " ".join(read(spelled, tokenizer).report.warnings)
    assert "In 1 of 3 examples the end of the prompt becomes other" in " ".join(
        read(merging, tokenizer).report.warnings
    )


# --- the tokenizer belongs to the model


def test_ids_that_the_model_does_not_have_are_refused(tmp_path: Path, bare_tokenizer: Any) -> None:
    path = write(tmp_path / "data.jsonl", [*pairs(2), {"prompt": "<|new|>", "completion": "a"}])
    size = len(bare_tokenizer)

    assert len(read(path, bare_tokenizer, vocab_size=size).train) == 3
    bare_tokenizer.add_tokens(["<|new|>"])

    message = refused(path, bare_tokenizer, vocab_size=size)
    assert f"gives the token id {size:,} at {path}:3, and the model has {size:,} embeddings" in message


def test_a_tokenizer_is_compared_with_that_of_the_release(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "release")
    copy = AutoTokenizer.from_pretrained(tmp_path / "release")
    copy.chat_template = "another"
    added = byte_tokenizer()
    added.add_tokens(["<|new|>"])
    other = byte_tokenizer("a wholly different set of words for the merges")
    closing = byte_tokenizer()
    closing.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 2)])

    check_tokenizer(copy, tmp_path / "release")
    check_tokenizer(other, tmp_path / "release", allow_other=True)

    assert tokenizer_digest(copy) == tokenizer_digest(tokenizer)
    for wrong, difference in ((added, "it has 1 tokens more, '<|new|>'"), (other, "tokens"), (closing, "ends")):
        with pytest.raises(IncompatibleError, match=r"is not that of .*release") as caught:
            check_tokenizer(wrong, tmp_path / "release")
        assert difference in str(caught.value)


# --- samples, held-out sets, order


def test_a_limit_takes_a_sample_by_the_seed_in_the_order_of_the_source(tmp_path: Path, tokenizer: Any) -> None:
    records = pairs(200)
    path = write(tmp_path / "data.jsonl", records)

    first, again, other = (read(path, tokenizer, limit=50, seed=seed).train.to_list() for seed in (0, 0, 1))

    places = [records.index(record) for record in first]
    assert places == sorted(set(places))
    assert len(first) == 50
    assert sum(place < 100 for place in places) in range(10, 41)  # from everywhere, not the first ones
    assert first == again != other
    assert read(path, tokenizer, limit=500).train.to_list() == records


def test_no_question_is_on_both_sides_of_a_held_out_split(tmp_path: Path, tokenizer: Any) -> None:
    answers = [{"prompt": one["prompt"] + " " * n, "completion": f" {n}"} for one in pairs(100) for n in range(3)]
    path = write(tmp_path / "data.jsonl", answers)

    share, number = read(path, tokenizer, held_out=0.2), read(path, tokenizer, held_out=30)
    grown = read(write(tmp_path / "grown.jsonl", answers + pairs(100, start=100)), tokenizer, held_out=0.2)

    for data in (share, number):
        train, aside = ({row["prompt"].strip() for row in part} for part in (data.train, data.evaluations["held_out"]))
        assert len(train) + len(aside) == 100
        assert not train & aside
    assert len(number.evaluations["held_out"]) == 30
    assert len(share.evaluations["held_out"]) in range(30, 91)
    kept = [row for row in grown.evaluations["held_out"].to_list() if row in answers]
    assert kept == share.evaluations["held_out"].to_list()  # more data move none of what was held out
    assert share.report.train.repeated == len(share.train) - len({row["prompt"].strip() for row in share.train})


@given(keys=st.lists(st.integers(0, 5), min_size=1, max_size=30), amount=st.integers(1, 10), seed=st.integers(0, 3))
def test_groups_are_held_out_whole_and_never_more_than_asked(keys: list[int], amount: int, seed: int) -> None:
    import numpy as np

    try:
        chosen = set(hold_out(np.array(keys, dtype=np.uint64), amount=amount, seed=seed).tolist())
    except InvalidRequestError:
        sizes = [keys.count(key) for key in set(keys)]
        assert len(sizes) == 1 or min(sizes) > amount or len(keys) <= amount
        return

    assert 0 < len(chosen) <= amount
    assert all(len({idx in chosen for idx, key in enumerate(keys) if key == one}) == 1 for one in set(keys))


def test_questions_that_are_trained_and_evaluated_on_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    empty = {"prompt": "a", "completion": ""}
    inside, outside = (
        write(tmp_path / "in.jsonl", [*pairs(5, start=7), empty]),
        write(tmp_path / "out.jsonl", pairs(3, start=50)),
    )
    sources = [DataSource(source=str(inside), name="in-domain"), DataSource(source=str(outside))]

    data = read(write(tmp_path / "train.jsonl", [*pairs(10), pairs(1)[0], empty]), tokenizer, evaluations=sources)

    assert list(data.evaluations) == ["in-domain", "out"]
    assert [(one.name, one.shared_with_training, one.repeated) for one in data.report.sets] == [
        ("train", 0, 1),
        ("in-domain", 3, 0),
        ("out", 0, 0),
    ]
    (drop,) = data.report.dropped
    assert (drop.count, drop.places) == (2, (f"{tmp_path / 'train.jsonl'}:12", f"{inside}:6"))
    assert "3 of 5 examples of in-domain have a question that is trained on" in " ".join(data.report.warnings)


def test_the_same_data_are_stored_once_and_a_failed_run_leaves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "data.jsonl", pairs(300))
    bad = write(tmp_path / "bad.jsonl", [*pairs(300), {"prompt": 3, "completion": ""}])

    first, again = read(path, tokenizer), read(path, tokenizer)
    refused(bad, tokenizer)

    (stored,) = first.train.cache_files
    assert again.train.cache_files == [stored]
    assert list(Path(stored["filename"]).parent.glob("*.part")) == []


def test_what_is_stored_is_on_disk_before_it_has_its_name(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: dict[int, int] = {}
    fsync = os.fsync

    def record(descriptor: int) -> None:
        status = os.fstat(descriptor)
        forced[status.st_ino] = status.st_size
        assert Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".part"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    records = [{"prompt": f"{tmp_path}", "completion": "a"}]  # nobody has stored these

    (stored,) = read(write(tmp_path / "data.jsonl", records), tokenizer).train.cache_files

    status = os.stat(stored["filename"])
    assert forced == {status.st_ino: status.st_size}


def test_the_report_is_json_and_says_how_to_have_the_data_again(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "data.jsonl", pairs(20))

    report = read(path, tokenizer, held_out=5, limit=10).report

    told = json.loads(json.dumps(report.to_dict()))
    assert DataSource(**told["records"][0]["source"]) == report.records[0].source
    assert (told["records"][0]["rows"], told["sets"][1]["examples"], told["seed"]) == (10, 5, 0)
    assert next(report.lines()) == f"data: 10 records of {path}, read as prompt-completion"


# --- the Hub


CLIENT = """
import loram_hub.instructions
has_torch = "torch" in sys.modules
from transformers import PreTrainedTokenizerFast
from loram_hub.errors import LoramError
from loram_hub.instructions import DataSource, read_instructions

tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])

def data(source, **changes):
    try:
        return read_instructions([DataSource(source=source, **changes)], tokenizer, max_length=32)
    except LoramError as err:
        return [type(err).__name__, str(err)]

found = data("org/tasks", subset="main", split="test[:4]")
again = data(found.report.records[0].source.source, subset="main", split="test[:4]", limit=2)
bad = [data("org/tasks", subset="mian"), data("org/tasks", subset="main", split="tset"), data("org/nothing"),
       data("org/tasks@nothing")]
print(json.dumps([found.report.to_dict()["records"], found.train.to_list(), again.train.to_list(), bad, has_torch]))
"""


def test_a_hub_dataset_is_read_at_a_commit_that_the_report_names(tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: test.jsonl\n---\n"
    records = [{"question": f"w{4 + n}", "answer": f"w{9 + n} #### w{20 + n}"} for n in range(6)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    with HubServer(tmp_path / "hub") as hub:
        commit = hub.add_repo("org/tasks", {"README.md": card.encode(), "test.jsonl": lines.encode()}, kind="datasets")
        recorded, rows, again, bad, has_torch = python(
            hub, tmp_path / "home", CLIENT, save_tokenizer(tmp_path / "words")
        )

    assert recorded[0]["source"]["source"] == f"org/tasks@{commit}"
    assert (recorded[0]["commit"], recorded[0]["rows"], recorded[0]["format"]) == (commit, 4, "gsm8k")
    assert [row["completion"] for row in rows] == [f" {record['answer']}" for record in records[:4]]
    assert len(again) == 2
    assert all(row in rows for row in again)
    assert [kind for kind, _ in bad] == ["InvalidRequestError", "InvalidRequestError", "AccessError", "AccessError"]
    assert "main" in bad[0][1]
    assert "test" in bad[1][1]
    assert not has_torch
