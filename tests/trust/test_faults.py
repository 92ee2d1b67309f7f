"""Every request of a push and of a pull goes wrong in turn: readers see all or nothing, and everything ends whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from builders import save_base, save_tokenizer, tiny_config

from loram_hub.pruning import prune

DRIVER = Path(__file__).with_name("faults.py")
ROOT = DRIVER.parents[2]
SHARDS = 2
AT_ONCE = 14
"""The cases mostly wait: for a client that pauses before it tries again."""
PUSHES = [("push", transfer, fault) for transfer in ("lfs", "xet") for fault in ("closed", "lost")]
PULLS = [
    ("pull", transfer, fault) for transfer in ("lfs", "xet") for fault in ("closed", "reset", "cut", "busy", "corrupt")
]

Case = tuple[str, str, str]
Results = Callable[[Case], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    folder = tmp_path_factory.mktemp("faults")
    base = save_tokenizer(save_base(folder / "base", tiny_config(layers=3), dtype="bfloat16"))
    release = prune(base, folder / "release", importance="random", keep_first=1, keep_last=1).folder

    def sweep(case: Case, shard: int) -> list[dict[str, Any]]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        command = [sys.executable, str(DRIVER), *case, str(release), str(shard), str(SHARDS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        running: dict[Case, list[Future[list[dict[str, Any]]]]] = {
            case: [pool.submit(sweep, case, shard) for shard in range(SHARDS)] for case in [*PUSHES, *PULLS]
        }
        yield lambda case: sorted(
            (found for future in running[case] for found in future.result()), key=lambda found: found["request"]
        )


@pytest.mark.parametrize("case", PUSHES, ids="-".join)
def test_a_push_survives_a_fault_at_any_request(results: Results, case: Case, figure: Callable[[str], None]) -> None:
    found = results(case)

    assert [entry["request"] for entry in found] == list(range(found[0]["total"]))
    for entry in found:
        assert not entry["reader_saw_part"], entry
        assert entry["same"], entry
        assert entry["commits"] == 2, entry  # the empty repository's, and the release's: none was made twice
        assert entry["branches"] == ["main"], entry
        assert entry["tag"], entry
        assert (entry["public"], entry["gated"]) == (True, "auto"), entry
        assert entry["outcome"] not in ("InvalidRequestError", "VerificationError"), entry
    healed = sum(entry["outcome"] != "AccessError" for entry in found)
    figure(f"{'-'.join(case)}: a fault at each of {len(found)} requests, {healed} healed without a rerun, rest by one")


@pytest.mark.parametrize("case", PULLS, ids="-".join)
def test_a_pull_survives_a_fault_at_any_request(results: Results, case: Case, figure: Callable[[str], None]) -> None:
    found = results(case)

    assert len(found) == found[0]["total"] > 10
    for entry in found:
        assert entry["hits"] == 1, entry
        assert entry["outcome"] in ("ok", "AccessError"), entry
        assert entry["again"] == "ok", entry
    healed = sum(entry["outcome"] == "ok" for entry in found)
    figure(f"{'-'.join(case)}: a fault at each of {len(found)} requests, {healed} healed without a rerun, rest by one")
