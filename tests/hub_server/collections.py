"""Collections: named lists of repositories."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hub_server.accounts import belongs, require_token, token_of
from hub_server.errors import HubError
from hub_server.messages import Call, Reply, json_reply
from hub_server.routing import Route
from hub_server.storage import now, write_json


@dataclass(frozen=True, slots=True)
class Item:
    """A repository in a collection."""

    key: str
    id: str
    type: str
    note: str | None = None


@dataclass(kw_only=True)
class Collection:
    """A titled list of items of a user or an organization."""

    slug: str
    title: str
    owner: str
    private: bool = False
    description: str | None = None
    items: list[Item] = field(default_factory=list)
    updated: str = field(default_factory=now)

    def save(self, folder: Path) -> None:
        """Write the collection."""
        self.updated = now()
        write_json(folder / f"{self.slug.rpartition('-')[2]}.json", asdict(self))


def load_collections(folder: Path) -> Iterator[Collection]:
    """Read the collections of a folder."""
    for path in sorted(folder.glob("[!.]*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        yield Collection(items=[Item(**item) for item in value.pop("items")], **value)


def _described(collection: Collection) -> dict[str, Any]:
    return {
        "slug": collection.slug,
        "title": collection.title,
        "description": collection.description,
        "owner": {"name": collection.owner},
        "private": collection.private,
        "lastUpdated": collection.updated,
        "theme": "orange",
        "upvotes": 0,
        "items": [
            {"_id": item.key, "id": item.id, "type": item.type, "position": position}
            | ({} if item.note is None else {"note": {"text": item.note}})
            for position, item in enumerate(collection.items)
        ],
    }


def _reply(collection: Collection) -> Reply:
    return json_reply({**_described(collection), "position": 0})  # in a list, the client counts by itself


def _open(call: Call, slug: str, *, write: bool = False) -> Collection:
    token = require_token(call, write=True) if write else token_of(call)
    collection = call.hub.collections.get(slug)
    member = collection is not None and belongs(call, token, collection.owner)
    if collection is None or (collection.private and not member):
        raise HubError(404 if token else 401, "Collection not found")
    if write and not member:
        raise HubError(403, "You don't have the rights to change this collection")
    return collection


def create(call: Call) -> Reply:
    """Make an empty collection; a namespace has one of each title."""
    token, body = require_token(call, write=True), call.json()
    title, owner = str(body["title"]), str(body["namespace"])
    if not belongs(call, token, owner):
        raise HubError(403, f"You don't have the rights to create a collection under the namespace {owner}")
    with call.hub.lock:
        for known in call.hub.collections.values():
            if (known.owner, known.title) == (owner, title):
                return json_reply({"error": "The collection already exists", "slug": known.slug}, 409)
        words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        collection = Collection(
            slug=f"{owner}/{words}-{secrets.token_hex(12)}",
            title=title,
            owner=owner,
            private=bool(body.get("private")),
            description=body.get("description"),
        )
        collection.save(call.hub.collections_folder)
        call.hub.collections[collection.slug] = collection
    return _reply(collection)


def list_all(call: Call) -> Reply:
    """List the collections that may be seen, of one owner where the query names one."""
    token, owner = token_of(call), call.query.get("owner")
    return json_reply(
        [
            _described(collection)
            for collection in call.hub.collections.values()
            if owner in (None, collection.owner) and (not collection.private or belongs(call, token, collection.owner))
        ]
    )


def describe(call: Call, owner: str, name: str) -> Reply:
    """Describe a collection and its items."""
    return _reply(_open(call, f"{owner}/{name}"))


def delete(call: Call, owner: str, name: str) -> Reply:
    """Remove a collection."""
    with call.hub.lock:
        collection = _open(call, f"{owner}/{name}", write=True)
        del call.hub.collections[collection.slug]
        (call.hub.collections_folder / f"{collection.slug.rpartition('-')[2]}.json").unlink()
    return json_reply({})


def add_item(call: Call, owner: str, name: str) -> Reply:
    """Put a repository at the end of a collection."""
    body = call.json()
    wanted = body["item"]
    with call.hub.lock:
        collection = _open(call, f"{owner}/{name}", write=True)
        if (f"{wanted['type']}s", wanted["id"]) not in call.hub.repos:
            raise HubError(404, f"There is no {wanted['type']} {wanted['id']}")
        if any((item.id, item.type) == (wanted["id"], wanted["type"]) for item in collection.items):
            raise HubError(409, "The item is in the collection already")
        collection.items.append(Item(secrets.token_hex(12), wanted["id"], wanted["type"], body.get("note")))
        collection.save(call.hub.collections_folder)
    return _reply(collection)


def delete_item(call: Call, owner: str, name: str, key: str) -> Reply:
    """Take a repository out of a collection."""
    with call.hub.lock:
        collection = _open(call, f"{owner}/{name}", write=True)
        kept = [item for item in collection.items if item.key != key]
        if len(kept) == len(collection.items):
            raise HubError(404, "The item is not in the collection")
        collection.items = kept
        collection.save(call.hub.collections_folder)
    return json_reply({})


ROUTES = (
    Route("GET", "/api/collections", list_all),
    Route("POST", "/api/collections", create),
    Route("GET", "/api/collections/{owner}/{name}", describe),
    Route("DELETE", "/api/collections/{owner}/{name}", delete),
    Route("POST", "/api/collections/{owner}/{name}/items", add_item),
    Route("DELETE", "/api/collections/{owner}/{name}/items/{key}", delete_item),
)
