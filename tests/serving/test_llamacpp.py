"""A recovered adapter as a GGUF file, run by llama.cpp: what it computes is what transformers and PEFT compute.

Opt-in: `make test-llamacpp` brings llama.cpp, by way of node-llama-cpp, and its converters, and runs this. The
converters want a tokenizer that llama.cpp knows, so the model is SmolLM2-135M.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from serving.cases import HERE, Case, LogProbs, reference, save_smollm2, trained

from loram_hub.adapter import MARK

PYTHON = os.environ.get("LLAMACPP_PYTHON", "")
FOLDER = Path(os.environ.get("LLAMACPP_FOLDER", "."))
TOLERANCE = 1e-3
"""Nats, with weights, keys and values in float32; an adapter moves log-probabilities by more than 1."""
PROMPTS = [[1, 5, 7, 11], [1, 400, 3, 3, 3, 900, 12], [1, *range(20, 40)]]
CONTINUED = np.array([[17, 400, 9, 2_000], [30_000, 8, 8, 1], [3, 44, 555, 6_666]])

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="needs llama.cpp in an environment of its own: make test-llamacpp"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    pytest.importorskip("gguf", reason="SmolLM2-135M comes in a GGUF file")
    with trained(tmp_path_factory.mktemp("llamacpp"), save_smollm2) as made:
        converted = convert(made, "convert_hf_to_gguf.py", made.base, "base.gguf")
        assert converted.returncode == 0, converted.stderr[-5_000:]
        yield made


def run(case: Case, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program that cannot import this project."""
    return subprocess.run(
        list(map(str, command)),
        env=case.environment("llamacpp", HF_HUB_OFFLINE="1"),
        cwd=case.folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def convert(
    case: Case, script: str, source: Path, target: str, *options: str | Path
) -> subprocess.CompletedProcess[str]:
    """Convert a model or an adapter to GGUF, in float32."""
    return run(case, PYTHON, FOLDER / script, source, "--outtype", "f32", "--outfile", target, *options)


def score(case: Case, *adapter: str) -> LogProbs:
    """Return llama.cpp's log-probabilities of the continuations, (prompts, tokens, vocabulary)."""
    # The last token is not fed: nothing is asked of what comes after it.
    fed = [
        ([*prompt, *tokens[:-1]], len(prompt) - 1) for prompt, tokens in zip(PROMPTS, CONTINUED.tolist(), strict=True)
    ]
    (case.folder / "sequences.json").write_text(json.dumps(fed))
    done = run(
        case, "node", HERE / "score_llamacpp.mjs", FOLDER / "node_modules", "base.gguf", "sequences.json", "out.bin",
        *adapter,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5_000:]
    logits = np.fromfile(case.folder / "out.bin", np.float32).reshape(*CONTINUED.shape, -1).astype(np.float64)
    return (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)).astype(np.float32)


def test_llamacpp_computes_what_peft_does(case: Case, figure: Callable[[str], None]) -> None:
    converted = convert(case, "convert_lora_to_gguf.py", case.recovered, "adapter.gguf", "--base", case.base)
    assert converted.returncode == 0, converted.stderr[-5_000:]

    base, tuned = score(case), score(case, "adapter.gguf")

    expected = [reference(case.base, adapter, PROMPTS, CONTINUED) for adapter in (None, case.recovered)]
    assert base.shape == tuned.shape == expected[0].shape
    differences = [float(np.abs(found - right).max()) for found, right in zip((base, tuned), expected, strict=True)]
    effect = float(np.abs(expected[1] - expected[0]).max())
    figure(
        f"llama.cpp, SmolLM2-135M: max |dlogp| base {differences[0]:.1e}, recovered adapter {differences[1]:.1e} over "
        f"{CONTINUED.size} tokens x {tuned.shape[-1]:,}; the adapter moves them by {effect:.2f}"
    )
    assert max(differences) < TOLERANCE
    assert effect > 100 * TOLERANCE
    assert (tuned.argmax(-1) == expected[1].argmax(-1)).all()


def test_the_converter_refuses_the_pruned_adapter_and_its_message_says_what_to_do(case: Case) -> None:
    converted = convert(case, "convert_lora_to_gguf.py", case.pruned, "pruned.gguf", "--base", case.base)

    assert converted.returncode != 0
    assert f"{MARK}': Not a lora_A or lora_B tensor" in converted.stderr
    assert not (case.folder / "pruned.gguf").exists()
