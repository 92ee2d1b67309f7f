"""Run alignment in several processes, many times, and pay for the imports once.

`RankForks` starts one interpreter that imports everything and then takes orders: for each it forks the processes of one
run, which find each other through a file, and tells how each ended. They can be killed after a time.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
_IMPORTED = (
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "datasets",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "matplotlib.style",
    "transformers.models.llama.modeling_llama",
    "loram_hub.alignment.aligning",
    "alignment.jobs",
)
_LOOK_SECONDS = 0.002
_PATIENCE_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How one process of a run ended."""

    status: int
    """Exit code; negative: the signal that ended it."""
    result: Any
    """What the job returned."""
    error: str | None
    """Class and message of the error that it raised."""
    output: str
    """Both stdout and stderr."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnded:
    """How a run ended."""

    ranks: tuple[Ended, ...]
    """Its processes."""
    seconds: float
    """From the fork to the end of the last."""

    @property
    def results(self) -> list[Any]:
        """What each process returned; a failure is raised with what it printed."""
        for rank in self.ranks:
            assert rank.status == 0, f"{rank.error}\n{rank.output}"
        return [rank.result for rank in self.ranks]


class RankForks:
    """An interpreter that forks the processes of a run, again and again."""

    def __init__(self) -> None:
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60)

    def run(
        self,
        job: str,
        *,
        size: int,
        kill_after: float | None = None,
        killed: list[int] | None = None,
        **arguments: Any,
    ) -> RunEnded:
        """Run a function of `jobs` in several processes.

        Args:
            job: Its name.
            size: Processes.
            kill_after: Seconds after which they are sent SIGKILL.
            killed: Which of them are; None for all.
            **arguments: Of the function; JSON.
        """
        order = {"job": job, "size": size, "kill_after": kill_after, "killed": killed, "arguments": arguments}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return RunEnded(ranks=tuple(Ended(**rank) for rank in answer["ranks"]), seconds=answer["seconds"])


def _answer_orders() -> None:
    for module in _IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # or each child would look through all that was imported
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    # Of pyarrow's allocator, which is prepared for forks; any other thread could leave a lock taken behind.
    assert len(threads - {"jemalloc_bg_thd"}) <= 1, threads
    for line in sys.stdin:
        with tempfile.TemporaryDirectory(prefix="loram-ranks-") as folder:
            answer = _run(Path(folder), **json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _run(
    folder: Path,
    job: str,
    size: int,
    kill_after: float | None,
    killed: list[int] | None,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    began = time.monotonic()
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _be_rank(folder, rank, size, job, arguments)
        children.append(child)
    statuses = _wait(children, began, kill_after, range(size) if killed is None else killed)
    ranks = []
    for rank, status in enumerate(statuses):
        said = folder / f"result-{rank}.json"
        found = json.loads(said.read_text()) if said.exists() else {"result": None, "error": None}
        output = (folder / f"output-{rank}.txt").read_text(errors="replace")
        ranks.append({"status": status, "output": output[-20_000:], **found})
    return {"ranks": ranks, "seconds": time.monotonic() - began}


def _wait(children: list[int], began: float, kill_after: float | None, killed: Sequence[int]) -> list[int]:
    statuses: dict[int, int] = {}
    kill_after = _PATIENCE_SECONDS if kill_after is None else kill_after
    while len(statuses) < len(children):
        elapsed = time.monotonic() - began
        if elapsed >= kill_after:
            _kill([child for rank, child in enumerate(children) if rank not in statuses and rank in killed])
            kill_after, killed = elapsed + _PATIENCE_SECONDS, range(len(children))
        for rank, child in enumerate(children):
            if rank not in statuses and (ended := os.waitpid(child, os.WNOHANG))[0]:
                statuses[rank] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(_LOOK_SECONDS)
    return [statuses[rank] for rank in range(len(children))]


def _kill(children: list[int]) -> None:
    for child in children:  # nobody has waited for them: the numbers are still their own
        os.kill(child, signal.SIGKILL)


def _be_rank(folder: Path, rank: int, size: int, job: str, arguments: dict[str, Any]) -> None:
    code = 1
    try:
        with (folder / f"output-{rank}.txt").open("wb", buffering=0) as output:
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
        found = _result(folder, rank, size, job, arguments)
        aside = folder / f".result-{rank}.json"
        aside.write_text(json.dumps(found))
        aside.rename(folder / f"result-{rank}.json")
        code = 0 if found["error"] is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _result(folder: Path, rank: int, size: int, job: str, arguments: dict[str, Any]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from alignment import jobs

    from loram_hub.errors import LoramError

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        return {"result": getattr(jobs, job)(**arguments), "error": None}
    except LoramError as err:
        traceback.print_exc()
        return {"result": None, "error": f"{type(err).__name__}: {err}"}
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _answer_orders()
