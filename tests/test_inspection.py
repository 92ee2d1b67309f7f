"""Looking at models, releases and adapters by Hub id, over real HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import projections, random_factors, save_adapter, save_base, save_tokenizer, tiny_config
from hub_client import loram
from hub_server import HubServer

from loram_hub.pruning import prune
from loram_hub.recovery import recover
from loram_hub.release import open_metadata

STRUCTURE = ("--importance", "random", "--keep-first", "1", "--keep-last", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspection") / "base"
    return save_tokenizer(save_base(folder, tiny_config(layers=3), dtype="bfloat16"))


@pytest.fixture
def hub(tmp_path: Path, base: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        server.add_repo("org/base", base)
        yield server


def fetched(hub: HubServer) -> list[str]:
    """Names of the files that were downloaded, one for each content."""
    lines = (request.line.partition("?")[0] for request in hub.matching("GET (/.*/resolve/|/get/)"))
    return sorted({line.rpartition("/")[2] for line in lines})


def test_plan_of_a_hub_id_fetches_the_config_and_nothing_else(hub: HubServer, tmp_path: Path) -> None:
    run = loram(hub, tmp_path, "plan", "org/base", "--keep-first", "1", "--keep-last", "1", "--json")

    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["kept"][0]["channels"] == 37
    assert fetched(hub) == ["config.json"]


def test_prune_of_a_hub_id_pins_the_commit_it_took(hub: HubServer, base: Path, tmp_path: Path) -> None:
    run = loram(hub, tmp_path / "home", "prune", "org/base", tmp_path / "out", *STRUCTURE, "--json")

    assert run.returncode == 0, run.stderr
    described = json.loads(run.stdout)["base"]
    assert (described["id"], described["commit"]) == ("org/base", hub.repo("org/base").refs["main"])
    local = prune(base, tmp_path / "local", importance="random", keep_first=1, keep_last=1)
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (local.folder / weights).read_bytes()


def test_info_of_a_hub_id_does_not_fetch_weights(hub: HubServer, base: Path, tmp_path: Path) -> None:
    prune(base, tmp_path / "release", importance="random", keep_first=1, keep_last=1)
    commit = hub.add_repo("org/release", tmp_path / "release")
    run = loram(hub, tmp_path / "home", "info", "org/release", "--json")

    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["commit"] == commit
    assert "model.safetensors" not in {
        request.path.rpartition("/")[2] for request in hub.matching("(GET|HEAD) /.*/resolve/")
    }


def test_verify_compares_a_release_on_the_hub_with_its_base(hub: HubServer, tmp_path: Path) -> None:
    assert loram(hub, tmp_path / "home", "prune", "org/base", tmp_path / "out", *STRUCTURE).returncode == 0
    hub.add_repo("org/release", tmp_path / "out")

    full = loram(hub, tmp_path / "home", "verify", "org/release", "--full", "--json")
    assert full.returncode == 0, full.stderr
    assert any(re.search("bytes of kept weights, bit by bit", phrase) for phrase in json.loads(full.stdout)["checked"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_evil.py", "x/chat_template.jinja"])
def test_verify_looks_at_names_that_are_never_fetched(hub: HubServer, base: Path, tmp_path: Path, name: str) -> None:
    prune(base, tmp_path / "release", importance="random", keep_first=1, keep_last=1)
    hub.add_repo("org/sound", tmp_path / "release")
    (tmp_path / "release" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "release" / name).write_text("anything")
    hub.add_repo("org/release", tmp_path / "release")

    sound = loram(hub, tmp_path / "home", "verify", "org/sound", "--json")
    assert sound.returncode == 0, sound.stderr
    assert any("as the Hub lists them" in phrase for phrase in json.loads(sound.stdout)["checked"])
    offline = loram(hub, tmp_path / "home", "verify", "org/sound", "--json", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert any("not fetched" in gap for gap in json.loads(offline.stdout)["not_checked"])
    run = loram(hub, tmp_path / "home", "verify", "org/release")
    assert run.returncode == 3, run.stdout
    assert f"holds {name}, which its manifest does not list" in run.stderr


def test_verify_of_an_adapter_on_the_hub_compares_it_with_the_base_it_names(hub: HubServer, tmp_path: Path) -> None:
    assert loram(hub, tmp_path / "home", "prune", "org/base", tmp_path / "out", *STRUCTURE).returncode == 0
    tensors = random_factors(projections(open_metadata(tmp_path / "out").plan))
    recover(save_adapter(tmp_path / "pruned", tensors, base="x"), tmp_path / "recovered", release=tmp_path / "out")
    hub.add_repo("org/adapter", tmp_path / "recovered")
    hub.add_repo("org/pruned", tmp_path / "pruned")

    sound = loram(hub, tmp_path / "home", "verify", "org/adapter", "--json")
    assert sound.returncode == 0, sound.stderr
    assert json.loads(sound.stdout)["kind"] == "recovered adapter"
    small = loram(hub, tmp_path / "home", "verify", "org/pruned", "--base", "org/base")
    assert small.returncode == 4, small.stderr
    assert "recover" in small.stderr


def test_a_repository_that_does_not_exist_is_exit_code_5(hub: HubServer, tmp_path: Path) -> None:
    run = loram(hub, tmp_path / "home", "plan", "org/other")

    assert run.returncode == 5
    assert "org/other" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_server_that_is_not_there_is_exit_code_5(hub: HubServer, tmp_path: Path) -> None:
    run = loram(hub, tmp_path / "home", "plan", "org/base", HF_ENDPOINT="http://127.0.0.1:9")

    assert run.returncode == 5, run.stderr
    assert "Traceback" not in run.stderr
