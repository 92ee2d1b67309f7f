"""What one number for the whole recovered adapter brings (`loram recover --calibrate-scale`), on SmolLM2-135M-Instruct.

The adapters are those of `alignment_ablation`: trained on releases of two ratios, pruned as they are, aligned, refitted
or distilled, three seeds each, and plain LoRA on the base as the control (a release of ratio 0: nothing is recovered
there, so whatever a scale brings is owed to the short training, not to the pruning). What that benchmark left in its
folder is taken; what is missing is trained first.

Three sets, disjoint: the training tasks; 100 held-out tasks on which `alignment_ablation` scored everything; and the
next 100 held-out tasks as development set, on which the scale is chosen. Reported are the losses on the scored ones.

    python benchmarks/scale_gain.py run --work-dir DIR      # DIR of alignment_ablation; finished cells are skipped
    python benchmarks/scale_gain.py table --work-dir DIR    # the table from the cells that are there
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from alignment_ablation import PLAIN, QUICK, VARIANTS, Budget, Study
from measuring import stopwatch

from loram_hub import evaluate
from loram_hub.demo.training import LONGEST_TASK
from loram_hub.rescaling import ScaleSearch, recover_scaled

DEVELOPMENT_TASKS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--work-dir", type=Path, required=True, help="that of alignment_ablation")
    parser.add_argument("--ratio", type=float, action="append", help="default: 0.35 and 0.7")
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1, 2")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="default: all")
    parser.add_argument("--base", help="another base than SmolLM2-135M-Instruct")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that the script works")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if arguments.action == "run":
        study = Study(arguments.work_dir, QUICK if arguments.quick else Budget(), arguments.base)
        for variant in arguments.variant or VARIANTS:
            for seed in arguments.seed or [0, 1, 2]:
                for ratio in arguments.ratio or [0.35, 0.7]:
                    study.run(ratio, seed)
                    rescale(study, f"0-{seed}-{PLAIN}", f"pruned-0.0-{seed}")
                    rescale(study, f"{ratio}-{seed}-{variant}", released(study, ratio, seed, variant))
    print(table(read_cells(arguments.work_dir)))


def released(study: Study, ratio: float, seed: int, variant: str) -> str:
    """Name of the folder of the release that a variant's adapter was trained on."""
    release = study.pruned(ratio, seed)
    for step in VARIANTS[variant]:
        release = getattr(study, step)(release, ratio, seed)
    return release.folder.name


def rescale(study: Study, name: str, release: str) -> None:
    """Choose a scale for one adapter and score it, unless that was done before."""
    done = study.folder / f"scale-{name}.json"
    if done.exists():
        return
    scored = study.held_out_tasks[: study.budget.scored_tasks]
    development = study.held_out_tasks[len(scored) : len(scored) + min(DEVELOPMENT_TASKS, len(scored))]
    place = study.folder / f"cell-{name}"
    with stopwatch() as seconds:
        found = recover_scaled(
            place / "adapter", place / "rescaled", data=development, release=study.folder / release, base=study.base,
            search=ScaleSearch(max_tokens=LONGEST_TASK), compute_dtype=torch.float32, overwrite=True,
        )  # fmt: skip
    after = evaluate(
        scored, base=study.base, recovered=place / "rescaled", max_tokens=LONGEST_TASK, dtype=torch.float32
    )
    cell = json.loads((study.folder / f"cell-{name}.json").read_text(encoding="utf-8"))
    line = {
        "name": name,
        **{key: cell[key] for key in ("ratio", "seed", "variant", "base", "task_tokens")},
        "before": cell["tasks_recovered"],
        "after": after.loss_of("base + recovered adapter"),
        "scale": found.scale.factor,
        "losses": dict(found.scale.losses),
        "development_gain": found.gain,
        "standard_error": found.scale.standard_error,
        "development_tokens": found.scale.tokens,
        "seconds": round(seconds(), 1),
    }
    done.write_text(json.dumps(line), encoding="utf-8")
    print(json.dumps(line), flush=True)


def read_cells(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("scale-*.json"))]


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds, before and after on the scored tasks."""
    columns = (
        "ratio", "release", "seeds", "scale chosen", "loss at 1", "**loss at the chosen**", "difference", "share at 1",
        "share at the chosen", "passes",
    )  # fmt: skip
    return "\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *_rows(cells)])


def _rows(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    plain = {cell["seed"]: cell for cell in cells if cell["variant"] == PLAIN}
    order = [PLAIN, *VARIANTS]
    groups: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["ratio"], cell["variant"]), []).append(cell)
    for (ratio, variant), group in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        columns = [
            "" if variant == PLAIN else f"{ratio:g}",
            f"{PLAIN} on the base" if variant == PLAIN else variant,
            str(len(group)),
            _spread([cell["scale"] for cell in group], digits=2),
            _spread([cell["before"] for cell in group]),
            f"**{_spread([cell['after'] for cell in group])}**",
            _spread([cell["after"] - cell["before"] for cell in group], sign="+"),
            *(_spread([_share(cell, key, plain) for cell in group], digits=2) for key in ("before", "after")),
            _spread([len(cell["losses"]) for cell in group], digits=0),
        ]
        yield "| " + " | ".join(columns) + " |"


def _share(cell: Mapping[str, Any], key: str, plain: Mapping[int, Mapping[str, Any]]) -> float:
    """Of what plain LoRA on the base gains, as it was trained, how much the recovered adapter does."""
    control = plain[cell["seed"]]
    return float((cell["base"] - cell[key]) / (control["base"] - control["before"]))


def _spread(values: Sequence[float], *, digits: int = 3, sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
