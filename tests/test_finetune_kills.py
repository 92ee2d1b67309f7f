"""A fine-tuning run that is killed again and again ends, byte for byte, with the adapter of an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed_finetuning
import pytest

ROOT = Path(__file__).parents[1]
KILLS = 30


@pytest.fixture(scope="module")
def saw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `killed_finetuning` saw, whose one process imports everything for all runs."""
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    settings = {
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator: no second thread
        "TORCHDYNAMO_DISABLE": "1",  # bitsandbytes would have each child compile kernels for CPUs
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }

    done = subprocess.run(
        [sys.executable, killed_finetuning.__file__, tmp_path_factory.mktemp("killed"), str(KILLS)],
        env={**os.environ, **one_thread, **settings}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_run_that_is_killed_at_any_instant_ends_with_the_adapter_of_an_undisturbed_one(
    saw: dict[str, Any], figure: Callable[[str], None]
) -> None:
    assert saw["kills"] + saw["masked_kills"] == KILLS
    assert saw["masked_kills"] >= 5
    assert saw["runs"] >= 3
    assert saw["states"] > 50
    assert saw["steps"] == [2, 4, 6, 7]  # each checkpoint was the newest whole one at some instant
    assert saw["two_ranks"] == [1, -9]
    assert saw["two_resumed_from"] in (2, 4, 6)
    assert saw["command_states"] > 50
    assert saw["command_runs"] > 10
    figure(
        f"fine-tuning: {saw['kills']} kills of stock trainers at random instants in {saw['runs']} runs, "
        f"{saw['masked_kills']} of masked `loram finetune` in {saw['masked_runs']}, and a look at {saw['states']} "
        "states between changes of files, 0 torn checkpoints taken, all runs ended with the undisturbed run's bytes; "
        f"the command, killed before {saw['command_states']} changes, run again from {saw['command_runs']} of these"
    )


def test_an_error_in_two_processes_is_told_once(saw: dict[str, Any]) -> None:
    failed = saw["failed"]

    assert failed["codes"] == [3, 3]
    first, second = failed["stdout"]
    assert "has no sha256 of its own" in json.loads(first)["error"]["message"]
    assert second == ""
    assert "Connection closed by peer" not in "".join(failed["stderr"])
