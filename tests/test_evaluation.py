"""Run with: pytest tests/test_evaluation.py"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MODEL_TYPES, SEVEN, save_base, save_tokenizer, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from loram_hub.auto import AutoLoramModel
from loram_hub.cards.evaluations import read_evaluation
from loram_hub.errors import InvalidRequestError
from loram_hub.evaluation import (
    EncodedExample,
    EvaluationRow,
    EvaluationTable,
    encode_examples,
    evaluate,
    evaluating,
    held_out_loss,
    losses,
    opening,
)
from loram_hub.pruning import prune
from loram_hub.recovery import recover
from loram_hub.texts import Example

EOS = 2
TOLERANCE = 1e-5  # fp32; the order of summation differs
TASKS = [
    Example(prompt="w4 w5", completion=" w6"),
    Example(prompt="w7", completion=" w8 w9 w10 w11 w12"),
    Example(prompt="w13 w14 w15 w16 w17 w18", completion=" w19 w20"),
    Example(prompt="", completion="w21 w22 w23"),
    Example(prompt="w24 w25 w26", completion=" w27 w28 w29 w30"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("evaluation") / "base", tiny_config(layers=3))
    return save_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def release(base: Path) -> Path:
    return prune(
        base, base.parent / "release", pruning_ratio=0.5, importance="magnitude", keep_first=1, keep_last=1
    ).folder


@pytest.fixture(scope="module")
def adapter(release: Path) -> Path:
    """An adapter on the release that does something."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoLoramModel.from_pretrained(release, dtype=torch.float32),
        LoraConfig(r=4, target_modules=list(SEVEN), init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(str(release.parent / "adapter"))
    return release.parent / "adapter"


@pytest.fixture(scope="module")
def recovered(adapter: Path, release: Path) -> Path:
    return recover(adapter, adapter.parent / "recovered", release=release).folder


def open_base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plain_loss(model: Any, encoded: list[EncodedExample]) -> float:
    """Sum over the examples what transformers itself computes with labels of -100 on the prompt, one by one."""
    total = 0.0
    for example in encoded:
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, : example.scored_from] = -100
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * example.scored_tokens
    return total / sum(example.scored_tokens for example in encoded)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_loss_equals_the_one_of_transformers_example_by_example(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, model_type: str
) -> None:
    model = open_base(save_base(tmp_path / "base", tiny_config(model_type, layers=2)))
    encoded, _ = encode_examples(TASKS, tokenizer)

    measured = held_out_loss(model, encoded, batch_size=3)

    assert measured.loss == pytest.approx(plain_loss(model, encoded), rel=TOLERANCE)
    assert measured.tokens == sum(len(task.completion.split()) + bool(task.prompt) for task in TASKS) - 1


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_batching_and_padding_do_not_change_the_loss(
    base: Path, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    model = open_base(base)
    encoded, _ = encode_examples(TASKS, tokenizer)

    measured = held_out_loss(model, encoded, batch_size=batch_size)

    assert measured.loss == pytest.approx(plain_loss(model, encoded), rel=TOLERANCE)


def test_a_large_vocabulary_makes_smaller_batches(
    base: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_base(base)
    encoded, _ = encode_examples(TASKS, tokenizer)
    most_logits: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: most_logits.append(output.numel()))
    monkeypatch.setattr(losses, "_LARGEST_LOGITS", 8 * 53)

    measured = held_out_loss(model, encoded, batch_size=100)

    assert measured.loss == pytest.approx(plain_loss(open_base(base), encoded), rel=TOLERANCE)
    assert len(most_logits) > 1
    assert max(most_logits) <= 8 * 53


def test_the_head_runs_on_scored_positions_only(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = open_base(base)
    encoded, _ = encode_examples([TASKS[2]], tokenizer)
    positions: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: positions.append(output.shape[1]))

    held_out_loss(model, encoded)

    assert positions == [3]  # two words and the end, of nine tokens


def test_the_model_is_left_in_the_mode_it_was_in(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = open_base(base).train()

    held_out_loss(model, encode_examples(TASKS, tokenizer)[0])

    assert model.training


def test_prompt_tokens_are_read_but_not_scored(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded, cut_examples = encode_examples(TASKS[:1], tokenizer)

    assert encoded == [EncodedExample((4, 5, 6, EOS), 2)]
    assert cut_examples == 0


def test_a_text_is_scored_from_its_second_token_and_without_an_end(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded, _ = encode_examples([Example(prompt="", completion="w4 w5 w6")], tokenizer)

    assert encoded == [EncodedExample((4, 5, 6), 1)]


def test_a_long_text_is_split_and_every_token_scored_that_can_be(tokenizer: PreTrainedTokenizerBase) -> None:
    text = Example(prompt="", completion="w4 w5 w6 w7 w8 w9 w10")

    encoded, cut_examples = encode_examples([text], tokenizer, max_tokens=3)

    assert encoded == [EncodedExample((4, 5, 6), 1), EncodedExample((7, 8, 9), 1)]
    assert cut_examples == 1


@pytest.mark.parametrize(
    ("max_tokens", "ids", "scored_from"),
    [
        (7, (4, 5, 6, 7, 8, 9, EOS), 4),
        (5, (6, 7, 8, 9, EOS), 2),
        (3, (8, 9, EOS), 1),
        (2, (8, 9), 1),
    ],
)
def test_a_long_task_loses_the_start_of_its_prompt(
    tokenizer: PreTrainedTokenizerBase, max_tokens: int, ids: tuple[int, ...], scored_from: int
) -> None:
    task = Example(prompt="w4 w5 w6 w7", completion=" w8 w9")

    encoded, cut_examples = encode_examples([task], tokenizer, max_tokens=max_tokens)

    assert encoded == [EncodedExample(ids, scored_from)]
    assert cut_examples == (max_tokens < 7)


def test_sequences_open_as_the_tokenizer_opens_them(base: Path, tmp_path: Path) -> None:
    inner = Tokenizer.from_file(str(base / "tokenizer.json"))
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = save_tokenizer(tmp_path)
    inner.save(str(folder / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = [Example(prompt="w4 w5", completion=" w6"), Example(prompt="", completion="w7 w8 w9")]

    encoded, _ = encode_examples(examples, tokenizer, max_tokens=3)

    assert encoded == [EncodedExample((1, 6, EOS), 1), EncodedExample((1, 7, 8), 1), EncodedExample((1, 9), 1)]


def test_the_table_has_all_four_models_on_the_same_tokens(
    base: Path, release: Path, adapter: Path, recovered: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    encoded, _ = encode_examples(TASKS, tokenizer)

    table = evaluate(
        TASKS, base=base, release=release, adapter=adapter, recovered=recovered, batch_size=2, dtype=torch.float32
    )

    expected = {
        "base": plain_loss(open_base(base), encoded),
        "pruned": plain_loss(open_pruned(release), encoded),
        "pruned + adapter": plain_loss(PeftModel.from_pretrained(open_pruned(release), str(adapter)), encoded),
        "base + recovered adapter": plain_loss(PeftModel.from_pretrained(open_base(base), str(recovered)), encoded),
    }
    assert {row.model: row.loss for row in table.rows} == pytest.approx(expected, rel=TOLERANCE)
    assert [row.model for row in table.rows] == list(expected)
    assert len(set(expected.values())) == 4  # the adapters do something
    assert table.tokens == sum(example.scored_tokens for example in encoded)


def open_pruned(release: Path) -> PreTrainedModel:
    return AutoLoramModel.from_pretrained(release, dtype=torch.float32).eval()


def test_rows_count_parameters_and_bytes(base: Path, release: Path, recovered: Path) -> None:
    table = evaluate(TASKS, base=base, release=release, recovered=recovered, dtype=torch.float32)

    rows = {row.model: row for row in table.rows}
    whole = open_base(base).num_parameters()
    assert rows["base"].parameters == whole
    assert rows["pruned"].parameters == open_pruned(release).loram.manifest.parameters
    assert rows["base + recovered adapter"].parameters > whole
    assert rows["base"].memory_bytes >= 4 * whole
    assert rows["base"].perplexity == pytest.approx(math.exp(rows["base"].loss))


def test_nf4_parameters_are_counted_by_shape_and_bytes_with_their_scales(base: Path, tmp_path: Path) -> None:
    release = prune(
        base, tmp_path / "nf4", pruning_ratio=0.5, importance="random", keep_first=1, keep_last=1, quantize=True
    )

    (row,) = evaluate(TASKS, release=release.folder, dtype=torch.float32).rows

    assert row.parameters == release.manifest.parameters
    assert row.memory_bytes < 4 * row.parameters


def test_the_table_is_json(base: Path) -> None:
    table = evaluate(TASKS, base=base)

    values = json.loads(json.dumps(table.to_dict(), allow_nan=False))

    assert values["rows"][0]["model"] == "base"
    assert values["tokens"] == table.tokens
    assert table.loss_of("base") == values["rows"][0]["loss"]
    assert table.loss_of("pruned") is None


def test_evaluation_is_deterministic_and_reads_files(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    lines = [json.dumps({"prompt": task.prompt, "completion": task.completion}) for task in TASKS]
    path.write_text("\n".join(lines), encoding="utf-8")

    tables: list[EvaluationTable] = [evaluate(data, base=base) for data in (TASKS, TASKS, path)]

    assert len({table.loss_of("base") for table in tables}) == 1
    assert evaluate(path, base=base, limit=2).examples == 2


def test_two_models_are_never_in_memory_at_once(
    base: Path, release: Path, adapter: Path, recovered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[PreTrainedModel]] = []

    def open_base_and_remember(*args: Any, **options: Any) -> PreTrainedModel:
        model = original_open(*args, **options)
        opened.append(weakref.ref(model))
        return model

    def open_pruned_and_look(*args: Any, **options: Any) -> PreTrainedModel:
        assert [model() for model in opened] == [None]
        return original_pruned(*args, **options)

    original_open, original_pruned = AutoModelForCausalLM.from_pretrained, AutoLoramModel.from_pretrained
    monkeypatch.setattr(opening.AutoModelForCausalLM, "from_pretrained", open_base_and_remember)
    monkeypatch.setattr(opening.AutoLoramModel, "from_pretrained", open_pruned_and_look)
    gc.disable()  # what is freed must be freed by evaluate
    try:
        table = evaluate(TASKS, base=base, release=release, adapter=adapter, recovered=recovered)
    finally:
        gc.enable()

    assert len(table.rows) == 4


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({}, "no model to evaluate"),
        ({"base": "b", "adapter": "a"}, "needs that release"),
        ({"release": "r", "recovered": "a"}, "needs the base model"),
    ],
)
def test_an_adapter_without_its_model_is_refused(models: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        evaluate(TASKS, **models)


def test_what_was_read_is_known_by_its_hash_whether_it_was_a_list_a_file_or_a_folder(
    base: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("w4 w5")

    def digest(data: Any) -> str:
        provenance = evaluate(data, base=base, identify=True, allow_base_mismatch=True).provenance
        assert provenance is not None
        assert provenance.settings["allow_base_mismatch"] is True
        return str(provenance.settings["examples_sha256"])

    found = digest(["w4 w5"])

    assert found == hashlib.sha256(b'["", "w4 w5"]\n').hexdigest()
    assert digest(tmp_path / "texts") == digest(tmp_path / "texts" / "a.txt") == found
    (tmp_path / "texts" / "a.txt").write_text("w4 w6")
    assert digest(tmp_path / "texts") != found


def test_a_dataset_on_the_hub_is_read_at_one_commit_which_is_recorded(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def read(data: str, *, limit: int | None) -> list[Example]:
        asked.append(data)
        return TASKS[:1]

    monkeypatch.setattr(evaluating.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(evaluating, "dataset_commit", lambda name, revision: f"{name}/{revision}/commit")
    monkeypatch.setattr(evaluating, "read_examples", read)

    table = evaluate("org/set:part@v1", base=base, identify=True)

    assert asked == ["org/set:part@org/set/v1/commit"]
    assert table.provenance is not None
    assert table.provenance.settings["data_commit"] == "org/set/v1/commit"
    assert table.dataset == "org/set:part"


def test_another_chat_template_makes_another_base(base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "copy"))

    def files() -> Any:
        provenance = evaluate(TASKS[:1], base=copy, identify=True).provenance
        assert provenance is not None
        return provenance.parts[0].files

    plain = files()
    (copy / "chat_template.jinja").write_text("{{ messages }}")

    assert files().keys() - plain.keys() == {"chat_template.jinja"}


def test_a_loss_that_is_not_finite_is_null_and_gets_onto_no_card() -> None:
    row = EvaluationRow(model="base", loss=math.nan, perplexity=None, parameters=5, memory_bytes=1, seconds=0.1)
    table = EvaluationTable(rows=(row,), examples=1, tokens=1, cut_examples=0)

    values = json.loads(json.dumps(table.to_dict(), allow_nan=False))

    assert values["rows"][0]["loss"] is None
    with pytest.raises(InvalidRequestError, match="loss of 'base' was not finite"):
        read_evaluation(values, parameters={})


def test_data_without_a_token_to_score_is_refused(base: Path) -> None:
    with pytest.raises(InvalidRequestError, match="None of the 1 examples has a token to score"):
        evaluate([Example(prompt="", completion="w4")], base=base)
    with pytest.raises(InvalidRequestError, match="at least 2"):
        evaluate(TASKS, base=base, max_tokens=1)
