"""Uploads by LFS: what is missing is sent to signed URLs, whole or in parts, and has to match its sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hub_server.accounts import open_repo
from hub_server.errors import HubError
from hub_server.messages import Call, Reply, json_reply
from hub_server.routing import Route


def _signed(call: Call, origin: str, path: str) -> str:
    return call.hub.signer.url(origin, path, seconds=call.hub.url_seconds)


def _actions(call: Call, sha256: str, size: int, transfers: list[str]) -> dict[str, Any]:
    hub, part = call.hub, call.hub.multipart_bytes
    verify = {"href": _signed(call, hub.url, f"/lfs/verify/{sha256}")}
    if part is None or size <= part or "multipart" not in transfers:
        return {"upload": {"href": _signed(call, hub.cdn_url, f"/put/{sha256}")}, "verify": verify}
    count = -(-size // part)
    urls = {str(i): _signed(call, hub.cdn_url, f"/part/{sha256}/{i}") for i in range(1, count + 1)}
    complete = _signed(call, hub.url, f"/lfs/complete/{sha256}")
    return {"upload": {"href": complete, "header": {"chunk_size": str(part), **urls}}, "verify": verify}


def batch(call: Call, repo: str, kind: str = "models") -> Reply:
    """Tell for each object where to upload it; those without actions are here already."""
    body = call.json()
    # Without a branch, or with a pull request's, it may be meant for a pull request.
    ref = (body.get("ref") or {}).get("name", "refs/pr/")
    open_repo(call, kind, repo, "propose" if ref.startswith("refs/pr/") else "write")
    objects = []
    for wanted in body["objects"]:
        described = {"oid": wanted["oid"], "size": wanted["size"]}
        if call.hub.lfs_size(wanted["oid"]) is None:
            described["actions"] = _actions(call, wanted["oid"], wanted["size"], body.get("transfers", []))
        objects.append(described)
    return json_reply({"transfer": "basic", "objects": objects})


def put(call: Call, digest: str) -> Reply:
    """Take a whole object."""
    call.hub.signer.check(call.path, call.query)
    arrived = call.hub.blobs.receive(call.pieces())
    if arrived.sha256 != digest:
        arrived.path.unlink()
        raise HubError(400, f"BadDigest: the content has the sha256 {arrived.sha256}")
    call.hub.blobs.adopt(arrived.path, digest)
    return Reply(headers={"ETag": f'"{arrived.md5}"'})


def put_part(call: Call, digest: str, number: str) -> Reply:
    """Take a part of an object."""
    call.hub.signer.check(call.path, call.query)
    arrived = call.hub.blobs.receive(call.pieces())
    arrived.path.replace(call.hub.blobs.part(digest, int(number)))
    return Reply(headers={"ETag": f'"{arrived.md5}"'})


def _read_parts(paths: list[Path], etags: list[str]) -> Iterator[bytes]:
    for path, etag in zip(paths, etags, strict=True):
        data = path.read_bytes() if path.exists() else b""
        if hashlib.md5(data).hexdigest() != etag.strip('"'):
            raise HubError(400, f"InvalidPart: {path.name}")
        yield data


def complete(call: Call, digest: str) -> Reply:
    """Put the parts of an object together."""
    call.hub.signer.check(call.path, call.query)
    parts = sorted(call.json()["parts"], key=lambda part: part["partNumber"])
    if call.hub.blobs.has(digest):  # the same request once more, after its answer was lost
        return json_reply({})
    paths = [call.hub.blobs.part(digest, part["partNumber"]) for part in parts]
    whole = call.hub.blobs.receive(_read_parts(paths, [part["etag"] for part in parts]))
    if whole.sha256 != digest:
        whole.path.unlink()
        raise HubError(400, f"BadDigest: the parts add up to the sha256 {whole.sha256}")
    call.hub.blobs.adopt(whole.path, digest)
    for path in paths:
        path.unlink()
    return json_reply({})


def verify(call: Call, digest: str) -> Reply:
    """Tell whether an object arrived."""
    call.hub.signer.check(call.path, call.query)
    if call.hub.lfs_size(digest) != call.json()["size"]:
        raise HubError(404, "The object does not exist, or has another size")
    return json_reply({})


ROUTES = (
    Route("POST", "/{repo}.git/info/lfs/objects/batch", batch),
    Route("POST", "/{kind}/{repo}.git/info/lfs/objects/batch", batch),
    Route("POST", "/lfs/complete/{digest}", complete),
    Route("POST", "/lfs/verify/{digest}", verify),
)
CDN_ROUTES = (
    Route("PUT", "/put/{digest}", put),
    Route("PUT", "/part/{digest}/{number}", put_part),
)
