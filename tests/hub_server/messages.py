"""What travels between the sockets and the routes: a record of each request, the request itself, the reply to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hub_server.errors import HubError
from hub_server.faults import Fault

if TYPE_CHECKING:
    from hub_server.server import HubServer

Role = Literal["hub", "cdn", "cas"]
"""The three origins: the API, the storage behind signed URLs, and xet's content-addressed store."""


@dataclass(kw_only=True)
class Request:
    """What is remembered of a request; it is listed when it arrives, and completed while it is answered."""

    role: Role
    method: str
    path: str
    """With the query."""
    range: str | None = None
    token_present: bool = False
    started: float = 0.0
    status: int | None = None
    """Of the answer; stays None where none was sent."""
    received: int = 0
    """Bytes of the request's body that were read."""
    sent: int = 0
    """Bytes of the answer's body that were sent."""
    fault: Fault | None = None

    @property
    def line(self) -> str:
        """What patterns are matched with."""
        return f"{self.method} {self.path}"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer: bytes, or a file of which the request may want a range."""

    status: int = 200
    body: bytes | Path = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """Return an answer in JSON."""
    headers = {"Content-Type": "application/json", **(headers or {})}
    return Reply(status=status, body=json.dumps(value).encode(), headers=headers)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request as the routes see it."""

    hub: HubServer
    method: str
    path: str
    query: Mapping[str, str]
    headers: Message
    pieces: Callable[[], Iterator[bytes]]
    """The body, piece by piece as it arrives; ends in `ConnectionDropped` where the client goes away."""

    def read(self) -> bytes:
        """Return the whole body."""
        return b"".join(self.pieces())

    def json(self) -> dict[str, Any]:
        """Return the body, an object in JSON."""
        try:
            value = json.loads(self.read() or b"{}")
        except ValueError as err:
            raise HubError(400, f"The body is not JSON: {err}") from err
        if not isinstance(value, dict):
            raise HubError(400, "The body is not an object")
        return value

    def flag(self, name: str) -> bool:
        """Return whether the query switches something on."""
        return self.query.get(name, "").lower() in ("1", "true")
