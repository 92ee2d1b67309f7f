"""Scripts and recipes of consume/ run as they stand, on a tiny model; test_notebooks.py runs the notebook.

tests/serving runs `serve_vllm.py` with a real vLLM.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from killed import bytes_of
from tiny_finetuning import save_tiny_release

from loram_hub.adapter import check_adapter
from loram_hub.finetuning import FinetuneRecipe, finetune
from loram_hub.recipes import read_file

CONSUME = Path(__file__).parents[1] / "consume"
SCRIPTS = ("finetune_lora.py", "recover_adapter.py", "serve_vllm.py")
NOTEBOOK = "finetune.ipynb"
RECIPES = tuple(f"finetune-{name}.yaml" for name in ("16gb", "20gb", "24gb", "smollm2-135m"))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_release(tmp_path_factory.mktemp("made") / "release")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with tasks."""
    tasks = [{"prompt": f"w{n % 40 + 4} w{n % 30 + 9}", "completion": f" w{n % 20 + 5}"} for n in range(12)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str | Path) -> None:
    """Run a script as `python SCRIPT ARGUMENTS` does, but for the imports, which are here already."""
    monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
    runpy.run_path(str(CONSUME / script), run_name="__main__")


def test_the_list_of_what_is_tested_here_is_complete() -> None:
    assert sorted(path.name for path in CONSUME.iterdir() if path.is_file()) == sorted(
        [*SCRIPTS, NOTEBOOK, *RECIPES, "README.md"]
    )
    named = set(re.findall(r"[\w-]+\.(?:py|ipynb|yaml)", (CONSUME / "README.md").read_text()))
    assert {*SCRIPTS, NOTEBOOK} <= named


def test_the_scripts_train_recover_and_give_the_command_that_serves(
    release: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (CONSUME / "finetune_lora.py").read_text()
    assert len(script.splitlines()) < 40
    run(
        monkeypatch, "finetune_lora.py", release, "tasks.jsonl", "by-script",
        "--steps", "2", "--batch", "2", "--accumulation", "1", "--tokens", "16",
    )  # fmt: skip
    command = "vllm serve release-base --enable-lora --max-lora-rank 8 --lora-modules tuned="
    assert f"{command}by-script" in capsys.readouterr().out
    assert check_adapter(here / "by-script").kind == "recovered adapter"

    run(monkeypatch, "recover_adapter.py", here / "by-script-checkpoints" / "checkpoint-2", "again")
    printed = capsys.readouterr().out
    assert bytes_of(here / "again") == bytes_of(here / "by-script")
    assert f"{command}again" in printed
    with pytest.raises(SystemExit, match="already exists and is not empty"):
        run(monkeypatch, "recover_adapter.py", here / "by-script-checkpoints" / "checkpoint-2", "again")

    run(monkeypatch, "serve_vllm.py", "again", "--dry-run")
    words = shlex.split(capsys.readouterr().out.strip())
    assert words[:3] == ["vllm", "serve", "release-base"]
    assert "tuned=again" in words
    with pytest.raises(SystemExit, match="does not fit the original one"):
        run(monkeypatch, "serve_vllm.py", here / "by-script-checkpoints" / "checkpoint-2", "--dry-run")


@pytest.mark.parametrize("size", ["16gb", "20gb", "24gb"])
def test_the_recipes_for_gpus_read(size: str) -> None:
    recipe = read_file(FinetuneRecipe, CONSUME / f"finetune-{size}.yaml")

    assert recipe.preset == size
    assert recipe.data.train


def test_the_recipe_for_a_cpu_runs(release: Path, here: Path) -> None:
    recipe = shutil.copy(CONSUME / "finetune-smollm2-135m.yaml", here)
    shutil.copytree(release, here / "smollm2-release")

    result = finetune(recipe, here / "task")

    assert result.steps == read_file(FinetuneRecipe, recipe).training.steps
    assert check_adapter(result.recovered).kind == "recovered adapter"
