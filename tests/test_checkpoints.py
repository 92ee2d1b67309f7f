"""Checkpoints come back bit by bit on any number of ranks, and whatever happens to the newest, one is left to take."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_ranks as ranks
import pytest
import torch

from loram_hub.alignment.checkpoints import CheckpointStore, FoundCheckpoint
from loram_hub.errors import IncompatibleError, InvalidRequestError, ResourceError, TrainingError, VerificationError
from loram_hub.files import sha256_of
from loram_hub.seals import seal

Figure = Callable[[str], None]


def save_here(folder: Path, *steps: int, keep: int = 2) -> None:
    """Save in this process, which belongs to no group: one rank without torch.distributed."""
    store = CheckpointStore(folder, keep=keep)
    for step in steps:
        store.save(step, ranks.whole_state(step), {"step": step})


def load_here(folder: Path) -> tuple[int, Any, Any] | None:
    store = CheckpointStore(folder, keep=2)
    found = store.newest()
    if found is None:
        return None
    state = ranks.whole_state(0)
    store.load(found, state)
    return found.step, dict(found.extra), ranks.whole(state)


def newest_of(store: CheckpointStore) -> FoundCheckpoint:
    found = store.newest()
    assert found is not None
    return found


def loaded(step: int) -> tuple[int, Any, Any]:
    """What loading the checkpoint of a step gives."""
    return step, {"step": step}, ranks.whole(ranks.whole_state(step))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def reseal(checkpoint: Path) -> None:
    """Write the manifest anew, as somebody can who may write the folder."""
    values = json.loads((checkpoint / "checkpoint.json").read_text())
    del values["sha256"]
    for name in values["files"]:
        path = checkpoint / name
        values["files"][name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    (checkpoint / "checkpoint.json").write_text(seal(values))


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_checkpoint_comes_back_bit_by_bit_on_any_number_of_ranks(
    tmp_path: Path, saved_by: int, loaded_by: int
) -> None:
    assert ranks.run(ranks.save, saved_by, tmp_path, 3) == ["step-00000003"] * saved_by

    assert ranks.run(ranks.load, loaded_by, tmp_path) == [loaded(3)] * loaded_by
    assert load_here(tmp_path) == loaded(3)


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    undisturbed, *_ = ranks.run(ranks.train, 1, tmp_path / "a", 6)

    ranks.run(ranks.train, 1, tmp_path / "b", 4)
    resumed, *_ = ranks.run(ranks.train, 1, tmp_path / "b", 6)

    assert resumed == undisturbed
    assert any("exp_avg_sq" in name for name in resumed["optimizer"])


def test_a_state_of_fsdp_moves_to_another_number_of_ranks(tmp_path: Path) -> None:
    trained, *_ = ranks.run(ranks.train, 2, tmp_path, 3)

    (taken_over,) = ranks.run(ranks.train, 1, tmp_path, 3)
    assert taken_over == trained
    assert ranks.run(ranks.train, 2, tmp_path, 3) == [trained, trained]


def test_where_there_is_no_checkpoint_none_is_found(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none", keep=1).newest() is None
    assert ranks.run(ranks.newest_step, 2, tmp_path) == [None, None]


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    save_here(tmp_path, *range(100, 105), keep=3)

    assert names_in(tmp_path) == ["step-00000102", "step-00000103", "step-00000104"]
    save_here(tmp_path, 105, keep=1)
    assert names_in(tmp_path) == ["step-00000105"]
    with pytest.raises(InvalidRequestError, match="0 checkpoints cannot be kept"):
        CheckpointStore(tmp_path, keep=0)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_here(tmp_path, 1, 2)
    store = CheckpointStore(tmp_path, keep=2)

    store.save(2, ranks.whole_state(9), {"again": True})

    assert names_in(tmp_path) == ["step-00000001", "step-00000002"]
    assert load_here(tmp_path) == (2, {"again": True}, loaded(9)[2])


def test_clearing_takes_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    save_here(tmp_path / "checkpoints", 1, 2)
    ranks.run(ranks.clear, 2, tmp_path / "checkpoints")
    assert names_in(tmp_path) == []

    save_here(tmp_path / "checkpoints", 1)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    CheckpointStore(tmp_path / "checkpoints", keep=1).clear()
    CheckpointStore(tmp_path / "elsewhere", keep=1).clear()

    assert names_in(tmp_path / "checkpoints") == ["notes.txt"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ranks.PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    there = path.parent.parent / f"{path.name}.elsewhere"
    shutil.move(path, there)
    path.symlink_to(there)


@pytest.mark.parametrize("damage", [truncate, empty, flip, Path.unlink, link])
def test_a_damaged_checkpoint_is_passed_over_whatever_file_it_is_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    save_here(tmp_path / "sound", 1, 2)
    files = names_in(tmp_path / "sound" / "step-00000002")
    assert files == [".metadata", "__0_0.distcp", "checkpoint.json", "extra.json"]

    for name in files:
        folder = shutil.copytree(tmp_path / "sound", tmp_path / name)
        damage(folder / "step-00000002" / name)
        caplog.clear()

        assert load_here(folder) == loaded(1)

        (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "Passing over checkpoint" in warning.getMessage()
        assert name in warning.getMessage()


def test_other_things_that_a_checkpoint_must_not_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def add_file(folder: Path) -> None:
        (folder / "step-00000002" / "__1_0.distcp").write_bytes(b"x")

    def rename(folder: Path) -> None:
        (folder / "step-00000002").rename(folder / "step-00000007")

    def link_folder(folder: Path) -> None:
        (folder / "step-00000003").symlink_to(folder / "step-00000002")
        flip(folder / "step-00000002" / "extra.json")

    def other_format(folder: Path) -> None:
        path = folder / "step-00000002" / "checkpoint.json"
        values = json.loads(path.read_text())
        path.write_text(seal({"files": values["files"], "format": 2, "step": 2}))

    save_here(tmp_path / "sound", 1, 2)
    for damage, message in (
        (add_file, "__1_0.distcp does not belong there"),
        (rename, "is of step 2 in format 1; step 7 in format 1 was expected"),
        (link_folder, "is no folder of its own"),
        (other_format, "in format 2"),
    ):
        folder = shutil.copytree(tmp_path / "sound", tmp_path / damage.__name__)
        damage(folder)
        caplog.clear()

        assert load_here(folder) == loaded(1)
        assert message in caplog.text


def test_all_ranks_pass_over_what_one_of_them_finds_damaged(tmp_path: Path) -> None:
    ranks.run(ranks.save, 2, tmp_path / "sound", 1, 2)
    files = names_in(tmp_path / "sound" / "step-00000002")
    assert "__1_0.distcp" in files

    for name in files:
        folder = shutil.copytree(tmp_path / "sound", tmp_path / name)
        flip(folder / "step-00000002" / name)

        assert ranks.run(ranks.newest_step, 2, folder) == [1, 1], name


def test_a_damaged_checkpoint_is_not_counted_among_those_to_keep(tmp_path: Path) -> None:
    save_here(tmp_path, 1, 2, 8)
    save_here(tmp_path, 1, 2, 3, 8, keep=4)
    for step in (2, 3, 8):
        flip(tmp_path / f"step-{step:08d}" / "extra.json")
    store = CheckpointStore(tmp_path, keep=2)
    assert newest_of(store).step == 1

    store.save(4, ranks.whole_state(4), {"step": 4})

    assert names_in(tmp_path) == ["step-00000001", "step-00000004"]
    assert load_here(tmp_path) == loaded(4)


def test_a_checkpoint_of_another_state_is_refused(tmp_path: Path) -> None:
    ranks.run(ranks.save, 2, tmp_path, 1)

    for error in ranks.run(ranks.load_other_shape, 2, tmp_path):
        assert isinstance(error, IncompatibleError)
        assert "Was it made from the same release" in str(error)
    store = CheckpointStore(tmp_path, keep=1)
    found = newest_of(store)
    with pytest.raises(IncompatibleError, match="more"):
        store.load(found, {**ranks.whole_state(0), "more": torch.ones(1)})


def test_what_cannot_be_saved_is_refused_on_every_rank(tmp_path: Path) -> None:
    errors = ranks.run(ranks.save_without_json, 2, tmp_path)

    assert [type(error) for error in errors] == [InvalidRequestError] * 2
    assert "must be JSON values" in str(errors[1])
    with pytest.raises(InvalidRequestError, match="step -1"):
        CheckpointStore(tmp_path, keep=1).save(-1, {}, {})


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    folder, sprung = tmp_path / "checkpoints", tmp_path / "sprung"
    store = CheckpointStore(folder, keep=2)
    save_here(folder, 1)
    index = folder / "step-00000001" / ".metadata"
    sound = pickle.loads(index.read_bytes())

    for trap, message in (
        (_Trap(sprung), "posix.mkdir, which no index needs"),
        ((sound, _Trap(sprung)), "posix.mkdir, which no index needs"),
        ({"a": 1}, "is no index: it holds dict"),
    ):
        index.write_bytes(pickle.dumps(trap))
        reseal(folder / "step-00000001")
        found = newest_of(store)
        with pytest.raises(VerificationError, match=message):
            store.load(found, ranks.whole_state(0))
    store.save(2, {"value": _Trap(sprung)}, {})
    found = newest_of(store)
    with pytest.raises(VerificationError, match="plain values"):
        store.load(found, {"value": 0})

    assert found.step == 2
    assert not sprung.exists()


# Rank 0 writes the extra file and the manifest too; what only rank 1 cannot write must stop rank 0 as well.
@pytest.mark.parametrize("limited_rank", [0, 1])
def test_a_disk_that_is_full_for_one_rank_stops_all_and_harms_nothing(
    tmp_path: Path, figure: Figure, limited_rank: int
) -> None:
    ranks.run(ranks.save, 2, tmp_path, 1, 2)
    before = {path: sha256_of(path) for path in tmp_path.rglob("*") if path.is_file()}
    largest = (tmp_path / "step-00000002" / f"__{limited_rank}_0.distcp").stat().st_size
    limits = [0, 20, 400, largest // 2, largest - 1]

    for limit in limits:
        errors = ranks.run(ranks.save_with_limit, 2, tmp_path, 3, limited_rank, limit)

        assert [type(error) for error in errors] == [ResourceError] * 2, (limit, errors)
        assert all("Free some space" in str(error) for error in errors)
        assert {path: sha256_of(path) for path in tmp_path.rglob("*") if path.is_file()} == before
    assert ranks.run(ranks.save, 2, tmp_path, 3) == ["step-00000003"] * 2
    figure(f"checkpoint: rank {limited_rank} of 2 out of disk at {len(limits)} limits, both stop, the old ones intact")


@pytest.mark.parametrize("saved", [3, 2], ids=["a new step", "the same step again"])
def test_a_kill_before_any_change_of_a_file_leaves_a_whole_checkpoint(
    tmp_path: Path, figure: Figure, saved: int
) -> None:
    save_here(tmp_path / "before", 1, 2)

    change, status = 0, -9
    while status == -9:
        change += 1
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(change))
        (process,), _ = ranks.start(ranks.save_and_die, 1, folder, saved, change)
        process.join(ranks.PATIENCE)
        status = process.exitcode or 0

        assert load_here(folder) in ([loaded(2), loaded(3)] if saved == 3 else [loaded(2)])
        save_here(folder, 3)
        assert names_in(folder) == ["step-00000002", "step-00000003"]
        assert load_here(folder) == loaded(3)

    assert status == 0
    assert change > 15
    figure(f"checkpoint: killed before each of {change - 1} changes of files, old or new one whole each time")


def test_kills_of_both_ranks_at_random_moments_lose_no_step_that_was_saved(tmp_path: Path, figure: Figure) -> None:
    kills, rng, at_work = 30, random.Random(0), 0
    for number in range(kills):
        folder, reports = tmp_path / str(number), tmp_path / f"{number}.saved"
        both, _ = ranks.start(ranks.save_until_killed, 2, folder, reports)
        wait_for(reports.is_file)
        time.sleep(rng.uniform(0, 0.06))
        for process in rng.sample(both, 2):
            process.kill()
        for process in both:
            process.join()

        reported = reports.stat().st_size
        at_work += any(name.startswith(".") for name in names_in(folder))
        assert load_here(folder) in (loaded(reported), loaded(reported + 1))
    assert at_work > kills // 4
    figure(
        f"checkpoint: {kills} of {kills} kills of 2 ranks at random moments lose no saved step; {at_work} while saving"
    )


def test_a_rank_that_dies_stops_the_other_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    for number, (dying, left) in enumerate([(0, 1), (1, 0)]):
        folder, reports = tmp_path / str(number), tmp_path / f"{number}.saved"
        both, results = ranks.start(ranks.save_until_killed, 2, folder, reports)
        wait_for(lambda reports=reports: reports.is_file() and reports.stat().st_size >= 3)

        both[dying].kill()
        both[left].join(20)

        assert both[left].exitcode == 0
        error = pickle.loads((results / str(left)).read_bytes())
        assert isinstance(error, TrainingError), error
        assert "goes on from its last checkpoint" in str(error)
        reported = reports.stat().st_size
        assert load_here(folder) in (loaded(reported), loaded(reported + 1))
