"""vLLM's offline engine, run in vLLM's environment: log-probabilities of a base, and with adapters.

    python generate.py job.json

The job names the base, prompts of token ids, adapters to serve and adapters to try. Written beside it: job.npz with the
generated tokens and the log-probabilities of the whole vocabulary at each of them, by name of the adapter. Printed: one
JSON line with what vLLM says of the adapters that it refuses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

TOKENS = 8


def main(job_file: Path) -> None:
    """Serve the base first and every adapter by itself.

    On a CPU, vLLM 0.32 applies the adapter of the last slot to requests without one (vllm#48421, vllm#49656).
    """
    job = json.loads(job_file.read_text())
    llm = LLM(
        model=job["base"],
        dtype="float32",
        enable_lora=True,
        max_lora_rank=16,
        max_loras=1,
        max_cpu_loras=8,
        max_model_len=128,
        enforce_eager=True,
        max_num_seqs=8,
        max_logprobs=-1,
        enable_prefix_caching=False,
    )
    arrays = generate(llm, job["prompts"], "base", None)
    refused = {}
    for number, (name, path) in enumerate(job["adapters"].items(), start=1):
        request = LoRARequest(name, number, path)
        try:
            llm.llm_engine.add_lora(request)  # generate() with an adapter that is refused ends the engine
        except ValueError as err:
            refused[name] = str(err)
        else:
            arrays |= generate(llm, job["prompts"], name, request)
    np.savez(job_file.with_suffix(".npz"), **arrays)
    sys.stdout.write(json.dumps(refused) + "\n")


def generate(llm: LLM, prompts: list[list[int]], name: str, request: LoRARequest | None) -> dict[str, Any]:
    """Generate greedily; return tokens (prompts, TOKENS) and log-probabilities (prompts, TOKENS, vocabulary)."""
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=-1, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, lora_request=request)
    tokens = [output.outputs[0].token_ids for output in outputs]
    steps = [[[step[i].logprob for i in range(len(step))] for step in output.outputs[0].logprobs] for output in outputs]
    return {f"{name}.tokens": np.array(tokens), f"{name}.logprobs": np.array(steps, np.float32)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
