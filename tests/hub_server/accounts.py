"""Who asks, and what they may do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hub_server.errors import HubError
from hub_server.messages import Call, Reply, json_reply
from hub_server.routing import Route
from hub_server.storage import Repo


@dataclass(frozen=True, slots=True)
class Token:
    """An access token's owner and what it allows."""

    user: str
    role: Literal["read", "write"]


TOKENS = {
    "hf_alice_write": Token("alice", "write"),
    "hf_alice_read": Token("alice", "read"),
    "hf_bob_write": Token("bob", "write"),
}
ORGANIZATIONS = {"org": ("alice",)}
"""Members by organization; all of them may write."""

Need = Literal["see", "read", "propose", "write"]
"""What a request wants of a repository: its metadata, its files, to open a pull request, or to change it."""


def token_of(call: Call) -> Token | None:
    """Return the token of a request; a wrong one is refused even where none is needed."""
    header = call.headers.get("Authorization")
    if not header:
        return None
    token = call.hub.tokens.get(header.removeprefix("Bearer "))
    if token is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return token


def require_token(call: Call, *, write: bool = False) -> Token:
    """Return the token of a request that has to have one."""
    token = token_of(call)
    if token is None:
        raise HubError(401, "Invalid username or password.")
    if write and token.role != "write":
        raise HubError(403, "Forbidden: you must use a write token")
    return token


def belongs(call: Call, token: Token | None, namespace: str) -> bool:
    """Return whether a namespace is the user's own or that of an organization of theirs."""
    return token is not None and (token.user == namespace or token.user in call.hub.organizations.get(namespace, ()))


def open_repo(call: Call, kind: str, repo: str, need: Need) -> Repo:
    """Return a repository, if the request may have what it wants of it."""
    token = require_token(call) if need in ("propose", "write") else token_of(call)
    found = call.hub.repos.get((kind, repo))
    member = belongs(call, token, repo.partition("/")[0])
    admitted = member or (token is not None and found is not None and token.user in found.allowed)
    if found is None or (found.private and not admitted):
        # The Hub does not tell whether it exists. The code tells the client, whose own rule for 401 is https only.
        raise HubError(404 if token else 401, "Repository not found", code="RepoNotFound")
    if need == "read" and found.gated and not admitted:
        message = f"Access to {kind.removesuffix('s')} {repo} is restricted. You must have access to it."
        raise HubError(403 if token else 401, message, code="GatedRepo")
    if need in ("propose", "write"):
        require_token(call, write=True)
    if need == "write" and not member:
        raise HubError(403, "You don't have the rights to write to this repository")
    return found


def whoami(call: Call) -> Reply:
    """Describe the owner of the token."""
    token = require_token(call)
    organizations = [name for name, members in call.hub.organizations.items() if token.user in members]
    return json_reply(
        {
            "type": "user",
            "id": token.user,
            "name": token.user,
            "fullname": token.user.title(),
            "orgs": [{"type": "org", "id": name, "name": name, "roleInOrg": "write"} for name in organizations],
            "auth": {"type": "access_token", "accessToken": {"displayName": "tests", "role": token.role}},
        }
    )


def check_access(call: Call, kind: str, repo: str) -> Reply:
    """Tell whether the files can be read."""
    open_repo(call, kind, repo, "read")
    return json_reply({})


def check_write_access(call: Call, kind: str, repo: str) -> Reply:
    """Tell whether the repository can be written to."""
    open_repo(call, kind, repo, "write")
    return json_reply({})


def grant_access(call: Call, kind: str, repo: str) -> Reply:
    """Let a user into a gated repository."""
    user = str(call.json()["user"])
    with call.hub.lock:
        found = open_repo(call, kind, repo, "write")
        found.allowed.add(user)
        found.save()
    return json_reply({})


ROUTES = (
    Route("GET", "/api/whoami-v2", whoami),
    Route("GET", "/api/{kind}/{repo}/auth-check", check_access),
    Route("GET", "/api/{kind}/{repo}/auth-check/write", check_write_access),
    Route("POST", "/api/{kind}/{repo}/user-access-request/grant", grant_access),
)
