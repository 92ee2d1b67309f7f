"""Where the Hub's protocol is tested: on the loopback server, and on a real Hub for those who ask for it.

    LORAM_LIVE_HUB=https://huggingface.co HF_TOKEN=hf_... python -m pytest tests -k live

The token needs write access. Every repository is private, has a random name under the token's user and is deleted when
its test ends. `conftest.py` imports this module before it drops HF_TOKEN, so that no other test ever sees the token.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any

from hub_server import HubServer

_ENDPOINTS = {"": None, "1": "https://huggingface.co"}
_ASKED = os.environ.get("LORAM_LIVE_HUB", "")
LIVE_ENDPOINT = _ENDPOINTS.get(_ASKED, _ASKED)
"""The Hub of the live suite; None where it was not asked for."""
LIVE_TOKEN = os.environ.pop("HF_TOKEN", None) if LIVE_ENDPOINT else None
"""The token for it."""

_PRELUDE = """
import json, os, sys
from pathlib import Path
from huggingface_hub import *
from huggingface_hub.errors import *
from huggingface_hub.hf_api import RepoFile
api = HfApi()

def refusal(call, *args, **kwargs):
    # The class and, if it came from a server, the status of what a call raises.
    try:
        call(*args, **kwargs)
    except Exception as err:
        return [type(err).__name__, getattr(getattr(err, "response", None), "status_code", None)]

def answer(value):
    sys.stdout.write("\\n" + json.dumps(value))
"""


class ClientError(AssertionError):
    """A client script failed."""


def run_client(environment: dict[str, str], script: str, *arguments: str | Path) -> Any:
    """Run a script that uses huggingface_hub in a process of its own, since it reads its environment when imported.

    Args:
        environment: The process' environment.
        script: Its code; `api`, `refusal` and the names of huggingface_hub are there.
        *arguments: Its `sys.argv[1:]`.

    Returns:
        What the script gave to `answer`.
    """
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", _PRELUDE + dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    if run.returncode != 0:
        raise ClientError(run.stderr)
    return json.loads(run.stdout.rpartition("\n")[2] or "null")


@dataclass(kw_only=True)
class Place:
    """A Hub to test, and a user of it."""

    home: Path
    """For the clients' HF_HOMEs and files."""
    namespace: str
    environment: Callable[[Path, bool], dict[str, str]]
    """Gives a client's environment, from its HF_HOME and whether it uses xet."""
    hub: HubServer | None = None
    """The loopback server; None on a real Hub."""
    _made: list[str] = field(default_factory=list)

    def new_repo(self) -> str:
        """Return the id of a repository that does not exist."""
        self._made.append(f"{self.namespace}/loram-hub-test-{secrets.token_hex(6)}")
        return self._made[-1]

    def client(self, script: str, *arguments: str | Path, xet: bool = True, home: str = "home") -> Any:
        """Run a client script; see `run_client`. Clients with the same `home` share a cache."""
        return run_client(self.environment(self.home / home, xet), script, *arguments)

    def clean_up(self) -> None:
        """Delete what was made."""
        if self.hub is None and self._made:
            self.client("for repo in sys.argv[1:]: api.delete_repo(repo, missing_ok=True)", *self._made)


def loopback_place(hub: HubServer, home: Path) -> Place:
    """Return the loopback server as a place to test."""
    return Place(home=home, namespace="alice", environment=lambda at, xet: hub.environment(at, xet=xet), hub=hub)


def live_place(endpoint: str, token: str, home: Path) -> Place:
    """Return a real Hub as a place to test."""

    def environment(at: Path, xet: bool) -> dict[str, str]:
        dropped = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        switches = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "0" if xet else "1"}
        return inherited | switches | {"HF_ENDPOINT": endpoint, "HF_HOME": str(at), "HF_TOKEN": token}

    namespace = run_client(environment(home / "whoami", True), "answer(api.whoami()['name'])")
    return Place(home=home, namespace=namespace, environment=environment)
