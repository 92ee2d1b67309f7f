"""A hash is remembered for as long as the file is the one that was hashed, and no longer."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants

from loram_hub.digests import check_once, git_sha1_of, remembered_sha256
from loram_hub.files import sha256_of


class Reader:
    """Hashes files and counts how often."""

    __name__ = "reader"

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self, path: Path) -> str:
        self.reads += 1
        return sha256_of(path)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    time.sleep(0.15)  # younger files are not remembered: a change within a tick of the clock could not be seen
    return path


def test_a_file_that_did_not_change_is_read_once(file: Path) -> None:
    read = Reader()
    expected = hashlib.sha256(b"content").hexdigest()

    assert [remembered_sha256(file, read=read) for _ in range(3)] == [expected] * 3
    assert read.reads == 1


def test_a_link_to_the_file_is_the_file(file: Path, tmp_path: Path) -> None:
    read = Reader()
    (tmp_path / "link").symlink_to(file)

    assert remembered_sha256(file, read=read) == remembered_sha256(tmp_path / "link", read=read)
    assert read.reads == 1


@pytest.mark.parametrize("what", ["rewrite", "one byte", "replace", "old times"])
def test_a_changed_file_is_read_again(file: Path, what: str) -> None:
    read = Reader()
    remembered_sha256(file, read=read)
    before = file.stat()
    if what == "rewrite":
        file.write_bytes(b"CONTENT")
    elif what == "one byte":
        with file.open("r+b") as opened:
            opened.write(b"C")
    else:
        other = file.with_name("other")
        other.write_bytes(b"CONTENT")
        other.replace(file)
    if what == "old times":  # as if nothing had happened; the time of this change cannot be set
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert remembered_sha256(file, read=read) == sha256_of(file) != hashlib.sha256(b"content").hexdigest()
    assert read.reads == 2


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    read = Reader()
    (tmp_path / "new").write_bytes(b"first")
    remembered_sha256(tmp_path / "new", read=read)
    remembered_sha256(tmp_path / "new", read=read)

    assert read.reads == 2


def test_what_one_reader_checked_is_not_remembered_for_another(file: Path) -> None:
    stricter = Reader()
    stricter.__name__ = "stricter"
    remembered_sha256(file, read=Reader())
    remembered_sha256(file, read=stricter)

    assert stricter.reads == 1


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"sha256": 1}', b"\xff"])
def test_a_damaged_record_only_costs_time(file: Path, cache: Path, damage: bytes) -> None:
    remembered_sha256(file)
    (record,) = (cache / "loram" / "sha256").iterdir()
    record.write_bytes(damage)

    assert remembered_sha256(file) == hashlib.sha256(b"content").hexdigest()


def test_a_cache_that_cannot_be_written_only_costs_time(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blocked").write_bytes(b"a file where a folder should be")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "blocked"))

    assert remembered_sha256(file) == hashlib.sha256(b"content").hexdigest()


@pytest.mark.parametrize("content", [b"", b"text\n", bytes(3_000_000)])
def test_blob_ids_are_gits_own(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    run = subprocess.run(
        ["git", "hash-object", "--no-filters", str(tmp_path / "file")], capture_output=True, text=True, check=True
    )

    assert git_sha1_of(content) == git_sha1_of(tmp_path / "file") == run.stdout.strip()


def test_a_check_that_passed_runs_once_for_the_same_content() -> None:
    passed: list[str] = []

    for content in ("a" * 64, "a" * 64, "b" * 64, "a" * 64):
        check_once(content, partial(passed.append, content))

    assert passed == ["a" * 64, "b" * 64]


def test_a_check_that_failed_runs_again() -> None:
    def fail() -> None:
        raise ValueError("not sound")

    for _ in range(2):
        with pytest.raises(ValueError, match="not sound"):
            check_once("c" * 64, fail)


def test_a_check_passes_where_nothing_can_be_remembered(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    passed: list[int] = []

    check_once("d" * 64, lambda: passed.append(1))
    check_once("d" * 64, lambda: passed.append(2))

    assert passed == [1, 2]
