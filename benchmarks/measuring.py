"""What the benchmarks share: a process of its own for every measured run, cold or warm files, and the one line of JSON.

Peak memory is the process's high-water mark, `VmHWM` of /proc/self/status where there is one. `ru_maxrss` is not used
on Linux: it starts at the size of the process that forked the measured one. Pages of memory-mapped files count.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

MB = 10**6
GB = 10**9

LLAMA_2_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
}
"""Sizes of LLaMA-2-70B, by the keys of its config."""
QUICK_70B = LLAMA_2_70B | {"hidden_size": 96, "intermediate_size": 320, "num_hidden_layers": 8, "head_dim": 16}
"""As many heads, and little else."""
_PACKAGES = ("loram-hub", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy")
_ROOT = Path(__file__).resolve().parents[1]


def measured(script: str, action: str, **arguments: object) -> dict[str, Any]:
    """Run one action of a benchmark script in a fresh process; return what it found, with its `peak_rss`.

    Args:
        script: `__file__` of the benchmark.
        action: name of one of the functions the script gave to `serve_actions`.
        **arguments: of that function, as JSON.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), environment.get("PYTHONPATH")]))
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, str(Path(script).resolve()), "--action", action, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{Path(script).name}: {action} ended with status {done.returncode} (its errors stand above).")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def serve_actions(*actions: Callable[..., Mapping[str, Any]]) -> None:
    """In a process started by `measured`: run the action it names, print what it returns, and exit."""
    if len(sys.argv) != 4 or sys.argv[1] != "--action":
        return
    action = {each.__name__: each for each in actions}[sys.argv[2]]
    found = action(**json.loads(sys.argv[3]))
    print(json.dumps({**found, "peak_rss": peak_rss()}))
    sys.exit(0)


def peak_rss() -> int:
    """Largest resident memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def scratch_folder(prefix: str, parent: str | None) -> Iterator[Path]:
    """A temporary folder that is gone at the end, also after an error or Ctrl-C."""
    folder = Path(tempfile.mkdtemp(prefix=f"loram-{prefix}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Give a function that tells the seconds since the block began, and, after it, how long the block took."""
    start, end = time.perf_counter(), 0.0
    try:
        yield lambda: (end or time.perf_counter()) - start
    finally:
        end = time.perf_counter()


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors weights of a checkpoint or release."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def make_cold(folder: Path) -> None:
    """Force a folder's files to disk and drop them from the page cache, where the system can."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_warm(folder: Path) -> None:
    """Read a folder's files once, so that they are in the page cache."""
    buffer = bytearray(16 * MB)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def report(benchmark: str, *, quick: bool, figures: Mapping[str, Any], target: str, met: bool) -> None:
    """Print the one line of JSON."""
    print(json.dumps({**_line(benchmark, quick, figures), "target": target, "met": met}, allow_nan=False))


def record(benchmark: str, *, quick: bool, figures: Mapping[str, Any]) -> None:
    """Print one of several lines of JSON, at once: whatever stops the run, what was measured is there."""
    print(json.dumps(_line(benchmark, quick, figures), allow_nan=False), flush=True)


def _line(benchmark: str, quick: bool, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "machine": _machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": _versions(),
        "quick": quick,
        "figures": figures,
    }


def _machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    """Model name, and on x86 family and model number: virtual machines hide the name."""
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return platform.processor()
    fields = dict(line.split("\t", 1) for line in information.read_text().split("\n\n")[0].splitlines() if "\t" in line)
    found = {name.strip(): value.strip(" :\t") for name, value in fields.items()}
    numbers = f" (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else ""
    return found.get("model name", platform.processor()) + numbers


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
