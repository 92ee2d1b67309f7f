"""What can be read about a repository without its files: its description, its tree, its commits."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlencode

from hub_server.accounts import open_repo
from hub_server.errors import HubError
from hub_server.messages import Call, Reply, json_reply
from hub_server.metadata import derived_tags, read_metadata
from hub_server.routing import Route
from hub_server.storage import Entry, Repo, Tree, git_sha1, lfs_pointer

_COMMITS_PER_PAGE = 50


def _metadata(found: Repo, tree: Tree) -> dict[str, Any] | None:
    readme = tree.get("README.md")
    if readme is None:
        return None
    return read_metadata(found.read(readme).read_text(encoding="utf-8"))[0]


def _lfs(entry: Entry) -> dict[str, Any]:
    assert entry.sha256 is not None
    return {"size": entry.size, "pointerSize": len(lfs_pointer(entry.sha256, entry.size))}


def _sibling(path: str, entry: Entry, *, blobs: bool) -> dict[str, Any]:
    described: dict[str, Any] = {"rfilename": path}
    if blobs:
        described |= {"size": entry.size, "blobId": entry.oid}
        described |= {"lfs": {"sha256": entry.sha256, **_lfs(entry)}} if entry.sha256 else {}
    return described


def describe_repo(call: Call, kind: str, repo: str, revision: str = "main") -> Reply:
    """Describe a repository at a revision, as `model_info` returns it."""
    found = open_repo(call, kind, repo, "see")
    commit = found.commits[found.resolve(revision)]
    card = _metadata(found, commit.tree)
    return json_reply(
        {
            "_id": git_sha1(found.id.encode())[:24],
            "id": found.id,
            "modelId": found.id,
            "author": found.namespace,
            "sha": commit.oid,
            "private": found.private,
            "gated": found.gated,
            "disabled": False,
            "createdAt": found.created,
            "lastModified": commit.date,
            "downloads": 0,
            "likes": 0,
            "cardData": card,
            "library_name": (card or {}).get("library_name"),
            "pipeline_tag": (card or {}).get("pipeline_tag"),
            "tags": derived_tags(card or {}),
            "siblings": [_sibling(*item, blobs=call.flag("blobs")) for item in sorted(commit.tree.items())],
        }
    )


def _file(call: Call, path: str, entry: Entry) -> dict[str, Any]:
    described: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
    if entry.sha256:
        described["lfs"] = {"oid": entry.sha256, **_lfs(entry)}
        if xet_hash := call.hub.xet_hash(entry.sha256):
            described["xetHash"] = xet_hash
    return described


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": git_sha1(path.encode())}


def _folders(tree: Tree) -> set[str]:
    return {str(parent) for path in tree for parent in PurePosixPath(path).parents if parent.name}


def list_tree(call: Call, kind: str, repo: str, revision: str, path: str = "") -> Reply:
    """List files and folders, page by page."""
    found = open_repo(call, kind, repo, "see")
    tree = found.tree(revision)
    folders = _folders(tree)
    if path and path not in folders:
        raise HubError(404, f'{path} does not exist on "{revision}"', code="EntryNotFound")
    inside = [name for name in sorted(folders | set(tree)) if not path or name.startswith(f"{path}/")]
    if not call.flag("recursive"):
        depth = len(PurePosixPath(path).parts) + 1
        inside = [name for name in inside if len(PurePosixPath(name).parts) == depth]
    entries = [_file(call, name, tree[name]) if name in tree else _folder(name) for name in inside]
    return _page(call, entries, size=call.hub.page_size)


def _page(call: Call, entries: list[dict[str, Any]], *, size: int) -> Reply:
    """Return one page of a list; the header `Link` leads to the next."""
    start = int(call.query.get("cursor", 0))
    if start + size >= len(entries):
        return json_reply(entries[start:])
    query = urlencode({**call.query, "cursor": start + size})
    return json_reply(
        entries[start : start + size], headers={"Link": f'<{call.hub.url}{call.path}?{query}>; rel="next"'}
    )


def describe_paths(call: Call, kind: str, repo: str, revision: str) -> Reply:
    """Describe the paths that exist among those asked for."""
    found = open_repo(call, kind, repo, "see")
    tree, wanted = found.tree(revision), parse_qs(call.read().decode()).get("paths", [])
    folders = _folders(tree)
    return json_reply(
        [
            _file(call, path, tree[path]) if path in tree else _folder(path)
            for path in wanted
            if path in tree or path in folders
        ]
    )


def list_commits(call: Call, kind: str, repo: str, revision: str) -> Reply:
    """List the commits that lead to a revision, the newest first."""
    found = open_repo(call, kind, repo, "see")
    commits = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        }
        for commit in found.history(revision)
    ]
    return _page(call, commits, size=_COMMITS_PER_PAGE)


ROUTES = (
    Route("GET", "/api/{kind}/{repo}/tree/{revision}", list_tree),
    Route("GET", "/api/{kind}/{repo}/tree/{revision}/{path}", list_tree),
    Route("POST", "/api/{kind}/{repo}/paths-info/{revision}", describe_paths),
    Route("GET", "/api/{kind}/{repo}/commits/{revision}", list_commits),
    Route("GET", "/api/{kind}/{repo}/revision/{revision}", describe_repo),
    Route("GET", "/api/{kind}/{repo}", describe_repo),
)
