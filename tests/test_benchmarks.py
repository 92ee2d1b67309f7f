"""The benchmark scripts run and report what they say. Timings are not judged here: quick sizes prove nothing."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from builders import save_base, save_tokenizer, tiny_config
from forked_benchmarks import Ended, ForkedBenchmarks
from pipeline_materials import some_texts

from loram_hub.finetuning import FinetuneRecipe
from loram_hub.pipeline import read_recipe
from loram_hub.recipes import read_file
from loram_hub.texts import Example

ROOT = Path(__file__).resolve().parents[1]
HELPERS = ("measuring", "synthetic", "simulated_training")
"""What the scripts import."""
APART = (
    "alignment_ablation", "variants", "scale_gain",  # studies of hours, which fill a folder with cells
    "stock_loaders",  # prints a table
    "memory_options", "sparse_loss",  # even in their quick sizes on the demo's model, which has to be converted first
)  # fmt: skip
SCRIPTS = tuple(sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in (*HELPERS, *APART)))
"""All the others."""
AS_A_USER = "recover_70b"
"""The script that runs as users run it, every action in an interpreter of its own; for the rest see the forks."""
LINE = {"benchmark", "machine", "date", "versions", "quick", "figures", "target", "met"}

Quick = Callable[[str], dict[str, Any]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quick() -> Iterator[Quick]:
    """Run a benchmark in its quick size, once, and return its one line."""
    with ForkedBenchmarks() as forks:

        @cache
        def run(script: str) -> dict[str, Any]:
            ended = _run_as_a_user(script) if script == AS_A_USER else forks.run(script)
            assert ended.status == 0, ended.errors
            (line,) = ended.output.splitlines()
            found: dict[str, Any] = json.loads(line)
            return found

        yield run


def _run_as_a_user(script: str) -> Ended:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--quick"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Ended(status=done.returncode, output=done.stdout, errors=done.stderr)


def numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        for each in value.values():
            yield from numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_line_says_what_was_measured_where_and_when(quick: Quick, script: str) -> None:
    found = quick(script)

    assert set(found) == LINE
    assert found["benchmark"] == script
    assert found["quick"] is True
    assert isinstance(found["met"], bool)
    assert set(found["machine"]) == {"cpu", "cores", "memory_gib", "system"}
    assert {"python", "torch", "transformers", "safetensors"} <= set(found["versions"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_figures_are_positive_and_finite(quick: Quick, script: str) -> None:
    figures = list(numbers(quick(script)["figures"]))

    assert len(figures) > 5
    assert all(math.isfinite(figure) and figure >= 0 for figure in figures)


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_of_this_machine_is_in_the_line(quick: Quick, script: str) -> None:
    text = json.dumps(quick(script))

    assert str(ROOT) not in text
    assert tempfile.gettempdir() not in text


def test_streamed_scores_are_those_of_a_full_backward(quick: Quick) -> None:
    figures = quick("taylor_memory")["figures"]

    assert figures["scores_compared"] > 100
    assert figures["scores_difference"] <= 1e-5


def test_peaks_of_taylor_are_those_of_processes_that_did_the_work(quick: Quick) -> None:
    figures = quick("taylor_memory")["figures"]

    peaks = [run["peak_rss"] for kind in ("streamed", "full") for run in figures[kind].values()]
    assert len(peaks) == 2
    assert min(peaks) > figures["import_rss"] > 50e6  # torch alone is more


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_prune_keeps_the_planned_bytes(quick: Quick, kind: str) -> None:
    figures = quick("prune_stream")["figures"]

    assert figures[kind]["kept_bytes"] == figures[kind]["expected_bytes"]
    assert figures[kind]["release_bytes"] > figures[kind]["kept_bytes"]  # by headers and code tables
    assert figures["base_bytes"] > figures["bf16"]["kept_bytes"]


def test_recovered_file_holds_the_trained_numbers_at_full_size(quick: Quick) -> None:
    figures = quick("recover_70b")["figures"]

    assert figures["modules"] == 8 * 7
    assert figures["output_sound"] is True
    rows_and_columns = 8 * (2 * (96 + 1024) + 2 * (96 + 128) + 3 * (96 + 320))  # q and o, k and v, gate and up and down
    assert 0 < figures["output_bytes"] - 2 * 8 * rows_and_columns < 100_000  # bf16, r 8; the rest is the header


def test_compared_checkpoints_are_of_the_same_size(quick: Quick) -> None:
    figures = quick("load_release")["figures"]

    assert figures["release_file_tensors"] == figures["stock_file_tensors"] > 300
    assert figures["bytes_ratio"] == pytest.approx(1, abs=0.02)
    assert figures["release"]["model_bytes"] == pytest.approx(figures["stock"]["model_bytes"], rel=0.02)


def test_masked_and_plain_steps_are_compared_in_time_and_memory(quick: Quick) -> None:
    figures = quick("masked_step")["figures"]

    assert figures["time_ratio"] == max(cell["time_ratio"] for cell in figures["cells"])
    assert figures["memory_ratio"] == max(cell["memory_ratio"] for cell in figures["cells"])


def test_streamed_sparsegpt_chooses_the_weights_of_the_plain_one(quick: Quick) -> None:
    figures = quick("sparsify_layer")["figures"]

    assert {row["agreeing_mask_entries"] for row in figures["layer_seconds"].values()} == {1.0}


def test_every_benchmark_has_a_row_in_the_results() -> None:
    results = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")

    assert [script for script in SCRIPTS if f"`{script}`" not in results] == []


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return save_tokenizer(save_base(folder, tiny_config(intermediate_size=40, head_dim=8)))


def test_sparse_losses_are_measured_once_for_each_method(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    benchmark = script("sparse_loss", monkeypatch)
    ids = torch.randint(4, 53, (4, 16), generator=torch.Generator().manual_seed(0))
    job = benchmark.Job(base=tiny, ids=ids, held_out=some_texts(2, words=20), work=tmp_path)

    found = benchmark.measure(job, {"2:4": {"pattern": "2:4"}})["2:4"]
    again = benchmark.measure(job, {"2:4": {"pattern": "2:4"}})["2:4"]
    other = benchmark.measure(replace(job, ids=ids.flip(0)), {"2:4": {"pattern": "2:4"}})["2:4"]

    assert list(found) == ["magnitude", "wanda", "sparsegpt"]
    assert len({row["loss"] for row in found.values()}) == 3
    assert len({row["kept_parameters"] for row in found.values()}) == 1
    assert again == found  # their seconds, too
    assert other["sparsegpt"]["loss"] != found["sparsegpt"]["loss"]
    assert len(list(tmp_path.iterdir())) == 6
    assert all(path.is_file() for path in tmp_path.iterdir())  # the releases are gone


def test_sparse_losses_are_told_in_one_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from loram_hub.demo import base_model, corpus

    monkeypatch.setattr(base_model, "base_model", lambda: tiny)
    monkeypatch.setattr(corpus, "stdlib_texts", lambda: some_texts(30, words=20))
    monkeypatch.setattr(sys, "argv", ["sparse_loss.py", "--quick"])

    script("sparse_loss", monkeypatch).main()

    found = json.loads(capsys.readouterr().out)
    assert set(found) == LINE
    assert list(found["figures"]["densities"]) == ["4:8"]
    assert all(math.isfinite(figure) and figure > 0 for figure in numbers(found["figures"]["densities"]))


@pytest.mark.parametrize("fact", ["budget", "base_sha256", "data_sha256"])
def test_variants_of_one_folder_have_one_base_budget_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fact: str
) -> None:
    benchmark = script("variants", monkeypatch)
    facts = {"budget": {"steps": 12}, "base_sha256": {"model.safetensors": "a"}, "data_sha256": "b"}
    benchmark.keep_to_one_study(tmp_path, facts)
    (tmp_path / "cell-0-plain.json").write_text("{}")

    benchmark.keep_to_one_study(tmp_path, facts)
    with pytest.raises(SystemExit, match=f"of another study: {fact} differ"):
        benchmark.keep_to_one_study(tmp_path, {**facts, fact: "other"})
    (tmp_path / "study.json").unlink()
    with pytest.raises(SystemExit, match="of which study is unknown"):
        benchmark.keep_to_one_study(tmp_path, facts)


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


def test_the_picture_of_variants_has_a_row_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = script("variants", monkeypatch)
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    losses = {"tasks": 3.0, "texts": 2.0}
    shared = dict.fromkeys(("base", "before", "trained", "recovered"), losses)

    benchmark.draw([{"variant": name, **shared} for name in benchmark.VARIANTS], tmp_path / "variants.png")

    labels = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert labels == [each.label for each in benchmark.VARIANTS.values()]


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
