"""New commits: how each file is to be uploaded, then all changes at once."""

from __future__ import annotations

import base64
import json
from pathlib import PurePosixPath
from typing import Any

from hub_server.accounts import Need, open_repo, require_token
from hub_server.errors import HubError
from hub_server.messages import Call, Reply, json_reply
from hub_server.metadata import read_metadata
from hub_server.repositories import open_pull
from hub_server.routing import Route
from hub_server.storage import Entry, Repo, git_sha1

LFS_SUFFIXES = (
    ".7z",
    ".bin",
    ".gguf",
    ".gz",
    ".h5",
    ".model",
    ".npy",
    ".npz",
    ".onnx",
    ".parquet",
    ".pt",
    ".pth",
    ".safetensors",
    ".zip",
)
"""What a new repository's `.gitattributes` says; other files are LFS files by size or by being binary."""


def gitattributes() -> bytes:
    """Return the one file of a new repository."""
    return "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def is_lfs(path: str, size: int, sample: bytes, threshold: int) -> bool:
    """Return whether a file of this name, size and beginning is stored with LFS."""
    return path.endswith(LFS_SUFFIXES) or size > threshold or b"\0" in sample


def check_path(path: str) -> str:
    """Return a path that stays inside the repository."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or ".git" in parts or str(PurePosixPath(*parts)) != path:
        raise HubError(400, f"Invalid path: {path}")
    return path


def _need(call: Call, revision: str) -> Need:
    return "propose" if call.flag("create_pr") or revision.startswith("refs/pr/") else "write"


def preupload(call: Call, kind: str, repo: str, revision: str) -> Reply:
    """Tell for each file whether it goes through LFS, and the hash of what is there under its path."""
    found = open_repo(call, kind, repo, _need(call, revision))
    tree, files = found.tree(revision), []
    for file in call.json()["files"]:
        path, size = check_path(file["path"]), file["size"]
        lfs = is_lfs(path, size, base64.b64decode(file["sample"]), call.hub.lfs_threshold)
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        files.append(answer | ({"oid": tree[path].digest} if path in tree else {}))
    return json_reply({"files": files, "commitOid": found.resolve(revision)})


def _added(call: Call, path: str, value: dict[str, Any]) -> Entry:
    data = base64.b64decode(value["content"], validate=True)
    if len(data) > call.hub.lfs_threshold:
        raise HubError(400, f"The file {path} is too large for a regular file; upload it with LFS")
    if path == "README.md":
        _, errors = read_metadata(data.decode("utf-8", "replace"))
        if errors:
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    oid = git_sha1(data)
    call.hub.blobs.put(oid, data)
    return Entry(len(data), oid)


def _added_lfs(call: Call, path: str, value: dict[str, Any]) -> Entry:
    size = call.hub.lfs_size(value["oid"])
    if value.get("algo") != "sha256" or size is None:
        raise HubError(400, f"LFS pointer pointed to a file that does not exist. For example: {path}")
    if value.get("size", size) != size:  # a copy carries no size
        raise HubError(400, f"The LFS file {path} has {size} bytes, not {value['size']}")
    return Entry.lfs(value["oid"], size)


def _apply(call: Call, tree: dict[str, Entry], operation: dict[str, Any]) -> None:
    """Make one change to a tree."""
    key, value = operation["key"], operation["value"]
    path = check_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
    if key == "file":
        tree[path] = _added(call, path, value)
    elif key == "lfsFile":
        tree[path] = _added_lfs(call, path, value)
    elif key == "deletedFile" and path in tree:
        del tree[path]
    elif key == "deletedFolder" and (inside := [name for name in tree if name.startswith(f"{path}/")]):
        for name in inside:
            del tree[name]
    elif key in ("deletedFile", "deletedFolder"):
        raise HubError(404, f"{path} does not exist", code="EntryNotFound")
    else:
        raise HubError(400, f"Unknown operation: {key}")


def _check_parent(found: Repo, revision: str, parent: str | None) -> None:
    if parent is not None and not found.resolve(revision).startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")


def commit(call: Call, kind: str, repo: str, revision: str) -> Reply:
    """Make all the changes in one commit, or none of them."""
    found = open_repo(call, kind, repo, _need(call, revision))
    lines = [json.loads(line) for line in call.read().splitlines() if line.strip()]
    if not lines or lines[0].get("key") != "header":
        raise HubError(400, "The first line of a commit is its header")
    header, author = lines[0]["value"], require_token(call).user
    with call.hub.lock:
        ref = revision.removeprefix("refs/heads/")
        if ref not in found.refs:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        _check_parent(found, ref, header.get("parentCommit"))
        tree = dict(found.tree(ref))
        for operation in lines[1:]:
            _apply(call, tree, operation)
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        if call.flag("create_pr"):
            pull = open_pull(found, title=header["summary"], author=author, base=ref)
            ref = f"refs/pr/{pull.number}"
            answer["pullRequestUrl"] = f"{call.hub.url}/{repo}/discussions/{pull.number}"
        message = header.get("description", "")
        made = found.commit(ref, tree, title=header["summary"], message=message, author=author)
    return json_reply(answer | {"commitOid": made.oid, "commitUrl": f"{call.hub.url}/{repo}/commit/{made.oid}"})


ROUTES = (
    Route("POST", "/api/{kind}/{repo}/preupload/{revision}", preupload),
    Route("POST", "/api/{kind}/{repo}/commit/{revision}", commit),
)
