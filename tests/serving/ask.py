"""One request of the openai client, run in vLLM's environment.

    python ask.py http://127.0.0.1:8000 model '[[1, 2], [3]]'

Prints one JSON line: for each prompt the generated tokens, each with the log-probabilities of the likeliest 20.
"""

from __future__ import annotations

import json
import sys

from openai import OpenAI

TOKENS = 8
PREFIX = "token_id:"


def main(address: str, model: str, prompts: list[list[int]]) -> None:
    """Ask for greedy completions with log-probabilities."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    answer = client.completions.create(
        model=model,
        prompt=prompts,
        max_tokens=TOKENS,
        temperature=0,
        logprobs=20,
        extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
    )
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    sys.stdout.write(json.dumps([read(choice.logprobs) for choice in choices]) + "\n")


def read(logprobs: object) -> list[dict[str, object]]:
    """Return tokens and their log-probabilities as numbers."""
    return [
        {
            "token": int(token.removeprefix(PREFIX)),
            "top": {name.removeprefix(PREFIX): value for name, value in top.items()},
        }
        for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)
    ]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
