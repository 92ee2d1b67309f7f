"""Xet: tokens from the Hub, and the store that takes xorbs and shards and says how to put files together again.

This is the first version of the protocol; hf_xet falls back to it where the newer routes answer 404.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hub_server.accounts import open_repo
from hub_server.errors import HubError
from hub_server.messages import Call, Reply, json_reply
from hub_server.routing import Route
from hub_server.shards import Segment, XetFile, chunk_offsets, dedup_shard, read_chunks, read_files, read_segment
from hub_server.storage import Blobs


class Cas:
    """The content-addressed store: xorbs as they came, and an index of the shards."""

    def __init__(self, folder: Path, blobs: Blobs) -> None:
        self._xorbs, self._shards, self._blobs = folder / "xorbs", folder / "shards", blobs
        self._xorbs.mkdir(parents=True, exist_ok=True)
        self._shards.mkdir(exist_ok=True)
        self.files: dict[str, XetFile] = {}
        """By xet hash."""
        self.by_sha256: dict[str, XetFile] = {}
        self._shard_by_chunk: dict[str, Path] = {}
        for shard in sorted(self._shards.iterdir()):
            self._index(shard)

    def _index(self, path: Path) -> None:
        shard = path.read_bytes()
        for file in read_files(shard):
            self.files[file.hash] = file
            if file.sha256:
                self.by_sha256[file.sha256] = file
        self._shard_by_chunk |= dict.fromkeys(read_chunks(shard), path)

    def xorb(self, digest: str) -> Path:
        """Return where a xorb lies, or would."""
        return self._xorbs / digest

    def put_xorb(self, digest: str, pieces: Iterator[bytes]) -> bool:
        """Store a xorb; returns whether it was new."""
        new = not self.xorb(digest).exists()
        self._blobs.receive(pieces).path.replace(self.xorb(digest))
        return new

    def put_shard(self, shard: bytes) -> bool:
        """Store a shard whose xorbs are here; returns whether it was new."""
        for file in read_files(shard):
            if missing := [segment.xorb for segment in file.segments if not self.xorb(segment.xorb).exists()]:
                raise HubError(400, f"The shard refers to an unknown xorb: {missing[0]}")
        arrived = self._blobs.receive([shard])
        path = self._shards / f"{arrived.sha256}.mdb"
        new = not path.exists()
        arrived.path.replace(path)
        self._index(path)
        return new

    def shard_with(self, chunk: str) -> Path | None:
        """Return a shard that tells in which xorb a chunk is."""
        return self._shard_by_chunk.get(chunk)

    def content(self, file: XetFile) -> Iterator[bytes]:
        """Yield the content of a file."""
        for segment in file.segments:
            yield read_segment(self.xorb(segment.xorb).read_bytes(), segment)


def _token(call: Call, scope: str) -> Reply:
    if not call.hub.xet:
        raise HubError(404, "This server was started without xet")
    token, expires = call.hub.signer.token(scope, seconds=call.hub.url_seconds)
    headers = {
        "X-Xet-Cas-Url": call.hub.cas_url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    return json_reply({"accessToken": token, "exp": expires, "casUrl": call.hub.cas_url}, headers=headers)


def read_token(call: Call, kind: str, repo: str, revision: str) -> Reply:
    """Give a token to download with."""
    open_repo(call, kind, repo, "read").resolve(revision)
    return _token(call, "read")


def write_token(call: Call, kind: str, repo: str, revision: str | None = None) -> Reply:
    """Give a token to upload with; a reader may upload for a pull request."""
    proposing = revision is None or call.flag("create_pr") or revision.startswith("refs/pr/")
    found = open_repo(call, kind, repo, "propose" if proposing else "write")
    if revision is not None:
        found.resolve(revision)
    return _token(call, "write")


def _check(call: Call, scope: str) -> None:
    granted = call.hub.signer.scope(call.headers.get("Authorization", "").removeprefix("Bearer "))
    if granted not in (scope, "write"):
        raise HubError(403, f"The token is for {granted}, not for {scope}")


def take_xorb(call: Call, digest: str) -> Reply:
    """Take a xorb."""
    _check(call, "write")
    return json_reply({"was_inserted": call.hub.cas.put_xorb(digest, call.pieces())})


def take_shard(call: Call) -> Reply:
    """Take a shard; the files it describes can be committed from now on."""
    _check(call, "write")
    shard = call.read()
    with call.hub.lock:
        new = call.hub.cas.put_shard(shard)
    return json_reply({"result": int(new)})


def find_chunk(call: Call, digest: str) -> Reply:
    """Tell the client that a chunk need not be uploaded again, by the shard that says where it is."""
    _check(call, "read")
    shard = call.hub.cas.shard_with(digest)
    if shard is None:
        raise HubError(404, "The chunk is not known")
    answer = dedup_shard(shard.read_bytes(), expires=int(time.time() + call.hub.url_seconds))
    return Reply(body=answer, headers={"Content-Type": "application/octet-stream"})


def _range(call: Call, size: int) -> tuple[int, int]:
    """Return (first byte, end) of what is wanted of a file."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", "bytes=0-"))
    if match is None or int(match[1]) >= max(size, 1):
        raise HubError(416, "Range Not Satisfiable")
    return int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)


