"""Everything in consume/ runs as it stands, on a tiny model. tests/serving runs `serve_vllm.py` with a real vLLM."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from killed import bytes_of
from tiny_finetuning import save_tiny_release

from loram_hub.adapter import check_adapter
from loram_hub.finetuning import FinetuneRecipe, finetune, latest_checkpoint
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


def run_notebook(parameters: Mapping[str, Any]) -> None:
    """Run the code cells of the notebook in their order, with other parameters."""
    cells = json.loads((CONSUME / NOTEBOOK).read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 4
    assert "parameters" in code[0]["metadata"]["tags"]
    scope: dict[str, Any] = {}
    exec("".join(code[0]["source"]), scope)
    assert parameters.keys() <= scope.keys()
    scope |= parameters
    for number, cell in enumerate(code[1:], start=1):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK}, code cell {number}", "exec"), scope)


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


def test_the_notebook_trains_seals_recovers_and_goes_on_where_it_was(
    release: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {
        "RELEASE": str(release), "STEPS": 4, "BATCH": 2, "ACCUMULATION": 1, "TOKENS": 16, "SAVE_EVERY": 2,
    }  # fmt: skip

    run_notebook(parameters)
    first = bytes_of(here / "my-task" / "recovered")
    run_notebook(parameters)  # all is done: it trains no more

    assert "vllm serve release-base --enable-lora --max-lora-rank 8" in capsys.readouterr().out
    assert bytes_of(here / "my-task" / "recovered") == first == bytes_of(here / "my-task" / "checkpoints/recovered-4")
    last = latest_checkpoint(here / "my-task" / "checkpoints")
    assert last is not None
    assert (last.step, last.has_stopped) == (4, True)


def test_the_notebook_holds_no_output_of_anybody() -> None:
    notebook = json.loads((CONSUME / NOTEBOOK).read_text())
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


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
