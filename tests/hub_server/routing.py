"""From the path of a request to the function that answers it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import unquote

from hub_server.errors import HubError
from hub_server.messages import Call, Reply

_FIELDS = {
    "kind": "models|datasets|spaces",
    "repo": "[^/]+/[^/]+",
    # Also `refs/pr/1` with its slashes as they are, which the Hub accepts beside the quoted form.
    "revision": "refs/(?:pr|convert)/[^/]+|[^/]+",
    "path": ".+",
    "digest": "[0-9a-f]{64}",
    "number": "[0-9]+",
}
"""What the fields of a pattern match; any other field is one segment of the path."""


@dataclass(frozen=True)
class Route:
    """A method, a path with fields in braces, and the function that takes the fields by name."""

    method: str
    pattern: str
    answer: Callable[..., Reply]

    @property
    def expression(self) -> str:
        """The pattern as a regular expression."""
        return re.sub(r"\\{(\w+)\\}", lambda m: f"(?P<{m[1]}>{_FIELDS.get(m[1], '[^/]+')})", re.escape(self.pattern))


class Router:
    """Finds the first route that fits; a HEAD request is answered as the GET of the same path."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = [(route, re.compile(route.expression)) for route in routes]

    def answer(self, call: Call) -> Reply:
        """Answer a request, with 404 where there is no such route."""
        method = "GET" if call.method == "HEAD" else call.method
        for route, expression in self._routes:
            if route.method == method and (match := expression.fullmatch(call.path)):
                return route.answer(call, **{name: unquote(value) for name, value in match.groupdict().items()})
        raise HubError(404, f"There is no route {call.method} {call.path}")
