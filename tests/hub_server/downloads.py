"""Downloads: regular files from the Hub itself, LFS files from another origin by a signed URL."""

from __future__ import annotations

from hub_server.accounts import open_repo
from hub_server.errors import HubError
from hub_server.messages import Call, Reply
from hub_server.routing import Route
from hub_server.storage import Entry


def resolve(call: Call, repo: str, revision: str, path: str, kind: str = "models") -> Reply:
    """Send a regular file, or tell where an LFS file lies.

    The redirect goes to another origin: huggingface_hub follows one to the same origin even in a HEAD request,
    and would lose the headers; and it leaves its token behind when it changes the origin.
    """
    found = open_repo(call, kind, repo, "read")
    commit = found.resolve(revision)
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    entry = found.tree(commit).get(path)
    if entry is None:
        raise HubError(404, "Entry not found", code="EntryNotFound", headers=headers)
    if entry.sha256 is None:
        content = {"ETag": f'"{entry.oid}"', "Content-Type": "text/plain"}
        return Reply(body=found.read(entry), headers=headers | content)
    location = call.hub.signer.url(call.hub.cdn_url, f"/get/{entry.sha256}", seconds=call.hub.url_seconds)
    headers |= {"Location": location, "X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    if xet_hash := call.hub.xet_hash(entry.sha256):
        tokens = f"{call.hub.url}/api/{kind}/{repo}/xet-read-token/{commit}"
        headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{tokens}>; rel="xet-auth"'}
    return Reply(status=302, headers=headers)


def get(call: Call, digest: str) -> Reply:
    """Send an LFS file, or the wanted range of it."""
    call.hub.signer.check(call.path, call.query)
    size = call.hub.lfs_size(digest)
    if size is None:
        raise HubError(404, "NoSuchKey")
    content = call.hub.content(Entry.lfs(digest, size))
    return Reply(body=content, headers={"ETag": f'"{digest}"', "Content-Type": "application/octet-stream"})


ROUTES = (
    Route("GET", "/{repo}/resolve/{revision}/{path}", resolve),
    Route("GET", "/{kind}/{repo}/resolve/{revision}/{path}", resolve),
)
CDN_ROUTES = (Route("GET", "/get/{digest}", get),)
