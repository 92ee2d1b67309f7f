"""Run a server until it answers, and ask it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WAIT_SECONDS = 300


def free_port() -> int:
    """Return a port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def serving(command: Sequence[str], *, folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Run a server, which takes --host and --port and answers /health; yield its address."""
    port = free_port()
    address, log = f"http://127.0.0.1:{port}", folder / f"server-{port}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + WAIT_SECONDS
        while not _is_healthy(address):
            assert process.poll() is None, log.read_text()[-5_000:]
            assert time.monotonic() < end, log.read_text()[-5_000:]
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def ask(address: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
    """Get, or post JSON; return status and answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode()


def _is_healthy(address: str) -> bool:
    try:
        return ask(f"{address}/health")[0] == 200
    except OSError:
        return False
