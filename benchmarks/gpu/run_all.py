"""Run every GPU benchmark, each in slots of at most ten minutes, and collect their lines of JSON in one file.

A slot is one command; it is stopped when its time is up, and what it printed until then is kept. Slots that are named
with --only run alone, so that short loans of a GPU can be used one after another.

    python benchmarks/gpu/run_all.py --out results.jsonl [--only step-focus --only load] [--list]
    python benchmarks/gpu/run_all.py --out /tmp/x.jsonl --device cpu --tiny      # shows that it works
    python benchmarks/gpu/table.py results.jsonl --write                         # the tables of README.md
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECONDS = 600
SLOTS: Mapping[str, tuple[str, ...]] = {
    "step-focus": ("qloram_step.py", "--shape", "LLaMA-3.1-70B", "--ratio", "0.85"),
    "unpruned-70B": ("unpruned.py", "--shape", "LLaMA-3.1-70B"),
    "load": ("load.py",),
    "step-3.1": (
        "qloram_step.py", "--shape", "LLaMA-3.1-70B", "--ratio", "0.65", "--ratio", "0.75", "--ratio", "0.95",
    ),
    "step-2": ("qloram_step.py", "--shape", "LLaMA-2-70B", "--shape", "LLaMA-2-13B"),
    "unpruned-2": ("unpruned.py", "--shape", "LLaMA-2-70B"),
    "unpruned-small": ("unpruned.py", "--shape", "LLaMA-2-13B", "--shape", "LLaMA-3.1-8B"),
    "taylor": ("taylor_block.py",),
}  # fmt: skip
"""Script and arguments by name, the most wanted first."""
TINY = {"step": ("qloram_step.py",), "unpruned": ("unpruned.py",), "taylor": ("taylor_block.py",), "load": ("load.py",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl", help="lines are added to it")
    parser.add_argument("--only", action="append", help="name of a slot; default: all")
    parser.add_argument("--list", action="store_true", help="print the names of the slots")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each slot at most")
    parser.add_argument("--tiny", action="store_true", help="tiny models: shows that the scripts work")
    arguments = parser.parse_args()
    slots = TINY if arguments.tiny else SLOTS
    if unknown := set(arguments.only or ()) - set(slots):
        parser.error(f"{sorted(unknown)[0]!r} is no slot; there are {', '.join(slots)}")
    if arguments.list:
        print("\n".join(slots))
        return
    shared = ["--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    for name in arguments.only or slots:
        script, *options = slots[name]
        print(f"{name}: {script} {' '.join(options)}", file=sys.stderr, flush=True)
        run_slot([sys.executable, str(HERE / script), *options, *shared], arguments.out, arguments.seconds)


def run_slot(command: list[str], out: Path, seconds: float) -> None:
    """Run a command whose lines go to the end of a file, for some time at most; a failure does not end the others."""
    paths = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    with out.open("a", encoding="utf-8") as file:
        # A session of its own: what the script has started ends with it, and the GPU is free for the next slot.
        running = subprocess.Popen(command, stdout=file, env=environment, start_new_session=True)
        try:
            status = running.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"stopped after {seconds:g} s; what it found until then is kept", file=sys.stderr)
        else:
            if status:
                print(f"ended with status {status}; its errors stand above", file=sys.stderr)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()


if __name__ == "__main__":
    main()
