"""The server: three origins on one folder, and what tests ask of it."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hub_server import accounts, collections, commits, downloads, lfs, listings, metadata, repositories, xet
from hub_server.errors import HubError
from hub_server.faults import Fault, Faults
from hub_server.handler import Origin
from hub_server.messages import Request, Role
from hub_server.routing import Router
from hub_server.signatures import Signer
from hub_server.storage import Blobs, Entry, Repo, git_sha1, load_repos

_API = (accounts, metadata, repositories, commits, collections, xet, lfs, listings, downloads)
_ROUTERS: Mapping[Role, Router] = {
    "hub": Router(route for module in _API for route in module.ROUTES),
    "cdn": Router((*lfs.CDN_ROUTES, *downloads.CDN_ROUTES)),
    "cas": Router(xet.CAS_ROUTES),
}
_CONTENT_UPLOADS = r"^(PUT /(put|part)/|POST /v1/xorbs/)"
_HERE = Path(__file__).resolve()


class HubServer:
    """A Hugging Face Hub on this machine. All it knows is in its folder; a new server on it continues.

    Args:
        folder: Where everything is kept.
        port: The Hub's port on 127.0.0.1; 0: a free one.
        multipart_bytes: LFS files larger than this are uploaded in parts of this size; None: never in parts.
        lfs_threshold: Files larger than this are LFS files whatever their name.
        xet: Whether xet is offered. Without it a client that has hf_xet and does not disable it cannot upload.
        page_size: Entries of a tree per page.
        url_seconds: How long signed URLs and xet's tokens are valid.
        tokens: Who has which access token.
        organizations: Members by organization.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        port: int = 0,
        multipart_bytes: int | None = None,
        lfs_threshold: int = 10 << 20,
        xet: bool = True,
        page_size: int = 1000,
        url_seconds: float = 3600.0,
        tokens: Mapping[str, accounts.Token] = accounts.TOKENS,
        organizations: Mapping[str, Sequence[str]] = accounts.ORGANIZATIONS,
    ) -> None:
        self.folder = Path(folder)
        self.multipart_bytes, self.lfs_threshold, self.xet = multipart_bytes, lfs_threshold, xet
        self.page_size, self.url_seconds = page_size, url_seconds
        self.tokens, self.organizations = dict(tokens), dict(organizations)
        self.rate_limit: tuple[int, float] | None = None
        """Requests to the Hub's origin allowed in so many seconds."""
        self.requests: list[Request] = []
        self.faults = Faults()
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self._port, self._origins = port, dict[Role, Origin]()
        self._recent: list[float] = []
        self._load()

    def _load(self) -> None:
        self.blobs = Blobs(self.folder)
        self.signer = Signer(self.folder)
        self.cas = xet.Cas(self.folder / "cas", self.blobs)
        self.repos = {(repo.kind, repo.id): repo for repo in load_repos(self.folder / "repos", self.content)}
        self.collections_folder = self.folder / "collections"
        self.collections = {one.slug: one for one in collections.load_collections(self.collections_folder)}

    def start(self) -> Self:
        """Open the ports and answer in the background."""
        for role, router in _ROUTERS.items():
            origin = Origin(self, role, router, self._port if role == "hub" else 0)
            self._origins[role] = origin
            threading.Thread(target=origin.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Close every port and connection."""
        self.stopping.set()
        for origin in self._origins.values():
            origin.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The Hub's endpoint, for HF_ENDPOINT."""
        return self._origins["hub"].url

    @property
    def cdn_url(self) -> str:
        """Where LFS contents are sent to and fetched from."""
        return self._origins["cdn"].url

    @property
    def cas_url(self) -> str:
        """Where xet's contents are sent to and fetched from."""
        return self._origins["cas"].url

    def environment(
        self, home: str | os.PathLike[str], token: str | None = "hf_alice_write", *, xet: bool = True, **more: str
    ) -> dict[str, str]:
        """Return the environment of a process that takes this server for the Hub.

        Args:
            home: The process' HF_HOME: its cache, and nothing of anyone else's.
            token: Its access token; None: it has none.
            xet: Whether it uses xet.
            **more: Further variables.
        """
        dropped = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(str(folder) for folder in (_HERE.parents[2], _HERE.parents[1])),
        }
        return environment | ({} if token is None else {"HF_TOKEN": token}) | more

    def fault(self, pattern: str, **what: Any) -> Fault:
        """Order a fault; see `Fault` for what it takes. `pattern` is searched in `METHOD /path?query`."""
        return self.faults.add(Fault(pattern=pattern, **what))

    def fault_at(self, k: int, **what: Any) -> Fault:
        """Order a fault for the k-th request from now on, counted from 0, whatever it asks."""
        return self.fault("", skip=k, **what)

    def matching(self, pattern: str) -> list[Request]:
        """Return the requests whose `METHOD /path?query` matches a pattern."""
        return [request for request in list(self.requests) if re.search(pattern, request.line)]

    def count(self, pattern: str) -> int:
        """Return how many requests match a pattern."""
        return len(self.matching(pattern))

    @property
    def content_received(self) -> int:
        """Bytes of LFS and xet contents that arrived, including those that arrived more than once."""
        return sum(request.received for request in self.matching(_CONTENT_UPLOADS))

    def repo(self, repo: str, kind: str = "models") -> Repo:
        """Return a repository."""
        return self.repos[kind, repo]

    def add_repo(
        self,
        repo: str,
        files: Mapping[str, bytes] | str | os.PathLike[str],
        *,
        private: bool = False,
        gated: bool | str = False,
        kind: str = "models",
    ) -> str:
        """Put files into a repository, made where it does not exist, in one commit that replaces what is there.

        Args:
            repo: Its id.
            files: Contents by path, or a folder.
            private: Whether others may not see it.
            gated: Whether others may not read its files: False, `auto` or `manual` (True).
            kind: `models`, `datasets` or `spaces`.

        Returns:
            The commit's id.
        """
        if not isinstance(files, Mapping):
            paths = sorted(path for path in Path(files).rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        tree = {path: self._entry(path, data) for path, data in files.items()}
        with self.lock:
            found = self.repos.get((kind, repo)) or self.make_repo(repo, kind=kind, author=repo.partition("/")[0])
            found.private, found.gated = private, "manual" if gated is True else gated
            return found.commit("main", tree, title="Add files", message="", author=found.namespace).oid

    def _entry(self, path: str, data: bytes) -> Entry:
        if data and commits.is_lfs(path, len(data), data[:512], self.lfs_threshold):
            entry = Entry.lfs(hashlib.sha256(data).hexdigest(), len(data))
        else:
            entry = Entry(len(data), git_sha1(data))
        self.blobs.put(entry.digest, data)
        return entry

    def make_repo(self, repo: str, *, kind: str, author: str, private: bool = False) -> Repo:
        """Make a repository with the one file a new repository has."""
        made = Repo(kind=kind, id=repo, folder=self.folder / "repos" / kind / repo, read=self.content, private=private)
        tree = {".gitattributes": self._entry(".gitattributes", commits.gitattributes())}
        made.commit("main", tree, title="initial commit", message="", author=author)
        self.repos[kind, repo] = made
        return made

    def stored(self, repo: str, path: str, *, revision: str = "main", kind: str = "models") -> Path:
        """Return where the content of a file lies, for those who want to alter it behind everyone's back.

        Only what comes from the Hub itself or its CDN is altered by that; xet's copy is in xorbs.
        """
        return self.content(self.repo(repo, kind).tree(revision)[path])

    def lfs_size(self, sha256: str) -> int | None:
        """Return the size of an LFS content, however it came; None where it is not here."""
        if self.blobs.has(sha256):
            return self.blobs.path(sha256).stat().st_size
        file = self.cas.by_sha256.get(sha256)
        return None if file is None else file.size

    def xet_hash(self, sha256: str) -> str | None:
        """Return xet's hash of an LFS content that came through xet."""
        file = self.cas.by_sha256.get(sha256)
        return file.hash if file is not None and self.xet else None

    def content(self, entry: Entry) -> Path:
        """Return where a content lies; one that came through xet is put together, and checked, the first time."""
        if not self.blobs.has(entry.digest):
            arrived = self.blobs.receive(self.cas.content(self.cas.by_sha256[entry.digest]))
            if arrived.sha256 != entry.digest:
                arrived.path.unlink()
                raise HubError(500, f"xet's chunks add up to the sha256 {arrived.sha256}, not {entry.digest}")
            self.blobs.adopt(arrived.path, entry.digest)
        return self.blobs.path(entry.digest)

    def arrive(self, request: Request) -> None:
        """List a request, and find the fault that hits it."""
        with self.lock:
            self.requests.append(request)
            request.fault = self.faults.take(request.line)

    def check_rate(self) -> None:
        """Refuse a request that comes too soon after the others."""
        if self.rate_limit is None:
            return
        most, seconds = self.rate_limit
        with self.lock:
            self._recent = [then for then in self._recent if then > time.monotonic() - seconds]
            if len(self._recent) < most:
                self._recent.append(time.monotonic())
                return
            wait = int(self._recent[0] + seconds - time.monotonic()) + 1
        headers = {
            "Retry-After": str(wait),
            "RateLimit": f'"api";r=0;t={wait}',
            "RateLimit-Policy": f'"fixed window";"api";q={most};w={int(seconds)}',
        }
        raise HubError(429, "Too Many Requests", headers=headers)
