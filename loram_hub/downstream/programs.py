"""Generated programs: run against their tests, in processes with limits, and counted as pass@k.

Nothing here runs unless the caller says so in plain words (`run_generated_code`): it is code that a model wrote.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from loram_hub.errors import InvalidRequestError, ResourceError

_RUNNER = Path(__file__).with_name("confining.py")
_MARGIN = 65536
"""Bytes of a result that are read; a whole one has some hundred."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one program may use.

    Raises:
        InvalidRequestError: a limit is too small for Python to start.
    """

    cpu_seconds: int = 5
    """Processor time, seconds, at least 1."""
    wall_seconds: float = 20.0
    """Time until it is killed, seconds, above 0."""
    memory_bytes: int = 2**30
    """Address space, bytes, at least 64 MiB."""
    file_bytes: int = 2**20
    """Largest file that it can write, bytes, at least 4 KiB."""

    def __post_init__(self) -> None:
        least = {"cpu_seconds": 1, "wall_seconds": 0.1, "memory_bytes": 2**26, "file_bytes": 2**12}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InvalidRequestError(f"{name} of generated programs is {getattr(self, name)}; at least {value}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Confinement:
    """How far programs were shut in, as far as the system allowed it."""

    network: str
    """`none`: the kernel gave them no network; `guarded`: only the interpreter refused them one."""
    user: str
    """`nobody`, where this process is root's; `own`: that of this process."""
    files: str
    """`landlock`: the kernel let them write to their folder alone, and read Python and the system's libraries alone;
    `guarded`: only the interpreter kept them from other files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a program."""

    passed: bool
    """Whether it ran to the end of its tests."""
    confinement: Confinement
    """How far it was shut in."""


def run_program(program: str, tests: str, *, limits: Limits | None = None) -> Outcome:
    """Run a program and, in the same process, its tests.

    Args:
        program: Python source; of the standard library alone, no package is there.
        tests: Python source that raises where the program is wrong.
        limits: None for the defaults.

    Returns:
        Whether the tests ran to their end without raising.

    Raises:
        InvalidRequestError: the system is not Linux.
        ResourceError: the process could not be started, or this one is root's and cannot give its rights away.
    """
    if sys.platform != "linux":
        raise InvalidRequestError(
            f"Generated programs are run on Linux alone; this is {sys.platform}, where memory would have no limit."
        )
    allowed, proof = limits or Limits(), secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="loram-program-") as folder, tempfile.TemporaryFile() as results:
        job = {"program": f"{program}\n", "tests": f"{tests}\n", "proof": proof, "folder": folder, **asdict(allowed)}
        with tempfile.TemporaryFile() as job_file:
            job_file.write(json.dumps(job).encode())
            job_file.seek(0)
            _run(folder, job_file, results, allowed)
        results.seek(0)
        first, _, rest = results.read(_MARGIN).decode("utf-8", "replace").partition("\n")
    if not first:
        raise ResourceError(
            "The process for generated programs did not start: it was killed, or more time or memory is needed than "
            f"{allowed.wall_seconds:g} s and {allowed.memory_bytes:,} bytes."
        )
    said = json.loads(first)
    if "refused" in said:
        raise ResourceError(
            f"Generated programs cannot be shut in here: {said['refused']}. As root they are not run without that: run "
            "this as another user."
        )
    return Outcome(passed=rest == proof, confinement=Confinement(**said))


def _run(folder: str, job: IO[bytes], results: IO[bytes], limits: Limits) -> None:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_RUNNER)],
        stdin=job,
        stdout=results,
        stderr=subprocess.DEVNULL,
        env={},
        cwd=folder,
        start_new_session=True,
    )
    try:
        process.wait(limits.wall_seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
        process.wait()


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Programs for one problem."""

    programs: tuple[str, ...]
    """Python sources, at least one."""
    tests: str
    """What each has to pass."""


def passed_programs(
    problems: Sequence[Problem], *, limits: Limits | None = None, processes: int | None = None
) -> tuple[list[int], Confinement]:
    """Count for each problem the programs that pass; arguments and errors as of `run_program`.

    Args:
        problems: at least one.
        limits: of each program.
        processes: programs at a time; None for one per processor, at most 8.
    """
    jobs = [(place, program, problem.tests) for place, problem in enumerate(problems) for program in problem.programs]
    with ThreadPoolExecutor(processes or min(8, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(lambda job: run_program(job[1], job[2], limits=limits), jobs))
    counts = [0] * len(problems)
    for (place, _, _), outcome in zip(jobs, outcomes, strict=True):
        counts[place] += outcome.passed
    return counts, outcomes[0].confinement


def pass_at_k(programs: int, passed: int, k: int) -> float:
    """Estimate the chance that one of `k` programs passes, without bias, from `programs` of which `passed` did.

    1 - C(n - c, k) / C(n, k), equation 1 of Chen et al. 2021 (arXiv 2107.03374), in whole numbers.

    Raises:
        InvalidRequestError: `k` is not in 1..programs.
    """
    if not 1 <= k <= programs:
        raise InvalidRequestError(f"pass@{k} needs at least {k} programs per problem; there are {programs}.")
    return 1 - math.comb(programs - passed, k) / math.comb(programs, k)


def pass_rates(counts: Sequence[int], programs: int, ks: Sequence[int]) -> Mapping[int, tuple[float, float | None]]:
    """Return pass@k over problems with its standard error, by k; no error of a single problem."""
    rates: dict[int, tuple[float, float | None]] = {}
    for k in ks:
        values = [pass_at_k(programs, passed, k) for passed in counts]
        mean = math.fsum(values) / len(values)
        spread = math.fsum((value - mean) ** 2 for value in values)
        size = len(values)
        rates[k] = (mean, math.sqrt(spread / (size - 1) / size) if size > 1 else None)
    return rates
