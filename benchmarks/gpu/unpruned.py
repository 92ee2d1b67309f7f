"""The same step on models that are not pruned: what LoRAM is compared with.

8B, 13B and 70B shapes in NF4, micro-batches of 1 and 4. Each is measured at several depths, the whole model last: time
and memory are lines in the number of layers, all layers being alike, so where the whole model does not fit, the line
through the depths that did gives its step. Where it fits, both are there, and the table says how far the line is off.

    PYTHONPATH=.:benchmarks python benchmarks/gpu/unpruned.py [--shape LLaMA-3.1-70B]
    PYTHONPATH=.:benchmarks python benchmarks/gpu/unpruned.py --device cpu --tiny      # shows that it works
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from measuring import measured, record, serve_actions
from qloram_step import TINY, step

DEPTHS: Mapping[str, tuple[int, ...]] = {
    "LLaMA-3.1-70B": (8, 16, 32, 80),
    "LLaMA-2-70B": (8, 16, 32, 80),
    "LLaMA-2-13B": (10, 20, 40),
    "LLaMA-3.1-8B": (8, 16, 32),
}
"""Numbers of layers by shape; the last is the whole model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=list(DEPTHS), help="default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that the script works")
    arguments = parser.parse_args()
    wanted = {"tiny": (2, 4, 8)} if arguments.tiny else {name: DEPTHS[name] for name in arguments.shape or DEPTHS}
    for shape, depths in wanted.items():
        for layers in depths:
            figures = measured(
                __file__, "whole_step", shape=shape, layers=layers, device=arguments.device,
                **(TINY if arguments.tiny else {}),
            )  # fmt: skip
            record("unpruned", quick=arguments.tiny, figures=figures)
            if any(each.get("out_of_memory") for each in figures["micro_batches"].values()):
                break  # a deeper one fits even less


def whole_step(shape: str, layers: int, device: str, **settings: Any) -> dict[str, Any]:  # noqa: ANN401 (JSON)
    """Step a model without pruning, with some of its layers."""
    return step(shape, 0.0, "plain", device, layers=layers, **settings)


if __name__ == "__main__":
    serve_actions(whole_step)
    main()
