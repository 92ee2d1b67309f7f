"""A publisher and a consumer, each with the script they would copy, on a Hub of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from builders import save_base, save_tokenizer, tiny_config
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
RELEASE, ADAPTER = "org/Tiny-LoRAM-0.4-nf4", "bob/Tiny-my-task"


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """The server as the README starts it."""
    command = [sys.executable, "-m", "hub_server", str(tmp_path / "hub")]
    environment = os.environ | {"PYTHONPATH": "tests", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = next(line for line in server.stdout if "http://" in line)
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found is not None
        yield found[0]
        server.terminate()


def person(endpoint: str, home: Path, token: str) -> dict[str, str]:
    """The environment of someone with a cache and a token of their own."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home.mkdir()
    return mine | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "cache"),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{mine['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


def call(environment: dict[str, str], folder: Path, *command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for token in ("hf_alice_write", "hf_bob_write"):
        assert token not in done.stdout + done.stderr
    return done.stdout


def test_from_base_model_to_served_adapter(endpoint: str, tmp_path: Path) -> None:
    base = save_tokenizer(save_base(tmp_path / "base", tiny_config(layers=8), dtype="bfloat16"))
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (base / "LICENSE").write_text("MIT License\n\nPermission is hereby granted, free of charge, ...\n")
    tasks = [{"prompt": f"w{n % 40 + 4} w{n % 30 + 9}", "completion": f" w{n % 20 + 5}"} for n in range(32)]
    alice = person(endpoint, tmp_path / "alice", "hf_alice_write")
    bob = person(endpoint, tmp_path / "bob", "hf_bob_write")
    call(alice, tmp_path / "alice", "hf", "repos", "create", "org/Tiny")
    call(alice, tmp_path / "alice", "hf", "upload", "org/Tiny", base)

    published = call(
        alice | {"PUSH": "--tag v1"}, tmp_path / "alice",
        ROOT / "publish" / "release.sh", "org/Tiny", RELEASE, "0.4", "--importance", "random",
    )  # fmt: skip
    assert "Would push" in published
    assert "Pushed" in published
    assert "Intact" in call(bob, tmp_path / "bob", "loram", "verify", f"{RELEASE}")

    (tmp_path / "bob" / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    trained = call(
        bob, tmp_path / "bob",
        sys.executable, "-W", "ignore", ROOT / "consume" / "finetune_lora.py", RELEASE, "tasks.jsonl",
        "recovered-adapter", "--steps", "3", "--batch", "4", "--accumulation", "1",
    )  # fmt: skip
    line = r"vllm serve org/Tiny --revision \w{40} --enable-lora --max-lora-rank 8 --lora-modules tuned=recovered"
    assert re.search(line, trained)
    call(bob, tmp_path / "bob", "loram", "push", "recovered-adapter", ADAPTER)
    assert "serves" in call(bob, tmp_path / "bob", "loram", "doctor", ADAPTER, "--target", "vllm", "--base", "org/Tiny")
    assert "Intact" in call(bob, tmp_path / "bob", "loram", "verify", ADAPTER)

    served = call(
        alice, tmp_path / "alice", sys.executable, "-W", "ignore", "-c",
        """
import json, torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("org/Tiny", dtype=torch.float32)
ids = torch.arange(4, 24)[None]
before = base(ids).logits
model = PeftModel.from_pretrained(base, "bob/Tiny-my-task")
after = model(ids).logits
config = model.peft_config["default"]
commit = HfApi().model_info("org/Tiny").sha
print(json.dumps([float((after - before).abs().max()), config.base_model_name_or_path, config.revision == commit]))
""",
    )  # fmt: skip
    moved, named, pinned = json.loads(served.splitlines()[-1])
    assert moved > 0
    assert (named, pinned) == ("org/Tiny", True)

    factors = load_file(tmp_path / "bob" / "recovered-adapter" / "adapter_model.safetensors")
    untouched = factors["base_model.model.model.layers.5.mlp.up_proj.lora_B.weight"].astype(np.float32)
    assert (untouched.any(axis=1).sum(), len(untouched)) == (int(37 * 0.6), 37)  # rows of kept channels, and no other
