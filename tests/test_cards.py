"""Cards say what is so, in metadata the Hub takes, and nothing a stranger wrote into a file gets out of its quotes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from builders import (
    half_plan,
    projections,
    random_factors,
    random_plan,
    save_adapter,
    save_base,
    save_metadata_release,
    save_tokenizer,
    tiny_architecture,
    tiny_config,
)
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image

from loram_hub.architecture import architecture_of
from loram_hub.cards import Card, make_card, release_card, write_card
from loram_hub.cards.escaping import MAX_TEXT, code, is_hub_id, json_block, visible
from loram_hub.cards.evaluations import MODELS as ROWS
from loram_hub.cards.pictures import (
    alignment_curve,
    alignment_picture,
    held_out_curves,
    kept_groups_picture,
    kept_shares,
)
from loram_hub.errors import (
    CheckpointError,
    IncompatibleError,
    InvalidRequestError,
    UnsupportedAdapterError,
    VerificationError,
)
from loram_hub.files import dump_json
from loram_hub.licences import duties, licence_documents, licence_of
from loram_hub.manifest import FileEntry
from loram_hub.plan import Plan, PruningSettings, plan_from_scores, pruned_layers
from loram_hub.recovery import recover
from loram_hub.release import Release, open_metadata, verify

LLAMA = "meta-llama/Llama-3.1-8B"
REPO = "org/Llama-3.1-8B-LoRAM-0.5"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ADAPTER_PARAMETERS = sum(4 * (rows + columns) for rows, columns in projections(Plan(tiny_architecture(), {})).values())
"""Of a recovered adapter for the tiny model, at rank 4."""
ATTACKS = [
    "<script>alert(1)</script>",
    "x\n# Heading\n",
    "[click](https://evil.example)",
    "![i](https://evil.example/x.png)",
    "https://evil.example www.evil.example me@evil.example",
    "a | b | c\n|---|---|\n",
    "`` ` ``` ~~~",
    "---\nlicense: mit\n---",
    "{{ 7 * 7 }} {% for x in y %}",
    "\x1b[31mred\x1b[0m\x00\x07",
    "\u202eevil\u2066\u200b",
    "$$x$$ \\\\( y \\\\)",
    "<!-- <img src=x onerror=alert(1)>",
    "&lt;script&gt; &#60;",
    "\\",
    "|",
    "",
    "long " * 10_000,
    "\u2028\u2029\x85",
]
NF4 = {"type": "nf4", "block": 64, "double_quant": True, "dtype": "bfloat16"}


@pytest.fixture
def release(tmp_path: Path) -> Release:
    """A release of Llama without weights."""
    plan = random_plan(tiny_architecture())
    return open_metadata(save_metadata_release(tmp_path / "release", tiny_config(), plan, base_id=LLAMA))


@pytest.fixture
def adapter(tmp_path: Path, release: Release) -> Path:
    """A recovered adapter for Llama."""
    trained = save_adapter(tmp_path / "trained", random_factors(projections(release.plan)), base=release.folder)
    return recover(trained, tmp_path / "recovered").folder


def _with(release: Release, **changes: Any) -> Release:
    return replace(release, manifest=replace(release.manifest, **changes))


def _card(release: Release, **options: Any) -> Card:
    return release_card(release, **{"repo_id": REPO, "licence": licence_of(LLAMA), **options})


def _metadata(card: Card) -> dict[str, Any]:
    _, front, _ = card.text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def _evaluation(release: Release | None = None, **losses: float) -> dict[str, Any]:
    names = {name.replace(" + ", "_").replace(" ", "_"): name for name in ROWS}
    rows = [
        {"model": names[key], "loss": loss, "perplexity": float(np.exp(loss)), "parameters": 7, "memory_bytes": 1,
         "seconds": 1.5}
        for key, loss in losses.items()
    ]  # fmt: skip
    for row in rows:
        if row["model"] in ("pruned + adapter", "base + recovered adapter"):
            row["parameters"] = 7 + ADAPTER_PARAMETERS
        if release is not None and row["model"] in ("base", "pruned"):
            layers = None if row["model"] == "base" else release.plan.layers
            shapes = release.architecture.tensor_shapes(layers) if layers else release.architecture.tensor_shapes()
            row["parameters"] = int(sum(np.prod(shape) for shape in shapes.values()))
    return {"rows": rows, "examples": 5, "tokens": 1234, "cut_examples": 0}


def _code_blocks(text: str, language: str) -> list[str]:
    return [token.content for token in MarkdownIt().parse(text) if token.type == "fence" and token.info == language]


# What a good card on the Hub has: each line is a promise of the issue.
def test_a_release_card_ticks_every_item_of_the_checklist(release: Release) -> None:
    card = _card(_with(release, quantization=NF4), evaluation=_evaluation(release, base=4.0, pruned=6.5))
    metadata, text = _metadata(card), card.text

    checklist = {
        "names its base": metadata["base_model"] == LLAMA,
        "says how it comes from it": metadata["base_model_relation"] == "quantized",
        "shows no serve button": metadata["library_name"] == "loram-hub",
        "is found as text generation": metadata["pipeline_tag"] == "text-generation",
        "has the licence": metadata["license"] == "llama3.1",
        "has its tags": {"loram", "pruned", "arxiv:2502.13533", "4-bit", "bitsandbytes"} == set(metadata["tags"]),
        "has measured results": metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 6.5,
        "says what it is not": "**What it is not:** a model to serve." in text,
        "shows consumer code": len(_code_blocks(text, "python")) == 1,
        "names the paper": "https://arxiv.org/abs/2502.13533" in text,
        "pins the base": COMMIT in text,
        "has a table of sizes": "| pruned, NF4 weights + bf16 rest (this repository) |" in text,
        "has the recipe": len(_code_blocks(text, "json")) == 1,
        "has losses": "| pruned | 6.5000 |" in text,
        "says what was not measured": "| base + recovered adapter | not measured |" in text,
        "has pictures": next(iter(card.files)) == "pictures/kept_groups.png" and "](pictures/kept_groups.png)" in text,
        "has limits": "## Limits" in text,
        "shows the line that the licence asks for": text.count("**Built with Llama") == 2,
        "has hashes": hashlib.sha256((release.folder / "loram.json").read_bytes()).hexdigest() in text,
    }
    assert [item for item, ticked in checklist.items() if not ticked] == []


def test_an_adapter_card_ticks_every_item_of_the_checklist(adapter: Path, release: Release) -> None:
    card = make_card(
        adapter, repo_id="org/Llama-3.1-8B-tuned", evaluation=_evaluation(base=4.0, base_recovered_adapter=3.25)
    )
    metadata, text = _metadata(card), card.text

    checklist = {
        "names the original as base": metadata["base_model"] == LLAMA,
        "says how it comes from it": metadata["base_model_relation"] == "adapter",
        "opens with PEFT": metadata["library_name"] == "peft",
        "has the licence": metadata["license"] == "llama3.1",
        "has its tags": {"loram", "lora", "arxiv:2502.13533"} == set(metadata["tags"]),
        "has measured results": metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 3.25,
        "pins the base": f"commit `{COMMIT}`" in text,
        "says which release it was trained on": "| release it was trained on | `release` |" in text,
        "says on which plan": release.plan.digest in text,
        "says rank and alpha": "| rank and alpha here | r 4, alpha 8 |" in text,
        "shows the PEFT code": "PeftModel.from_pretrained" in _code_blocks(text, "python")[0],
        "shows losses": "| base + recovered adapter | 3.2500 |" in text,
        "shows the line that the licence asks for": "**Built with Llama" in text,
        "has hashes": all(
            hashlib.sha256((adapter / name).read_bytes()).hexdigest() in text
            for name in ("adapter_model.safetensors", "adapter_config.json", "loram.json")
        ),
        "writes the Notice": b"Llama 3.1 Community License" in card.files["Notice"],
    }
    assert [item for item, ticked in checklist.items() if not ticked] == []


def test_a_card_in_place_meets_all_duties_but_the_texts_that_only_the_base_has(release: Release) -> None:
    write_card(release.folder, _card(release))
    documents = licence_documents(release.folder)
    text = (release.folder / "README.md").read_text()

    looked_at = duties(licence_of(LLAMA), repo_name=REPO, documents=documents, card=text)

    unmet = [duty.what for duty in looked_at if not duty.met]
    assert unmet == [
        "a copy of the Llama 3.1 Community License travels along",
        "a copy of the use policy travels along",
    ]


@pytest.mark.parametrize("base", ["google/gemma-2-9b", "Qwen/Qwen2.5-3B", "Qwen/Qwen2-72B", "Qwen/Qwen3-8B", LLAMA])
def test_the_card_itself_meets_what_a_licence_asks_of_cards(release: Release, base: str) -> None:
    licence = licence_of(base)
    card = _card(release, licence=licence, repo_id="org/Llama-x")

    texts = {"LICENSE": licence.text_holds or "", "USE_POLICY.md": "policy"}
    notices = {name: data.decode() for name, data in card.files.items() if name == "Notice"}
    looked_at = duties(licence, repo_name="org/Llama-x", documents=texts | notices, card=card.text)

    assert [duty.what for duty in looked_at if not duty.met] == []


@pytest.mark.parametrize(
    ("changes", "relation"),
    [
        ({}, "finetune"),
        ({"alignment": {"tokens": 1000}}, "finetune"),
        ({"quantization": NF4}, "quantized"),
        ({"quantization": NF4, "alignment": {"tokens": 1000}}, "quantized"),
    ],
)
def test_the_relation_to_the_base_is_one_that_the_hub_knows(
    release: Release, changes: dict[str, Any], relation: str
) -> None:
    assert _metadata(_card(_with(release, **changes)))["base_model_relation"] == relation


def test_a_base_that_is_not_on_the_hub_stays_out_of_the_metadata_and_the_card_says_so(tmp_path: Path) -> None:
    folder = save_metadata_release(
        tmp_path / "r", tiny_config(), random_plan(tiny_architecture()), base_id="my-base", commit=None
    )

    card = make_card(folder, license="apache-2.0")

    assert "base_model" not in _metadata(card)
    assert "base_model_relation" not in _metadata(card)
    assert "The base model has no id on the Hub" in card.text


def test_the_card_of_a_release_with_nothing_pruned_says_so(tmp_path: Path) -> None:
    plan = Plan(tiny_architecture(), {})
    made = _card(open_metadata(save_metadata_release(tmp_path / "whole", tiny_config(), plan, base_id=LLAMA)))

    assert "with nothing pruned (ratio" in made.text
    assert "As many parameters as the base" in made.text
    assert "no weight was removed" in made.text
    assert "times fewer" not in made.text
    assert not any(name.endswith("kept_groups.png") for name in made.files)


def test_data_on_the_hub_goes_into_the_metadata_and_other_data_does_not(release: Release) -> None:
    alignment = {"corpora": ["HuggingFaceFW/fineweb", "/home/me/texts.jsonl", "no owner"], "tokens": 1000}

    card = _card(_with(release, alignment=alignment))

    assert _metadata(card)["datasets"] == ["HuggingFaceFW/fineweb"]
    assert "(https://huggingface.co/datasets/HuggingFaceFW/fineweb)" in card.text
    assert "datasets" not in _metadata(_card(release))


def test_nothing_is_measured_unless_it_was(release: Release, adapter: Path) -> None:
    for card in (_card(release), make_card(adapter)):
        assert "model-index" not in _metadata(card)
        assert "\nNot measured: " in card.text
        assert not [name for name in card.files if name.startswith(".eval_results")]


def test_a_row_of_another_model_is_no_result_of_this_one(release: Release) -> None:
    card = _card(release, evaluation=_evaluation(release, base=4.0))

    assert "model-index" not in _metadata(card)
    assert "| base | 4.0000 |" in card.text


def test_results_on_a_dataset_of_the_hub_come_in_the_hubs_own_form(release: Release) -> None:
    evaluation = {**_evaluation(release, pruned=6.5), "dataset": "org/held-out"}

    card = _card(release, evaluation=evaluation)

    (entry,) = parse_eval_result_entries(yaml.safe_load(card.files[".eval_results/held_out_loss.yaml"]))
    assert (entry.dataset_id, entry.value, entry.source_url) == ("org/held-out", 6.5, f"https://huggingface.co/{REPO}")
    assert _metadata(card)["model-index"][0]["results"][0]["dataset"]["type"] == "org/held-out"
    assert ".eval_results/held_out_loss.yaml" not in _card(release, evaluation=_evaluation(release, pruned=6.5)).files


ACCURACY = {"model": "base", "task": "arc_easy", "metric": "acc", "filter": "none", "value": 0.5}


def _tasks(**changes: Any) -> dict[str, Any]:
    """Scores as `loram eval --tasks` gives them."""
    score = {"stderr": 0.01, "samples": 100, "is_headline": True}
    scores = [
        {"model": model, "task": task, "metric": metric, "filter": taken, "value": value + shift, **score}
        for model, shift in (("base", 0.0), ("base + recovered adapter", 0.25), ("pruned", -0.125))
        for task, metric, taken, value in (
            ("arc_easy", "acc", "none", 0.5),
            ("gsm8k_cot", "exact_match", "strict-match", 0.25),
        )
    ]
    described = {"num_fewshot": 1, "samples": 100, "documents": 100, "dataset_config": "main", "split": "test"}
    values = {
        "scores": scores,
        "tasks": [
            {"task": "arc_easy", "dataset": "allenai/ai2_arc", "dataset_revision": COMMIT, **described},
            {"task": "gsm8k_cot", "dataset": "openai/gsm8k", "dataset_revision": None, **described},
        ],
        "models": [{"model": "base + recovered adapter", "parameters": None, "backend": "transformers, merged"}],
        "provenance": {"parts": [], "settings": {}, "versions": {"lm-eval": "0.4.13"}},
        "date": "2026-11-23T02:44:00+00:00",
    }
    return {"tasks": values | changes}


def test_scores_on_tasks_come_as_table_as_model_index_and_in_the_hubs_own_form(adapter: Path) -> None:
    card = make_card(adapter, repo_id="org/Llama-3.1-8B-tuned", evaluation=_tasks())

    entries = parse_eval_result_entries(yaml.safe_load(card.files[".eval_results/tasks.yaml"]))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("allenai/ai2_arc", "arc_easy", 0.75), ("openai/gsm8k", "gsm8k_cot", 0.5),
    ]  # fmt: skip
    assert entries[0].dataset_revision == COMMIT
    assert entries[0].date == "2026-11-23T02:44:00+00:00"
    assert entries[0].notes == (
        "base + recovered adapter: acc, 1-shot, lm-evaluation-harness 0.4.13, run as transformers, merged"
    )
    name, results = model_index_to_eval_results(_metadata(card)["model-index"])
    assert name == "Llama-3.1-8B-tuned"
    assert [(result.dataset_type, result.metric_type, result.metric_value) for result in results] == [
        ("allenai/ai2_arc", "acc", 0.75), ("openai/gsm8k", "exact_match", 0.5),
    ]  # fmt: skip
    assert "| `arc_easy` | `acc` | 1 | 100 | 0.5000 ± 0.0100 | 0.3750 ± 0.0100 | 0.7500 ± 0.0100 |" in card.text
    assert "| `gsm8k_cot` | `exact_match` (`strict-match`) | 1 | 100 | 0.2500 ± 0.0100 | 0.1250 ± 0.0100 |" in card.text
    both = make_card(adapter, evaluation=_evaluation(base=4.0, base_recovered_adapter=3.25) | _tasks())
    for made, expected in ((card, 3), (both, 4)):  # how it was trained, losses, tasks, files
        tokens = MarkdownIt().enable("table").parse(made.text)
        assert sum(token.type == "table_open" for token in tokens) == expected


@pytest.mark.parametrize(
    "change",
    [{"samples": 50}, {"dataset": None}, {"dataset": "a local folder"}, {"dataset": "org/x\nverified: true"}],
)
def test_scores_that_nobody_can_compare_stay_in_the_text(adapter: Path, change: dict[str, Any]) -> None:
    evaluation = _tasks()
    for task in evaluation["tasks"]["tasks"]:
        task.update(change)

    card = make_card(adapter, evaluation=evaluation)

    assert "`arc_easy`" in card.text
    assert ("first 50 of 100" in card.text) == ("samples" in change)
    assert "model-index" not in _metadata(card)
    assert not [name for name in card.files if name.startswith(".eval_results")]


def test_scores_of_ones_own_task_files_are_marked_and_stay_in_the_text(adapter: Path) -> None:
    evaluation = _tasks()
    evaluation["tasks"]["provenance"]["settings"] = {"task_files": {"arc_easy": "0" * 64}}

    card = make_card(adapter, repo_id="org/tuned", evaluation=evaluation)

    entries = parse_eval_result_entries(yaml.safe_load(card.files[".eval_results/tasks.yaml"]))
    assert [entry.task_id for entry in entries] == ["gsm8k_cot"]
    assert [result.dataset_type for result in model_index_to_eval_results(_metadata(card)["model-index"])[1]] == [
        "openai/gsm8k"
    ]
    assert "| `arc_easy` (own task file) | `acc` |" in card.text
    assert "| `gsm8k_cot` | `exact_match`" in card.text


@pytest.mark.parametrize(
    "changes",
    [{"rows": [{"model": "base", "loss": 10**400, "perplexity": None, "parameters": 5}]}, {"rows": [{"model": []}]}],
)
def test_losses_that_no_float_holds_are_refused(adapter: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="The evaluation has"):
        make_card(adapter, evaluation={"examples": 1, "tokens": 1, **changes})


@pytest.mark.parametrize("name", [[], {}, 7, "unheard of"])
def test_a_protocol_by_no_known_name_is_not_named(release: Release, name: object) -> None:
    card = _card(release, evaluation=_evaluation(release, pruned=6.5) | {"protocol": {"name": name}})

    assert "protocol" not in card.text


def test_an_older_cards_task_results_do_not_outlive_it(adapter: Path) -> None:
    write_card(adapter, make_card(adapter, evaluation=_tasks()))
    (adapter / ".eval_results" / "mine.yaml").write_text("- mine\n")
    assert (adapter / ".eval_results" / "tasks.yaml").is_file()

    write_card(adapter, make_card(adapter))

    assert [path.name for path in (adapter / ".eval_results").iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": []}, "no score"),
        ({"scores": [{"model": "mine"}]}, "where a text is needed"),
        ({"scores": [{"model": "base", "task": "t", "metric": "m", "filter": "none", "value": "1"}]}, "value"),
        ({"scores": [{"model": "base", "task": "t", "metric": "m", "filter": "none", "value": 1}] * 2}, "two scores"),
        ({"tasks": [{"task": "arc_easy", "num_fewshot": -1}]}, "num_fewshot"),
        ({"models": [{"model": "base", "parameters": 7.5, "backend": "x"}]}, "parameters"),
        ({"models": None}, "without a list of models"),
        ({"scores": [ACCURACY | {"value": 7.0}]}, "acc = 7, which is from 0 to 1"),
        ({"scores": [ACCURACY | {"stderr": -1}]}, "a standard error of -1"),
        ({"scores": [ACCURACY | {"value": 10**400}]}, "where a number is needed"),
        ({"tasks": [{"task": "arc_easy", "num_fewshot": 1, "samples": 9, "documents": 8}]}, "9 questions measured of"),
    ],
)
def test_malformed_scores_are_refused(adapter: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        make_card(adapter, evaluation=_tasks(**change))


def test_scores_of_a_model_of_another_size_are_refused(release: Release) -> None:
    models = [{"model": "pruned", "parameters": 7, "backend": "transformers"}]

    with pytest.raises(InvalidRequestError, match="'pruned' has 7 parameters; here it has"):
        _card(release, evaluation=_tasks(models=models))


@settings(max_examples=10)
@given(task=st.sampled_from(ATTACKS), metric=st.sampled_from(ATTACKS), version=st.sampled_from(ATTACKS))
def test_no_text_of_scores_becomes_markup(
    tmp_path_factory: pytest.TempPathFactory, task: str, metric: str, version: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "scored"
    if not folder.exists():
        save_metadata_release(folder, tiny_config(), half_plan(tiny_architecture()), base_id="name")
    evaluation = _tasks(provenance={"versions": {"lm-eval": version}})
    evaluation["tasks"]["scores"][0].update({"task": task or "x", "metric": metric or "x"})
    opened = open_metadata(folder)
    with patch("loram_hub.cards.releases.kept_groups_picture", return_value=b""):
        expected, card = _card(opened, evaluation=_tasks()), _card(opened, evaluation=evaluation)

    headings, links, html = _shape(card.text)
    assert (headings, html) == (_shape(expected.text)[0], 0)
    assert set(links) <= set(_shape(expected.text)[1])
    assert _metadata(card)["library_name"] == "loram-hub"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "no rows"),
        ({"rows": [{"model": "mine", "loss": 1.0}]}, "none of base"),
        ({"rows": [{"model": "base", "loss": float("nan"), "perplexity": 1.0, "parameters": 1}]}, "loss"),
        ({"rows": [{"model": "base", "loss": "1", "perplexity": 1.0, "parameters": 1}]}, "loss"),
        ({"rows": [{"model": "base", "loss": 1.0, "perplexity": None, "parameters": 1}]}, "has 1 parameters; here it"),
        ({"tokens": True}, "tokens"),
        ({"tokens": -1}, "tokens"),
    ],
)
def test_an_evaluation_that_is_malformed_or_of_another_model_is_refused(
    release: Release, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        _card(release, evaluation=_evaluation(release, base=4.0) | change)


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("base + recovered adapter", {"parameters": 5}, "no more than 'base' without the adapter"),
        ("base + recovered adapter", {"parameters": 8}, "1 parameters more than the base; this adapter has"),
        ("pruned + adapter", {"parameters": 7}, "no more than 'pruned' without the adapter"),
        ("base", {"perplexity": 3.0}, r"perplexity 3, which is not exp\(loss\)"),
        ("base", {"perplexity": 0}, "perplexity 0"),
    ],
)
def test_an_evaluation_of_another_adapter_gets_onto_no_card(
    adapter: Path, model: str, change: dict[str, Any], message: str
) -> None:
    evaluation = _evaluation(base=4.0, pruned=6.5, pruned_adapter=5.0, base_recovered_adapter=3.25)
    assert "3.2500" in make_card(adapter, evaluation=evaluation).text
    next(row for row in evaluation["rows"] if row["model"] == model).update(change)

    with pytest.raises(InvalidRequestError, match=message):
        make_card(adapter, evaluation=evaluation)


def test_without_the_base_in_it_an_evaluation_must_still_have_room_for_the_adapter(adapter: Path) -> None:
    evaluation = _evaluation(base_recovered_adapter=3.25)
    assert "3.2500" in make_card(adapter, evaluation=evaluation).text
    evaluation["rows"][0]["parameters"] = 5

    with pytest.raises(InvalidRequestError, match="has 5 parameters; this adapter has"):
        make_card(adapter, evaluation=evaluation)


def test_a_card_is_not_written_through_a_link(release: Release, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (release.folder / "pictures").symlink_to(tmp_path / "outside")

    with pytest.raises(InvalidRequestError, match="pictures is a link"):
        write_card(release.folder, _card(release))
    assert list((tmp_path / "outside").iterdir()) == []
    assert not (release.folder / "README.md").exists()


def test_a_model_may_not_be_measured_twice(release: Release) -> None:
    rows = _evaluation(release, base=4.0)["rows"] * 2

    with pytest.raises(InvalidRequestError, match="twice"):
        _card(release, evaluation=_evaluation(release, base=4.0) | {"rows": rows})


def test_the_table_of_a_70b_model_states_the_papers_parameters_and_the_bytes_that_are_stored(tmp_path: Path) -> None:
    config = tiny_config(
        layers=80, vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    architecture, chosen = architecture_of(config), PruningSettings(pruning_ratio=0.85)
    scores = {
        layer: {"kv_heads": np.arange(8, dtype="f4"), "channels": np.arange(28672, dtype="f4")}
        for layer in pruned_layers(architecture, chosen)
    }
    plan = plan_from_scores(architecture, chosen, scores)
    folder = save_metadata_release(tmp_path / "r", config, plan, base_id="meta-llama/Llama-3.1-70B")

    text = make_card(folder).text

    assert "| base, 16 bit | 70,553,706,496 | 131.42 GiB |" in text  # 2 bytes each
    assert "17,849,982,976" in text  # table 6 of the paper
    assert "| pruned, NF4 weights + bf16 rest | 17,849,982,976 | 11.48 GiB |" in text  # not the 8.31 of parameters / 2
    assert "2 of 8 KV heads" in text  # 8 - (1024 - int(1024 * 0.15)) // 128
    assert "4,300 of 28,672 MLP channels" in text


def test_the_bytes_of_nf4_on_the_card_are_those_in_the_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    from loram_hub.pruning import prune

    base = save_base(tmp_path / "base", tiny_config(), dtype="bfloat16")
    folder = prune(
        base, tmp_path / "r", pruning_ratio=0.5, keep_first=1, keep_last=1, importance="random", quantize=True
    ).folder
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tables = ("quant_map", "quant_state.bitsandbytes__nf4")  # code tables are not counted, and the card says so
        nbytes = sum(file.get_tensor(name).nbytes for name in file.keys() if not name.endswith(tables))  # noqa: SIM118

    text = make_card(folder, license="mit").text

    assert f"(this repository) | {open_metadata(folder).manifest.parameters:,} | {nbytes / 1024:,.2f} KiB |" in text
    assert "| quantization | NF4, double quantization (bitsandbytes) |" in text


def test_weights_that_may_have_been_trained_are_not_said_to_be_the_bases_own(release: Release) -> None:
    saved = _card(_with(release, recipe={"saved": True})).text

    assert "the kept weights are as pruning left them" in _card(release).text
    assert "the kept weights are as pruning left them" not in saved
    assert "may have been trained" in saved


def test_the_alignment_curve_is_drawn_where_there_is_one(release: Release) -> None:
    aligned = _with(release, alignment={"tokens": 1000, "losses": [[0, 5.0], [100, 4.0], [200, 3.5]]})

    card = _card(aligned)

    assert "](pictures/alignment_loss.png)" in card.text
    assert Image.open(BytesIO(card.files["pictures/alignment_loss.png"])).size[0] > 500
    assert "pictures/alignment_loss.png" not in _card(release).files


ALIGNED = {
    "corpora": ["HuggingFaceFW/fineweb:sample-10BT", "mine.jsonl"],
    "tokens": 104857600,
    "steps": 1600,
    "losses": [[0, 5.0], [800, 4.0], [1600, 3.5]],
    "held_out": [[0, {"HuggingFaceFW/fineweb:sample-10BT": 5.25, "mine.jsonl": 6.0}],
                 [1600, {"HuggingFaceFW/fineweb:sample-10BT": 3.75, "mine.jsonl": 4.0}]],
    "run_sha256": "f" * 64,
}  # fmt: skip
REFIT = {"target": "residual", "ridge": 0.05, "samples": 64, "tokens": 128, "calibration": {"file": "x"}}


def _row(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return line


def test_the_card_of_an_aligned_release_says_on_what_for_how_long_and_what_it_brought(release: Release) -> None:
    card = _card(_with(release, alignment=ALIGNED))

    assert "structurally pruned (ratio 0.5), trained further to make up for it: a small stand-in" in card.text
    assert _row(card.text, "alignment") == "| alignment | `tokens 104857600`, `steps 1600` |"
    assert _row(card.text, "held-out loss in alignment") == (
        "| held-out loss in alignment | `HuggingFaceFW/fineweb:sample-10BT` 5.2500 to 3.7500, "
        "`mine.jsonl` 6.0000 to 4.0000 (nats per token) |"
    )
    assert _row(card.text, "data") == (
        "| data | [`HuggingFaceFW/fineweb`](https://huggingface.co/datasets/HuggingFaceFW/fineweb) `sample-10BT`, "
        "`mine.jsonl` |"
    )
    assert _metadata(card)["datasets"] == ["HuggingFaceFW/fineweb"]
    assert "refit" not in card.text
    assert "Not aligned" not in card.text


def test_a_release_that_was_only_refitted_is_not_said_to_be_trained(release: Release) -> None:
    text = _card(_with(release, alignment={"refit": REFIT})).text

    assert "(ratio 0.5), its output projections refitted in closed form: a small stand-in" in text
    assert _row(text, "refit").endswith(": `target residual`, `ridge 0.05`, `samples 64`, `tokens 128` |")
    assert _row(text, "alignment") == "| alignment | none: no training after the refit |"
    assert "- Refitted in closed form, but not aligned by further training." in text
    assert "the output projections of the rest were refitted in closed form" in text
    assert "trained further" not in text
    assert "as pruning left them" not in text


def test_a_release_that_was_refitted_and_aligned_is_said_to_be_both(release: Release) -> None:
    text = _card(_with(release, alignment={**ALIGNED, "refit": REFIT})).text

    assert "its output projections refitted in closed form, trained further to make up for it: a small" in text
    assert "refitted in closed form, the rest was trained further" in text
    assert _row(text, "alignment") == "| alignment | `tokens 104857600`, `steps 1600` |"
    assert "aligned by further training" not in text


def test_a_release_that_was_refitted_after_its_alignment_shows_no_losses_of_other_weights(release: Release) -> None:
    card = _card(_with(release, alignment={"refit": REFIT, "earlier": {**ALIGNED, "refit": {"ridge": 7}}}))

    assert (
        "trained further to make up for it, its output projections refitted in closed form afterwards: a small"
        in card.text
    )
    assert "the rest was trained further, the output projections of the rest were refitted" in card.text
    assert _row(card.text, "alignment") == (
        "| alignment | `tokens 104857600`, `steps 1600`; before the refit, so its losses are not those of these "
        "weights |"
    )
    assert "`ridge 0.05`" in _row(card.text, "refit")
    assert "held-out loss in alignment" not in card.text
    assert "pictures/alignment_loss.png" not in card.files
    assert _metadata(card)["datasets"] == ["HuggingFaceFW/fineweb"]
    assert "aligned by further training" not in card.text


@pytest.mark.parametrize("earlier", [{"refit": REFIT}, {"earlier": {"refit": REFIT}}, "x", [1], None])
def test_a_second_refit_is_no_training(release: Release, earlier: object) -> None:
    text = _card(_with(release, alignment={"refit": REFIT, "earlier": earlier})).text

    assert _row(text, "alignment") == "| alignment | none: no training after the refit |"
    assert "trained further" not in text


def test_held_out_losses_are_drawn_with_those_of_training(release: Release) -> None:
    trained_only = {key: value for key, value in ALIGNED.items() if key != "held_out"}

    pictures = {
        _card(_with(release, alignment=alignment)).files["pictures/alignment_loss.png"]
        for alignment in (ALIGNED, trained_only, {**ALIGNED, "losses": [[0, 5.0], [800, 3.9], [1600, 3.5]]})
    }

    assert len(pictures) == 3
    curve, held_out = alignment_curve(ALIGNED), held_out_curves(ALIGNED)
    assert alignment_picture(curve, held_out) in pictures
    assert held_out["mine.jsonl"] == ((0.0, 6.0), (1600.0, 4.0))


@pytest.mark.parametrize(
    "rows", [None, "ab", 7, [[0]], [[0, 1.0]], [[0, {"a": "x"}]], [["0", {"a": 1.0}]], [[0, {"a": float("nan")}]], [3]]
)
def test_held_out_losses_that_are_none_are_not_drawn(release: Release, rows: object) -> None:
    assert held_out_curves({"held_out": rows}) == {}
    assert "held-out loss in alignment" not in _card(_with(release, alignment={**ALIGNED, "held_out": rows})).text


def test_any_number_of_corpora_of_any_names_gives_a_picture_of_few() -> None:
    names = [f"$x_{{{number} \x1b中{'y' * 300}" for number in range(100)]

    curves = held_out_curves({"held_out": [[step, dict.fromkeys(names, 2.0)] for step in range(5_000)]})

    assert 1 < len(curves) <= 8
    assert all(1 < len(points) <= 4_096 for points in curves.values())
    assert alignment_picture([(0, 5.0), (1, 4.0)], curves)


@pytest.mark.parametrize("losses", [None, [], [[0, 1.0]], "abc", [[0, "x"], [1, 2.0]], [[0, 1e300], [1, 1.0]], [1, 2]])
def test_a_curve_that_is_none_is_not_drawn(losses: object) -> None:
    assert alignment_curve({"losses": losses}) == ()


def test_a_curve_of_many_points_is_thinned() -> None:
    curve = alignment_curve({"losses": [[step, 1.0] for step in range(100_000)]})

    assert 2_000 < len(curve) <= 4_096
    assert curve[1][0] > curve[0][0]


@pytest.mark.parametrize("bins", [1, 2, 5, 37])
def test_the_picture_shows_the_share_of_channels_kept(bins: int) -> None:
    plan = random_plan(tiny_architecture())

    shares = kept_shares(plan, "channels", bins=bins)

    for layer in range(4):
        kept = set(plan.kept[layer]["channels"].tolist()) if layer in plan.kept else set(range(37))
        for column in range(bins):
            cell = [channel for channel in range(37) if column * 37 // bins <= channel < (column + 1) * 37 // bins]
            assert shares[layer, column] == pytest.approx(len(kept & set(cell)) / len(cell))


@pytest.mark.parametrize("attention", ["mha", "gqa", "mqa"])
def test_pictures_are_pngs_without_a_trace_of_who_drew_them(attention: str) -> None:
    picture = kept_groups_picture(half_plan(tiny_architecture(attention=attention)))

    image = Image.open(BytesIO(picture))
    image.load()
    assert image.format == "PNG"
    assert set(image.info) <= {"dpi"}
    assert len({pixel for _, pixel in image.convert("RGB").getcolors(1_000_000) or []}) > 2


IN_ANOTHER_PROCESS = """
import sys, hashlib
from loram_hub.cards import make_card
card = make_card(sys.argv[1], repo_id="org/Llama-3.1-8B-LoRAM-0.5")
print({name: hashlib.sha256(data).hexdigest() for name, data in card.all_files.items()})
"""


def test_equal_input_gives_equal_bytes_whatever_matplotlib_is_set_to(release: Release, tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: red\nfont.size: 22\nlines.linewidth: 9\n")

    def hashes(seed: str, **more: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent), **more}
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(release.folder)]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    first, second = hashes("1"), hashes("2", MATPLOTLIBRC=str(tmp_path / "matplotlibrc"))

    assert first == second
    assert "kept_groups.png" in first


def test_an_installed_package_brings_its_templates(release: Release, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    unwanted = shutil.ignore_patterns("__pycache__", "model_cards")
    shutil.copytree(root / "loram_hub", tmp_path / "site" / "loram_hub", ignore=unwanted)
    shutil.copytree(root / "model_cards", tmp_path / "site" / "loram_hub" / "model_cards")  # where the wheel has them
    command = [sys.executable, "-P", "-c", IN_ANOTHER_PROCESS, str(release.folder)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=tmp_path)

    assert hashlib.sha256(_card(release).text.encode()).hexdigest() in done.stdout


BLOCKED = """
import sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None
import loram_hub.cards
from loram_hub.errors import MissingDependencyError
try:
    loram_hub.cards.make_card(sys.argv[1])
