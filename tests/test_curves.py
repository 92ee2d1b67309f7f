"""The log of a run loses no step and gains none, its curves are those of its numbers, trackers get the same numbers."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import checkpoint_ranks
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loram_hub.alignment import trackers
from loram_hub.alignment.curves import (
    RunLog,
    draw_curves,
    held_out_for_manifest,
    held_out_summary,
    losses_for_manifest,
)
from loram_hub.alignment.trackers import open_trackers
from loram_hub.cards.pictures import alignment_curve, held_out_curves
from loram_hub.errors import InvalidRequestError, MissingDependencyError, ResourceError, VerificationError


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 5.0 - step / 100, "learning_rate": 5e-5, **more}


RUN = [
    record(0, held_out={"a": 5.0, "b": 6.0}),
    *(record(step) for step in range(1, 10)),
    record(10, held_out={"a": 4.0, "b": 5.5, "late": 7.0}),
]


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    log = RunLog(tmp_path / "run" / "log.jsonl")
    for each in RUN:
        log.append(each)
    return log


def test_what_was_appended_is_read(log: RunLog, tmp_path: Path) -> None:
    assert log.read() == RUN
    assert [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == RUN
    assert RunLog(tmp_path / "none.jsonl").read() == []


def test_a_run_that_goes_on_from_a_checkpoint_drops_what_came_after_it(log: RunLog, tmp_path: Path) -> None:
    log.cut_back(4)
    log.append(record(5, again=True))

    assert log.read() == [*RUN[:5], record(5, again=True)]
    log.cut_back(-1)
    assert log.read() == []
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_line_torn_by_a_kill_is_dropped_by_reading_cutting_and_appending(tmp_path: Path, cut: int) -> None:
    for act in (
        lambda log: None,
        lambda log: log.cut_back(1),
        lambda log: log.append(record(2)),
    ):
        path = tmp_path / f"{time.monotonic_ns()}.jsonl"
        for step in range(3):
            RunLog(path).append(record(step))
        os.truncate(path, path.stat().st_size - cut)

        act(RunLog(path))

        steps = [each["step"] for each in RunLog(path).read()]
        assert steps in ([0, 1], [0, 1, 2])


def test_a_process_killed_while_it_logs_leaves_whole_lines_and_at_most_a_torn_one(tmp_path: Path) -> None:
    path, reports = tmp_path / "log.jsonl", tmp_path / "reports"
    (process,), _ = checkpoint_ranks.start(checkpoint_ranks.log_until_killed, 1, path, reports)
    deadline = time.monotonic() + checkpoint_ranks.PATIENCE
    while not reports.is_file() or reports.stat().st_size < 100:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()

    steps = [each["step"] for each in RunLog(path).read()]
    assert steps == [*range(len(steps))]
    assert len(steps) - reports.stat().st_size in (0, 1)


def test_a_number_that_is_not_finite_is_kept_as_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")

    log.append({"step": 1, "loss": float("nan"), "losses": {"a": float("inf"), "b": 2.0}})
    log.append({"step": 2, "loss": 3.0, "held_out": {"a": None}})

    assert log.read()[0] == {"step": 1, "loss": None, "losses": {"a": None, "b": 2.0}}
    assert losses_for_manifest(log.read()) == [[2, 3.0]]
    assert held_out_summary(log.read()) == {}
    assert draw_curves(log.read())


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 2}', '{"step": "x"}'])
def test_a_log_with_a_line_that_is_no_record_is_refused(log: RunLog, tmp_path: Path, line: str) -> None:
    path = tmp_path / "run" / "log.jsonl"
    path.write_text(path.read_text().replace("\n", f"\n{line}\n", 1))

    with pytest.raises(VerificationError, match=r"line 2 of .*log\.jsonl is no"):
        log.read()


def test_a_log_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ResourceError, match=r"log\.jsonl"):
        RunLog(tmp_path / "file" / "log.jsonl").append(record(0))


def test_a_line_that_a_full_disk_took_in_part_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    (outcome,) = checkpoint_ranks.run(checkpoint_ranks.log_on_full_disk, 1, path)

    assert "Free some space" in outcome
    assert [each["step"] for each in RunLog(path).read()] == [0, 2]


@given(count=st.integers(0, 60), most=st.integers(2, 20))
def test_losses_are_thinned_evenly_with_the_first_and_the_last(count: int, most: int) -> None:
    records = [record(step) for step in range(count)]

    thinned = losses_for_manifest(records, most=most)

    steps = [step for step, _ in thinned]
    assert len(thinned) == min(count, most)
    assert steps[:1] == [0][:count]
    assert steps[-1:] == [count - 1][:count]
    gaps = np.diff(steps)
    assert gaps.size == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    assert all(loss == records[step]["loss"] for step, loss in thinned)


def test_held_out_losses_before_and_after_are_the_first_and_the_last_measured() -> None:
    assert held_out_summary(RUN) == {
        "a": {"before": 5.0, "after": 4.0},
        "b": {"before": 6.0, "after": 5.5},
        "late": {"before": 7.0, "after": 7.0},
    }


def test_a_card_draws_from_the_manifest_what_the_run_logged() -> None:
    alignment = {"losses": losses_for_manifest(RUN), "held_out": held_out_for_manifest(RUN)}

    assert json.loads(json.dumps(alignment)) == alignment
    assert alignment_curve(alignment) == tuple((float(each["step"]), each["loss"]) for each in RUN)
    assert held_out_curves(alignment) == {
        "a": ((0.0, 5.0), (10.0, 4.0)),
        "b": ((0.0, 6.0), (10.0, 5.5)),
        "late": ((10.0, 7.0),),
    }


def _picture(records: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(draw_curves(records))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_picture_of_a_run_shows_losses_held_out_losses_and_rates() -> None:
    full = _picture(RUN)

    assert full.shape[1] > 600
    assert draw_curves(RUN) == draw_curves(RUN)
    without_held_out = [{key: value for key, value in each.items() if key != "held_out"} for each in RUN]
    for changed in (
        without_held_out,
        [each | {"learning_rate": each["step"] * 1e-6} for each in RUN],
        [each | {"loss": 4.0} for each in RUN],
    ):
        assert (_picture(changed) != full).any()
    reddish = (full[..., 0] > 180) & (full[..., 1] < 100)
    assert reddish.sum() > 50  # the first corpus's line
    assert not ((_picture(without_held_out)[..., 0] > 180) & (_picture(without_held_out)[..., 1] < 100)).any()


def test_a_run_of_no_or_few_steps_can_be_drawn() -> None:
    for records in ([], RUN[:1], RUN[:2], [{"step": 3}]):
        assert _picture(records).shape[1] > 600


# A warning about a missing glyph, or a formula that does not parse, would be an error here.
@pytest.mark.parametrize("name", ["a $x_{", "中文", "_hidden", "x" * 500, "\x1b[31m", "$\\frac"])
def test_any_name_of_a_corpus_can_be_drawn(name: str) -> None:
    assert draw_curves([record(0, held_out={name: 1.0}), record(1, held_out={name: 2.0})])


def stand_in(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a package in place of a tracker's that writes down how it is called, as the real ones are."""
    calls = folder / f"{name}.jsonl"
    (folder / f"{name}.py").write_text(
        "import json\n"
        "def note(*call):\n"
        f"    with open({str(calls)!r}, 'a') as file:\n"
        "        file.write(json.dumps(call) + '\\n')\n"
        "class Run:\n"
        "    def log(self, values, step=None):\n"
        "        note('log', values, step)\n"
        "    def finish(self):\n"
        "        note('finish')\n"
        "def init(project, name=None, config=None):\n"
        "    print('a banner')\n"
        "    note('init', project, name, config)\n"
        "    return Run()\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(sys.modules, name, None)  # so that what is imported in its place is gone after the test
    del sys.modules[name]
    return calls


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_numbers_under_flat_names_at_their_step_and_keeps_off_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    calls = stand_in(tmp_path, name, monkeypatch)

    tracker = open_trackers([name, name], project="p", name="n", config={"seed": 1}, folder=tmp_path)
    tracker.log(200, {"loss": 2.5, "held_out": {"a/b": 3.0, "c": None}, "note": "text", "tokens": 7})
    tracker.finish()

    assert [json.loads(line) for line in calls.read_text().splitlines()] == [
        ["init", "p", "n", {"seed": 1}],
        ["log", {"loss": 2.5, "held_out/a/b": 3.0, "tokens": 7}, 200],
        ["finish"],
    ]
    assert capsys.readouterr().out == ""


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_trackers(["tensorboard"], project="p", name="n", config={"seed": 1}, folder=tmp_path / "tb")
    for step in (100, 101):
        tracker.log(step, record(step, held_out={"a": 1.5}))
    tracker.finish()

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(5.0 - step / 100)) for step in (100, 101)
    ]
    assert [event.step for event in events.Scalars("held_out/a")] == [100, 101]


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=f"pip install {name}$"):
        open_trackers([name], project="p", name="n", config={}, folder=tmp_path)

    (tmp_path / name).mkdir()  # as wandb leaves one where a run was started
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingDependencyError, match=f"not the folder: pip install {name}$"):
        trackers.check_trackers([name])
    monkeypatch.delitem(sys.modules, name)


def test_a_tracker_nobody_knows_is_refused_before_any_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stand_in(tmp_path, "wandb", monkeypatch)

    with pytest.raises(InvalidRequestError, match=r"'TensorBord' is unknown; .* Did you mean 'tensorboard'\?"):
        open_trackers(["wandb", "TensorBord"], project="p", name="n", config={}, folder=tmp_path)
    with pytest.raises(InvalidRequestError, match=r"there are trackio, wandb, tensorboard\.$"):
        open_trackers(["qqq"], project="p", name="n", config={}, folder=tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)

    assert not calls.exists()


def test_without_trackers_logging_does_nothing(tmp_path: Path) -> None:
    tracker = open_trackers([], project="p", name="n", config={}, folder=tmp_path)

    tracker.log(1, {"loss": 1.0})
    tracker.finish()

    assert list(tmp_path.iterdir()) == []
