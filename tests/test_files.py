"""Folders that appear whole or not at all, strict JSON, errors of the disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loram_hub.errors import CheckpointError, InvalidRequestError, ResourceError, VerificationError
from loram_hub.files import (
    _swap,
    atomic_folder,
    dump_json,
    parse_json,
    read_json,
    resource_errors,
    sha256_of,
    write_bytes,
    write_text,
)

OLD = {"config.json": "old", "sub/weights": "old weights"}
NEW = {"config.json": "new", "other": "new weights"}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str] | None:
    if not folder.exists():
        return None
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- folders ----------------------------------------------------------------------------------------------------------


def test_folder_appears_under_its_name_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "parents" / "out"

    with atomic_folder(target) as folder:
        fill(folder, NEW)
        assert not target.exists()

    assert content(target) == NEW
    assert [p.name for p in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_old_folder_stays_when_the_block_raises(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "out"
    fill(target, OLD)

    def interrupted() -> None:
        with atomic_folder(target, overwrite=True) as folder:
            fill(folder, NEW)
            raise error

    with pytest.raises(error):
        interrupted()

    assert content(target) == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_existing_folder_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    fill(target, OLD)

    with pytest.raises(InvalidRequestError, match="already exists"), atomic_folder(target):
        pytest.fail("the block must not run")

    assert content(target) == OLD


def test_existing_empty_folder_is_filled(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()

    with atomic_folder(target) as folder:
        fill(folder, NEW)

    assert content(target) == NEW


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("a file")

    with pytest.raises(InvalidRequestError, match="is a file"), atomic_folder(target, overwrite=True):
        pytest.fail("the block must not run")

    assert target.read_text() == "a file"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    fill(tmp_path / "real", OLD)
    (tmp_path / "link").symlink_to("real")

    for _ in range(2):  # the second run meets what the first left behind
        with atomic_folder(tmp_path / "link", overwrite=True) as folder:
            fill(folder, NEW)

    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == NEW
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_concurrent_writer_is_refused_and_the_first_one_finishes(tmp_path: Path) -> None:
    target = tmp_path / "out"
    second = (
        f"from loram_hub.files import atomic_folder as a; from pathlib import Path\nwith a(Path({str(target)!r})): pass"
    )

    with atomic_folder(target) as folder:
        fill(folder, NEW)
        attempt = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True, check=False)

    assert attempt.returncode == 1
    assert "ResourceError: Another process is writing" in attempt.stderr
    assert content(target) == NEW


# The child counts its file system calls and kills itself before the nth; the parent looks at what is left, tries again.
KILLED_AT_EVERY_CALL = """
import json, os, signal, sys
from pathlib import Path
from loram_hub.files import atomic_folder

root, had_old = Path(sys.argv[1]), sys.argv[2] == "old"
OLD, NEW = json.loads(sys.argv[3]), json.loads(sys.argv[4])
CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree", "ctypes.dlsym"}

def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

def content(folder):
    if not folder.exists():
        return None
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}

def write(target, fatal_call):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    seen = 0
    def count(event, args):
        nonlocal seen
        if event in CALLS:
            if seen == fatal_call:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
    sys.addaudithook(count)
    with atomic_folder(target, overwrite=had_old) as folder:
        fill(folder, NEW)
    os._exit(0)

outcomes, call, status = [], 0, None
while status != 0:
    target = root / str(call) / "out"
    target.parent.mkdir()
    if had_old:
        fill(target, OLD)
    status = write(target, call)
    left = content(target)
    retried = write(target, -1) if had_old or left is None else 0
    outcomes.append({"status": status, "left": left, "retried": retried, "after": content(target),
                     "beside": sorted(p.name for p in target.parent.iterdir())})
    call += 1
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("had_old", [True, False])
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path: Path, had_old: bool) -> None:
    arguments = [str(tmp_path), "old" if had_old else "none", json.dumps(OLD), json.dumps(NEW)]

    run = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_CALL, *arguments], capture_output=True, text=True, check=True
    )

    *killed, finished = json.loads(run.stdout)
    assert len(killed) > 15
    assert all(outcome["status"] == signal.SIGKILL for outcome in killed)
    assert finished["left"] == NEW
    before = OLD if had_old else None
    assert [outcome for outcome in killed if outcome["left"] not in (before, NEW)] == []
    assert killed[0]["left"] == before
    assert [outcome for outcome in killed if outcome["retried"] != 0 or outcome["after"] != NEW] == []
    assert [outcome["beside"] for outcome in killed if had_old and outcome["beside"] != ["out"]] == []


