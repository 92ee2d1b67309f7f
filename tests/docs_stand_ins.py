"""Programs that the documents call and that no test can: what can be said of a call without them is checked.

    pip     installs what the tests run in already: the extras that it is asked for must exist
    make    would start the tests, or an installation: the target must exist
    vllm    needs an environment of its own (tests/serving has a real one): `loram doctor` must take the adapter, and
            know each option
    $EDITOR is a person

`docs_stand_ins.py PROGRAM ARGUMENTS`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("pip", "make", "vllm", "editor")


def pip(arguments: list[str]) -> None:
    """Take `pip install -e '.[extra]'`, with constraints perhaps."""
    parser = argparse.ArgumentParser("pip")
    parser.add_argument("command", choices=["install"])
    parser.add_argument("-e", dest="project", required=True)
    parser.add_argument("-c", dest="constraints")
    given = parser.parse_args(arguments)
    asked = re.fullmatch(r"\.(?:\[([\w,]+)\])?", given.project)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if asked is None or not set((asked[1] or "").split(",")) - {""} <= known.keys():
        sys.exit(f"{given.project} is no installation of this project; its extras are {', '.join(known)}")
    if given.constraints is not None and not (ROOT / given.constraints).is_file():
        sys.exit(f"there is no {given.constraints}")


def make(arguments: list[str]) -> None:
    """Take targets of the Makefile."""
    _, _, without_stand_ins = os.environ["PATH"].partition(os.pathsep)
    real = shutil.which("make", path=without_stand_ins)
    assert real is not None, "make is not installed"
    sys.exit(subprocess.run([real, "-n", "-C", str(ROOT), *arguments], check=False).returncode)


def vllm(arguments: list[str]) -> None:
    """Take `vllm serve BASE --enable-lora ... --lora-modules NAME=ADAPTER`."""
    parser = argparse.ArgumentParser("vllm")
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("base")
    for option in ("--revision", "--chat-template", "--host", "--port"):
        parser.add_argument(option)
    parser.add_argument("--enable-lora", action="store_true", required=True)
    parser.add_argument("--max-lora-rank", type=int, required=True)
    parser.add_argument("--lora-modules", required=True)
    given = parser.parse_args(arguments)
    adapter = given.lora_modules.partition("=")[2]
    done = subprocess.run(
        ["loram", "doctor", adapter, "--target", "vllm", "--base", given.base, "--json"],
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"vLLM would not serve {adapter} on {given.base}: {done.stdout}")
    (served,) = json.loads(done.stdout)["command"]
    if f"--max-lora-rank {given.max_lora_rank} " not in served:
        sys.exit(f"it is served by: {served}")


def editor(arguments: list[str]) -> None:
    """Take a file that is there."""
    if not all(Path(name).is_file() for name in arguments) or not arguments:
        sys.exit(f"there is no file to edit: {arguments}")


if __name__ == "__main__":
    {"pip": pip, "make": make, "vllm": vllm, "editor": editor}[sys.argv[1]](sys.argv[2:])
