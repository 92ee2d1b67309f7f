"""The benchmark scripts run and report what they say. Timings are not judged here: quick sizes prove nothing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

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
