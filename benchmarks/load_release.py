"""Time to open an NF4 release against stock transformers opening an unpruned NF4 checkpoint of the same bytes.

The release: Llama-3.2-3B layers (28 layers, hidden 3,072, 24 query and 8 KV heads of 128, 8,192 channels, vocabulary
32,000, embeddings not tied), pruned by 0.65 with the first 4 and last 2 layers whole; 1.1 GB. It is opened with
`AutoLoramModel.from_pretrained`, which also checks it: file sizes, mask indexes, every shape and quantization state.

The stock checkpoint has the same layers, hidden size, vocabulary and heads, hence the same tensors under the same
names and as many of them; only its MLPs are narrower, all alike, by as many channels (a multiple of 64) as bring the
file to the release's size: `bytes_ratio` is within 2 %. What a loader does per tensor and per byte is then the same for
both. It has the base's own model_type and is opened with `AutoModelForCausalLM.from_pretrained`.

Both on the CPU, dtype bfloat16, files in the page cache, in alternation:

    fresh    one load in a process of its own, after the imports, as a user's script does it; the target is on this
    repeat   loads in one process, after one of each that does not count

`cpu_seconds` (user and system, all threads) leave out waiting for the disk and for other processes.

    python benchmarks/load_release.py [--quick] [--rounds 9]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

from measuring import make_warm, measured, report, scratch_folder, serve_actions, stopwatch, weight_bytes

SIZES = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
}
QUICK_SIZES = SIZES | {"hidden_size": 192, "intermediate_size": 4096, "num_hidden_layers": 8, "head_dim": 8}
RATIO = 0.65
ROUNDS, QUICK_ROUNDS = 9, 1
LIMIT, SAME_BYTES = 1.1, 0.02
CHANNELS_STEP = 64


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to open an NF4 release.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: shows that the script works")
    parser.add_argument("--rounds", type=int, help=f"how often each is timed; default {ROUNDS}")
    parser.add_argument("--work-dir", help="where to put the temporary files; default: the system's own")
    options = parser.parse_args()
    sizes, rounds = (QUICK_SIZES, QUICK_ROUNDS) if options.quick else (SIZES, options.rounds or ROUNDS)

    with scratch_folder("load", options.work_dir) as work:
        folders = {"release": work / "release", "stock": work / "stock"}
        made = measured(__file__, "make_both", folders={k: str(v) for k, v in folders.items()}, sizes=sizes)
        figures: dict[str, Any] = {"stock_intermediate_size": made["stock_intermediate_size"]}
        figures |= {f"{kind}_file_bytes": weight_bytes(folder) for kind, folder in folders.items()}
        figures |= {f"{kind}_file_tensors": made[kind] for kind in folders}
        make_warm(work)
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in folders}
        for turn in range(rounds):
            order = list(folders) if turn % 2 == 0 else list(reversed(folders))
            for kind in order:
                runs[kind].append(measured(__file__, "load_once", kind=kind, folder=str(folders[kind])))
        repeated = measured(__file__, "load_again", folders={k: str(v) for k, v in folders.items()}, rounds=rounds)

    for kind, turns in runs.items():
        figures[kind] = {
            "fresh": _statistics([turn["seconds"] for turn in turns]),
            "fresh_cpu": _statistics([turn["cpu_seconds"] for turn in turns]),
            "repeat": _statistics(repeated[kind]),
            "repeat_cpu": _statistics(repeated[f"{kind}_cpu"]),
            "peak_rss": median(turn["peak_rss"] for turn in turns),
            "model_bytes": turns[0]["model_bytes"],
        }
    figures["bytes_ratio"] = figures["release_file_bytes"] / figures["stock_file_bytes"]
    figures["ratios"] = {
        when: {which: figures["release"][when][which] / figures["stock"][when][which] for which in ("median", "min")}
        for when in ("fresh", "fresh_cpu", "repeat", "repeat_cpu")
    }
    report(
        "load_release",
        quick=options.quick,
        figures=figures,
        target=f"AutoLoramModel takes at most {LIMIT} times stock transformers (fresh process, medians) at the same "
        f"bytes (within {SAME_BYTES:.0%}) and number of tensors",
        met=figures["ratios"]["fresh"]["median"] <= LIMIT
        and abs(figures["bytes_ratio"] - 1) <= SAME_BYTES
        and figures["release_file_tensors"] == figures["stock_file_tensors"],
    )


def _statistics(seconds: list[float]) -> dict[str, float]:
    return {"median": median(seconds), "min": min(seconds)}


def make_both(
    folders: dict[str, str], sizes: dict[str, int], ratio: float = RATIO, device: str = "cpu"
) -> dict[str, Any]:
    """Write the release and the stock checkpoint, straight to NF4, quantized on a device."""
    import torch
    from synthetic import llama_config, manifest_of, random_plan

    from loram_hub.architecture import architecture_of
    from loram_hub.checkpoint import CONFIG, Checkpoint
    from loram_hub.files import dump_json
    from loram_hub.plan import Plan, parameter_counts
    from loram_hub.quantization import as_nf4, bitsandbytes_config
    from loram_hub.release import write_release

    config = llama_config(**sizes) | {"dtype": "bfloat16"}
    plan = random_plan(config, ratio)
    manifest, nf4_config = as_nf4(manifest_of(plan, ratio), config, torch.bfloat16)
    with write_release(Path(folders["release"]), manifest=manifest, plan=plan, config=nf4_config) as folder:
        _write_nf4(folder, plan, device)

    wanted = parameter_counts(plan.architecture, plan.layers).nf4_bytes
    candidates = range(CHANNELS_STEP, sizes["intermediate_size"], CHANNELS_STEP)
    narrower = [config | {"intermediate_size": channels} for channels in candidates]
    whole = [Plan(architecture_of(values), {}) for values in narrower]
    off = [abs(parameter_counts(each.architecture, each.layers).nf4_bytes - wanted) for each in whole]
    best = off.index(min(off))
    stock = Path(folders["stock"])
    stock.mkdir()
    _write_nf4(stock, whole[best], device)
    stock_config = narrower[best] | {"quantization_config": bitsandbytes_config("bfloat16")}
    (stock / CONFIG).write_text(dump_json(stock_config), encoding="utf-8")

    found: dict[str, Any] = {"stock_intermediate_size": narrower[best]["intermediate_size"]}
    for kind, path in folders.items():
        with Checkpoint(Path(path)) as checkpoint:
            found[kind] = len(checkpoint.tensors)
    return found


def _write_nf4(folder: Path, plan: Any, device: str) -> None:  # noqa: ANN401 (loram_hub is not imported up here)
    import torch
    from synthetic import random_tensor

    from loram_hub.checkpoint import ShardWriter
    from loram_hub.quantization import quantized_tensors

    generator = torch.Generator(device).manual_seed(0)
    writer = ShardWriter(folder)
    for name, shape in sorted(plan.tensor_shapes().items()):
        tensor = random_tensor(shape, torch.bfloat16, generator)
        for part, value in quantized_tensors(plan.architecture, name, tensor, torch.bfloat16).items():
            writer.add(part, value.cpu())
    writer.finish()


def load_once(kind: str, folder: str, device: str = "cpu") -> dict[str, Any]:
    _import_all()
    _wake(device)
    cpu_before = time.process_time()
    with stopwatch() as seconds:
        model = _load(kind, folder, device)
        _wake(device)
    cpu_seconds = time.process_time() - cpu_before
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"seconds": seconds(), "cpu_seconds": cpu_seconds, "model_bytes": model_bytes}


def load_again(folders: dict[str, str], rounds: int) -> dict[str, Any]:
    _import_all()
    found: dict[str, Any] = {f"{kind}{suffix}": [] for kind in folders for suffix in ("", "_cpu")}
    for turn in range(rounds + 1):
        for kind, folder in folders.items():
            cpu_before = time.process_time()
            with stopwatch() as seconds:
                model = _load(kind, folder)
            cpu_seconds = time.process_time() - cpu_before
            del model
            if turn:
                found[kind].append(seconds())
                found[f"{kind}_cpu"].append(cpu_seconds)
    return found


def _import_all() -> None:
    """Import what either loader needs, also what it would import at the first load."""
    import accelerate
    import bitsandbytes
    import transformers.integrations.bitsandbytes
    import transformers.models.llama.modeling_llama
    import transformers.quantizers.quantizer_bnb_4bit

    import loram_hub.auto

    assert all((accelerate, bitsandbytes, transformers, loram_hub.auto))


def _wake(device: str) -> None:
    """Start CUDA before the clock does, and wait for copies to end before it stops."""
    if device != "cpu":
        import torch

        torch.empty(1, device=device)
        torch.cuda.synchronize()


def _load(kind: str, folder: str, device: str = "cpu") -> Any:  # noqa: ANN401 (torch is not imported up here)
    import torch

    place: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}
    if kind == "release":
        from loram_hub.auto import AutoLoramModel

        return AutoLoramModel.from_pretrained(folder, dtype=torch.bfloat16, **place)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **place)


if __name__ == "__main__":
    serve_actions(make_both, load_once, load_again)
    main()
