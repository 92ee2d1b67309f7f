"""URLs and tokens that carry their own permission for a while, as those of a storage service do."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode

from hub_server.errors import HubError


class Signer:
    """Signs with a key that outlives the server, so that its URLs do too."""

    def __init__(self, folder: Path) -> None:
        key = folder / "key"
        if not key.exists():
            key.write_bytes(secrets.token_bytes(32))
        self._key = key.read_bytes()

    def _signature(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), "sha256").hexdigest()

    def url(self, origin: str, path: str, *, seconds: float) -> str:
        """Return a URL that may be used by whoever has it."""
        expires = f"{time.time() + seconds:.3f}"
        return f"{origin}{path}?{urlencode({'expires': expires, 'signature': self._signature(f'{path} {expires}')})}"

    def check(self, path: str, query: Mapping[str, str]) -> None:
        """Refuse a URL that was not signed here, or too long ago."""
        expires = query.get("expires", "")
        genuine = hmac.compare_digest(self._signature(f"{path} {expires}"), query.get("signature", ""))
        if not genuine or float(expires) < time.time():
            raise HubError(403, "The signature does not match or has expired")

    def token(self, scope: str, *, seconds: float) -> tuple[str, int]:
        """Return a token for what `scope` says, and when it expires in seconds since the epoch."""
        expires = int(time.time() + seconds)
        return f"{scope}:{expires}:{self._signature(f'{scope}:{expires}')}", expires

    def scope(self, token: str) -> str:
        """Return what a token is for."""
        text, _, signature = token.rpartition(":")
        scope, _, expires = text.rpartition(":")
        if not hmac.compare_digest(self._signature(text), signature) or float(expires) < time.time():
            raise HubError(401, "The token is invalid or has expired")
        return scope
