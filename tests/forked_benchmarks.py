"""Run benchmark scripts in their quick sizes, each measured action in a process of its own, and import torch once.

`measuring.measured` starts an interpreter for every action, whose imports take longer than a quick action does. Here an
interpreter that has imported everything forks one for the script, and that one forks another for each action: what a
process does is the same, but its peak memory begins with what was imported.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
_MODULES = (
    "transformers.models.llama.modeling_llama", "peft", "bitsandbytes", "synthetic",
    "loram_hub.alignment", "loram_hub.auto", "loram_hub.corpora", "loram_hub.importance", "loram_hub.masked_lora",
    "loram_hub.pruning", "loram_hub.quantization", "loram_hub.recovery", "loram_hub.refitting",
    "loram_hub.sparsification.sparsifying", "loram_hub.teaching",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a script ended."""

    status: int
    """Exit code; negative: the signal that ended it."""
    output: str
    """Its stdout."""
    errors: str
    """Its stderr."""


class ForkedBenchmarks:
    """The interpreter that forks; it starts with the first script."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.communicate(timeout=60)

    def run(self, script: str) -> Ended:
        """Run a script in its quick size."""
        if self._process is None:
            one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={
                    **os.environ,
                    **one_thread,
                    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, BENCHMARKS))),
                    "TRANSFORMERS_VERBOSITY": "error",
                },
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{script}\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


def _answer_orders() -> None:
    for module in _MODULES:
        importlib.import_module(module)
    import measuring

    measuring.measured = _measured_in_fork
    gc.freeze()  # or each child would look through all that was imported
    if Path("/proc/self/task").is_dir():
        assert len(os.listdir("/proc/self/task")) == 1, "a second thread: a fork could take a lock along"
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_in_fork(BENCHMARKS / f"{line.strip()}.py", "--quick")) + "\n")
        sys.stdout.flush()


def _measured_in_fork(script: str, action: str, **arguments: object) -> dict[str, Any]:
    """Stand in for `measuring.measured`."""
    ended = _in_fork(Path(script), "--action", action, json.dumps(arguments))
    sys.stderr.write(ended["errors"])
    if ended["status"] != 0:
        raise SystemExit(f"{Path(script).name}: {action} ended with status {ended['status']}.")
    found: dict[str, Any] = json.loads(ended["output"].splitlines()[-1])
    return found


def _in_fork(script: Path, *arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            _run(script, *arguments)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found: dict[str, Any] = {"status": status}
        for name, file in (("output", output), ("errors", errors)):
            file.seek(0)
            found[name] = file.read().decode(errors="replace")
    return found


def _run(script: Path, *arguments: str) -> NoReturn:
    """Run a script to its end, and end the process as the interpreter would."""
    sys.argv = [str(script), *arguments]
    code: object = 1
    try:
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
    except BaseException:  # as the interpreter does with what nobody caught
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    _answer_orders()
