"""Repositories as a whole: made, removed, opened or closed to others; their branches, tags and pull requests."""

from __future__ import annotations

import re
import shutil
from typing import Any

from hub_server.accounts import Need, belongs, open_repo, require_token
from hub_server.errors import HubError
from hub_server.messages import Call, Reply, json_reply
from hub_server.routing import Route
from hub_server.storage import Pull, Repo, now

_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")


def create_repo(call: Call) -> Reply:
    """Make a repository with one commit."""
    token, body = require_token(call, write=True), call.json()
    kind = f"{body.get('type') or 'model'}s"
    namespace, name = body.get("organization") or token.user, str(body["name"])
    if not belongs(call, token, namespace):
        raise HubError(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{namespace}"')
    if not _NAME.fullmatch(name):
        raise HubError(400, f'Invalid repository name "{name}"')
    repo = f"{namespace}/{name}"
    url = f"{call.hub.url}/{'' if kind == 'models' else kind + '/'}{repo}"
    with call.hub.lock:
        if (kind, repo) in call.hub.repos:  # the client reads the url with exist_ok=True
            return json_reply({"error": f"You already created this {kind[:-1]} repo", "url": url}, 409)
        private = body.get("visibility") == "private" or bool(body.get("private"))
        call.hub.make_repo(repo, kind=kind, private=private, author=token.user)
    return json_reply({"url": url, "name": repo, "id": repo})


def delete_repo(call: Call) -> Reply:
    """Remove a repository; contents stay, for others may have the same."""
    token, body = require_token(call), call.json()
    kind = f"{body.get('type') or 'model'}s"
    with call.hub.lock:
        repo = open_repo(call, kind, f"{body.get('organization') or token.user}/{body['name']}", "write")
        del call.hub.repos[kind, repo.id]
        shutil.rmtree(repo.folder)
    return json_reply({})


def change_settings(call: Call, kind: str, repo: str) -> Reply:
    """Change who sees a repository and who may read its files."""
    body = call.json()
    if body.get("gated", False) not in (False, "auto", "manual"):
        raise HubError(400, '"gated" must be one of [auto, manual, false]')
    if body.get("visibility", "public") not in ("public", "private"):
        raise HubError(400, '"visibility" must be one of [public, private]')
    with call.hub.lock:
        found = open_repo(call, kind, repo, "write")
        found.gated = body.get("gated", found.gated)
        if "visibility" in body:
            found.private = body["visibility"] == "private"
        found.private = body.get("private", found.private)
        found.save()
    return json_reply({"private": found.private, "gated": found.gated})


def list_refs(call: Call, kind: str, repo: str) -> Reply:
    """List branches, tags and, when asked, pull requests."""
    found = open_repo(call, kind, repo, "see")

    def described(prefix: str, refs: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]

    answer: dict[str, Any] = {
        "branches": described("refs/heads/", found.branches),
        "tags": described("refs/tags/", found.tags),
        "converts": [],
    }
    if call.flag("include_prs"):
        pulls = {name.removeprefix("refs/pr/"): oid for name, oid in found.pull_refs.items()}
        answer["pullRequests"] = described("refs/pr/", pulls)
    return json_reply(answer)


def create_branch(call: Call, kind: str, repo: str, name: str) -> Reply:
    """Make a branch, of `main` unless another starting point is given."""
    if name.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {name}")
    start = call.json().get("startingPoint") or "main"
    with call.hub.lock:
        found = open_repo(call, kind, repo, "write")
        if name in found.refs:
            raise HubError(409, f"Reference already exists: refs/heads/{name}")
        found.refs[name] = found.resolve(start)
        found.save()
    return json_reply({})


def delete_branch(call: Call, kind: str, repo: str, name: str) -> Reply:
    """Remove a branch other than `main`."""
    with call.hub.lock:
        found = open_repo(call, kind, repo, "write")
        if name == "main":
            raise HubError(403, "The branch main is protected")
        if name not in found.branches:
            raise HubError(404, f"Reference does not exist: refs/heads/{name}", code="RevisionNotFound")
        del found.refs[name]
        found.save()
    return json_reply({})


def create_tag(call: Call, kind: str, repo: str, revision: str) -> Reply:
    """Give a commit a name that does not move."""
    tag = str(call.json()["tag"])
    with call.hub.lock:
        found = open_repo(call, kind, repo, "write")
        oid = found.resolve(revision)
        if tag in found.tags:
            raise HubError(409, "Tag reference exists already.")
        found.tags[tag] = oid
        found.save()
    return json_reply({})


def delete_tag(call: Call, kind: str, repo: str, revision: str) -> Reply:
    """Take the name off again."""
    with call.hub.lock:
        found = open_repo(call, kind, repo, "write")
        if revision not in found.tags:
            raise HubError(404, f"Tag not found: {revision}", code="RevisionNotFound")
        del found.tags[revision]
        found.save()
    return json_reply({})


def open_pull(repo: Repo, *, title: str, author: str, base: str = "main") -> Pull:
    """Open a pull request whose ref starts at a branch's commit."""
    number = max(repo.pulls, default=0) + 1
    pull = Pull(number=number, title=title, author=author, created=now(), base=base)
    repo.refs[f"refs/pr/{number}"] = repo.resolve(base)
    repo.pulls[number] = pull
    repo.save()
    return pull


def _described(repo: Repo, pull: Pull) -> dict[str, Any]:
    return {
        "num": pull.number,
        "title": pull.title,
        "author": {"name": pull.author},
        "createdAt": pull.created,
        "status": pull.status,
        "repo": {"name": repo.id, "type": repo.kind.removesuffix("s")},
        "isPullRequest": True,
        "changes": {"base": f"refs/heads/{pull.base}"},
        "filesWithConflicts": [],
        "events": [],
    }


def create_pull(call: Call, kind: str, repo: str) -> Reply:
    """Open a pull request without changes."""
    body = call.json()
    if not body.get("pullRequest"):
        raise HubError(400, "This server has pull requests, but no other discussions")
    with call.hub.lock:
        found = open_repo(call, kind, repo, "propose")
        pull = open_pull(found, title=str(body["title"]), author=require_token(call).user)
    return json_reply({"num": pull.number, "pullRequest": True})


def _pull(call: Call, kind: str, repo: str, number: str, need: Need) -> tuple[Repo, Pull]:
    found = open_repo(call, kind, repo, need)
    if int(number) not in found.pulls:
        raise HubError(404, f"There is no discussion {number}")
    return found, found.pulls[int(number)]


def list_pulls(call: Call, kind: str, repo: str) -> Reply:
    """List the pull requests, on one page."""
    found = open_repo(call, kind, repo, "see")
    pulls = [_described(found, pull) for pull in found.pulls.values()]
    return json_reply({"count": len(pulls), "start": 0, "discussions": pulls})


def describe_pull(call: Call, kind: str, repo: str, number: str) -> Reply:
    """Describe a pull request."""
    return json_reply(_described(*_pull(call, kind, repo, number, "see")))


def change_pull_status(call: Call, kind: str, repo: str, number: str) -> Reply:
    """Close a pull request, or open it again."""
    status = str(call.json()["status"])
    with call.hub.lock:
        found, pull = _pull(call, kind, repo, number, "write")
        pull.status = status
        found.save()
    event = {
        "id": f"{number}-status",
        "type": "status-change",
        "createdAt": now(),
        "author": {"name": require_token(call).user},
        "data": {"status": status},
    }
    return json_reply({"newStatus": event})


ROUTES = (
    Route("POST", "/api/repos/create", create_repo),
    Route("DELETE", "/api/repos/delete", delete_repo),
    Route("PUT", "/api/{kind}/{repo}/settings", change_settings),
    Route("GET", "/api/{kind}/{repo}/refs", list_refs),
    Route("POST", "/api/{kind}/{repo}/branch/{name}", create_branch),
    Route("DELETE", "/api/{kind}/{repo}/branch/{name}", delete_branch),
    Route("POST", "/api/{kind}/{repo}/tag/{revision}", create_tag),
    Route("DELETE", "/api/{kind}/{repo}/tag/{revision}", delete_tag),
    Route("GET", "/api/{kind}/{repo}/discussions", list_pulls),
    Route("POST", "/api/{kind}/{repo}/discussions", create_pull),
    Route("GET", "/api/{kind}/{repo}/discussions/{number}", describe_pull),
    Route("POST", "/api/{kind}/{repo}/discussions/{number}/status", change_pull_status),
)
