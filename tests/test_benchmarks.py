"""The benchmark scripts run and report what they say. Timings are not judged here: quick sizes prove nothing."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from builders import save_base, save_tokenizer, tiny_config
from pipeline_materials import some_texts

from loram_hub.finetuning import FinetuneRecipe
from loram_hub.pipeline import read_recipe
from loram_hub.recipes import read_file
from loram_hub.texts import Example

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "taylor_memory", "stream_memory", "prune_stream", "recover_70b", "load_release", "verify_speed", "align_step",
    "memory_simulation",
)  # fmt: skip

pytestmark = pytest.mark.slow


@cache
def quick(script: str) -> dict[str, Any]:
    """Run a benchmark in its quick size, once per session, and return its one line."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--quick"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        for each in value.values():
            yield from numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_line_says_what_was_measured_where_and_when(script: str) -> None:
    found = quick(script)

    assert set(found) == {"benchmark", "machine", "date", "versions", "quick", "figures", "target", "met"}
    assert found["benchmark"] == script
    assert found["quick"] is True
    assert isinstance(found["met"], bool)
    assert set(found["machine"]) == {"cpu", "cores", "memory_gib", "system"}
    assert {"python", "torch", "transformers", "safetensors"} <= set(found["versions"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_figures_are_positive_and_finite(script: str) -> None:
    figures = list(numbers(quick(script)["figures"]))

    assert len(figures) > 5
    assert all(math.isfinite(figure) and figure >= 0 for figure in figures)


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_of_this_machine_is_in_the_line(script: str) -> None:
    text = json.dumps(quick(script))

    assert str(ROOT) not in text
    assert tempfile.gettempdir() not in text


def test_streamed_scores_are_those_of_a_full_backward() -> None:
    figures = quick("taylor_memory")["figures"]

    assert figures["scores_compared"] > 100
    assert figures["scores_difference"] <= 1e-5


def test_peaks_of_taylor_are_those_of_processes_that_did_the_work() -> None:
    figures = quick("taylor_memory")["figures"]

    peaks = [run["peak_rss"] for kind in ("streamed", "full") for run in figures[kind].values()]
    assert len(peaks) == 2
    assert min(peaks) > figures["import_rss"] > 50e6  # torch alone is more


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_prune_keeps_the_planned_bytes(kind: str) -> None:
    figures = quick("prune_stream")["figures"]

    assert figures[kind]["kept_bytes"] == figures[kind]["expected_bytes"]
    assert figures[kind]["release_bytes"] > figures[kind]["kept_bytes"]  # by headers and code tables
    assert figures["base_bytes"] > figures["bf16"]["kept_bytes"]


def test_recovered_file_holds_the_trained_numbers_at_full_size() -> None:
    figures = quick("recover_70b")["figures"]

    assert figures["modules"] == 8 * 7
    assert figures["output_sound"] is True
    rows_and_columns = 8 * (2 * (96 + 1024) + 2 * (96 + 128) + 3 * (96 + 320))  # q and o, k and v, gate and up and down
    assert 0 < figures["output_bytes"] - 2 * 8 * rows_and_columns < 100_000  # bf16, r 8; the rest is the header


def test_compared_checkpoints_are_of_the_same_size() -> None:
    figures = quick("load_release")["figures"]

    assert figures["release_file_tensors"] == figures["stock_file_tensors"] > 300
    assert figures["bytes_ratio"] == pytest.approx(1, abs=0.02)
    assert figures["release"]["model_bytes"] == pytest.approx(figures["stock"]["model_bytes"], rel=0.02)


def test_every_benchmark_has_a_row_in_the_results() -> None:
    results = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")

    assert all(f"`{script}`" in results for script in SCRIPTS)


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return save_tokenizer(save_base(folder, tiny_config(intermediate_size=40)))


def test_sparse_losses_are_measured_once_for_each_method(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    benchmark = script("sparse_loss", monkeypatch)
    ids = torch.randint(4, 53, (4, 16), generator=torch.Generator().manual_seed(0))
    job = benchmark.Job(base=tiny, ids=ids, held_out=some_texts(2, words=20), work=tmp_path)

    found = benchmark.measure(job, {"2:4": {"pattern": "2:4"}})["2:4"]
    again = benchmark.measure(job, {"2:4": {"pattern": "2:4"}})["2:4"]

    assert list(found) == ["magnitude", "wanda", "sparsegpt"]
    assert len({row["loss"] for row in found.values()}) == 3
    assert len({row["kept_parameters"] for row in found.values()}) == 1
    assert again == found  # their seconds, too
    assert all(path.is_file() for path in tmp_path.iterdir())  # the releases are gone


def test_variants_differ_in_pruning_and_masking_alone(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = script("variants", monkeypatch)
    tasks = [Example(prompt=f"w{number}", completion=" w5") for number in range(4, 14)]
    monkeypatch.setattr(benchmark, "stdlib_texts", some_texts)  # the standard library takes seconds to read
    monkeypatch.setattr(benchmark, "stdlib_examples", lambda: (tasks, tasks))
    study = benchmark.Study(tmp_path, benchmark.QUICK, str(tiny))
    release = tmp_path / "release"
    release.mkdir()

    published = {name: read_recipe(study.publish_recipe(each, 1)) for name, each in benchmark.VARIANTS.items()}
    tuned = {
        name: read_file(FinetuneRecipe, study.finetune_recipe(name, each, release, 1))
        for name, each in benchmark.VARIANTS.items()
    }

    assert {name for name, recipe in published.items() if recipe.align is None} == {"plain"}
    assert len({recipe.align for name, recipe in published.items() if name != "plain"}) == 1
    assert len({recipe.seed for recipe in (*published.values(), *tuned.values())}) == 1
    assert len({recipe.data.train for recipe in tuned.values()}) == 1
    assert len({recipe.training for recipe in tuned.values()}) == 1
    assert {name for name, recipe in tuned.items() if recipe.lora.masked} == {"semi-masked", "unst-masked"}
    assert published["semi"] == published["semi-masked"]


def test_the_table_of_variants_has_means_and_differences_seed_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = script("variants", monkeypatch)

    def cell(variant: str, seed: int, loss: float) -> dict[str, Any]:
        losses = {"tasks": loss, "texts": loss + 1}
        return {
            "variant": variant, "seed": seed, "parameters": 76_100_000, "making_seconds": 60.0, "tuning_seconds": 30.0,
            "base": {"tasks": 4.0, "texts": 3.0}, "before": losses, "trained": losses, "recovered": losses,
        }  # fmt: skip

    losses = {("plain", 0): 3.0, ("plain", 1): 3.2, ("unst", 0): 3.25, ("unst", 1): 3.45, ("unst-masked", 0): 3.5}
    rows = benchmark.table([cell(*place, loss) for place, loss in losses.items()]).splitlines()

    assert "| base, not fine-tuned | | 76.1 M | | | 4.000 | |" in rows
    assert any(row.startswith("| Unst 55 %, plain LoRA | 2 | 76.1 M | 3.350 ± 0.141 |") for row in rows)
    assert any("**3.350 ± 0.141** | +0.250 ± 0.000 |" in row for row in rows)
    assert "| Unst | 1 | +0.250 | +0.250 | +0.250 | +0.250 |" in rows
