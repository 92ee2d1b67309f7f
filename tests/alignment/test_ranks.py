"""Alignment in two processes against one, and what is left when one or all of them die."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from alignment.materials import SETTINGS, save_corpora, save_release, save_sparse_release, save_texts
from alignment.ranks import ROOT, RankForks, RunEnded
from safetensors.torch import load_file

from loram_hub.alignment import AlignmentSettings
from loram_hub.alignment.estimates import estimate
from loram_hub.release import open_release, verify

KILLS = 20
SHORT = {**SETTINGS, "steps": 8, "warmup_steps": 2, "save_every": 2, "held_out": 1, "micro_batch_size": 4}


@pytest.fixture(scope="module")
def forks() -> Iterator[RankForks]:
    with RankForks() as running:
        yield running


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_release(tmp_path_factory.mktemp("pruned"))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [asdict(corpus) for corpus in save_corpora(tmp_path_factory.mktemp("corpora"))]


def order(release: Path, out: Path, corpora: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    settings = {
        **SHORT,
        **{key: value for key, value in changes.items() if key in AlignmentSettings.__dataclass_fields__},
    }
    others = {key: value for key, value in changes.items() if key not in AlignmentSettings.__dataclass_fields__}
    return {"release": str(release), "out": str(out), "corpora": corpora, "settings": settings, **others}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    assert found
    return found


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"loram.json", "model.safetensors"} <= set(found)
    return found


def test_two_processes_train_as_one(
    forks: RankForks, release: Path, corpora: list[dict[str, Any]], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    found = [
        forks.run(
            "aligned",
            size=size,
            **order(release, tmp_path / f"out{size}", corpora, steps=50, save_every=50, held_out=3),
        )
        for size in (1, 2)
    ]

    one, two = (run.results for run in found)
    assert two[0] == two[1]
    assert len(one[0]["losses"]) == len(two[0]["losses"]) == 50
    pairs = [(a[1], b[1]) for a, b in zip(one[0]["losses"], two[0]["losses"], strict=True)]
    worst = max(abs(a - b) / a for a, b in pairs)
    figure(f"Alignment, 50 steps in fp32, 2 gloo processes against 1: loss differs by {worst:.1e} relative at most")
    assert worst < 1e-4
    for (_, of_one), (_, of_two) in zip(one[0]["held_out"], two[0]["held_out"], strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-4)
    for name, values in weights_of(tmp_path / "out1").items():
        assert torch.allclose(weights_of(tmp_path / "out2")[name], values, atol=1e-3), name


def first_step(ended: RunEnded) -> int:
    """Return after which step a run went on."""
    said = re.findall(r"Going on after step (\d+) of", ended.ranks[0].output)
    return int(said[0]) if said else 0


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_in_another_number_of_processes(
    forks: RankForks, release: Path, corpora: list[dict[str, Any]], tmp_path: Path, before: int, after: int
) -> None:
    whole = forks.run("aligned", size=after, **order(release, tmp_path / "whole", corpora)).results
    killed = forks.run("aligned", size=before, **order(release, tmp_path / "out", corpora, dies_before=5))
    assert {rank.status for rank in killed.ranks} <= {-signal.SIGKILL, 1}  # 1: it noticed that the other was gone

    ended = forks.run("aligned", size=after, **order(release, tmp_path / "out", corpora))

    found = ended.results
    assert first_step(ended) == 4
    log = [json.loads(line) for line in (tmp_path / "out-run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(9))
    assert [loss for _, loss in found[0]["losses"]] == pytest.approx([loss for _, loss in whole[0]["losses"]], rel=1e-5)
    for name, values in weights_of(tmp_path / "whole").items():
        assert torch.allclose(weights_of(tmp_path / "out")[name], values, atol=1e-4), name


def test_the_zeros_of_a_sparse_release_stay_in_two_processes_and_across_a_kill(
    forks: RankForks, corpora: list[dict[str, Any]], tmp_path: Path
) -> None:
    sparse = save_sparse_release(tmp_path)
    whole = forks.run("aligned", size=1, **order(sparse, tmp_path / "whole", corpora)).results
    killed = forks.run("aligned", size=2, **order(sparse, tmp_path / "out", corpora, dies_before=5))
    assert {rank.status for rank in killed.ranks} <= {-signal.SIGKILL, 1}

    ended = forks.run("aligned", size=2, **order(sparse, tmp_path / "out", corpora))

    found = ended.results
    assert first_step(ended) == 4
    assert [loss for _, loss in found[0]["losses"]] == pytest.approx([loss for _, loss in whole[0]["losses"]], rel=1e-5)
    zeros = 0
    for name, values in weights_of(tmp_path / "whole").items():
        other = weights_of(tmp_path / "out")[name]
        assert torch.allclose(other, values, atol=1e-4), name
        assert torch.equal(other == 0, values == 0), name
        zeros += int((other == 0).sum())
    made, weights = verify(tmp_path / "out"), 0
    assert made.weight_masks is not None
    for name in made.weight_masks.names:
        weights += made.weight_masks.read(name).size
    assert zeros == pytest.approx(0.55 * weights, rel=1e-3)


def test_kills_at_any_time_do_not_change_the_result(
    forks: RankForks, release: Path, corpora: list[dict[str, Any]], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    undisturbed = forks.run("aligned", size=2, **order(release, tmp_path / "whole", corpora))
    assert undisturbed.results
    expected = contents(tmp_path / "whole")
    rng, kills, finished, resumed, out = random.Random(0), 0, 0, 0, tmp_path / "out"

    while kills < KILLS or finished == 0:
        after = rng.uniform(0.1, undisturbed.seconds) if kills < KILLS else None
        has_checkpoint = any((tmp_path / "out-run" / "checkpoints").glob("step-*"))
        killed = rng.choice([[0], [1], [0, 1], [0, 1]])
        found = forks.run("aligned", size=2, kill_after=after, killed=killed, **order(release, out, corpora))
        resumed += first_step(found) > 0
        was_killed = any(rank.status == -signal.SIGKILL for rank in found.ranks)
        kills += was_killed
        if not was_killed:
            assert found.results
            assert (first_step(found) > 0) == has_checkpoint
        if out.exists():  # whole, also if a kill came after it appeared
            assert contents(out) == expected
            finished += not was_killed
            shutil.rmtree(out)
            shutil.rmtree(tmp_path / "out-run", ignore_errors=True)

    assert resumed > KILLS // 5
    figure(
        f"Alignment in 2 processes, killed {kills} times, one or both: {resumed} restarts went on from a checkpoint, "
        "every release that came out has the undisturbed one's bytes"
    )
    verify(tmp_path / "whole")


def test_a_process_that_dies_alone_ends_the_run(
    forks: RankForks, release: Path, corpora: list[dict[str, Any]], tmp_path: Path
) -> None:
    for dead, alive in ((1, 0), (0, 1)):
        asked = order(release, tmp_path / f"out{dead}", corpora, dies_before=3, dying=dead)
        found = forks.run("aligned", size=2, **asked)

        assert found.ranks[dead].status == -signal.SIGKILL
        assert found.ranks[alive].status == 1
        assert "TrainingError: Another process of the run has ended" in (found.ranks[alive].error or "")
        assert found.seconds < 30


def test_a_loss_that_is_no_number_on_one_process_stops_all(
    forks: RankForks, release: Path, corpora: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = forks.run("aligned", size=2, **order(release, tmp_path / "out", corpora, poisoned_step=6))

    # Step 6: sequences 40 to 47, of which the second process has the second half.
    assert found.ranks[0].error == found.ranks[1].error
    assert "Step 6 of 8: the loss is not finite, in sequence(s) 44-47" in (found.ranks[0].error or "")
    assert sorted(path.name for path in (tmp_path / "out-run/checkpoints").glob("step-*")) == [
        "step-00000002",
        "step-00000004",
    ]
    again = forks.run("aligned", size=2, **order(release, tmp_path / "out", corpora))
    assert again.results
    assert first_step(again) == 4


def test_what_goes_wrong_in_reading_reaches_all(forks: RankForks, release: Path, tmp_path: Path) -> None:
    short = save_texts(tmp_path / "short.jsonl", stride=1, documents=40)
    found = forks.run("aligned", size=2, **order(release, tmp_path / "out", [{"source": str(short)}], steps=16))

    assert found.ranks[0].error == found.ranks[1].error
    assert "InvalidRequestError" in (found.ranks[0].error or "")
    assert "short.jsonl" in (found.ranks[0].error or "")
    assert list((tmp_path / "out-run/checkpoints").glob("step-*"))


def test_a_batch_that_cannot_be_shared_out_is_refused(
    forks: RankForks, release: Path, corpora: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = forks.run("aligned", size=2, **order(release, tmp_path / "out", corpora, batch_size=7))

    assert all("batch_size 7 cannot be divided among 2" in (rank.error or "") for rank in found.ranks)
    found = forks.run("aligned", size=2, **order(release, tmp_path / "out", corpora, processes=4))
    assert all("meant for 4 processes; the process group has 2" in (rank.error or "") for rank in found.ranks)


def test_each_process_holds_what_the_formula_says(
    forks: RankForks, release: Path, figure: Callable[[str], None]
) -> None:
    plan, held = open_release(release).plan, {}
    for size in (1, 2):
        settings = {**SHORT, "trainable": "no-embeddings"}
        found = forks.run("held_bytes", size=size, release=str(release), settings=settings).results
        told = estimate(plan, AlignmentSettings(**settings), precision="fp32", processes=size)
        expected = {"weights": told.weight_bytes, "gradients": told.gradient_bytes, "optimizer": told.optimizer_bytes}
        assert found[0] == expected  # the first process has the larger part of what cannot be divided evenly
        assert all(rank[kind] <= expected[kind] for rank in found for kind in expected)
        held[size] = sum(found[0].values())

    figure(f"Alignment: bytes held by a process, 1 process {held[1]:,}, 2 processes {held[2]:,} (as estimated)")
    assert held[2] < 0.51 * held[1]


def test_torchrun_starts_it_and_leaves_nobody_behind(
    forks: RankForks, release: Path, corpora: list[dict[str, Any]], tmp_path: Path
) -> None:
    asked = tmp_path / "order.json"
    asked.write_text(json.dumps(order(release, tmp_path / "out", corpora, processes=2)))
    log = tmp_path / "out-run" / "log.jsonl"
    launcher = _torchrun(asked)
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)

    launcher.kill()
    launcher.communicate()

    ranks = [int((tmp_path / f"order.json.{rank}").read_text()) for rank in range(2)]
    deadline = time.monotonic() + 10
    while any(_is_running(rank) for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(_is_running(rank) for rank in ranks)
    again = _torchrun(asked)
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    assert forks.run("aligned", size=2, **order(release, tmp_path / "whole", corpora, processes=2)).results
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _torchrun(asked: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(Path(__file__).with_name("launched.py")), str(asked),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
    )  # fmt: skip


def _is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
