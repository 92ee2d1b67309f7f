"""What a route raises to answer with an error, as the Hub words them."""

from __future__ import annotations

from collections.abc import Mapping


class HubError(Exception):
    """An answer with an error status.

    `code` becomes the header `X-Error-Code`, by which huggingface_hub chooses the class of its exception.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})


class ConnectionDropped(Exception):
    """The connection is to end without an answer, or without the rest of one."""
