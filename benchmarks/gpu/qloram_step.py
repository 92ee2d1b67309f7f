"""Memory and speed of a QLoRAM training step on 70B-shaped releases, at each ratio and with each memory option.

Weights are random NF4, made on the device; see `random_models` why that is honest, and `training_step` for what a step
is. Sequences of 512 tokens, micro-batches of 1 and 4. Each release has a process of its own. A line of JSON for each
of them has the prediction of `loram_hub.estimation` beside the figures.

    PYTHONPATH=.:benchmarks python benchmarks/gpu/qloram_step.py [--shape LLaMA-3.1-70B] [--ratio 0.85]
    PYTHONPATH=.:benchmarks python benchmarks/gpu/qloram_step.py --device cpu --tiny      # shows that it works
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from measuring import measured, record, serve_actions

PLAIN: Mapping[str, Any] = {}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "plain": PLAIN,
    "embedding in main memory": {"embedding": "cpu"},
    "embedding and lm_head in 8 bit": {"embedding": "int8", "lm_head": "int8"},
    "embedding in main memory, lm_head in NF4": {"embedding": "cpu", "lm_head": "nf4"},
    "the same, activations offloaded": {"embedding": "cpu", "lm_head": "nf4", "activation_offloading": True},
}
"""Memory options by the name they have in the table."""
RATIOS = (0.65, 0.75, 0.85, 0.95)
SHAPES = ("LLaMA-3.1-70B", "LLaMA-2-70B", "LLaMA-2-13B")
FOCUS = ("LLaMA-3.1-70B", 0.85)
"""The release that the targets are about, and that is measured with every option."""
MICRO_BATCHES, TOKENS = (1, 4), 512
WARM_UP, STEPS = 3, 8
TINY = {"micro_batches": [1, 2], "sequence_length": 16, "warm_up": 1, "steps": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: all")
    parser.add_argument("--ratio", action="append", type=float, help="default: all of the shape's")
    parser.add_argument("--options", action="append", choices=list(OPTIONS), help="default: all that are measured")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that the script works")
    arguments = parser.parse_args()
    if arguments.tiny:
        wanted = [("tiny", 0.5, "plain")]
    else:
        chosen = (arguments.shape, arguments.ratio, arguments.options)
        wanted = [
            each
            for each in configurations()
            if all(not some or it in some for it, some in zip(each, chosen, strict=True))
        ]
    for shape, ratio, options in wanted:
        try:
            figures = measured(
                __file__, "step", shape=shape, ratio=ratio, options=options, device=arguments.device,
                **(TINY if arguments.tiny else {}),
            )  # fmt: skip
        except SystemExit as err:  # one that cannot run, for want of TRL for example, does not end the others
            print(err, file=sys.stderr)
        else:
            record("qloram_step", quick=arguments.tiny, figures=figures)


def configurations() -> Iterator[tuple[str, float, str]]:
    """Shape, ratio and name of the options of everything that is measured, the most wanted first."""
    for options in OPTIONS:
        yield (*FOCUS, options)
    for shape in ("LLaMA-3.1-70B", "LLaMA-2-70B"):
        for ratio in RATIOS:
            if (shape, ratio) != FOCUS:
                yield shape, ratio, "plain"
    yield "LLaMA-2-13B", 0.65, "plain"  # what the paper's cost table is about


def step(
    shape: str,
    ratio: float,
    options: str,
    device: str,
    micro_batches: list[int] | None = None,
    sequence_length: int = TOKENS,
    warm_up: int = WARM_UP,
    steps: int = STEPS,
    layers: int | None = None,
) -> dict[str, Any]:
    """Make the release, step it, and put the prediction beside what was found."""
    from gpu_shapes import config_of, layers_of
    from random_models import random_model
    from training_step import measure, predicted

    config = config_of(shape, layers=layers)
    architecture, sizes = layers_of(config, ratio)
    batches = micro_batches or list(MICRO_BATCHES)
    found = measure(
        lambda: random_model(config, architecture, sizes, device=device),
        options=OPTIONS[options],
        micro_batches=batches,
        sequence_length=sequence_length,
        warm_up=warm_up,
        steps=steps,
    )
    for micro_batch, figures in found["micro_batches"].items():
        figures["predicted"] = predicted(
            architecture, sizes, options=OPTIONS[options], micro_batch=int(micro_batch), sequence_length=sequence_length
        )
    return {
        "shape": shape,
        "ratio": ratio,
        "options": options,
        "layers": architecture.num_hidden_layers,
        "sequence_length": sequence_length,
        **found,
    }


if __name__ == "__main__":
    serve_actions(step)
    main()
