"""Push to or pull from the loopback Hub with a fault at one request after the other; prints one JSON line per case.

A process of its own: huggingface_hub reads the Hub's address when it is imported.

    python faults.py push|pull lfs|xet FAULT RELEASE SHARD SHARDS
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from hub_server import HubServer

FAULTS: dict[str, dict[str, Any]] = {
    "closed": {"drop_after": 0},
    "lost": {"lost_response": True},
    "reset": {"reset": True},
    "cut": {"drop_after": 300},
    "busy": {"status": 503},
    "corrupt": {"corrupt_at": 40},
}


def main(direction: str, transfer: str, fault: str, release: Path, shard: int, shards: int) -> None:
    with tempfile.TemporaryDirectory() as folder, HubServer(Path(folder) / "hub") as hub:
        chunks = {"HF_XET_CHUNK_CACHE_SIZE_BYTES": "0"}  # else a second download would not ask the server
        os.environ.update(hub.environment(Path(folder) / "home", xet=transfer == "xet", **chunks))
        sweep = {"push": sweep_pushes, "pull": sweep_pulls}[direction]
        sweep(hub, release, Path(folder), FAULTS[fault], shard, shards)


def report(number: int, request: str, outcome: str, **result: Any) -> None:
    print(json.dumps({"request": number, "line": request, "outcome": outcome} | result), flush=True)


def sweep_pushes(hub: HubServer, release: Path, _: Path, fault: dict[str, Any], shard: int, shards: int) -> None:
    from loram_hub.hub import UploadFile, look_up, publish_files

    def push(repo: str) -> str:
        contents = {
            p.relative_to(release).as_posix(): p.read_bytes() for p in sorted(release.rglob("*")) if p.is_file()
        }
        contents["repo.txt"] = repo.encode()  # content of its own, which the Hub cannot have from another case
        contents["salt.safetensors"] = hashlib.sha512(repo.encode()).digest() * 100
        files = [
            UploadFile(name=name, content=data, size=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in contents.items()
        ]
        expected.update(contents)
        seen = look_up(repo, refs=True)
        return publish_files(
            files, repo, message="Push", private=False, gated="auto", seen=seen, tag="v1", collection="Sweep"
        ).commit

    expected: dict[str, bytes] = {}
    push("alice/first")  # also makes the collection
    begin = len(hub.requests)
    push("alice/count")
    total = len(hub.requests) - begin
    for number in range(shard, total, shards):
        repo = f"alice/case-{number}"
        expected.clear()
        begin = len(hub.requests)
        hub.fault_at(number, **fault)
        outcome = attempt(lambda repo=repo: push(repo))
        hub.faults.clear()
        line = hub.requests[begin + number].line
        repository = hub.repos.get(("models", repo))
        seen = [] if repository is None else [set(commit.tree) for commit in repository.history("main")]
        partial = [tree for tree in seen if tree != {".gitattributes"} and not set(expected) <= tree]
        again = push(repo)
        repository = hub.repo(repo)
        files = repository.files()
        del files[".gitattributes"]
        report(
            number,
            line,
            outcome,
            total=total,
            reader_saw_part=bool(partial),
            same=files == expected,
            commits=len(repository.history("main")),
            branches=sorted(repository.refs),
            tag=repository.tags.get("v1") == again,
            public=not repository.private,
            gated=repository.gated,
        )


def sweep_pulls(hub: HubServer, release: Path, folder: Path, fault: dict[str, Any], shard: int, shards: int) -> None:
    from huggingface_hub import HfApi

    from loram_hub.hub import fetch_release

    def upload(repo: str) -> None:
        """Each case has a repository of its own: clients keep xet's tokens for as long as they live."""
        HfApi().create_repo(repo)
        HfApi().upload_folder(repo_id=repo, folder_path=release)
        hub.requests.clear()

    def pull(repo: str) -> str:
        source, _ = fetch_release(repo, cache_dir=folder / repo)
        wanted = (path for path in release.rglob("*") if path.is_file() and path.name != "README.md")
        same = all((source.folder / path.name).read_bytes() == path.read_bytes() for path in wanted)
        return "ok" if same else "other bytes"

    upload("org/count")
    pull("org/count")
    # Downloads run side by side, in no fixed order: requests are known by what they ask for, not by their number.
    lines = list(dict.fromkeys(request.line.partition("?")[0] for request in hub.requests))
    for number, line in list(enumerate(lines))[shard::shards]:
        repo = f"org/case-{number}"
        upload(repo)
        pattern = re.sub(r"/[0-9a-f]{40}(?=/|$)", "/[0-9a-f]{40}", line.replace("org/count", repo))
        ordered = hub.fault(rf"^{pattern}(\?|$)", **fault)
        outcome = attempt(lambda repo=repo: pull(repo))
        hub.faults.clear()
        again = attempt(lambda repo=repo: pull(repo))
        report(number, line, outcome, total=len(lines), hits=ordered.hits, again=again)


def attempt(action: Any) -> str:
    from loram_hub.errors import LoramError

    try:
        return str(action())
    except LoramError as err:
        return type(err).__name__


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(arguments[0], arguments[1], arguments[2], Path(arguments[3]), int(arguments[4]), int(arguments[5]))
