"""Run a call many times, each in a child of one process that has imported everything, and kill all but the last."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_killed(imports: str, call: str, after: str = "", *, kills: int, **names: object) -> int:
    """Kill a call at moments spread over the time that it takes, then let it run to its end.

    Args:
        imports: Python source, run once.
        call: Python source, run in every child; writes the folder `out`. The first child is timed, undisturbed, with
            another `out`: the one named, with `-timed` at its end.
        after: Python source, run after every kill; `bytes_of` is there.
        kills: how many children are killed.
        **names: JSON values that the sources use, `out` among them.

    Returns:
        How many children were at work when the kill came.
    """
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps({"imports": imports, "call": call, "after": after, "kills": kills, "names": names}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **one_thread, "PYTHONPATH": str(ROOT)},
    )
    return int(done.stdout.splitlines()[-1])


def _serve(imports: str, call: str, after: str, kills: int, names: dict[str, Any]) -> None:
    scope: dict[str, Any] = {"bytes_of": bytes_of, "Path": Path, **names}
    exec(imports, scope)
    gc.freeze()  # or each child would look through all that was imported
    _, seconds = _in_child(call, {**scope, "out": f"{names['out']}-timed"}, None)
    at_work = 0
    for number in range(kills):
        status, _ = _in_child(call, scope, seconds * (number + 1) / (kills + 1))
        at_work += status == -signal.SIGKILL
        exec(after, scope)
    _in_child(call, scope, None)
    sys.stdout.write(f"{at_work}\n")


def _in_child(call: str, scope: dict[str, Any], kill_after: float | None) -> tuple[int, float]:
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            exec(call, scope)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    while kill_after is not None and time.monotonic() < began + kill_after:
        time.sleep(0.001)
    if kill_after is not None:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status, time.monotonic() - began


def bytes_of(folder: Path, *, but: Sequence[str] = ()) -> dict[str, bytes]:
    """Return every file of a folder."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if name not in but}


if __name__ == "__main__":
    _serve(**json.load(sys.stdin))
