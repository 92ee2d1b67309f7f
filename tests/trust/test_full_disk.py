"""Disks that are full at any write, or cannot be written to: one message, exit code 6, and what was there stays."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from trust.forks import HUB, WEIGHTS, Ended, Forks
from trust.kills import content_of
from trust.materials import Materials

from loram_hub.manifest import read_manifest

WRITERS = ("prune", "prune to NF4", "quantize", "recover", "merge")
PAGE = 4096
DISK_PAGES = 1024
REPO = "alice/release"

Figure = Callable[[str], None]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks(WEIGHTS) as forks:
        yield forks


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Materials:
    return Materials(tmp_path_factory.mktemp("full"), forks)


def limits_below(folder: Path) -> list[int]:
    """Sizes of file of which each stops the writing of this folder at another place."""
    sizes = {path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    limits = {0, 1, PAGE} | {size - 1 for size in sizes} | {size // 2 for size in sizes}
    return sorted(limit for limit in limits if limit < max(sizes))


def check_refused(ended: Ended) -> None:
    assert ended.status == 6, ended
    assert "Traceback" not in ended.output
    errors = [line for line in ended.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, ended
    assert "Free some space" in errors[0]


@pytest.mark.parametrize("name", WRITERS)
def test_no_file_may_grow_over_a_limit(
    tmp_path: Path, forks: Forks, materials: Materials, figure: Figure, name: str
) -> None:
    out = tmp_path / "out"
    assert forks.run(*materials.writer(name, out)).status == 0
    whole, limits = content_of(out), limits_below(out)
    largest = max(path.stat().st_size for path in out.rglob("*"))

    for replaces in (False, True):
        shutil.rmtree(out)
        options = ("--overwrite",) if replaces else ()
        if replaces:
            shutil.copytree(materials.old, out)
        before = content_of(out)
        for limit in limits:
            ended = forks.run(*materials.writer(name, out, *options), largest_file=limit)

            check_refused(ended)
            assert content_of(out) == before, limit
            assert [path.name for path in tmp_path.iterdir()] == (["out"] if replaces else []), limit
        ended = forks.run(*materials.writer(name, out, *options), largest_file=largest)
        assert ended.status == 0, ended
        assert content_of(out) == whole
    figure(f"{name}: stopped at {2 * len(limits)} limits, each time with exit code 6 and the old state")


def save_evaluation(path: Path, release: Path, *, loss: float) -> Path:
    row = {"model": "pruned", "loss": loss, "perplexity": None, "parameters": read_manifest(release).parameters}
    path.write_text(json.dumps({"rows": [row], "examples": 2, "tokens": 10, "dataset": "org/held-out"}))
    return path


def test_a_card_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, forks: Forks, materials: Materials) -> None:
    folder = shutil.copytree(materials.release, tmp_path / "release")
    old = save_evaluation(tmp_path / "old.json", folder, loss=6.5)
    new = save_evaluation(tmp_path / "new.json", folder, loss=7.5)
    command = ("card", folder, "--license", "mit")
    assert forks.run(*command, "--repo-id", "org/old", "--evaluation", old).status == 0
    before = content_of(folder)
    card = [folder / "README.md", *folder.glob("pictures/*"), *folder.glob(".eval_results/*")]
    assert len(card) == 3
    sizes = {path.stat().st_size for path in card}

    for limit in sorted({0, 1, PAGE} | {size - 1 for size in sizes} | {size // 2 for size in sizes}):
        check_refused(forks.run(*command, "--repo-id", "org/new", "--evaluation", new, largest_file=limit))
        assert content_of(folder) == before, limit
        assert sorted(path.name for path in tmp_path.iterdir()) == ["new.json", "old.json", "release"]
    ended = forks.run(*command, "--repo-id", "org/new", "--evaluation", new)
    assert ended.status == 0, ended
    assert len([name for name, digest in content_of(folder).items() if before[name] != digest]) == 2


@pytest.mark.parametrize("transfer", ["LFS", "xet"])
def test_a_pull_that_cannot_be_stored_is_refused_and_completed_later(
    tmp_path: Path, materials: Materials, transfer: str
) -> None:
    home = tmp_path / "home"
    wanted = {name: digest for name, digest in content_of(materials.release).items() if "/" not in name}

    with (
        HubServer(tmp_path / "hub") as hub,
        Forks(HUB, hub.environment(home, xet=transfer == "xet", HF_XET_CHUNK_CACHE_SIZE_BYTES="0")) as clients,
    ):
        pushed = clients.run("push", materials.release, REPO, "--public", "--license", "mit")
        assert pushed.status == 0, pushed
        snapshot = home / "hub" / "models--alice--release" / "snapshots" / hub.repo(REPO).refs["main"]
        for limit in limits_below(materials.release):
            shutil.rmtree(home)
            check_refused(clients.run("verify", REPO, largest_file=limit))
            assert content_of(snapshot).items() <= wanted.items(), limit

            ended = clients.run("verify", REPO)
            assert ended.status == 0, ended
            assert content_of(snapshot) == wanted


def pages_of(folder: Path) -> int:
    return sum(-(-path.stat().st_size // PAGE) for path in folder.rglob("*") if path.is_file())


class SmallDisk:
    """A file system of its own with as much room as a test leaves it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def leave(self, pages: int) -> None:
        """Leave so many pages; names and folders take none."""
        self._ballast.unlink(missing_ok=True)
        self._ballast.write_bytes(bytes((DISK_PAGES - pages) * PAGE))

    def mount(self, *options: str) -> None:
        """Mount it, or change how it is mounted."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", self.folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    disk.folder.mkdir()
    try:
        disk.mount(f"size={DISK_PAGES * PAGE}")
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a small disk here (needs root on Linux)")
    yield disk
    subprocess.run(["umount", disk.folder], check=True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_with_too_little_room_by_any_number_of_pages(
    small_disk: SmallDisk, forks: Forks, materials: Materials, figure: Figure, name: str
) -> None:
    out = small_disk.folder / "out"
    assert forks.run(*materials.writer(name, out)).status == 0
    whole = content_of(out)
    shutil.rmtree(out)
    shutil.copytree(materials.old, out)
    before, occupied = content_of(out), pages_of(out)

    def run_with_room(pages: int) -> Ended:
        small_disk.leave(occupied + pages)
        return forks.run(*materials.writer(name, out, "--overwrite"))

    room = 0
    while (ended := run_with_room(room)).status != 0:
        check_refused(ended)
        assert content_of(out) == before, room
        assert sorted(path.name for path in small_disk.folder.iterdir()) == ["ballast", "out"]
        room += 1

    assert content_of(out) == whole
    assert room == pages_of(out)
    figure(f"{name}: the disk full after each of {room} pages, each time with exit code 6 and the old folder")


def test_a_disk_that_is_read_only_is_refused(small_disk: SmallDisk, forks: Forks, materials: Materials) -> None:
    out = shutil.copytree(materials.old, small_disk.folder / "out")
    before = content_of(out)
    small_disk.mount("remount", "ro")

    for name in WRITERS:
        ended = forks.run(*materials.writer(name, out, "--overwrite"))
        assert ended.status == 6, ended
        assert "Traceback" not in ended.output
    ended = forks.run("card", out, "--license", "mit")
    assert ended.status == 6, ended

    assert content_of(out) == before
