"""Loading an NF4 release onto a GPU, against stock transformers loading an NF4 checkpoint of the same bytes.

As `load_release`, which says how the two checkpoints are made equal, at the shape of LLaMA-3.1-70B pruned by 0.85 (two
folders of 12 GB) and straight to the device. Files are in the page cache; each load has a process of its own, in
alternation; CUDA is started before the clock. The first load of a release hashes its weights and does not count.

    PYTHONPATH=.:benchmarks python benchmarks/gpu/load.py [--work-dir DIR] [--rounds 3]
    PYTHONPATH=.:benchmarks python benchmarks/gpu/load.py --device cpu --tiny      # shows that it works
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import load_release
from gpu_shapes import SHAPES
from measuring import make_warm, measured, record, scratch_folder, weight_bytes

SHAPE, RATIO = "LLaMA-3.1-70B", 0.85
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work-dir", help="where to put the temporary files; default: the system's own")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that the script works")
    arguments = parser.parse_args()
    shape, rounds = ("tiny", 1) if arguments.tiny else (SHAPE, arguments.rounds)
    script, device = load_release.__file__, arguments.device
    with scratch_folder("gpu-load", arguments.work_dir) as work:
        folders = {kind: str(work / kind) for kind in ("release", "stock")}
        made = measured(
            script, "make_both", folders=folders, sizes=dict(SHAPES[shape]), ratio=RATIO, device=device
        )  # fmt: skip
        nbytes = {kind: weight_bytes(work / kind) for kind in folders}
        make_warm(work)
        measured(script, "load_once", kind="release", folder=folders["release"], device=device)
        runs: dict[str, list[float]] = {kind: [] for kind in folders}
        for turn in range(rounds):
            for kind in list(folders) if turn % 2 else reversed(folders):
                found = measured(script, "load_once", kind=kind, folder=folders[kind], device=device)
                runs[kind].append(found["seconds"])
    record("load", quick=arguments.tiny, figures=combined(shape, device, made, nbytes, runs))


def combined(
    shape: str, device: str, made: dict[str, Any], nbytes: dict[str, int], runs: dict[str, Sequence[float]]
) -> dict[str, Any]:
    """Medians, and the release's in parts of the stock one's."""
    seconds = {kind: median(found) for kind, found in runs.items()}
    return {
        "shape": shape,
        "ratio": RATIO,
        "device": {"kind": device.partition(":")[0]},
        "file_bytes": nbytes,
        "file_tensors": {kind: made[kind] for kind in nbytes},
        "seconds": seconds,
        "runs": runs,
        "release_to_stock": seconds["release"] / seconds["stock"],
    }


if __name__ == "__main__":
    main()
