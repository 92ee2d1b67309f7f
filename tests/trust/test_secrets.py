"""The access token goes into the Authorization header, and nowhere else: not into output, logs, tracebacks or files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from builders import projections, random_factors, save_adapter, save_base, save_tokenizer, tiny_config
from hub_client import run
from hub_server import HubServer, Token
from trust.forks import HUB, WEIGHTS, Forks

from loram_hub.release import open_metadata

CANARY = "hf_CaNaRyToKeNtHaTmUsTnOtSiNg"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub"), tokens={CANARY: Token("alice", "write")}) as server:
        base = save_tokenizer(save_base(server.folder / "base", tiny_config(layers=3), dtype="bfloat16"))
        (base / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
        (base / "LICENSE").write_text("MIT License. Permission is hereby granted, free of charge, ...\n")
        server.add_repo("org/base", base, private=True)
        yield server


def holders(*folders: Path) -> list[Path]:
    """Files in which the token stands."""
    paths = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if CANARY.encode() in path.read_bytes()]


@pytest.mark.parametrize("given", ["environment", "option"])
def test_the_token_sings_nowhere(hub: HubServer, tmp_path: Path, given: str) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    spoken: list[str] = []

    token = CANARY if given == "environment" else None
    with Forks((*WEIGHTS, *HUB), hub.environment(home, token, xet=False)) as forks:

        def loram(*arguments: str | Path, code: int = 0, option: bool = True) -> None:
            by_option = ["--token", CANARY] if given == "option" and option else []
            done = forks.run("--debug", *arguments, *by_option)
            assert done.status == code, done.output
            spoken.append(done.output)

        use_everything(loram, hub, work, given)

    assert "Traceback" in spoken[-1]
    assert not [text for text in spoken if CANARY in text]
    assert holders(work, home) == []
    published = hub.repo(f"alice/release-{given}").files() | hub.repo(f"alice/adapter-{given}").files()
    assert not [name for name, data in published.items() if CANARY.encode() in data]
    assert not [request.line for request in hub.requests if CANARY in request.line]
    assert [request for request in hub.requests if request.token_present]


def use_everything(loram: Callable[..., None], hub: HubServer, work: Path, given: str) -> None:
    """Run every command that may talk to the Hub, also where it fails."""
    structure = ("--importance", "random", "--keep-first", "1", "--keep-last", "1", "--pruning-ratio", "0.4")
    release, adapter = work / "release", work / "adapter"
    loram("prune", "org/base", release, *structure, "--json")
    loram("push", release, f"alice/release-{given}", "--json")
    loram("verify", f"alice/release-{given}")
    loram("info", f"alice/release-{given}")
    loram("card", release, "--license", "mit", option=False)
    save_adapter(
        work / "pruned", random_factors(projections(open_metadata(release).plan)), base=f"alice/release-{given}"
    )
    loram("recover", work / "pruned", adapter)
    loram("push", adapter, f"alice/adapter-{given}")
    loram("merge", "org/base", adapter, work / "merged")
    # Everything that can go wrong, with the traceback.
    for status in (400, 401, 403, 404):  # at others the client waits and tries again
        hub.fault("", times=-1, status=status)
        loram("push", release, "alice/other", code=1)
        loram("verify", "alice/other", code=1)
        hub.faults.clear()


def test_library_errors_do_not_hold_the_token(hub: HubServer, tmp_path: Path) -> None:
    code = """
import sys, traceback
from loram_hub.hub import resolve
from loram_hub.pushing import push
token = sys.argv[1]
for call in (lambda: resolve("alice/none", token=token), lambda: push("/nowhere", "alice/x", token=token)):
    try:
        call()
    except Exception as err:
        found = "".join(traceback.format_exception(err)) + repr(err) + repr(vars(err))
        print("none" in found or "nowhere" in found, token in found)
"""
    done = run(hub, tmp_path / "home", "-c", code, CANARY, token=None, xet=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"] * 2


def test_the_canary_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "leak.json").write_text(f'{{"token": "{CANARY}"}}')
    assert holders(tmp_path) == [tmp_path / "inside" / "leak.json"]
    shutil.rmtree(tmp_path / "inside")
    assert holders(tmp_path) == []
