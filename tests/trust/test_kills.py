"""Commands killed with SIGKILL at random moments: nothing torn is ever seen, and the next run ends the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from trust.forks import HUB, WEIGHTS, Forks
from trust.kills import HubLane, Kill, kill_writers
from trust.materials import Materials

WRITERS = {"prune": 25, "prune to NF4": 25, "quantize": 25, "recover": 30}
"""Kills that come before the end, by command."""
PUSHES = {"push by LFS": 25, "push by xet": 20}
PULLS = {"pull by LFS": 30, "pull by xet": 20}
COUNTS = WRITERS | PUSHES | PULLS
SIZES = {"hidden_size": 240, "intermediate_size": 900, "head_dim": 40, "layers": 6, "vocab_size": 2000}
"""Of the base model: 12 MB, so that there is something to interrupt."""

Results = Callable[[str], list[Kill]]
Figure = Callable[[str], None]


def kill_all_writers(folder: Path, forks: Forks, materials: Materials) -> dict[str, list[Kill]]:
    return {name: kill_writers(forks, materials, name, folder / name, count=COUNTS[name]) for name in WRITERS}


def kill_all_on_hub(folder: Path, materials: Materials, transfer: str) -> dict[str, list[Kill]]:
    push, pull = f"push by {transfer}", f"pull by {transfer}"
    lane = HubLane(folder / transfer, xet=transfer == "xet")
    release = materials.nf4 if transfer == "xet" else materials.release
    with Forks(HUB, lane.environment()) as forks:
        return {
            push: lane.kill_pushes(forks, release, materials.old, count=COUNTS[push]),
            pull: lane.kill_pulls(forks, release, count=COUNTS[pull]),
        }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    folder = tmp_path_factory.mktemp("kills")
    with Forks(WEIGHTS) as forks, ThreadPoolExecutor() as pool:
        materials = Materials(folder, forks, **SIZES)
        lanes: dict[str, Future[dict[str, list[Kill]]]] = {
            transfer: pool.submit(kill_all_on_hub, folder, materials, transfer) for transfer in ("LFS", "xet")
        }
        lanes["writers"] = pool.submit(kill_all_writers, folder, forks, materials)

        def of(name: str) -> list[Kill]:
            return lanes["writers" if name in WRITERS else name.rpartition(" ")[2]].result()[name]

        yield of


def report(figure: Figure, name: str, kills: list[Kill]) -> None:
    seen = [kill.seen for kill in kills]
    figure(
        f"{name}: {len(kills)} kills, {sum(kill.landed for kill in kills)} before the end; seen then: "
        f"{seen.count('before')} times what was there, {seen.count('after')} times the result, {seen.count('part')} "
        f"times a part; {sum(kill.same for kill in kills)} of {len(kills)} reruns end as an undisturbed run"
    )


def check(kills: list[Kill], name: str) -> None:
    assert sum(kill.landed for kill in kills) == COUNTS[name]
    assert [kill for kill in kills if kill.seen == "part" or not kill.same] == []


def test_there_are_two_hundred_kills_in_all() -> None:
    assert sum(COUNTS.values()) >= 200


@pytest.mark.parametrize("name", WRITERS)
def test_a_killed_command_leaves_the_old_folder_or_the_new_one_and_its_rerun_ends_the_same(
    results: Results, figure: Figure, name: str
) -> None:
    kills = results(name)

    report(figure, name, kills)
    check(kills, name)
    assert [kill for kill in kills if kill.left] == []


@pytest.mark.parametrize("name", PUSHES)
def test_a_killed_push_shows_nothing_or_all_and_its_rerun_ends_the_same(
    results: Results, figure: Figure, name: str
) -> None:
    kills = results(name)

    report(figure, name, kills)
    figure(f"{name}: at most {max(kill.sent for kill in kills):.2f} times the bytes of an undisturbed run")
    check(kills, name)
    assert [kill for kill in kills if kill.left] == []  # no branch aside
    assert [kill for kill in kills if kill.sent_again] == []
    assert max(kill.sent for kill in kills) <= 2  # what was under way is sent once more


@pytest.mark.parametrize("name", PULLS)
def test_a_killed_pull_leaves_only_whole_files_and_its_rerun_ends_the_same(
    results: Results, figure: Figure, name: str
) -> None:
    kills = results(name)

    report(figure, name, kills)
    figure(f"{name}: {sum(len(kill.left) for kill in kills)} of huggingface_hub's .incomplete files stay in the cache")
    check(kills, name)
