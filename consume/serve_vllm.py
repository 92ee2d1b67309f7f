"""Serve a recovered adapter with vLLM on its original model, and ask it something.

    python serve_vllm.py me/my-adapter --prompt "Once upon a time"
    python serve_vllm.py my-adapter --dry-run                     # only print the command
    python serve_vllm.py my-adapter -- --dtype float16            # what follows -- goes to vLLM

Base model, its commit and the rank come from the adapter. Needs vLLM, and what it brings (openai, huggingface_hub);
nothing of loram-hub. To see beforehand whether vLLM will take an adapter: loram doctor ADAPTER --target vllm.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from huggingface_hub import hf_hub_download

WEIGHTS = "adapter_model.safetensors"
PRUNED_MARK = ".lora_pruned_adapter_run_loram_recover_first"  # ends a name in an adapter that is not recovered
MAX_HEADER_BYTES = 100_000_000  # of safetensors
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
WAIT_SECONDS = 1800  # a 70B model loads for minutes


def main() -> None:
    """Print the command, run it until it answers, send one request, and serve on until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="folder or Hub id of a recovered adapter")
    parser.add_argument("--base", help="folder of the base model, instead of the id that the adapter names")
    parser.add_argument("--name", default="tuned", help="model name of the requests")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--once", action="store_true", help="stop the server after the first answer")
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    parser.add_argument("--server", default="vllm serve", help="how vLLM is started here")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])

    command = [*shlex.split(options.server), *serving_options(options), *words[end + 1 :]]
    print(shlex.join(command), flush=True)
    if options.dry_run:
        return
    server = subprocess.Popen(command)
    try:
        wait_until_ready(server, f"http://127.0.0.1:{options.port}/health")
        print(ask(f"http://127.0.0.1:{options.port}/v1", options.name, options.prompt), flush=True)
        if not options.once:
            server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()


def serving_options(options: argparse.Namespace) -> list[str]:
    """Return what follows `vllm serve`: the base at its commit, and the adapter with the rank that it needs."""
    config = json.loads(file_of(options.adapter, "adapter_config.json").read_text(encoding="utf-8"))
    if any(name.endswith(PRUNED_MARK) for name in tensor_names(file_of(options.adapter, WEIGHTS))):
        sys.exit(
            f"{options.adapter} was trained on a pruned model and does not fit the original one. Recover it first: "
            f"loram recover {options.adapter} recovered"
        )
    pin = ["--revision", config["revision"]] if config.get("revision") and options.base is None else []
    rank = next((rank for rank in RANKS if rank >= config["r"]), None)
    if rank is None:
        sys.exit(f"{options.adapter} has rank {config['r']}; vLLM takes up to {RANKS[-1]}. Merge it: loram merge")
    lora = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{options.name}={options.adapter}"]
    base = options.base or config["base_model_name_or_path"]
    if base.startswith("-"):
        sys.exit(f"{options.adapter} names the base {base!r}, which vLLM would take for an option. Give --base")
    return [base, *pin, *lora, "--host", "127.0.0.1", "--port", str(options.port)]


def file_of(adapter: str, name: str) -> Path:
    """Return a file of an adapter, from its folder or from the Hub, where vLLM will find it in the cache."""
    folder = Path(adapter)
    path = folder / name if folder.is_dir() else Path(hf_hub_download(adapter, name))
    if not path.is_file():
        sys.exit(f"{adapter} has no {name}; give the folder of a recovered adapter.")
    return path


def tensor_names(weights: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file, from its header."""
    try:
        with weights.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            return list(json.loads(file.read(min(size, MAX_HEADER_BYTES))))
    except (struct.error, ValueError) as err:
        sys.exit(f"{weights} is damaged or no safetensors file: {err}")


def wait_until_ready(server: subprocess.Popen[bytes], health: str) -> None:
    """Wait until the server answers; its own output says what it is at."""
    for _ in range(WAIT_SECONDS):
        if server.poll() is not None:
            sys.exit(f"vLLM ended with status {server.returncode}; its output above says why.")
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=5):
            return
        time.sleep(1)
    sys.exit(f"vLLM does not answer after {WAIT_SECONDS} s.")


def ask(address: str, model: str, prompt: str) -> str:
    """Send one request, as any OpenAI client does."""
    from openai import OpenAI

    client = OpenAI(base_url=address, api_key="none")
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=64, temperature=0)
    return prompt + answer.choices[0].text


if __name__ == "__main__":
    main()
