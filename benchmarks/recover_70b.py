"""Time of `recover` on a 70B adapter against reading and writing the file it makes.

A LLaMA-2-70B shaped adapter: 80 layers, hidden 8,192, 64 query and 8 KV heads of 128, 28,672 channels, r 8 on the seven
projections, in fp32 as PEFT saves it, trained on a release pruned by 0.85 (random plan, first 4 and last 2 layers
whole). `recover` reads it, checks it, rounds it to bf16, scatters it to full size, writes, forces all to disk and
renames. The reference reads that very output with safetensors' `load_file` and writes it back with `save_file`, in
numpy and in torch; the faster of the two counts.

`save_file` leaves its bytes in the page cache, `recover` does not return before they are on disk. So three ratios:

    synced            recover                        / load_file + save_file + fsync of the file and its folder
    unsynced          recover with fsync switched off / load_file + save_file
    synced_by_plain   recover                        / load_file + save_file: what fsync costs counts against us

The target is on the first two, like against like. All runs happen in one process after a round that does not count, in
alternation, inputs in the page cache, outputs deleted and the disk idle before each; medians, with minima beside them.
`cpu_seconds` (user and system, of the process) leave out waiting for the disk and for other processes.

    python benchmarks/recover_70b.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
from measuring import LLAMA_2_70B, QUICK_70B, make_warm, measured, report, scratch_folder, serve_actions, stopwatch

RANK, ALPHA, RATIO = 8, 16, 0.85
ROUNDS, QUICK_ROUNDS = 9, 1
LIMIT = 2.0
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of recovering a 70B adapter.")
    parser.add_argument("--quick", action="store_true", help="a tiny adapter, one round: shows that the script works")
    parser.add_argument("--rounds", type=int, help=f"how often each is timed; default {ROUNDS}")
    parser.add_argument("--work-dir", help="where to put the temporary files; default: the system's own")
    options = parser.parse_args()
    sizes, rounds = (QUICK_70B, QUICK_ROUNDS) if options.quick else (LLAMA_2_70B, ROUNDS)

    with scratch_folder("recover", options.work_dir) as work:
        made = measured(__file__, "make_inputs", folder=str(work), sizes=sizes)
        timed = measured(__file__, "time_all", folder=str(work), rounds=options.rounds or rounds)
    seconds = {name: {"median": median(values), "min": min(values)} for name, values in timed["seconds"].items()}
    cpu_seconds = {name: median(values) for name, values in timed["cpu_seconds"].items()}
    figures: dict[str, Any] = {**made, **timed, "seconds": seconds, "cpu_seconds": cpu_seconds}
    del figures["peak_rss"]  # of a process that did many things
    plain = _faster(seconds, "numpy", "torch")
    synced = _faster(seconds, "numpy_synced", "torch_synced")
    figures["ratios"] = {
        "synced": _ratio(seconds["recover"], synced),
        "unsynced": _ratio(seconds["recover_unsynced"], plain),
        "synced_by_plain": _ratio(seconds["recover"], plain),
        "unsynced_cpu": cpu_seconds["recover_unsynced"] / min(cpu_seconds["numpy"], cpu_seconds["torch"]),
    }
    report(
        "recover_70b",
        quick=options.quick,
        figures=figures,
        target=f"recover takes at most {LIMIT:g} times load_file + save_file of its output (medians), "
        "both with fsync and both without",
        met=max(figures["ratios"]["synced"]["median"], figures["ratios"]["unsynced"]["median"]) <= LIMIT,
    )


def _faster(seconds: dict[str, dict[str, float]], *names: str) -> dict[str, float]:
    return {statistic: min(seconds[name][statistic] for name in names) for statistic in ("median", "min")}


def _ratio(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {statistic: one[statistic] / other[statistic] for statistic in one}


def make_inputs(folder: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Write the release's metadata and the pruned adapter."""
    from safetensors.numpy import save_file
    from synthetic import llama_config, manifest_of, random_plan

    from loram_hub.architecture import layer_tensor
    from loram_hub.files import dump_json
    from loram_hub.release import release_config, write_release

    config = llama_config(**sizes)
    plan = random_plan(config, RATIO)
    with write_release(
        Path(folder) / "release", manifest=manifest_of(plan, RATIO), plan=plan, config=release_config(config)
    ):
        pass

    rng = np.random.default_rng(0)
    tensors = {}
    for layer, layer_sizes in enumerate(plan.layers):
        for weight in plan.architecture.projections:
            rows, columns = plan.architecture.shape(weight, layer_sizes)
            module = f"base_model.model.{layer_tensor(layer, weight.module)}"
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((RANK, columns), dtype=np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((rows, RANK), dtype=np.float32)
    adapter = Path(folder) / "adapter"
    adapter.mkdir()
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    values |= {"target_modules": list(SEVEN), "base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(dump_json(values), encoding="utf-8")
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return {"modules": len(tensors) // 2, "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size}


def time_all(folder: str, rounds: int) -> dict[str, Any]:
    """Time `recover` and the references in alternation; check the output."""
    import safetensors.numpy
    import safetensors.torch

    from loram_hub.recovery import recover

    work = Path(folder)
    out, copied = work / "recovered", work / "copied"
    weights = out / "adapter_model.safetensors"
    make_warm(work)

    def run_recover() -> None:
        recover(work / "adapter", out, release=work / "release")

    def run_unsynced() -> None:
        with mock.patch("os.fsync"):
            run_recover()

    def reference(module: Any, *, sync: bool) -> Callable[[], None]:  # noqa: ANN401 (either of two modules)
        def run() -> None:
            module.save_file(module.load_file(weights), copied / "copy.safetensors", metadata={"format": "pt"})
            if sync:
                _sync(copied / "copy.safetensors")
                _sync(copied)

        return run

    runs: dict[str, tuple[Callable[[], None], Path]] = {
        "recover_unsynced": (run_unsynced, out),
        "recover": (run_recover, out),
        "numpy": (reference(safetensors.numpy, sync=False), copied),
        "numpy_synced": (reference(safetensors.numpy, sync=True), copied),
        "torch": (reference(safetensors.torch, sync=False), copied),
        "torch_synced": (reference(safetensors.torch, sync=True), copied),
    }
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, (run, target) in runs.items():
            shutil.rmtree(target, ignore_errors=True)
            if target == copied:
                copied.mkdir()
            os.sync()
            cpu_before = time.process_time()
            with stopwatch() as seconds:
                run()
            if turn:
                wall[name].append(seconds())
                cpu[name].append(time.process_time() - cpu_before)
    return {
        "seconds": wall,
        "cpu_seconds": cpu,
        "output_bytes": weights.stat().st_size,
        "output_sound": _is_sound(work, weights),
    }


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_sound(work: Path, weights: Path) -> bool:
    """Whether a pruned layer's recovered down_proj holds the trained numbers where the mask index keeps, else zeros."""
    import torch
    from safetensors import safe_open

    config = json.loads((work / "release" / "config.json").read_text())
    layer = config["num_hidden_layers"] // 2
    name = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_A.weight"
    with (
        safe_open(work / "adapter" / "adapter_model.safetensors", framework="pt") as adapter,
        safe_open(work / "release" / "mask_index.safetensors", framework="pt") as mask,
        safe_open(weights, framework="pt") as recovered,
    ):
        expected = torch.zeros(RANK, config["intermediate_size"], dtype=torch.bfloat16)
        expected[:, mask.get_tensor(f"model.layers.{layer}.mlp.channels").long()] = adapter.get_tensor(name).bfloat16()
        return torch.equal(expected, recovered.get_tensor(name))


if __name__ == "__main__":
    serve_actions(make_inputs, time_all)
    main()