except MissingDependencyError as err:
    print(err)
"""


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_what_is_missing_for_a_card_is_named_and_torch_is_not_needed(release: Release, missing: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", BLOCKED, str(release.folder), f"torch,transformers,{missing}"]

    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)

    assert f"pip install {missing}" in done.stdout


# The code on the cards is run as it stands, with folders that have the names of repositories.


def test_the_consumer_code_of_a_release_card_trains_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl
    from trl import SFTConfig, SFTTrainer

    from loram_hub.pruning import prune

    base = save_base(tmp_path / "base", tiny_config())
    save_tokenizer(base)
    prune(base, tmp_path / "org" / "release", pruning_ratio=0.5, keep_first=1, keep_last=1, importance="random")
    (tmp_path / "train.jsonl").write_text('{"text": "w4 w5 w6 w7 w8 w9"}\n' * 2)
    monkeypatch.chdir(tmp_path)
    arguments = SFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, max_steps=1, report_to="none")
    monkeypatch.setattr(trl, "SFTTrainer", partial(SFTTrainer, args=arguments))  # the defaults are for a GPU
    (source,) = _code_blocks(
        make_card(tmp_path / "org" / "release", repo_id="org/release", license="mit").text, "python"
    )

    exec(compile(source, "card", "exec"), {})

    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    statements = [line for line in source.splitlines() if line and not line.startswith("from ")]
    assert len(statements) == 6, "six lines of consumer code"


def test_the_code_of_an_adapter_card_opens_it_on_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "org" / "base", tiny_config())
    save_tokenizer(base)
    plan = random_plan(architecture_of(json.loads((base / "config.json").read_text())))
    release = save_metadata_release(tmp_path / "release", tiny_config(), plan, base_id="org/base")
    trained = save_adapter(tmp_path / "trained", random_factors(projections(plan)), base=release)
    recover(trained, tmp_path / "org" / "tuned")
    monkeypatch.chdir(tmp_path)
    (source,) = _code_blocks(make_card("org/tuned", repo_id="org/tuned", license="mit").text, "python")
    names: dict[str, Any] = {}

    exec(compile(source, "card", "exec"), names)

    assert names["model"].peft_config["default"].r == 4
    assert f'revision="{COMMIT}"' in source


@pytest.mark.parametrize(("rank", "served"), [(4, 8), (8, 8), (9, 16), (40, 64)])
def test_the_line_for_vllm_names_base_commit_rank_and_repository(
    tmp_path: Path, release: Release, rank: int, served: int
) -> None:
    factors = random_factors(projections(release.plan), rank=rank)
    trained = save_adapter(tmp_path / "trained", factors, base=release.folder, r=rank)
    recover(trained, tmp_path / "recovered")

    (line,) = _code_blocks(make_card(tmp_path / "recovered", repo_id="org/Llama-tuned").text, "sh")

    assert shlex.split(line) == [
        "vllm", "serve", LLAMA, "--revision", COMMIT, "--enable-lora", "--max-lora-rank", str(served),
        "--lora-modules", "Llama-tuned=org/Llama-tuned",
    ]  # fmt: skip


def test_an_adapter_that_was_not_recovered_gets_no_card(tmp_path: Path, release: Release) -> None:
    trained = save_adapter(tmp_path / "trained", random_factors(projections(release.plan)), base=release.folder)

    with pytest.raises(UnsupportedAdapterError, match="recover"):
        make_card(trained, license="mit")


def test_an_adapter_of_full_size_from_elsewhere_gets_a_card_that_claims_no_recovery(tmp_path: Path) -> None:
    whole = projections(half_plan(tiny_architecture(), seed=0))
    architecture = tiny_architecture()
    shapes = {name: (24, 37) if name.endswith("down_proj") else (37, 24) for name in whole if ".mlp." in name}
    folder = save_adapter(tmp_path / "a", random_factors(shapes), base="org/base")
    assert architecture.intermediate_size == 37

    card = make_card(folder, license="mit")

    assert "recovered to full size" not in card.text
    assert "release it was trained on" not in card.text
    assert _metadata(card)["tags"] == ["lora"], "nothing of it comes from the paper"
    assert "| r 4, alpha 8 |" in card.text

    scaled = save_adapter(
        tmp_path / "b", random_factors(shapes), base="org/base", use_rslora=True, alpha_pattern={"up": 2}
    )
    text = make_card(scaled, license="mit").text
    assert (
        "| r 4, alpha 8; scaled by alpha / sqrt(r) (rsLoRA); some modules have a rank or an alpha of their own" in text
    )


def test_a_rank_that_vllm_does_not_take_gets_no_line_for_vllm(tmp_path: Path) -> None:
    factors = random_factors({"model.layers.0.mlp.up_proj": (37, 24)}, rank=520)
    text = make_card(save_adapter(tmp_path / "a", factors, base="org/base", r=520), license="mit").text

    assert "vllm serve" not in text
    assert "vLLM takes no adapter of this rank" in text


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"base": {"id": "org/other", "commit": COMMIT, "config_sha256": "0" * 64}}, VerificationError),
        ({"format": 2}, IncompatibleError),
        ({"files": {}}, VerificationError),
    ],
)
def test_an_adapter_whose_record_was_altered_gets_no_card(
    adapter: Path, change: dict[str, Any], error: type[Exception]
) -> None:
    record = json.loads((adapter / "loram.json").read_text())
    (adapter / "loram.json").write_text(dump_json(record | change))

    with pytest.raises(error):
        make_card(adapter)


@pytest.mark.parametrize("change", [{"base_model_name_or_path": "org/other"}, {"revision": "main"}, {"revision": None}])
def test_an_adapter_whose_config_names_another_base_than_its_record_gets_no_card(
    adapter: Path, change: dict[str, Any]
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(dump_json(config | change))

    with pytest.raises(VerificationError, match=r"Recover the adapter again"):
        make_card(adapter, license="llama3.1")


@pytest.mark.parametrize(
    "change",
    [
        {"base_model_name_or_path": "$(reboot)"},
        {"base_model_name_or_path": "/home/me/model"},
        {"base_model_name_or_path": 'org/x", trust_remote_code=True, y="'},
        {"base_model_name_or_path": None},
        {"revision": 'main"); import os; ("'},
    ],
)
def test_no_name_from_a_config_gets_into_code_unless_it_is_a_plain_name(tmp_path: Path, change: dict[str, Any]) -> None:
    shapes = {"model.layers.0.mlp.up_proj": (37, 24)}
    folder = save_adapter(tmp_path / "a", random_factors(shapes), **{"base": "org/base", **change})

    with pytest.raises(VerificationError, match=r"names the base|has revision"):
        make_card(folder, license="mit")


@pytest.mark.parametrize(
    "repo_id", ["name", "a/b/c", "org/na me", 'org/x"', "org/<b>", "org/..", "org/x\n## y", "ö/x", ""]
)
def test_a_repo_id_that_is_none_of_the_hubs_is_refused(release: Release, adapter: Path, repo_id: str) -> None:
    for folder in (release.folder, adapter):
        with pytest.raises(InvalidRequestError, match="repo_id"):
            make_card(folder, repo_id=repo_id)


def test_a_folder_that_is_neither_release_nor_adapter_gets_no_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a release nor an adapter"):
        make_card(tmp_path)


# Writing.


def test_a_written_card_leaves_the_release_valid_and_can_be_written_again(tmp_path: Path) -> None:
    from loram_hub.pruning import prune

    base = save_base(tmp_path / "base", tiny_config())
    folder = prune(base, tmp_path / "r", pruning_ratio=0.5, keep_first=1, keep_last=1, importance="random").folder
    release = open_metadata(folder)
    evaluation = {**_evaluation(release, pruned=6.5), "dataset": "org/held-out"}

    first = write_card(folder, make_card(folder, license="gemma", evaluation=evaluation))
    again = write_card(folder, make_card(folder, license="gemma", evaluation=evaluation))

    assert set(first) - set(again) == {"Notice"}, "it is there by now"
    assert set(first) == {"README.md", "pictures/kept_groups.png", ".eval_results/held_out_loss.yaml", "Notice"}
    assert verify(folder).manifest == release.manifest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_an_older_card_measured_does_not_outlive_it(release: Release) -> None:
    evaluation = {**_evaluation(release, pruned=6.5), "dataset": "org/held-out"}
    write_card(release.folder, _card(release, evaluation=evaluation))
    assert (release.folder / ".eval_results" / "held_out_loss.yaml").is_file()

    write_card(release.folder, _card(release))

    assert not (release.folder / ".eval_results" / "held_out_loss.yaml").exists()


def test_a_card_that_would_break_the_manifest_is_not_written(tmp_path: Path) -> None:
    from loram_hub.release import release_config, write_release

    plan = random_plan(tiny_architecture())
    made = open_metadata(save_metadata_release(tmp_path / "a", tiny_config(), plan, base_id=LLAMA))
    manifest = replace(made.manifest, files={})
    with write_release(tmp_path / "b", manifest=manifest, plan=plan, config=release_config(tiny_config())) as folder:
        (folder / "README.md").write_text("mine")

    with pytest.raises(InvalidRequestError, match=r"README\.md in its loram\.json"):
        write_card(tmp_path / "b", make_card(tmp_path / "b"))

    assert (tmp_path / "b" / "README.md").read_text() == "mine"


def test_texts_that_come_from_elsewhere_count_for_the_notice(release: Release) -> None:
    notice = licence_of(LLAMA).notice or ""

    assert "Notice" in make_card(release.folder).files
    assert "Notice" not in make_card(release.folder, documents={"NOTICE": notice}).files


# Strangers' text.

HOSTILE = st.one_of(
    st.sampled_from(ATTACKS), st.text(max_size=30), st.lists(st.sampled_from(ATTACKS), max_size=3).map("".join)
)


def _shape(text: str) -> tuple[list[str], list[str], int]:
    """What a renderer makes of a card: headings, links and pictures, and HTML tags."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(ModelCard(text).text)
    flat: list[Token] = [part for token in tokens for part in (token, *(token.children or []))]
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    links = [
        str(token.attrGet("href") or token.attrGet("src")) for token in flat if token.type in ("link_open", "image")
    ]
    return headings, links, sum(token.type.startswith("html") for token in flat)


