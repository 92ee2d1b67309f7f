"""Peak memory and time of streaming prune on a 7B checkpoint.

LLaMA-2-7B shapes (32 layers, hidden 4,096, 32 heads, 11,008 channels, vocabulary 32,000) with random bf16 weights: 13.5
GB in 5 GB shards, written tensor by tensor to a temporary folder. `prune(importance="random", pruning_ratio=0.85)` is
run to bf16 and, with `quantize=True`, straight to NF4 on the CPU.

Memory: `rss_above_import` is the peak of a process that prunes, less that of one that only imports the same modules.
`prune` reads with pread and not through a memory map, so the page cache that it fills is not part of it.

Time: from cold files to files on disk. Before every timed run all files are forced to disk and dropped from the page
cache. Three references, each timed in turn with the prune it is compared to:

    copy     the weight files that prune wrote, read and written with `shutil.copyfile`, then fsync: the same kept bytes
    hash     sha256 over the same files (the manifest holds it; prune needs it once), warm as it is in prune
    read     every byte of the base, read once: prune reads whole tensors and drops most of each

`ratio_to_copy` is what the issue asks for. `ratio_to_floor` puts prune against the sum of what it cannot avoid: reading
the whole base, writing and forcing the kept bytes, hashing them; copy counts there for the writing, which is a little
too much, as it also reads the kept bytes.

    python benchmarks/prune_stream.py [--quick] [--rounds 2] [--work-dir DIR]        (needs 23 GB of free disk)
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from pathlib import Path
from statistics import median
from typing import Any

from measuring import GB, make_cold, make_warm, measured, report, scratch_folder, serve_actions, stopwatch, weight_bytes

SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32000,
}
QUICK_SIZES = SIZES | {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 8, "head_dim": 2}
RATIO = 0.85
ROUNDS, QUICK_ROUNDS = 2, 1
LIMIT = 3 * GB // 2
"""Most resident memory above the import baseline."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory and time of streaming prune.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: shows that the script works")
    parser.add_argument("--rounds", type=int, help=f"how often each is timed; default {ROUNDS}")
    parser.add_argument("--work-dir", help="where to put the temporary files; default: the system's own")
    options = parser.parse_args()
    sizes, rounds = (QUICK_SIZES, QUICK_ROUNDS) if options.quick else (SIZES, ROUNDS)

    figures: dict[str, Any] = {"import_rss": measured(__file__, "only_import")["peak_rss"]}
    with scratch_folder("prune", options.work_dir) as work:
        base = str(work / "base")
        figures["base_bytes"] = measured(__file__, "make_base", folder=base, sizes=sizes)["base_bytes"]
        for kind in ("bf16", "nf4"):
            turns = [_turn(work, quantize=kind == "nf4") for _ in range(options.rounds or rounds)]
            figures[kind] = _summary(turns, figures["import_rss"])
    report(
        "prune_stream",
        quick=options.quick,
        figures=figures,
        target=f"peak RSS of prune at most {LIMIT / GB:g} GB above the import baseline, to bf16 and to NF4",
        met=all(figures[kind]["rss_above_import"] <= LIMIT for kind in ("bf16", "nf4")),
    )


def _turn(work: Path, *, quantize: bool) -> dict[str, Any]:
    """Prune from cold files, then time the references; removes what it wrote."""
    base, out, copy = work / "base", work / "out", work / "copy"
    make_cold(work)
    found = measured(__file__, "prune_once", base=str(base), out=str(out), quantize=quantize)
    found["release_bytes"] = weight_bytes(out)
    make_cold(work)
    copy.mkdir()
    with stopwatch() as seconds:
        for path in sorted(out.glob("model*.safetensors")):
            shutil.copyfile(path, copy / path.name)
            with (copy / path.name).open("rb") as file:
                os.fsync(file.fileno())
    found["copy_seconds"] = seconds()
    shutil.rmtree(copy)
    make_warm(out)
    with stopwatch() as seconds:
        for path in sorted(out.glob("model*.safetensors")):
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")
    found["hash_seconds"] = seconds()
    make_cold(work)
    with stopwatch() as seconds:
        make_warm(base)
    found["read_seconds"] = seconds()
    shutil.rmtree(out)
    return found


def _summary(turns: list[dict[str, Any]], import_rss: int) -> dict[str, Any]:
    kept = {"kept_bytes", "release_bytes", "parameters", "expected_bytes"}
    summary = {key: turns[0][key] for key in sorted(kept)}
    summary["peak_rss"] = max(turn["peak_rss"] for turn in turns)
    summary["rss_above_import"] = summary["peak_rss"] - import_rss
    for key in ("seconds", "copy_seconds", "hash_seconds", "read_seconds"):
        summary[key] = median(turn[key] for turn in turns)
    summary["ratio_to_copy"] = median(turn["seconds"] / turn["copy_seconds"] for turn in turns)
    floors = [turn["read_seconds"] + turn["copy_seconds"] + turn["hash_seconds"] for turn in turns]
    summary["ratio_to_floor"] = median(turn["seconds"] / floor for turn, floor in zip(turns, floors, strict=True))
    return summary


def only_import() -> dict[str, Any]:
    import loram_hub.pruning  # noqa: F401

    return {}


def make_base(folder: str, sizes: dict[str, int]) -> dict[str, Any]:
    import torch
    from synthetic import llama_config, write_checkpoint

    config = llama_config(**sizes)
    write_checkpoint(Path(folder), config, dtype=torch.bfloat16)
    return {"base_bytes": weight_bytes(Path(folder))}


def prune_once(base: str, out: str, *, quantize: bool) -> dict[str, Any]:
    from loram_hub.pruning import prune

    with stopwatch() as seconds:
        release = prune(base, out, importance="random", pruning_ratio=RATIO, quantize=quantize)
    return {"seconds": seconds(), **_contents(release, quantize=quantize)}


def _contents(release: Any, *, quantize: bool) -> dict[str, Any]:  # noqa: ANN401 (loram_hub is not imported up here)
    """What the release holds by its headers, and what the plan says it should hold."""
    from loram_hub.checkpoint import Checkpoint
    from loram_hub.plan import parameter_counts

    counts = parameter_counts(release.architecture, release.plan.layers)
    with Checkpoint(release.folder) as checkpoint:
        # Code tables and quantization states are not counted in nf4_bytes.
        tables = ("quant_map", "nested_quant_map", "quant_state.bitsandbytes__nf4")
        kept = sum(info.nbytes for name, info in checkpoint.tensors.items() if not name.endswith(tables))
    return {
        "kept_bytes": kept,
        "parameters": counts.pruned_parameters,
        "expected_bytes": counts.nf4_bytes if quantize else counts.bf16_bytes,
    }


if __name__ == "__main__":
    serve_actions(only_import, make_base, prune_once)
    main()
