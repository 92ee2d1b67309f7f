"""Clients of the loopback Hub, in processes of their own: huggingface_hub reads its settings when it is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hub_server import HubServer


def loram(
    hub: HubServer,
    home: Path,
    *arguments: str | Path,
    token: str | None = "hf_alice_write",
    xet: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run the `loram` command against the server."""
    return run(hub, home, "-m", "loram_hub", *arguments, token=token, xet=xet, **environment)


def python(
    hub: HubServer,
    home: Path,
    code: str,
    *arguments: str | Path,
    token: str | None = "hf_alice_write",
    xet: bool = False,
    **environment: str,
) -> Any:
    """Run Python code against the server; it finds its arguments in `sys.argv` and prints one JSON value last."""
    done = run(hub, home, "-c", f"import sys, json\n{code}", *arguments, token=token, xet=xet, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run(
    hub: HubServer, home: Path, *arguments: str | Path, token: str | None, xet: bool, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the interpreter against the server."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=hub.environment(home, token, xet=xet, **environment),
    )
