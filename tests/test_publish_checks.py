"""What a dry run finds before hours of work: lost files, tags that sit elsewhere, settings that fail late, disks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from pipeline_materials import save_texts, save_tiny_base, tiny_recipe

from loram_hub.architecture import architecture_of
from loram_hub.checkpoint import read_config
from loram_hub.errors import InvalidRequestError
from loram_hub.hub.publishing import RemoteRepository
from loram_hub.pipeline import Preview, Recipe, check_publish, publish, recipe_from
from loram_hub.pipeline import checks as pipeline_checks
from loram_hub.pipeline.assessment import assess
from loram_hub.pipeline.checks import find_problems
from loram_hub.pipeline.preview import stage_costs
from loram_hub.pipeline.publishing import _job
from loram_hub.pipeline.stages import stages_of
from loram_hub.pipeline.workspace import Workspace, folder_bytes


def recipe_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe without what takes time and is of no interest here."""
    recipe = tiny_recipe(folder)
    del recipe["evaluate"]
    recipe["prune"]["importance"] = "random"
    recipe["align"] |= {"steps": 2, "held_out": 1} | changes
    return recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checks")
    save_tiny_base(folder / "base", max_position_embeddings=64)
    save_texts(folder / "texts.jsonl")
    publish(recipe_from(recipe_of(folder)), work_dir=folder / "work")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "work", tmp_path / "work")
    for name in ("base", "texts.jsonl"):
        os.symlink(made / name, tmp_path / name)
    return tmp_path


def dry_run(place: Path, recipe: dict[str, Any], *, work: str = "work", until: str | None = None) -> Preview:
    return check_publish(recipe_from(recipe), work_dir=place / work, until=until)


def test_an_edited_card_is_kept_by_a_run_that_ends_before_it(place: Path) -> None:
    card = place / "work" / "quantized" / "README.md"
    card.write_text(card.read_text() + "\nMade with care.\n")
    changed = recipe_of(place, learning_rate=1e-3)

    assert dry_run(place, changed, until="align").problems == ()
    with pytest.raises(InvalidRequestError, match=r"README.md was edited.*Keep a copy"):
        publish(recipe_from(changed), work_dir=place / "work", until="quantize")

    assert "Made with care." in card.read_text()


def test_a_file_of_somebody_else_in_an_output_folder_is_named_instead_of_deleted(place: Path) -> None:
    notes = place / "work" / "aligned" / "NOTES.py"
    notes.write_text("mine")

    for recipe in (recipe_of(place), recipe_of(place, learning_rate=1e-3)):
        with pytest.raises(InvalidRequestError, match=r"aligned holds NOTES\.py.*Move it out"):
            publish(recipe_from(recipe), work_dir=place / "work")
    assert notes.read_text() == "mine"

    notes.unlink()
    assert not [
        stage.name for stage in publish(recipe_from(recipe_of(place)), work_dir=place / "work").stages if stage.made
    ]


def test_an_edited_card_in_a_folder_that_is_no_longer_the_last_is_kept(made: Path, tmp_path: Path) -> None:
    whole = recipe_of(made)
    del whole["quantize"]
    publish(recipe_from(whole), work_dir=tmp_path / "work")
    card = tmp_path / "work" / "aligned" / "README.md"
    card.write_text(card.read_text() + "\nMade with care.\n")

    assert dry_run(tmp_path, recipe_of(made)).problems == ()  # aligned stays
    (problem,) = dry_run(tmp_path, recipe_of(made, learning_rate=1e-3)).problems
    assert "aligned holds README.md, which no stage has put there, or which was edited since" in problem


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("align", {"report_to": ["wandbx"]}, "Tracker 'wandbx' is unknown"),
        ("align", {"optimizer": "adamw_8bit"}, "Optimizer 'adamw_8bit' runs on CUDA"),
        ("align", {"sequence_length": 65}, "align.sequence_length is 65; the model has positions for 64 tokens"),
        ("align", {"processes": 2}, "align.processes is 2, and hardware.count is 1"),
        ("teach", {"k": 1000}, "teach.k is 1000, and the vocabulary of base has 53 tokens"),
        ("evaluate", {"data": "texts.jsonl", "max_tokens": 1}, "max_tokens is 1; at least"),
        ("evaluate", {"data": "damaged.jsonl"}, "damaged.jsonl"),
    ],
)
def test_what_would_fail_late_is_found_by_a_dry_run(
    place: Path, section: str, changes: dict[str, Any], message: str
) -> None:
    texts = (place / "texts.jsonl").read_text().splitlines()
    (place / "damaged.jsonl").write_text("\n".join([*texts[:150], '{"text": "w5', *texts[150:]]))
    recipe = recipe_of(place) | {"hardware": {"gpu": "none", "memory_gib": 8, "tflops": 1}}
    changes = changes | ({"data": str(place / changes["data"])} if "data" in changes else {})
    recipe[section] = recipe.get(section, {}) | changes
    if section == "teach":
        recipe["align"]["distillation"] = 0.5

    problems = dry_run(place, recipe, work="new").problems

    assert [problem for problem in problems if message in problem], problems