def _visible(text: str) -> str:
    return text.replace("\n", "")


@settings(max_examples=100)
@given(
    method=HOSTILE, importance=HOSTILE, base=HOSTILE, commit=HOSTILE, name=HOSTILE, tool=HOSTILE, recipe=HOSTILE,
    corpus=HOSTILE,
)  # fmt: skip
def test_no_text_of_a_manifest_becomes_markup(
    tmp_path_factory: pytest.TempPathFactory,
    method: str, importance: str, base: str, commit: str, name: str, tool: str, recipe: str, corpus: str,
) -> None:  # fmt: skip
    folder = tmp_path_factory.getbasetemp() / "hostile"
    if not folder.exists():
        save_metadata_release(folder, tiny_config(), half_plan(tiny_architecture()), base_id="name")
    plain = open_metadata(folder)
    manifest = replace(
        plain.manifest,
        base=replace(plain.manifest.base, id=base, commit=commit, config_sha256=tool),
        pruning=replace(
            plain.manifest.pruning, method=method, importance=importance, calibration={name: tool, "dataset": corpus}
        ),
        alignment={
            "corpora": [corpus],
            name: importance,
            "refit": {name: tool},
            "held_out": [[0, {corpus: 1}], [1, {corpus: 2}]],
        },
        recipe={recipe: [recipe, method]},
        tools={tool: name},
        files={name: FileEntry(sha256=commit, size=1)},
    )
    with patch("loram_hub.cards.releases.kept_groups_picture", return_value=b""):  # it takes most of the time
        expected = _card(_with(plain, alignment={"tokens": 1, "refit": {}}, recipe={"x": 1}))
        card = _card(replace(plain, manifest=manifest))

    headings, links, html = _shape(card.text)
    own = _shape(expected.text)
    assert (headings, html) == (own[0], 0)
    assert set(links) <= set(own[1])
    assert "<script" not in card.text
    assert "$$" not in card.text
    assert all(char.isprintable() for char in _visible(card.text))
    assert len(card.text) < 60_000
    wanted = {"library_name": "loram-hub", "license": "llama3.1", "pipeline_tag": "text-generation",
              "tags": ["loram", "pruned", "arxiv:2502.13533"]}  # fmt: skip
    assert _metadata(card) == wanted
    assert ModelCard(card.text).data.to_dict() == wanted
    (shown,) = _code_blocks(card.text, "json") or ["null"]
    assert json.loads(shown) in (manifest.recipe, None)


