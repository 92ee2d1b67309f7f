"""Studies: their grid, their controls, their cells against plain computations, and reruns."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from killed import run_killed
from peft import PeftModel
from pipeline_materials import save_texts, save_tiny_base, some_texts
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loram_hub.demo.arithmetic import arithmetic_examples
from loram_hub.errors import InvalidRequestError, TrainingError, VerificationError
from loram_hub.evaluation import HeldOutLoss
from loram_hub.finetuning import finetune
from loram_hub.recipes import section_from
from loram_hub.studies import Row, Study, cells_of, check_study, filling, making, read_rows, read_study, ready_studies
from loram_hub.studies.running import StudyResult, run_study
from loram_hub.studies.workers import Workers

TIMES = {"making_seconds", "tuning_seconds", "peak_memory_bytes"}


def tiny_study(folder: Path, **changes: Any) -> Study:
    """A study of two ratios, with and without alignment, of the tiny base in a folder."""
    values: dict[str, Any] = {
        "name": "tiny", "title": "Tiny", "question": "Does it run?", "mirrors": "nothing",
        "base": str(folder / "base"), "seeds": [3], "keep_first": 1, "keep_last": 2,
        "methods": [{"method": "stru", "ratios": [0.5]}],
        "calibration": {"source": str(folder / "texts.jsonl"), "samples": 2, "tokens": 16},
        "alignment": {
            "steps": [0, 2], "corpora": [{"source": str(folder / "texts.jsonl")}], "batch_size": 2,
            "micro_batch_size": 2, "sequence_length": 16, "precision": "fp32", "held_out": 2, "shuffle_window": 16,
        },
        "data": [{"name": "pairs", "train": [{"source": str(folder / "tasks.jsonl")}]}],
        "held_out": [
            {"name": "held-out pairs", "source": str(folder / "held_out.jsonl"), "of": "pairs", "max_tokens": 32},
            {"name": "texts", "source": str(folder / "texts.jsonl"), "limit": 2, "max_tokens": 32},
        ],
        "lora": {"dropout": 0.0},
        "training": {"steps": 3, "batch_size": 2, "micro_batch": 2, "max_tokens": 32, "learning_rate": 0.02},
    }  # fmt: skip
    return section_from(Study, values | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    save_tiny_base(folder / "base", dtype="float32")
    save_texts(folder / "texts.jsonl")
    for name, seed in (("tasks", 5), ("held_out", 6)):
        pairs = some_texts(12, seed=seed, words=8)
        lines = [{"prompt": text[: len(text) // 2], "completion": text[len(text) // 2 :]} for text in pairs]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def result(folder: Path, work: Path) -> StudyResult:
    return run_study(tiny_study(folder), work, keep_releases=True)


def plain_loss(model: torch.nn.Module, tokenizer: Any, file: Path) -> float:
    """Mean cross-entropy of completion and end-of-sequence tokens, one pair at a time, nothing batched."""
    total, count = 0.0, 0
    for line in file.read_text().splitlines():
        pair = json.loads(line)
        prompt = tokenizer(pair["prompt"])["input_ids"]
        ids = tokenizer(pair["prompt"] + pair["completion"])["input_ids"]
        start = next((idx for idx, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        ids = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        for position in range(start, len(ids)):
            total -= float(logits[position - 1].log_softmax(-1)[ids[position]])
            count += 1
    return total / count


def loss_of(rows: tuple[Row, ...] | list[Row], **wanted: Any) -> float:
    found = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    assert len(found) == 1, f"{len(found)} rows are {wanted}"
    return found[0].loss


@pytest.fixture(scope="module")
def base(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder / "base"), AutoTokenizer.from_pretrained(folder / "base")


def test_a_study_has_every_combination_and_its_controls_for_every_seed(folder: Path) -> None:
    study = tiny_study(
        folder, seeds=[1, 2], quantization=["none", "nf4"],
        methods=[{"method": "rand", "ratios": [0.25, 0.5]}, {"method": "semi", "masked": [False, True]}],
    )  # fmt: skip
    cells = cells_of(study)
    assert len(set(cells)) == len(cells)
    assert [cell.kind for cell in cells].count("base") == 1
    for seed in (1, 2):
        kinds = [cell.kind for cell in cells if cell.seed == seed]
        # 2 ratios x 2 alignments x 2 types, and 2 maskings x 2 alignments x 2 types
        assert (kinds.count("plain"), kinds.count("whole layers"), kinds.count("loram")) == (2, 2, 16)
    assert {cell.seed for cell in cells_of(study, [2]) if cell.kind != "base"} == {2}


@pytest.mark.parametrize("name", ["cost", "domains", "methods", "necessity", "ratios", "steps"])
def test_ready_made_studies_can_be_read_in_every_profile_and_say_what_they_ask(name: str) -> None:
    assert ready_studies()[name].endswith(".")
    full, quick = read_study(name), read_study(name, profile="quick")
    assert full.name == quick.name == name
    assert len(cells_of(quick)) <= len(cells_of(full)) + 2
    assert "?" in full.question
    assert {"plain", "whole layers", "base"} <= {cell.kind for cell in cells_of(full)}


def test_the_untouched_base_is_measured_as_plain_transformers_measures_it(
    result: StudyResult, base: tuple[Any, Any], folder: Path
) -> None:
    model, tokenizer = base
    found = loss_of(result.rows, kind="base", held_out="held-out pairs")
    assert found == pytest.approx(plain_loss(model, tokenizer, folder / "held_out.jsonl"), abs=1e-5)


@pytest.mark.parametrize(("kind", "steps"), [("plain", 0), ("whole layers", 0), ("loram", 0), ("loram", 2)])
def test_a_recovered_adapter_is_measured_as_plain_peft_measures_it(
    result: StudyResult, folder: Path, kind: str, steps: int
) -> None:
    row = next(row for row in result.rows if (row.kind, row.alignment_steps) == (kind, steps))
    adapter = result.folder / "runs" / row.cell / "recovered"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), str(adapter))
    expected = plain_loss(model, AutoTokenizer.from_pretrained(folder / "base"), folder / "held_out.jsonl")
    found = loss_of(result.rows, cell=row.cell, model="base + recovered adapter", held_out="held-out pairs")
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(found - loss_of(result.rows, kind="base", held_out="held-out pairs")) > 1e-3  # it was trained


def test_lora_on_the_whole_layers_touches_no_other(result: StudyResult) -> None:
    row = next(row for row in result.rows if row.kind == "whole layers")
    factors = load_file(result.folder / "runs" / row.cell / "recovered" / "adapter_model.safetensors")
    layers = {int(found[1]) for name in factors if (found := re.search(r"layers\.(\d+)\.", name))}
    assert layers == {0, 4, 5}  # of 6: keep_first 1, keep_last 2
    plain = next(row for row in result.rows if row.kind == "plain")
    everywhere = load_file(result.folder / "runs" / plain.cell / "recovered" / "adapter_model.safetensors")
    assert len(everywhere) == 2 * 7 * 6
    assert len(factors) == 2 * 7 * 3


def test_alignment_changes_the_pruned_model_and_only_it(result: StudyResult) -> None:
    before = loss_of(result.rows, kind="loram", alignment_steps=0, model="pruned", held_out="texts")
    after = loss_of(result.rows, kind="loram", alignment_steps=2, model="pruned", held_out="texts")
    assert before != after
    assert {row.parameters for row in result.rows if row.kind == "loram"} != {
        row.parameters for row in result.rows if row.kind == "base"
    }


def test_a_cell_says_all_that_it_takes_to_repeat_it(result: StudyResult) -> None:
    row = next(row for row in result.rows if row.alignment_steps == 2)
    record = json.loads((result.folder / "cells" / f"{row.cell}.json").read_text())
    assert {"torch", "transformers", "peft", "trl", "loram-hub"} <= record["versions"].keys()
    assert record["facts"]["seed"] == 3
    assert [stage["stage"] for stage in record["facts"]["release"]] == ["prune", "align"]
    assert len(record["training"]["history"]) >= 3
    assert record["alignment"]["held_out"]
    assert str(result.folder) not in json.dumps(record["facts"])


def test_a_second_run_does_nothing_and_another_study_takes_the_cells_that_it_shares(
    result: StudyResult, folder: Path, work: Path
) -> None:
    written = (work / "tiny" / "results.jsonl").read_bytes()
    again = run_study(tiny_study(folder), work, keep_releases=True)
    assert (again.made, again.missing) == (0, 0)
    assert (work / "tiny" / "results.jsonl").read_bytes() == written
    assert read_rows(work / "tiny") == list(result.rows)
    other = tiny_study(folder, name="other", methods=[{"method": "stru", "ratios": [0.5]}, {"method": "semi"}])
    missing = check_study(other, work).missing
    assert len(missing) == 2
    assert all(label.startswith("Semi 4:8") for label in missing)


def test_whatever_decides_over_a_cell_makes_another_one(folder: Path, work: Path, result: StudyResult) -> None:
    study = tiny_study(folder)
    finished = len(check_study(study, work).finished)
    assert finished == result.cells
    assert result.study == study  # not the one whose sources were found
    (folder / "other.jsonl").write_text((folder / "tasks.jsonl").read_text().replace("w4 ", "w5 "))
    changes: Mapping[str, Any] = {
        "data": [{"name": "pairs", "train": [{"source": str(folder / "other.jsonl")}]}],
        "training": asdict(study.training) | {"learning_rate": 0.01},
        "lora": asdict(study.lora) | {"r": 4, "masked": None},
    }
    for name, value in changes.items():
        assert len(check_study(tiny_study(folder, **{name: value}), work).finished) == 1, name  # the base alone
    assert len(check_study(replace(study, dtype="bfloat16"), work).finished) == 0


def test_releases_that_no_cell_needs_any_more_are_deleted_and_results_stay(folder: Path, tmp_path: Path) -> None:
    study = tiny_study(folder, alignment={"steps": [0]}, methods=[{"method": "rand", "ratios": [0.5]}])
    done = run_study(study, tmp_path)
    assert not [path for path in (tmp_path / "releases").glob("prune-*") if path.is_dir() and _is_pruned(path)]
    assert done.missing == 0
    assert run_study(study, tmp_path).made == 0


def test_cells_can_be_named_so_that_several_machines_share_a_study(
    result: StudyResult, folder: Path, work: Path, tmp_path: Path
) -> None:
    study = tiny_study(folder, seeds=[3, 4])
    assert check_study(study, work, only="WHOLE layers").missing == ("LoRA on the whole layers, pairs, seed 4",)
    assert len(check_study(study, work, only="seed 4").missing) == 4
    assert run_study(study, work, only="base untouched").made == 0
    with pytest.raises(InvalidRequestError, match=r"stru 0\.9.*Stru 0\.5, 2 alignment steps"):
        run_study(study, tmp_path, only="stru 0.9")


def _is_pruned(release: Path) -> bool:
    return json.loads((release / "loram.json").read_text())["pruning"]["pruning_ratio"] > 0


def test_a_study_that_is_killed_again_and_again_ends_with_the_same_losses(
    folder: Path, tmp_path: Path, result: StudyResult
) -> None:
    at_work = run_killed(
        "import sys; sys.path.insert(0, tests)\n"
        "from test_studies import tiny_study\nfrom loram_hub.studies.running import run_study",
        "run_study(tiny_study(Path(folder)), Path(out))",
        kills=3,
        out=str(tmp_path / "killed"),
        folder=str(folder),
        tests=str(Path(__file__).parent),
    )
    assert at_work >= 2
    names = [field.name for field in fields(Row) if field.name not in {*TIMES, "threads"}]
    undisturbed = [[getattr(row, name) for name in names] for row in read_rows(tmp_path / "killed-timed" / "tiny")]
    assert [[getattr(row, name) for name in names] for row in read_rows(tmp_path / "killed" / "tiny")] == undisturbed
    assert len(undisturbed) == len(result.rows)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "twice"),
        ({"name": "../out"}, "name"),
        ({"methods": [{"method": "semi", "ratios": [0.5]}]}, "no ratios"),
        ({"methods": [{"method": "stru"}]}, "at least one ratio"),
        ({"methods": [{"method": "rand", "ratios": [0.5], "masked": [True]}]}, "nothing to mask"),
        ({"methods": [{"method": "rand", "ratios": [1.5]}]}, "1.5"),
        ({"calibration": None}, "calibration is missing"),
        ({"alignment": {"steps": [5]}}, "corpora is missing"),
        ({"lora": {"masked": True}}, "axis"),
    ],
)
def test_a_study_that_cannot_be_is_refused(folder: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        tiny_study(folder, **changes)


def test_unknown_names_are_refused_with_those_that_there_are(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="necessity"):
        read_study("no-such-study")
    with pytest.raises(InvalidRequestError, match="quick"):
        read_study("necessity", profile="huge")
    with pytest.raises(InvalidRequestError, match=r"seeds \[3\]"):
        run_study(tiny_study(folder), tmp_path, seeds=[4])
    held_out = [{"name": "x", "source": "demo:nothing"}]
    with pytest.raises(InvalidRequestError, match="demo:texts"):
        check_study(tiny_study(folder, held_out=held_out), tmp_path)


def test_a_profile_outweighs_the_study_key_by_key(tmp_path: Path, folder: Path) -> None:
    text = json.dumps(
        {
            "name": "profiled", "title": "t", "question": "q", "mirrors": "m", "base": str(folder / "base"),
            "methods": [{"method": "rand", "ratios": [0.5]}], "training": {"steps": 40, "max_tokens": 99},
            "data": [{"name": "d", "train": [{"source": str(folder / "tasks.jsonl")}]}],
            "held_out": [{"name": "h", "source": str(folder / "held_out.jsonl")}],
            "profiles": {"short": {"training": {"steps": 4}, "seeds": [7]}, "wrong": {"training": {"stepz": 4}}},
        },
        indent=1,
    )  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(text)
    assert read_study(path).training.steps == 40
    short = read_study(path, profile="short")
    assert (short.training.steps, short.training.max_tokens, short.seeds) == (4, 99, (7,))
    line = next(number for number, line in enumerate(text.splitlines(), start=1) if "stepz" in line)
    with pytest.raises(InvalidRequestError, match=rf"line {line}: 'training.stepz'"):
        read_study(path, profile="wrong")


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.pop("loss"),
        lambda row: row.update(extra=1),
        lambda row: row.update(loss="low"),
        lambda row: row.update(seed=True),
        lambda row: row.update(kind="best"),
        lambda row: row.update(tokens=None),
    ],
)
def test_a_results_file_that_was_altered_is_refused_with_its_line(
    result: StudyResult, tmp_path: Path, change: Any
) -> None:
    rows = [row.to_dict() for row in result.rows[:3]]
    change(rows[1])
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(VerificationError, match="line 2"):
        read_rows(path)


def test_arithmetic_problems_are_right_and_held_out_ones_are_about_other_things() -> None:
    train, held_out = arithmetic_examples(300, 100)
    for example in (*train, *held_out):
        *working, last = re.findall(r"(\d+ [-+*/] \d+) = (\d+)", example.completion)
        assert all(eval(sum_) == int(shown) for sum_, shown in (*working, last))
        assert example.completion.endswith(f"The answer is {last[1]}.")
    words = [{word for example in part for word in example.prompt.split()} for part in (train, held_out)]
    assert {"shells", "tickets"} <= words[1]
    assert not {"shells", "tickets"} & words[0]
    assert arithmetic_examples(300, 100) == (train, held_out)


def test_the_base_is_known_by_its_config_and_tokenizer_too(folder: Path, tmp_path: Path, result: StudyResult) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    study = tiny_study(folder, base=str(tmp_path / "base"))
    assert check_study(study, result.folder).missing == ()
    for name, old, new in (
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'),
        ("chat.jinja", "", "{{ x }}"),
    ):
        file = tmp_path / "base" / name
        text = file.read_text() if file.exists() else ""
        assert old in text
        file.write_text(text.replace(old, new) if old else new)
        assert check_study(study, result.folder).finished == (), name
        file.write_text(text) if text else file.unlink()


def test_a_file_that_changes_while_the_study_runs_stops_it_and_leaves_no_cell(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text((folder / "held_out.jsonl").read_text())
    study = tiny_study(folder, held_out=[{"name": "pairs", "source": str(held_out), "of": "pairs", "max_tokens": 32}])

    def finetune_and_edit(*args: Any) -> Any:
        held_out.write_text(held_out.read_text().replace("w4", "w5"))
        return finetune(*args)

    monkeypatch.setattr(filling, "finetune", finetune_and_edit)
    with pytest.raises(VerificationError, match=r"held_out\.jsonl was changed"):
        run_study(study, tmp_path / "work", only="plain LoRA")
    assert not list((tmp_path / "work" / "cells").glob("*.json"))


def test_times_of_a_run_that_went_on_are_unknown(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_study(folder, alignment={"steps": [0]}, methods=[{"method": "rand", "ratios": [0.5]}])
    with monkeypatch.context() as patched:
        patched.setattr(filling, "pruned_losses", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_study(study, tmp_path, only="rand 0.5")
    for note in (tmp_path / "releases").glob("prune-*.json"):
        note.write_text("torn")
    row = next(row for row in run_study(study, tmp_path, only="rand 0.5").rows if row.kind == "loram")
    assert (row.making_seconds, row.tuning_seconds, row.peak_memory_bytes) == (None, None, None)


def _interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_a_kill_while_releases_are_deleted_leaves_none_that_looks_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"alignment": {"steps": [0]}, "methods": [{"method": "rand", "ratios": [0.5]}]}
    with monkeypatch.context() as patched:
        patched.setattr(making.shutil, "rmtree", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_study(tiny_study(folder, **changes), tmp_path, only="rand 0.5")
    assert not [path for path in (tmp_path / "releases").glob("prune-*") if path.is_dir()]
    longer = tiny_study(folder, **changes, training={"steps": 4, "batch_size": 2, "max_tokens": 32})
    assert run_study(longer, tmp_path, only="rand 0.5").made == 1
    assert not list((tmp_path / "releases").glob(".deleted-*"))


def test_releases_stay_while_another_process_may_be_using_them(folder: Path, tmp_path: Path) -> None:
    study = tiny_study(folder, alignment={"steps": [0]}, methods=[{"method": "rand", "ratios": [0.5]}])
    with Workers(tmp_path).registered():
        with Workers(tmp_path).alone() as alone:
            assert not alone
        run_study(study, tmp_path, only="rand 0.5")
        assert [path for path in (tmp_path / "releases").glob("prune-*") if path.is_dir()]
    with Workers(tmp_path).alone() as alone:
        assert alone


def test_a_cell_that_another_process_is_at_is_left_to_it_until_the_end(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, result: StudyResult
) -> None:
    caplog.set_level("INFO", logger="loram_hub.studies")
    base = next(row.cell for row in result.rows if row.kind == "base")
    (tmp_path / "cells").mkdir()
    lock = FileLock(tmp_path / "cells" / f"{base}.lock", thread_local=False)
    lock.acquire()
    timer = threading.Timer(1.0, lock.release)
    timer.start()
    done = run_study(tiny_study(folder, methods=[{"method": "rand", "ratios": [0.5]}], alignment={}), tmp_path)
    timer.join()
    labels = [record.args[2] for record in caplog.records if record.msg.startswith("cell %d") and record.args]
    assert len(labels) == done.cells == 4
    assert labels[-1] == "base untouched"


def test_a_loss_that_is_no_number_leaves_its_cell_out_and_runs_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = filling.base_losses

    def without_base(*args: Any, adapter: Path | None, **rest: Any) -> dict[str, HeldOutLoss]:
        found = measured(*args, adapter=adapter, **rest)
        return found if adapter else {name: replace(one, loss=float("nan")) for name, one in found.items()}

    monkeypatch.setattr(filling, "base_losses", without_base)
    study = tiny_study(folder, alignment={"steps": [0]}, methods=[{"method": "rand", "ratios": [0.5]}])
    with pytest.raises(TrainingError, match=r"1 of 4 cells gave no finite loss.*base untouched"):
        run_study(study, tmp_path)
    assert {row.kind for row in read_rows(tmp_path / "tiny")} == {"plain", "whole layers", "loram"}


def test_what_can_never_run_is_refused_before_the_controls_are(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="leave none of the 6 layers"):
        run_study(tiny_study(folder, keep_first=5), tmp_path)
    held_out = [{"name": "pairs", "source": str(folder / "tasks.jsonl"), "of": "pairs"}]
    with pytest.raises(InvalidRequestError, match="which is trained on"):
        run_study(tiny_study(folder, held_out=held_out), tmp_path)
    assert not (tmp_path / "cells").exists()
