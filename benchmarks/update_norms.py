"""Time and memory of `update_norms` on a recovered adapter of 70B.

The adapter: LLaMA-2-70B's shapes (80 layers, hidden 8,192, 64 query and 8 KV heads of 128, 28,672 channels), r 8 on the
seven projections, bf16, as `recover` leaves it behind for a release pruned by 0.85: random factors, with zeros in the
lines that a random plan prunes (first 4 and last 2 layers whole).

`update_norms` runs in a process of its own, with the file in the page cache, once for the means over channels and once
with a norm for every channel; the seconds leave out imports, the memory does not. For scale: safetensors' `load_file`,
which reads the same numbers and computes nothing. Norms above 0 are counted and held against the plan.

    python benchmarks/update_norms.py [--quick] [--rounds 3]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import ml_dtypes
import numpy as np
from measuring import GB, LLAMA_2_70B, QUICK_70B, make_warm, measured, report, scratch_folder, serve_actions, stopwatch

RANK, ALPHA, RATIO = 8, 16, 0.85
ROUNDS, QUICK_ROUNDS = 3, 1
SECONDS_LIMIT, MEMORY_LIMIT = 20, 2 * GB


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the norms of a 70B adapter.")
    parser.add_argument("--quick", action="store_true", help="a tiny adapter, one round: shows that the script works")
    parser.add_argument("--rounds", type=int, help=f"how often each is timed; default {ROUNDS}")
    parser.add_argument("--work-dir", help="where to put the temporary files; default: the system's own")
    options = parser.parse_args()
    sizes, rounds = (QUICK_70B, QUICK_ROUNDS) if options.quick else (LLAMA_2_70B, options.rounds or ROUNDS)

    with scratch_folder("norms", options.work_dir) as work:
        made = measured(__file__, "make_inputs", folder=str(work), sizes=sizes)
        make_warm(work)
        figures = {
            "adapter": {name: count for name, count in made.items() if name != "peak_rss"},
            "means": _repeated(rounds, "measure", folder=str(work), per_channel=False),
            "per_channel": _repeated(rounds, "measure", folder=str(work), per_channel=True),
            "load_file": _repeated(rounds, "load", folder=str(work)),
        }
    measurements = (figures["means"], figures["per_channel"])
    report(
        "update_norms",
        quick=options.quick,
        figures=figures,
        target=f"under {SECONDS_LIMIT} s (median) and {MEMORY_LIMIT // GB} GB, and no norm above 0 but of what is kept",
        met=all(
            found["seconds"] < SECONDS_LIMIT
            and found["peak_rss"] < MEMORY_LIMIT
            and all(found[name] == made[name] for name in ("heads_above_0", "active_channels"))
            for found in measurements
        ),
    )


def _repeated(rounds: int, action: str, **arguments: object) -> dict[str, Any]:
    """Run an action several times: median of the seconds, largest of the peaks, the rest from the first run."""
    runs = [measured(__file__, action, **arguments) for _ in range(rounds)]
    seconds = [run["seconds"] for run in runs]
    peak = max(run["peak_rss"] for run in runs)
    return runs[0] | {"seconds": median(seconds), "slowest": max(seconds), "peak_rss": peak}


def make_inputs(folder: str, sizes: dict[str, int]) -> dict[str, int]:
    """Write the base's config and the recovered adapter; count what its norms must show."""
    from synthetic import llama_config, random_plan

    from loram_hub.adapter import CanonicalAdapter, Factor, linear_modules, module_shape, write_adapter
    from loram_hub.files import dump_json

    work, config = Path(folder), llama_config(**sizes)
    plan = random_plan(config, RATIO)
    shapes = {module: module_shape(plan.architecture, module) for module in linear_modules(plan.architecture)[:-1]}
    adapter = CanonicalAdapter(
        base_id="org/base",
        revision=None,
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in shapes})),
        dtype="bfloat16",
        shapes={module: shape for module, shape in shapes.items() if shape is not None},
    )
    rng = np.random.default_rng(0)

    def factors(module: str) -> tuple[Factor, Factor]:
        out_features, in_features = adapter.shapes[module]
        lora_A = np.zeros((RANK, in_features), dtype=ml_dtypes.bfloat16)
        lora_B = np.zeros((out_features, RANK), dtype=ml_dtypes.bfloat16)
        rows, columns = plan.kept_on_axes(f"{module}.weight")
        kept_rows = np.arange(out_features) if rows is None else rows
        kept_columns = np.arange(in_features) if columns is None else columns
        lora_A[:, kept_columns] = rng.standard_normal((RANK, kept_columns.size), dtype=np.float32)
        lora_B[kept_rows] = rng.standard_normal((kept_rows.size, RANK), dtype=np.float32)
        return lora_A, lora_B

    for name in ("base", "adapter"):
        (work / name).mkdir()
    (work / "base" / "config.json").write_text(dump_json(config), encoding="utf-8")
    write_adapter(work / "adapter", adapter, factors)
    per_group = 2 * sizes["num_attention_heads"] // sizes["num_key_value_heads"] + 2  # q and o, k and v
    return {
        "modules": len(adapter.shapes),
        "bytes": (work / "adapter" / "adapter_model.safetensors").stat().st_size,
        "heads_above_0": per_group * sum(layer.kv_heads for layer in plan.layers),
        "active_channels": 3 * sum(layer.channels for layer in plan.layers),
    }


def measure(folder: str, *, per_channel: bool) -> dict[str, float]:
    """Time `update_norms`; count the norms above 0."""
    from loram_hub.updates import update_norms

    work = Path(folder)
    with stopwatch() as seconds:
        found = update_norms(work / "adapter", base=work / "base", per_channel=per_channel)
    active = {part: int(counts.sum()) for part, counts in found.active_channels.items()}
    if found.channels is not None:
        active = {part: int((norms > 0).sum()) for part, norms in found.channels.items()}
    return {
        "seconds": seconds(),
        "heads_above_0": sum(int((norms > 0).sum()) for norms in found.heads.values()),
        "active_channels": sum(active.values()),
    }


def load(folder: str) -> dict[str, float]:
    """Time reading the file whole with safetensors."""
    from safetensors.numpy import load_file

    with stopwatch() as seconds:
        found = load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
    return {"seconds": seconds(), "tensors": len(found)}


if __name__ == "__main__":
    serve_actions(make_inputs, measure, load)
    main()
