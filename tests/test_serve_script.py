"""`consume/serve_vllm.py` without vLLM: the command that it prints. tests/serving runs it with a real one."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from builders import SEVEN, projections, random_factors, save_adapter, tiny_architecture
from hub_server import HubServer
from safetensors.numpy import load_file, save_file

from loram_hub.adapter import MARK
from loram_hub.doctor import examine
from loram_hub.plan import Plan

SCRIPT = Path(__file__).parents[1] / "consume" / "serve_vllm.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHOLE = projections(Plan(tiny_architecture(), {}))


def adapter(folder: Path, rank: int = 12, base: str = "org/base") -> Path:
    """Write a recovered adapter."""
    factors = random_factors(WHOLE, rank=rank)
    return save_adapter(folder, factors, targets=list(SEVEN), r=rank, base=base, revision=COMMIT)


def run(*arguments: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_the_command_is_the_doctors_with_an_address(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "tuned")
    doctors = examine(folder, "vllm").command
    assert doctors is not None

    done = run(folder, "--dry-run", "--port", "8123", "--", "--dtype", "float16")

    address = ["--host", "127.0.0.1", "--port", "8123", "--dtype", "float16"]
    assert shlex.split(done.stdout) == [*shlex.split(doctors[0]), *address]
    assert done.returncode == 0


def test_an_adapter_is_taken_from_the_hub_and_a_base_from_a_folder(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("alice/tuned", adapter(tmp_path / "tuned", rank=8))
        done = run(
            "alice/tuned", "--dry-run", "--base", "/models/base", "--name", "mine",
            environment=hub.environment(tmp_path / "home"),
        )  # fmt: skip

    words = shlex.split(done.stdout)
    assert words[:4] == ["vllm", "serve", "/models/base", "--enable-lora"]
    assert words[4:8] == ["--max-lora-rank", "8", "--lora-modules", "mine=alice/tuned"]


def test_what_vllm_cannot_serve_is_said_before_it_starts(tmp_path: Path) -> None:
    large, option = adapter(tmp_path / "large", rank=600), adapter(tmp_path / "option", base="--trust-remote-code")

    assert "rank 600" in run(large, "--dry-run").stderr
    assert "--trust-remote-code" in run(option, "--dry-run").stderr
    assert {run(folder, "--dry-run").returncode for folder in (large, option)} == {1}


def test_an_adapter_of_a_pruned_model_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    pruned, damaged, bare = (adapter(tmp_path / name) for name in ("pruned", "damaged", "bare"))
    weights = load_file(pruned / "adapter_model.safetensors")
    mark = f"base_model.model.model.layers.0.mlp.up_proj.{MARK}"
    save_file(weights | {mark: np.zeros(32, np.uint8)}, pruned / "adapter_model.safetensors")
    (damaged / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    (bare / "adapter_model.safetensors").unlink()

    for folder, problem in ((pruned, "loram recover "), (damaged, "is damaged"), (bare, "has no adapter_model")):
        done = run(folder, "--dry-run")
        assert (done.returncode, done.stdout) == (1, "")
        assert problem in done.stderr
        assert "Traceback" not in done.stderr


def test_a_server_that_does_not_start_ends_the_script_with_its_status(tmp_path: Path) -> None:
    done = run(adapter(tmp_path / "tuned"), "--server", shlex.join((sys.executable, "-c", "raise SystemExit(7)")))

    assert done.returncode == 1
    assert "status 7" in done.stderr
