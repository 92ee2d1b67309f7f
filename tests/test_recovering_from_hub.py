"""Recovery from a release on the Hub that was replaced by one of equal sizes and another plan."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import SEVEN, projections, random_factors, save_adapter, save_base, save_tokenizer, tiny_config
from hub_client import loram, python
from hub_server import HubServer
from safetensors.numpy import load_file

from loram_hub.hub.fetching import cached_commits
from loram_hub.pruning import prune
from loram_hub.release import open_metadata

NAME = "alice/mv"
FETCH = """
from loram_hub.hub import fetch_release
for revision in sys.argv[2:]:
    fetch_release(sys.argv[1], revision=revision)
print(0)
"""
# Adapters are put on the model that is opened; recovered is the live one.
LIVE = """
from peft import LoraConfig, get_peft_model
from loram_hub import AutoLoramModel, recover
model = AutoLoramModel.from_pretrained(sys.argv[1], revision=sys.argv[2] or None)
live = get_peft_model(model, LoraConfig(r=2, target_modules=sys.argv[5].split(","), task_type="CAUSAL_LM"))
recovered = recover(live, sys.argv[3], release=sys.argv[4] or None)
print(json.dumps([recovered.release_commit, recovered.assumed]))
"""


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two releases of equal sizes, which keep different groups."""
    folder = tmp_path_factory.mktemp("releases")
    base = save_tokenizer(save_base(folder / "base", tiny_config(layers=3), dtype="bfloat16"))
    first, second = (
        prune(
            base, folder / f"{seed}", importance="random", pruning_ratio=0.5, keep_first=1, keep_last=1, seed=seed
        ).folder
        for seed in (0, 1)
    )
    plans = [open_metadata(folder).plan for folder in (first, second)]
    assert plans[0].layers == plans[1].layers
    assert plans[0].digest != plans[1].digest
    return first, second