def test_more_processes_than_gpus_are_refused_unless_a_launcher_reaches_others(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_checks, "check_device", lambda _: None)  # as if there was a GPU
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    recipe = recipe_of(place, processes=2) | {"device": "cuda"}

    assert any("this machine has 1 GPUs" in problem for problem in dry_run(place, recipe, work="new").problems)
    recipe["align"]["launcher"] = ["env"]
    assert dry_run(place, recipe, work="new").problems == ()


def test_gpus_that_align_leaves_idle_are_noted(place: Path) -> None:
    recipe = recipe_of(place) | {"hardware": {"gpu": "H100", "count": 8, "memory_gib": 80, "tflops": 989}}

    assert "align.processes is 1, and hardware.count is 8: 7 GPUs idle in align." in dry_run(place, recipe).notes


def test_a_tag_on_another_release_stops_a_run_that_makes_a_new_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is a stand-in: its answers are tested with the pushes."""
    there = RemoteRepository(
        commit="a" * 40, private=False, gated=False, files={}, licence="mit", tags={"v1": "b" * 40}
    )
    monkeypatch.setattr(pipeline_checks, "why_not_writable", lambda *_, **__: None)
    monkeypatch.setattr(pipeline_checks, "look_up", lambda *_, **__: there)
    monkeypatch.setattr(pipeline_checks, "refuse_to_replace_edits_on_hub", lambda _: None)
    recipe = recipe_of(place) | {"push": {"tag": "v1"}}

    same = dry_run(place, recipe)
    assert same.problems == ()
    assert any(f"v1 of org/Tiny-LoRAM is on commit {'b' * 12}; the push stops if" in note for note in same.notes)
    shutil.rmtree(place / "work" / "pruned")  # comes out as it was
    assert dry_run(place, recipe).problems == ()
    recipe["align"]["learning_rate"] = 1e-3
    (problem,) = dry_run(place, recipe).problems
    assert "this release will be another one (align:" in problem
    recipe["push"]["tag"] = "v2"
    assert dry_run(place, recipe).problems == ()


def is_refused(
    place: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, *, free: int, keep_intermediate: bool = True
) -> bool:
    """Return whether a run is stopped on a disk with so much room."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, free))
    job = _job(recipe, Workspace(place / "work"), None)
    assessed = assess(stages_of(job), job.materials.digests, job.work, ignore_versions=False)
    rows = check_publish(recipe, work_dir=place / "work").rows
    found = find_problems(job, assessed, rows, keep_intermediate=keep_intermediate)
    return any("GB more are needed" in str(problem) for problem in found.problems)


def test_room_is_asked_only_for_what_is_not_there_yet(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_from(recipe_of(place, learning_rate=1e-3))
    costs = stage_costs(recipe, architecture_of(read_config(place / "base")))
    align, run_folder = costs["align"], place / "work" / "aligned-run"
    assert align.scratch_bytes > costs["quantize"].output_bytes

    for half in (0, 1000):
        (run_folder / "half").write_bytes(bytes(half))
        needed = align.output_bytes + align.scratch_bytes - folder_bytes(run_folder)
        needed -= folder_bytes(place / "work" / "aligned")  # which is replaced; and pruned stays
        assert is_refused(place, recipe, monkeypatch, free=needed - 1)
        assert not is_refused(place, recipe, monkeypatch, free=needed)


def test_outputs_that_will_be_deleted_make_room(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = recipe_of(made) | {"refit": {}}
    del values["align"]
    recipe = recipe_from(values)
    costs = stage_costs(recipe, architecture_of(read_config(made / "base")))
    two = costs["prune"].output_bytes + costs["refit"].output_bytes

    assert not is_refused(tmp_path, recipe, monkeypatch, free=two, keep_intermediate=False)
    assert is_refused(tmp_path, recipe, monkeypatch, free=two - 1, keep_intermediate=False)
    assert is_refused(tmp_path, recipe, monkeypatch, free=two)
    assert not is_refused(tmp_path, recipe, monkeypatch, free=two + costs["quantize"].output_bytes)