def test_a_run_killed_between_two_renames_is_put_right_by_the_next(tmp_path: Path) -> None:
    """Where the system cannot exchange two folders in one step, the old one waits under another name."""
    target = tmp_path / "out"
    fill(tmp_path / ".out.replaced", OLD)

    with pytest.raises(InvalidRequestError, match="already exists"), atomic_folder(target):
        pytest.fail("the old folder is back, so it must not be overwritten unasked")

    assert content(target) == OLD


def test_two_renames_put_the_old_folder_back_when_the_second_fails(tmp_path: Path) -> None:
    fill(tmp_path / "out", OLD)

    with pytest.raises(FileNotFoundError):
        _swap(tmp_path / "no such folder", tmp_path / "out", tmp_path / ".out.replaced")

    assert content(tmp_path / "out") == OLD


# -- full disks -------------------------------------------------------------------------------------------------------

WRITE_A_MEGABYTE = """
import sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from loram_hub.errors import ResourceError
from loram_hub.files import atomic_folder
limit = int(sys.argv[2])
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with atomic_folder(Path(sys.argv[1])) as folder:
        if sys.argv[3] == "safetensors":
            save_file({"x": np.ones(2**20, dtype=np.uint8)}, folder / "x.safetensors")
        else:
            (folder / "x").write_bytes(bytes(2**20))
except ResourceError as err:
    sys.exit(f"ResourceError: {err}")
"""


def write_a_megabyte(target: Path, *, limit: int, through: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WRITE_A_MEGABYTE, str(target), str(limit), through]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("through", ["python", "safetensors"])
def test_a_file_over_the_size_limit_is_a_resource_error_and_leaves_nothing(tmp_path: Path, through: str) -> None:
    run = write_a_megabyte(tmp_path / "out", limit=2**16, through=through)

    assert run.returncode == 1
    assert run.stderr.startswith(f"ResourceError: Writing {tmp_path / 'out'} failed")
    assert "Free some space" in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a small disk here (needs root on Linux)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("through", ["python", "safetensors"])
def test_a_full_disk_is_a_resource_error_and_leaves_the_disk_as_it_was(small_disk: Path, through: str) -> None:
    run = write_a_megabyte(small_disk / "out", limit=0, through=through)

    assert run.returncode == 1
    assert run.stderr.startswith("ResourceError: Writing")
    assert "No space left on device" in run.stderr
    assert list(small_disk.iterdir()) == []


def test_memory_error_becomes_a_resource_error() -> None:
    with pytest.raises(ResourceError, match="Pruning ran out of memory"), resource_errors("Pruning"):
        raise MemoryError


def test_errors_that_are_not_the_disks_pass_unchanged() -> None:
    with pytest.raises(FileNotFoundError), resource_errors("Pruning"):
        os.stat("/no/such/file")


# -- JSON and hashes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "key 'a' twice"),
        ('{"deep": [{"x": 1, "x": 1}]}', "key 'x' twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": [Infinity]}', "Infinity"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "holds 1e999"),
        ('{"a": [-1e999]}', "holds -1e999"),
        ("[1]", "must hold a JSON object, found list"),
        ("3", "found int"),
        ("", "not valid JSON"),
        ('{"a": 1', "not valid JSON"),
        ('{"a": 1} {"b": 2}', "not valid JSON"),
        ('{"a":' * 200_000 + "1" + "}" * 200_000, "not valid JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "not valid JSON"),
    ],
)
def test_bad_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(VerificationError, match=message) as caught:
        parse_json(text, source="some.json")

    assert "some.json" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_json_over_the_cap_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # a sparse terabyte: reading it would not end

    with pytest.raises(VerificationError, match=r"1,099,511,627,776 bytes"):
        read_json(path)


def test_json_at_the_cap_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')

    assert read_json(path, max_bytes=8) == {"a": 1}
    with pytest.raises(VerificationError, match="at most 7"):
        read_json(path, max_bytes=7)


def test_json_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{}")

    with pytest.raises(CheckpointError, match=r"absent\.json is missing"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(VerificationError, match="not UTF-8"):
        read_json(tmp_path / "binary.json")


def test_dumped_json_is_one_text_whatever_the_order_of_keys() -> None:
    assert dump_json({"b": [1, 2], "a": "é"}) == dump_json({"a": "é", "b": [1, 2]})
    assert dump_json({"b": 1, "a": None}) == '{\n  "a": null,\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"a": float("nan")})


def test_sha256_is_that_of_the_standard(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")

    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.md"
    write_text(path, "old ±")
    assert path.read_bytes() == "old ±".encode()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match=r"page\.md.*Free some space"):
            write_bytes(path, b"new")
    assert path.read_bytes() == "old ±".encode()
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
