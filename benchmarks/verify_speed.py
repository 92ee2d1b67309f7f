"""Time and memory of `loram verify` against `sha256sum` over the same files.

The release: Llama-3.2-3B layers (28 layers, hidden 3,072, 24 query and 8 KV heads of 128, 8,192 channels, vocabulary
32,000, embeddings not tied), pruned by 0.5 with the first 4 and last 2 layers whole; once in bf16 and once in NF4. In
bf16 every number is looked at for NaN, which is the more work per byte.

Both over the same warm files, in alternation, each `verify` in a process of its own after the imports:

    verify       `release.verify`: hashes and everything else
    sha256sum    the command, in one call over all files
    hashlib      Python's own SHA-256 of all files, and nothing else

`sha256sum` of some systems does not use the processor's SHA instructions, which Python's does; the ratio to `hashlib`
then says what verification costs beyond hashing, so both ratios are held to the target.

    python benchmarks/verify_speed.py [--quick] [--rounds 5]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

from measuring import MB, make_warm, measured, report, scratch_folder, serve_actions, stopwatch, weight_bytes

SIZES = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
}
QUICK_SIZES = SIZES | {"hidden_size": 192, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 8}
RATIO = 0.5
ROUNDS, QUICK_ROUNDS = 5, 1
KINDS = ("bf16", "nf4")
LIMIT, MEMORY_LIMIT = 1.3, 300 * MB


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of verify against sha256sum.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: shows that the script works")
    parser.add_argument("--rounds", type=int, help=f"how often each is timed; default {ROUNDS}")
    parser.add_argument("--work-dir", help="where to put the temporary files; default: the system's own")
    options = parser.parse_args()
    sizes, rounds = (QUICK_SIZES, QUICK_ROUNDS) if options.quick else (SIZES, options.rounds or ROUNDS)

    figures: dict[str, Any] = {}
    with scratch_folder("verify", options.work_dir) as work:
        for kind in KINDS:
            folder = work / kind
            measured(__file__, "make", folder=str(folder), kind=kind, sizes=sizes)
            figures[kind] = _compare(folder, rounds)
            shutil.rmtree(folder)
    report(
        "verify_speed",
        quick=options.quick,
        figures=figures,
        target=f"verify takes at most {LIMIT} times sha256sum and hashlib over the same files (medians), and at most "
        f"{MEMORY_LIMIT // MB} MB",
        met=all(
            found[f"ratio_to_{other}"] <= LIMIT and found["peak_rss"] <= MEMORY_LIMIT
            for found in figures.values()
            for other in ("sha256sum", "hashlib")
        ),
    )


def _compare(folder: Path, rounds: int) -> dict[str, Any]:
    make_warm(folder)
    runs: dict[str, list[float]] = {"verify": [], "sha256sum": [], "hashlib": []}
    peaks = []
    for _ in range(rounds):
        verified = measured(__file__, "verify_once", folder=str(folder))
        peaks.append(verified["peak_rss"])
        runs["verify"].append(verified["seconds"])
        runs["sha256sum"].append(_sha256sum(folder))
        runs["hashlib"].append(measured(__file__, "hash_once", folder=str(folder))["seconds"])
    seconds = {name: median(times) for name, times in runs.items()}
    return {
        "weight_bytes": weight_bytes(folder),
        "seconds": seconds,
        "ratio_to_sha256sum": seconds["verify"] / seconds["sha256sum"],
        "ratio_to_hashlib": seconds["verify"] / seconds["hashlib"],
        "peak_rss": max(peaks),
    }


def _sha256sum(folder: Path) -> float:
    command = shutil.which("sha256sum")
    if command is None:
        raise SystemExit("verify_speed.py: there is no sha256sum on this system to compare with.")
    with stopwatch() as seconds:
        subprocess.run([command, *map(str, sorted(folder.iterdir()))], stdout=subprocess.DEVNULL, check=True)
    return seconds()


def make(folder: str, kind: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Write a release with random weights, tensor by tensor."""
    import torch
    from synthetic import llama_config, manifest_of, random_plan, random_tensor

    from loram_hub.checkpoint import ShardWriter
    from loram_hub.quantization import as_nf4, quantized_tensors
    from loram_hub.release import release_config, write_release

    config = llama_config(**sizes) | {"dtype": "bfloat16"}
    plan = random_plan(config, RATIO)
    manifest, written = manifest_of(plan, RATIO), release_config(config)
    if kind == "nf4":
        manifest, written = as_nf4(manifest, config, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with write_release(Path(folder), manifest=manifest, plan=plan, config=written) as out:
        writer = ShardWriter(out)
        for name, shape in sorted(plan.tensor_shapes().items()):
            parts = {name: random_tensor(shape, torch.bfloat16, generator)}
            if kind == "nf4":
                parts = quantized_tensors(plan.architecture, name, parts[name], torch.bfloat16)
            for part, value in parts.items():
                writer.add(part, value)
        writer.finish()
    return {}


def verify_once(folder: str) -> dict[str, Any]:
    from loram_hub.release import verify

    with stopwatch() as seconds:
        verify(folder)
    return {"seconds": seconds()}


def hash_once(folder: str) -> dict[str, Any]:
    from loram_hub.files import sha256_of

    with stopwatch() as seconds:
        for path in sorted(Path(folder).iterdir()):
            sha256_of(path)
    return {"seconds": seconds()}


if __name__ == "__main__":
    serve_actions(make, verify_once, hash_once)
    main()
