"""What the server keeps, all of it on disk: contents by their hash, commits with parents, and the refs that move.

A server that is started on the same folder again continues where the last one stopped, however it stopped:
files are written beside their place and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hub_server.errors import HubError


def now() -> str:
    """Return the time as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def git_sha1(data: bytes) -> str:
    """Return the name git gives to the content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """Return the text that git holds in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def write_json(path: Path, value: Any) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    beside.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(beside, path)


@dataclass(frozen=True, slots=True)
class Incoming:
    """Bytes that arrived and have no name yet."""

    path: Path
    size: int
    sha256: str
    md5: str


class Blobs:
    """Contents under their hash: git's sha1 for regular files, sha256 for LFS files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "blobs"
        self._incoming = folder / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Return where a content lies, or would."""
        return self._folder / digest[:2] / digest

    def has(self, digest: str) -> bool:
        """Return whether a content is here."""
        return self.path(digest).exists()

    def put(self, digest: str, data: bytes) -> None:
        """Store a content, once."""
        if not self.has(digest):
            self.adopt(self.receive([data]).path, digest)

    def receive(self, pieces: Iterable[bytes]) -> Incoming:
        """Write what arrives; nothing stays of an upload that is cut short."""
        path = self._incoming / secrets.token_hex(8)
        sha256, md5, size = hashlib.sha256(), hashlib.md5(), 0
        try:
            with path.open("wb") as file:
                for piece in pieces:
                    size += file.write(piece)
                    sha256.update(piece)
                    md5.update(piece)
        except BaseException:
            path.unlink()
            raise
        return Incoming(path, size, sha256.hexdigest(), md5.hexdigest())

    def adopt(self, path: Path, digest: str) -> None:
        """Give bytes that arrived their name."""
        self.path(digest).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, self.path(digest))

    def part(self, digest: str, number: int) -> Path:
        """Return where a part of a multipart upload waits for the others."""
        return self._incoming / f"{digest}.{number}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit."""

    size: int
    oid: str
    """git's sha1 of the content, or of the pointer of an LFS file."""
    sha256: str | None = None
    """Of the content of an LFS file."""

    @classmethod
    def lfs(cls, sha256: str, size: int) -> Entry:
        """Return the entry of an LFS file."""
        return cls(size, git_sha1(lfs_pointer(sha256, size)), sha256)

    @property
    def digest(self) -> str:
        """The hash under which the content is stored."""
        return self.sha256 or self.oid


Tree = Mapping[str, Entry]
"""The files of a commit by path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """A state of a repository; its id depends on all of it."""

    oid: str
    parent: str | None
    tree: Tree
    title: str
    message: str
    author: str
    date: str

    @classmethod
    def load(cls, path: Path) -> Commit:
        """Read a commit."""
        value = json.loads(path.read_text(encoding="utf-8"))
        tree = {name: Entry(**entry) for name, entry in value.pop("tree").items()}
        return cls(tree=tree, **value)


@dataclass(kw_only=True)
class Pull:
    """A pull request; its commits are under `refs/pr/NUMBER`."""

    number: int
    title: str
    author: str
    created: str
    status: str = "draft"
    base: str = "main"


@dataclass(kw_only=True)
class Repo:
    """A repository. What changes it writes it to disk before anyone is told."""

    kind: str
    """`models`, `datasets` or `spaces`."""
    id: str
    folder: Path
    read: Callable[[Entry], Path]
    """Gives the path of a content."""
    private: bool = False
    gated: bool | str = False
    """False, `auto` or `manual`."""
    refs: dict[str, str] = field(default_factory=dict)
    """Commit by branch (`main`) and by pull request (`refs/pr/1`)."""
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)
    allowed: set[str] = field(default_factory=set)
    """Who was let into a gated repository."""
    created: str = field(default_factory=now)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        """The user or organization it belongs to."""
        return self.id.partition("/")[0]

    @property
    def branches(self) -> dict[str, str]:
        """Commit by branch."""
        return {name: oid for name, oid in self.refs.items() if not name.startswith("refs/")}

    @property
    def pull_refs(self) -> dict[str, str]:
        """Commit by pull request's ref."""
        return {name: oid for name, oid in self.refs.items() if name.startswith("refs/pr/")}

    def resolve(self, revision: str) -> str:
        """Return the commit that a branch, tag, pull request or (abbreviated) commit id names."""
        named = self.refs.get(revision.removeprefix("refs/heads/")) or self.tags.get(revision)
        if named:
            return named
        found = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return found[0]

    def tree(self, revision: str = "main") -> Tree:
        """Return the files at a revision."""
        return self.commits[self.resolve(revision)].tree

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return the contents at a revision, by path."""
        return {path: self.read(entry).read_bytes() for path, entry in self.tree(revision).items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """Return the commits that lead to a revision, the newest first."""
        commits: list[Commit] = []
        oid: str | None = self.resolve(revision)
        while oid is not None:
            commits.append(self.commits[oid])
            oid = commits[-1].parent
        return commits

    def commit(self, ref: str, tree: Tree, *, title: str, message: str, author: str) -> Commit:
        """Add a commit and move the ref to it, which makes it visible, last."""
        fields = {"parent": self.refs.get(ref), "title": title, "message": message, "author": author, "date": now()}
        files = {path: asdict(entry) for path, entry in sorted(tree.items())}
        nonce = [files, time.time_ns()]  # the same change made twice is two commits
        oid = hashlib.sha1(json.dumps([fields, nonce]).encode()).hexdigest()
        write_json(self.folder / "commits" / f"{oid}.json", {"oid": oid, "tree": files, **fields})
        self.commits[oid] = Commit.load(self.folder / "commits" / f"{oid}.json")
        self.refs[ref] = oid
        self.save()
        return self.commits[oid]

    def save(self) -> None:
        """Write everything but the commits, which are written as they are made."""
        fields = ("kind", "id", "private", "gated", "refs", "tags", "created")
        state = {name: getattr(self, name) for name in fields}
        state |= {"allowed": sorted(self.allowed), "pulls": [asdict(pull) for pull in self.pulls.values()]}
        write_json(self.folder / "repo.json", state)

    @classmethod
    def load(cls, folder: Path, read: Callable[[Entry], Path]) -> Repo:
        """Read a repository."""
        state = json.loads((folder / "repo.json").read_text(encoding="utf-8"))
        state["allowed"] = set(state["allowed"])
        state["pulls"] = {pull["number"]: Pull(**pull) for pull in state["pulls"]}
        commits = [Commit.load(path) for path in sorted((folder / "commits").glob("[!.]*.json"))]
        return cls(folder=folder, read=read, commits={commit.oid: commit for commit in commits}, **state)


def load_repos(folder: Path, read: Callable[[Entry], Path]) -> Iterator[Repo]:
    """Read the repositories under a folder."""
    for state in sorted(folder.glob("*/*/*/repo.json")):
        yield Repo.load(state.parent, read)
