"""Hub ids, over real HTTP: a server on this machine that answers as the Hub does for a few files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from builders import save_base, save_tokenizer, tiny_config

from loram_hub.pruning import prune

COMMIT = "c0ffee" * 6 + "c0de"


def _listing(repo_id: str, folder: Path, *, tree: bool) -> bytes:
    files = sorted(folder.iterdir())
    if tree:
        sha1 = {path: hashlib.sha1(path.read_bytes()).hexdigest() for path in files}
        return json.dumps(
            [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": sha1[p]} for p in files]
        ).encode()
    siblings = [{"rfilename": path.name} for path in files]
    return json.dumps({"id": repo_id, "sha": COMMIT, "siblings": siblings}).encode()


class _Hub(ThreadingHTTPServer):
    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requested: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: _Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requested.append(f"{self.command} {self.path}")
        repositories = self.server.repositories
        found = next((r for r in repositories if f"/{r}/" in f"{self.path}/".replace("?", "/")), None)
        if found is None:
            self.answer(b"not found", 404, **{"X-Error-Code": "RepoNotFound"})
        elif self.path.startswith("/api/"):
            self.answer(_listing(found, repositories[found], tree="/tree/" in self.path))
        else:
            self.answer_with_file(repositories[found] / self.path.rpartition("/")[2])

    def answer_with_file(self, file: Path) -> None:
        if not file.is_file():
            return self.answer(b"not found", 404, **{"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        return self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')

    def answer(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repositories with one commit; yields the endpoint and the requested paths."""
    server = _Hub(repositories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.requested
    finally:
        server.shutdown()
        server.server_close()


def loram(endpoint: str, home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: huggingface_hub reads its endpoint when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_HOME")} | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.getcwd(),
    }
    return subprocess.run(
        [sys.executable, "-m", "loram_hub", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspection") / "base"
    return save_tokenizer(save_base(folder, tiny_config(layers=3), dtype="bfloat16"))


def test_plan_of_a_hub_id_fetches_the_config_and_nothing_else(base: Path, tmp_path: Path) -> None:
    with hub({"org/base": base}) as (endpoint, requested):
        run = loram(endpoint, tmp_path, "plan", "org/base", "--keep-first", "1", "--keep-last", "1", "--json")

    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["kept"][0]["channels"] == 37
    fetched = [path for path in requested if path.startswith("GET") and "/resolve/" in path]
    assert [path.rpartition("/")[2] for path in fetched] == ["config.json"]


def test_prune_of_a_hub_id_pins_the_commit_it_took(base: Path, tmp_path: Path) -> None:
    structure = ("--importance", "random", "--keep-first", "1", "--keep-last", "1")
    with hub({"org/base": base}) as (endpoint, _):
        run = loram(endpoint, tmp_path / "home", "prune", "org/base", tmp_path / "out", *structure, "--json")

    assert run.returncode == 0, run.stderr
    described = json.loads(run.stdout)["base"]
    assert (described["id"], described["commit"]) == ("org/base", COMMIT)
    local = prune(base, tmp_path / "local", importance="random", keep_first=1, keep_last=1)
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (local.folder / weights).read_bytes()


def test_info_of_a_hub_id_does_not_fetch_weights(base: Path, tmp_path: Path) -> None:
    prune(base, tmp_path / "release", importance="random", keep_first=1, keep_last=1)
    with hub({"org/release": tmp_path / "release"}) as (endpoint, requested):
        run = loram(endpoint, tmp_path / "home", "info", "org/release", "--json")

    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["commit"] == COMMIT
    assert not [path for path in requested if "model.safetensors" in path and "/resolve/" in path]


def test_a_repository_that_does_not_exist_is_exit_code_5(base: Path, tmp_path: Path) -> None:
    with hub({"org/base": base}) as (endpoint, _):
        run = loram(endpoint, tmp_path, "plan", "org/other")

    assert run.returncode == 5
    assert "org/other" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_server_that_is_not_there_is_exit_code_5(tmp_path: Path) -> None:
    run = loram("http://127.0.0.1:9", tmp_path, "plan", "org/base")

    assert run.returncode == 5, run.stderr
    assert "Traceback" not in run.stderr