@given(st.text() | st.text("`|<>$\\ \n\x1b\u202eab"))
def test_a_code_span_has_one_line_of_visible_characters_and_no_way_out(value: str) -> None:
    span = code(value)

    assert re.fullmatch(r"`[^`|<>$\\\n]+`", span)
    assert span.isprintable()
    assert len(span) <= MAX_TEXT + 2
    (paragraph,) = [t for t in MarkdownIt("commonmark", {"html": True}).parse(f"a {span} b") if t.type == "inline"]
    assert [child.type for child in paragraph.children or []] == ["text", "code_inline", "text"]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10))  # fmt: skip  # noqa: E501
def test_json_on_a_card_parses_back_to_the_values_and_cannot_close_its_block(value: object) -> None:
    block = json_block(value)

    assert block is not None
    (fence,) = [token for token in MarkdownIt().parse(block) if token.type == "fence"]
    assert json.loads(fence.content) == value
    assert len(MarkdownIt().parse(block)) == 1
    assert not set(fence.content) & set("`<>&$")


def test_plain_names_are_shown_as_they_are() -> None:
    assert code("taylor:param_first") == "`taylor:param_first`"
    assert visible("  a\tb \n c ") == "a b c"
    assert [is_hub_id(name) for name in ("org/name", "name", "a/b/c", None, "org/..x", "org/x--y", "ö/x")] == [
        True, False, False, False, False, False, False,
    ]  # fmt: skip