class Moved:
    """A Hub on which a release was replaced, and the machine of someone who trained on the first one."""

    def __init__(self, hub: HubServer, releases: tuple[Path, Path], folder: Path) -> None:
        self.hub, self.releases, self.folder = hub, releases, folder
        self.home, self.out = folder / "home", folder / "out"
        self.first = hub.add_repo(NAME, releases[0])
        hub.repo(NAME).tags["v1"] = self.first
        self.second = hub.add_repo(NAME, releases[1])
        self.digests = [open_metadata(release).plan.digest for release in releases]
        self.tensors = random_factors(projections(open_metadata(releases[0]).plan))
        self.adapter()

    def adapter(self, **changes: Any) -> None:
        """Write the adapter as PEFT does, or with other settings."""
        save_adapter(self.folder / "ad-v1", self.tensors, **({"base": NAME} | changes))

    def fetch(self, *revisions: str) -> None:
        """Bring the weights of revisions to the machine, as training on them does."""
        python(self.hub, self.home, FETCH, NAME, *revisions)

    def recover(self, *options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Recover the adapter with the command."""
        shutil.rmtree(self.out, ignore_errors=True)
        return loram(self.hub, self.home, "recover", self.folder / "ad-v1", self.out, "--json", *options, **environment)

    def assert_took(self, done: subprocess.CompletedProcess[str], number: int, *, assumed: bool = False) -> None:
        """Assert that a recovery took the first or second state of the release, and put every row where that has it."""
        commit = (self.first, self.second)[number]
        assert done.returncode == 0, done.stderr
        assert "cannot be compared" not in done.stderr
        result = json.loads(done.stdout)
        assert (result["release_commit"], result["assumed"]) == (commit, assumed)
        release = json.loads((self.out / "loram.json").read_text())["release"]
        assert release == {"id": NAME, "commit": commit, "plan_sha256": self.digests[number]}
        kept = open_metadata(self.releases[number]).plan.kept[1]["channels"]
        factor = load_file(self.out / "adapter_model.safetensors")
        (rows,) = factor["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].any(axis=1).nonzero()
        assert rows.tolist() == kept.tolist()

    def assert_refused(self, done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
        """Assert that a recovery failed with an exit code and a message, and wrote nothing."""
        assert done.returncode == code, done.stdout + done.stderr
        message = json.loads(done.stdout)["error"]["message"]
        assert [word for word in words if word not in message] == [], message
        assert not self.out.exists()


@pytest.fixture
def moved(tmp_path: Path, releases: tuple[Path, Path]) -> Iterator[Moved]:
    with HubServer(tmp_path / "hub") as hub:
        yield Moved(hub, releases, tmp_path)


def test_the_revision_whose_weights_are_here_is_taken_though_the_release_has_moved_on(moved: Moved) -> None:
    moved.fetch("v1")
    # Without the listings that the client keeps by commit, it asks the Hub unless told not to.
    shutil.rmtree(moved.home / "hub" / "models--alice--mv" / "trees", ignore_errors=True)
    asked = len(moved.hub.requests)
    done = moved.recover()

    moved.assert_took(done, 0)
    assert moved.first in done.stderr
    assert "worthless" not in done.stderr
    assert len(moved.hub.requests) == asked  # all of it is here, so that it works when the repository is gone, too

    moved.assert_took(moved.recover("--release", NAME), 0)
    moved.assert_took(moved.recover(HF_HUB_OFFLINE="1"), 0)


def test_metadata_of_a_later_revision_does_not_count_as_trained_on(moved: Moved) -> None:
    moved.fetch("v1")
    described = loram(moved.hub, moved.home, "info", NAME, "--json")
    assert described.returncode == 0, described.stderr
    cache = moved.home / "hub"
    assert (cache / "models--alice--mv" / "snapshots" / moved.second / "loram.json").is_file()

    assert cached_commits(NAME, cache) == [moved.first]
    moved.assert_took(moved.recover(), 0)


@pytest.mark.parametrize("named", [True, False], ids=["with --release", "without"])
@pytest.mark.parametrize("state", ["fresh", "v1 here", "both here", "main described"])
def test_a_revision_that_the_user_gives_wins(moved: Moved, state: str, named: bool) -> None:
    if state == "main described":
        assert loram(moved.hub, moved.home, "info", NAME).returncode == 0
    elif state != "fresh":
        moved.fetch("v1", *(["main"] if state == "both here" else []))
    release = ["--release", NAME] if named else []

    moved.assert_took(moved.recover(*release, "--revision", "v1"), 0)
    moved.assert_took(moved.recover(*release, "--revision", moved.first), 0)
    moved.assert_took(moved.recover(*release, "--revision", "main"), 1)


def test_without_weights_here_the_latest_is_taken_with_a_warning_and_the_result_says_so(moved: Moved) -> None:
    done = moved.recover()

    moved.assert_took(done, 1, assumed=True)
    assert "Nothing says which revision of alice/mv" in done.stderr
    assert "worthless" in done.stderr
    dry = loram(
        moved.hub, moved.home, "--quiet", "recover", moved.folder / "ad-v1", moved.folder / "o", "--dry-run", "--json"
    )
    assert json.loads(dry.stdout)["assumed"] is True
    assert "worthless" in dry.stderr

    # What that left in the cache is no evidence for the next run.
    moved.assert_took(moved.recover(), 1, assumed=True)


def test_weights_of_different_plans_are_a_question_to_the_user(moved: Moved) -> None:
    moved.fetch("v1", "main")
    done = moved.recover()

    moved.assert_refused(done, 2, NAME, "--revision", *(digest[:12] for digest in moved.digests))
    message = json.loads(done.stdout)["error"]["message"]
    assert -1 < message.index(moved.second) < message.index(moved.first)  # the one that arrived last comes first
    for number, commit in enumerate((moved.first, moved.second)):
        moved.assert_took(moved.recover("--revision", commit), number)


def test_two_commits_of_one_plan_are_no_question(moved: Moved) -> None:
    files = {path.name: path.read_bytes() for path in moved.releases[0].iterdir()}
    third = moved.hub.add_repo(NAME, files | {"README.md": b"# Another card\n"})
    moved.fetch("v1", third)
    done = moved.recover()

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["release_commit"] == third


def test_a_recorded_plan_chooses_among_the_revisions_that_are_here(moved: Moved) -> None:
    moved.fetch("v1", "main")
    (moved.folder / "ad-v1" / "loram.json").write_text(json.dumps({"plan_sha256": moved.digests[0]}))
    moved.assert_took(moved.recover(), 0)

    shutil.rmtree(moved.home)
    moved.fetch("main")
    moved.assert_refused(moved.recover(), 4, moved.digests[0][:12], moved.digests[1][:12])


def test_a_recorded_plan_that_the_latest_has_makes_it_no_assumption(moved: Moved) -> None:
    (moved.folder / "ad-v1" / "loram.json").write_text(json.dumps({"plan_sha256": moved.digests[1]}))
    done = moved.recover()

    moved.assert_took(done, 1)
    assert "worthless" not in done.stderr


def test_a_revision_that_the_adapter_records_is_held_against_the_users(moved: Moved) -> None:
    moved.adapter(revision=moved.first)
    moved.fetch("main")
    moved.assert_took(moved.recover(), 0)
    moved.assert_took(moved.recover("--release", NAME), 0)

    moved.assert_refused(moved.recover("--revision", "main"), 4, moved.digests[0][:12], moved.digests[1][:12])


def test_another_release_that_the_user_gives_wins_and_is_compared_with_what_is_here(moved: Moved) -> None:
    moved.fetch("v1")
    same = moved.recover("--release", moved.releases[0])
    assert same.returncode == 0, same.stderr
    assert "cannot be compared" not in same.stderr
    result = json.loads(same.stdout)
    assert (result["release_commit"], result["assumed"]) == (None, False)

    other = moved.recover("--release", moved.releases[1])
    assert other.returncode == 0, other.stderr
    assert "cannot be compared" in other.stderr


def test_the_snapshot_folder_of_a_revision_can_be_given(moved: Moved) -> None:
    moved.fetch("v1", "main")
    for number, commit in enumerate((moved.first, moved.second)):
        snapshot = moved.home / "hub" / "models--alice--mv" / "snapshots" / commit
        moved.assert_took(moved.recover("--release", snapshot), number)


def test_metadata_that_was_damaged_in_the_cache_does_not_turn_recovery_to_the_latest(moved: Moved) -> None:
    moved.fetch("v1")
    index = moved.home / "hub" / "models--alice--mv" / "snapshots" / moved.first / "mask_index.safetensors"
    data = bytearray(index.read_bytes())
    data[-1] ^= 1
    index.resolve().write_bytes(data)

    moved.assert_took(moved.recover(), 0)


def test_a_revision_with_weights_that_is_no_release_is_passed_over(moved: Moved) -> None:
    files = {path.name: path.read_bytes() for path in moved.releases[0].iterdir() if path.name != "loram.json"}
    plain = moved.hub.add_repo(NAME, files)
    moved.fetch("v1")
    python(
        moved.hub, moved.home,
        "from huggingface_hub import snapshot_download\nsnapshot_download(sys.argv[1])\nprint(0)", NAME,
    )  # fmt: skip
    assert cached_commits(NAME, moved.home / "hub") == [plain, moved.first]
    done = moved.recover()

    moved.assert_took(done, 0)
    assert plain in done.stderr


@pytest.mark.parametrize("release", ["", NAME], ids=["alone", "with the release's name"])
def test_a_live_model_recovers_with_the_revision_it_was_opened_at(moved: Moved, release: str) -> None:
    moved.fetch("main")
    taken = python(moved.hub, moved.home, LIVE, NAME, "v1", moved.out, release, ",".join(SEVEN))

    assert taken == [moved.first, False]


def test_cached_commits_are_those_with_weights_and_the_last_to_arrive_comes_first(tmp_path: Path) -> None:
    snapshots = tmp_path / "models--org--name" / "snapshots"
    for place, (commit, name) in enumerate(
        (
            ("a" * 40, "model-00001-of-00002.safetensors"),
            ("c" * 40, "model.safetensors"),
            ("b" * 40, "model.safetensors"),
            ("d" * 40, "mask_index.safetensors"),
            ("main", "model.safetensors"),
        )
    ):
        (snapshots / commit).mkdir(parents=True)
        (snapshots / commit / name).touch()
        os.utime(snapshots / commit / name, (place, place))
    (snapshots / ("e" * 40)).mkdir()
    (snapshots / ("e" * 40) / "model.safetensors").symlink_to(tmp_path / "a blob that was removed")

    assert cached_commits("org/name", tmp_path) == ["b" * 40, "c" * 40, "a" * 40]
    assert cached_commits("org/other", tmp_path) == []
    assert cached_commits("org/name", tmp_path / "nowhere") == []
