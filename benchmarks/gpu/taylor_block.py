"""Streamed Taylor importance on a GPU: peak memory, and seconds per layer of a 70B model.

Blocks of 2 and of 4 whole decoder layers of LLaMA-3.1-70B, with its embedding and lm_head, in bf16 with random weights,
are written to a temporary folder (19 GB) and scored with `importance_scores` (taylor:param_first, 10 samples of 128
tokens). The difference between the two is the time of two layers, each of them read twice, with the embedding and the
head taken out. Files are in the page cache: what a disk adds is its own affair. Memory does not grow with depth (see
`taylor_memory`), so the peak is that of the whole model.

    PYTHONPATH=.:benchmarks python benchmarks/gpu/taylor_block.py [--work-dir DIR]
    PYTHONPATH=.:benchmarks python benchmarks/gpu/taylor_block.py --device cpu --tiny      # shows that it works
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from measuring import make_warm, measured, record, scratch_folder, serve_actions, stopwatch

SHAPE = "LLaMA-3.1-70B"
DEPTHS = (2, 4)
SAMPLES, TOKENS = 10, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work-dir", help="where to put the temporary checkpoints; default: the system's own")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that the script works")
    arguments = parser.parse_args()
    shape = "tiny" if arguments.tiny else SHAPE
    runs: dict[int, dict[str, Any]] = {}
    with scratch_folder("taylor-block", arguments.work_dir) as work:
        for layers in DEPTHS:
            made = {"shape": shape, "layers": layers, "folder": str(work / str(layers)), "device": arguments.device}
            runs[layers] = measured(__file__, "score", **made)
    record("taylor_block", quick=arguments.tiny, figures=combined(shape, runs))


def combined(shape: str, runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Figures of all depths, and the time of a layer from the difference between the last and the first."""
    first, last = min(runs), max(runs)
    return {
        "shape": shape,
        "samples": SAMPLES,
        "tokens": TOKENS,
        "device": runs[last]["device"],
        "seconds": {str(layers): run["seconds"] for layers, run in runs.items()},
        "seconds_per_layer": (runs[last]["seconds"] - runs[first]["seconds"]) / (last - first),
        "peak_allocated": {str(layers): run.get("peak_allocated") for layers, run in runs.items()},
        "scored": runs[last]["scored"],
    }


def score(shape: str, layers: int, folder: str, device: str) -> dict[str, Any]:
    """Write a block of layers, score it, and remove it."""
    import shutil

    import torch
    from gpu_shapes import config_of
    from synthetic import write_checkpoint
    from training_step import cuda_device

    from loram_hub.architecture import architecture_of
    from loram_hub.checkpoint import Checkpoint
    from loram_hub.importance import importance_scores, parse_importance

    config = config_of(shape, layers=layers)
    architecture = architecture_of(config)
    write_checkpoint(Path(folder), config, dtype=torch.bfloat16, device=device)
    make_warm(Path(folder))
    ids = torch.randint(0, architecture.vocab_size, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with Checkpoint(Path(folder)) as checkpoint, stopwatch() as seconds:
        scores = importance_scores(
            checkpoint, architecture, range(layers), importance=parse_importance("taylor"), calibration=ids,
            device=device,
        )  # fmt: skip
    shutil.rmtree(folder)
    return {
        "device": cuda_device() if on_gpu else {"kind": "cpu"},
        "seconds": seconds(),
        "scored": sum(len(groups) for spaces in scores.values() for groups in spaces.values()),
        **({"peak_allocated": torch.cuda.max_memory_allocated()} if on_gpu else {}),
    }


if __name__ == "__main__":
    serve_actions(score)
    main()