def test_a_template_that_forgets_to_escape_shows_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import ModelCardData

    from loram_hub.cards import rendering

    monkeypatch.setattr(rendering, "read_template", lambda name: "{{ value }} {{ value ~ value }} {{ number }}")

    text = rendering.render_card("x", ModelCardData(license="mit"), {"value": "<b>", "number": 3})

    assert text.endswith("`‹b›` `‹b›‹b›` 3\n")


def test_a_manifest_of_many_files_gives_a_card_of_bounded_length(release: Release) -> None:
    files: Mapping[str, FileEntry] = {f"f{number}": FileEntry(sha256="0" * 64, size=1) for number in range(5_000)}

    text = _card(_with(release, files=files)).text

    assert len(text) < 60_000
    assert "4801 more files are listed" in text


def test_the_picture_of_alignment_is_of_the_given_numbers() -> None:
    assert alignment_picture([(0, 5.0), (1, 4.0)]) == alignment_picture([(0, 5.0), (1, 4.0)])
    assert alignment_picture([(0, 5.0), (1, 4.0)]) != alignment_picture([(0, 5.0), (1, 4.5), (2, 4.0)])


def test_what_evaluate_returns_is_what_a_card_takes(release: Release) -> None:
    from loram_hub import evaluation

    row = evaluation.EvaluationRow(
        model="base + recovered adapter", loss=3.25, perplexity=25.8, parameters=9, memory_bytes=1, seconds=0.1
    )
    table = evaluation.EvaluationTable(rows=(row,), examples=2, tokens=10, cut_examples=0)

    assert "| base + recovered adapter | 3.2500 | 25.80 | 9 |" in _card(release, evaluation=table.to_dict()).text
    assert ROWS == evaluation.MODELS