def _runs(segments: Iterable[Segment]) -> list[tuple[int, int]]:
    """Return the runs of chunks (first, end) that segments of one xorb need, those that touch made one."""
    runs: list[tuple[int, int]] = []
    for first, end in sorted((segment.first, segment.end) for segment in segments):
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
        else:
            runs.append((first, end))
    return runs


def _fetches(call: Call, xorb: str, segments: Iterable[Segment]) -> list[dict[str, Any]]:
    """Tell where the bytes of runs of chunks are; each has a URL of its own, for hf_xet tells them apart by it."""
    offsets = chunk_offsets(call.hub.cas.xorb(xorb).read_bytes())
    return [
        {
            "range": {"start": first, "end": end},
            "url": call.hub.signer.url(call.hub.cas_url, f"/xorb/{xorb}/{first}-{end}", seconds=call.hub.url_seconds),
            "url_range": {"start": offsets[first], "end": offsets[end] - 1},
        }
        for first, end in _runs(segments)
    ]


def reconstruct(call: Call, digest: str) -> Reply:
    """Tell which chunks make up a file, or the wanted range of it."""
    _check(call, "read")
    file = call.hub.cas.files.get(digest)
    if file is None:
        raise HubError(404, "The file is not known")
    start, end = _range(call, file.size)
    position, skipped, wanted = 0, 0, list[Segment]()
    for segment in file.segments:
        if position < end and position + segment.size > start:
            skipped = skipped if wanted else start - position
            wanted.append(segment)
        position += segment.size
    terms = [
        {"hash": one.xorb, "unpacked_length": one.size, "range": {"start": one.first, "end": one.end}} for one in wanted
    ]
    xorbs = dict.fromkeys(segment.xorb for segment in wanted)
    fetches = {xorb: _fetches(call, xorb, [one for one in wanted if one.xorb == xorb]) for xorb in xorbs}
    return json_reply({"offset_into_first_range": skipped, "terms": terms, "fetch_info": fetches})


def get_xorb(call: Call, digest: str, run: str) -> Reply:
    """Send the bytes of a run of chunks, which the header `Range` names."""
    call.hub.signer.check(call.path, call.query)
    if not call.hub.cas.xorb(digest).exists():
        raise HubError(404, "NoSuchKey")
    return Reply(body=call.hub.cas.xorb(digest), headers={"Content-Type": "application/octet-stream"})


ROUTES = (
    Route("GET", "/api/{kind}/{repo}/xet-read-token/{revision}", read_token),
    Route("GET", "/api/{kind}/{repo}/xet-write-token/{revision}", write_token),
    Route("GET", "/api/{kind}/{repo}/xet-write-token", write_token),
)
CAS_ROUTES = (
    Route("POST", "/v1/xorbs/default/{digest}", take_xorb),
    Route("POST", "/v1/shards", take_shard),
    Route("GET", "/v1/chunks/default/{digest}", find_chunk),
    Route("GET", "/v1/reconstructions/{digest}", reconstruct),
    Route("GET", "/xorb/{digest}/{run}", get_xorb),
)
