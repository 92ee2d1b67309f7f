"""Run the `loram` command many times, each time in a process of its own, and pay for its imports once.

`Forks` starts one interpreter that imports everything and then takes orders: for each it forks a child, which runs the
real command, and tells how the child ended. A child can be killed after a time, or be denied files over a size. The
interpreter must have one thread when it forks, so nothing is imported there that starts another (numpy's BLAS, hf_xet).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
WEIGHTS = (
    "loram_hub.pruning", "loram_hub.quantization", "loram_hub.merging", "loram_hub.recovery", "loram_hub.inspection",
    "loram_hub.cards",
)  # fmt: skip
"""What commands on local folders import."""
HUB = ("loram_hub.pushing", "loram_hub.inspection", "loram_hub.hub")
"""What push and pull import: no torch."""
_LOOK_SECONDS = 0.0003


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a command ended."""

    status: int
    """Exit code; negative: the signal that ended it."""
    seconds: float
    """From the fork to the end."""
    output: str
    """Both stdout and stderr."""

    @property
    def was_killed(self) -> bool:
        """Whether it was at work when the kill came."""
        return self.status == -signal.SIGKILL


class Forks:
    """An interpreter that forks a child for every command.

    Args:
        modules: What it imports beforehand.
        environment: Its environment; None for that of this process.
    """

    def __init__(self, modules: tuple[str, ...], environment: Mapping[str, str] | None = None) -> None:
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**(os.environ if environment is None else environment), **one_thread, **paths},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60)

    def run(
        self,
        *arguments: str | Path,
        kill_after: float | None = None,
        kill_when: Path | None = None,
        largest_file: int | None = None,
    ) -> Ended:
        """Run the command.

        Args:
            *arguments: Of the command, or `pull REPO_ID`, which is what every load from the Hub begins with.
            kill_after: Seconds after which it is sent SIGKILL, if it is still at work.
            kill_when: They count from when this file or folder is there.
            largest_file: Bytes over which no file can grow.
        """
        order = {
            "arguments": [str(one) for one in arguments],
            "kill_after": kill_after,
            "kill_when": None if kill_when is None else str(kill_when),
            "largest_file": largest_file,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


def _answer_orders(modules: list[str]) -> None:
    for module in ("loram_hub.cli", *modules):
        importlib.import_module(module)
    gc.freeze()  # or each child would look through all that was imported
    if Path("/proc/self/task").is_dir():
        assert len(os.listdir("/proc/self/task")) == 1, "a second thread: a fork could take a lock along"
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_in_child(**json.loads(line))) + "\n")
        sys.stdout.flush()


def _in_child(
    arguments: list[str], kill_after: float | None, kill_when: str | None, largest_file: int | None
) -> dict[str, Any]:
    read, write = os.pipe()  # whose buffer of 64 KiB holds more than a command says
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        for descriptor in (1, 2):
            os.dup2(write, descriptor)
        _run(arguments, largest_file)
    os.close(write)
    deadline = None if kill_after is None else began + kill_after
    ended, status = os.waitpid(child, 0 if deadline is None else os.WNOHANG)
    while not ended:
        if kill_after is not None and kill_when is not None:
            if os.path.exists(kill_when):
                kill_when = None
            deadline = time.monotonic() + kill_after
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)  # nobody else has waited for it: the number is still its own
            deadline = None
        time.sleep(_LOOK_SECONDS)
        ended, status = os.waitpid(child, os.WNOHANG if deadline else 0)
    seconds = time.monotonic() - began
    with os.fdopen(read, "rb") as pipe:
        output = pipe.read().decode(errors="replace")
    return {"status": os.waitstatus_to_exitcode(status), "seconds": seconds, "output": output}


def _run(arguments: list[str], largest_file: int | None) -> None:
    """Run a command to its end, and end the process as the interpreter would."""
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails with EFBIG and does not end the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    code: object = 1
    try:
        code = _pull(arguments[1]) if arguments[0] == "pull" else _command(arguments)
    except BaseException:  # as the interpreter does with what nobody caught
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _command(arguments: list[str]) -> object:
    from loram_hub.cli import main

    try:
        main(arguments, prog_name="loram")
    except SystemExit as end:
        return end.code
    return 0


def _pull(repo_id: str) -> int:
    from loram_hub.errors import LoramError
    from loram_hub.hub import fetch_release

    try:
        source, _ = fetch_release(repo_id)
    except LoramError as err:
        sys.stderr.write(f"Error: {err}\n")
        return err.exit_code
    sys.stdout.write(f"{source.folder}\n")
    return 0


if __name__ == "__main__":
    _answer_orders(sys.argv[1:])
