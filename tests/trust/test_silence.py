"""`verify`, `info` and `recover` on local folders open no socket, start no process and import no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from trust.subjects import build_subjects

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ROOT = Path(__file__).parents[2]
WATCH = """
import sys

events = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind", "subprocess.Popen", "os.exec"):
        events.append(event)
    if event == "import" and arguments[0] in ("torch", "transformers", "peft", "bitsandbytes"):
        events.append("import of " + arguments[0])

sys.addaudithook(watch)
{probe}
from loram_hub.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    print(end.code, events)
"""


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subjects")
    build_subjects(folder)
    return folder


def watched(*arguments: str | Path, probe: str = "") -> str:
    """Run a command under an audit hook, online as far as the environment goes; return exit code and what it did."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    run = subprocess.run(
        [sys.executable, "-c", WATCH.format(probe=probe, arguments=[str(each) for each in arguments])],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


@pytest.mark.parametrize("subject", ["bf16", "nf4", "sharded", "recovered", "peft"])
def test_verify_is_silent(subjects: Path, subject: str) -> None:
    assert watched("verify", subjects / subject) == "0 []"
    assert watched("verify", subjects / subject, "--base", subjects / "base") == "0 []"


def test_a_full_comparison_is_silent(subjects: Path) -> None:
    assert watched("verify", subjects / "bf16", "--full", "--base", subjects / "base") == "0 []"


def test_info_is_silent(subjects: Path) -> None:
    assert watched("info", subjects / "nf4") == "0 []"


def test_recover_is_silent(subjects: Path, tmp_path: Path) -> None:
    found = watched("recover", subjects / "trained", tmp_path / "out", "--release", subjects / "bf16")

    assert found == "0 []"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("probe", "event"),
    [
        ("import socket; s = socket.socket(); s.settimeout(0); s.connect_ex(('127.0.0.1', 9))", "socket.connect"),
        ("import torch", "import of torch"),
    ],
)
def test_the_watch_sees_what_it_watches_for(subjects: Path, probe: str, event: str) -> None:
    assert event in watched("info", subjects / "nf4", probe=probe)
