"""Time, memory and size of a report on a release of 70B.

The release: LLaMA-2-70B's shapes (80 layers, 8 KV heads, 28,672 channels), pruned by 0.85, by its index alone
(manifest, config, mask indexes; no weights). With it come the importance scores of every group, an alignment of 400
steps, the record of a fine-tuning of 2,000 steps with two evaluation sets, and an evaluation: six pictures.

`report` runs in a process of its own. Its seconds begin before the imports that it makes itself (matplotlib, jinja2,
and torch, which reading scores brings along); those of the processor are given beside them, for a machine that does
other work. An adapter of this size takes `update_norms` first, which has a benchmark of its own.

    python benchmarks/report.py [--quick] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from measuring import LLAMA_2_70B, MB, QUICK_70B, measured, scratch_folder, serve_actions, stopwatch
from measuring import report as print_line

if TYPE_CHECKING:
    from loram_hub.manifest import Manifest
    from loram_hub.plan import Plan

RATIO, ALIGNMENT_STEPS, STEPS, QUICK_STEPS = 0.85, 400, 2000, 60
ROUNDS, QUICK_ROUNDS = 3, 1
SECONDS_LIMIT, SIZE_LIMIT = 10, 5 * MB
PICTURES = 6


def main() -> None:
    parser = argparse.ArgumentParser(description="Time, memory and size of a report on a 70B release.")
    parser.add_argument("--quick", action="store_true", help="a tiny release, one round: shows that the script works")
    parser.add_argument("--rounds", type=int, help=f"how often it is timed; default {ROUNDS}")
    parser.add_argument("--work-dir", help="where to put the temporary files; default: the system's own")
    options = parser.parse_args()
    sizes, rounds = (QUICK_70B, QUICK_ROUNDS) if options.quick else (LLAMA_2_70B, options.rounds or ROUNDS)

    with scratch_folder("report", options.work_dir) as work:
        steps = QUICK_STEPS if options.quick else STEPS
        inputs = measured(__file__, "make_inputs", folder=str(work), sizes=sizes, steps=steps)
        runs = [measured(__file__, "measure", folder=str(work)) for _ in range(rounds)]
    seconds = [run["seconds"] for run in runs]
    figures = {
        **runs[0],
        "seconds": median(seconds),
        "slowest": max(seconds),
        "processor_seconds": median(run["processor_seconds"] for run in runs),
        "peak_rss": max(run["peak_rss"] for run in runs),
        "input_bytes": inputs["bytes"],
    }
    print_line(
        "report",
        quick=options.quick,
        figures=figures,
        target=f"under {SECONDS_LIMIT} s (median) and {SIZE_LIMIT // MB} MB",
        met=figures["seconds"] < SECONDS_LIMIT
        and figures["page_bytes"] < SIZE_LIMIT
        and figures["pictures"] == PICTURES,
    )


def make_inputs(folder: str, sizes: dict[str, int], steps: int) -> dict[str, int]:
    """Write a release without weights, scores, the record of a run, and an evaluation."""
    from synthetic import llama_config, manifest_of, random_plan

    from loram_hub.files import dump_json
    from loram_hub.release import release_config, write_release

    work, config = Path(folder), llama_config(**sizes)
    plan = random_plan(config, RATIO)
    losses = [[step, 2.4 - step / 1000] for step in range(1, ALIGNMENT_STEPS + 1)]
    held_out = [[step, {"texts": 2.5 - step / 1000}] for step in range(0, ALIGNMENT_STEPS + 1, 25)]
    alignment = {"steps": ALIGNMENT_STEPS, "losses": losses, "held_out": held_out, "corpora": ["texts"]}
    manifest = replace(manifest_of(plan, RATIO), alignment=alignment)
    with write_release(work / "release", manifest=manifest, plan=plan, config=release_config(config)):
        pass
    _write_scores(work / "importance.safetensors", plan)
    (work / "run").mkdir()
    (work / "run" / "finetune.json").write_text(dump_json(_run_record(plan.digest, steps)), encoding="utf-8")
    (work / "evaluation.json").write_text(json.dumps(_evaluation(manifest)), encoding="utf-8")
    return {"bytes": sum(path.stat().st_size for path in work.rglob("*") if path.is_file())}


def _write_scores(path: Path, plan: Plan) -> None:
    """Write scores by which the plan is the one to be made."""
    from loram_hub.importance.stored import StoredScores, write_scores

    rng = np.random.default_rng(0)
    whole = plan.architecture.whole_layer
    scores: dict[int, Any] = {}
    for layer, spaces in plan.kept.items():
        scores[layer] = {}
        for space, kept in spaces.items():
            count = whole.kv_heads if space == "kv_heads" else whole.channels
            values = rng.uniform(0.1, 1, count).astype(np.float32)
            values[kept] += 1
            scores[layer][space] = values
    write_scores(
        path,
        StoredScores(
            scores=scores, importance="random", seed=0, base_id="org/base", base_commit="0" * 40,
            base_config_sha256="0" * 64, calibration=None,
        ),
    )  # fmt: skip


def _run_record(plan_sha256: str, steps: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    history: list[dict[str, Any]] = [
        {"step": step, "loss": 1.2 + math.exp(-step / 300) + float(rng.normal(0, 0.05))} for step in range(1, steps + 1)
    ]
    for step in range(20, steps + 1, 20):
        history.append({"step": step, "eval_instructions_loss": 1.1 + math.exp(-step / 300), "eval_others_loss": 1.9})
    recipe = {"lora": {"r": 8, "alpha": 16}, "training": {"max_tokens": 512}, "seed": 0}
    release = {"id": "release", "commit": None, "plan_sha256": plan_sha256}
    return {"release": release, "recipe": recipe, "schedule": {"micro_batch": 4}, "steps": steps, "history": history}


def _evaluation(manifest: Manifest) -> dict[str, Any]:
    base, pruned = manifest.base.parameters, manifest.parameters
    losses = (("base", 1.4, base), ("pruned", 2.0, pruned), ("base + recovered adapter", 1.1, base + 10**8))
    rows = [
        {"model": model, "loss": loss, "perplexity": math.exp(loss), "parameters": parameters}
        for model, loss, parameters in losses
    ]
    return {"rows": rows, "examples": 100, "tokens": 20000, "dataset": None}


def measure(folder: str) -> dict[str, float]:
    """Time one report, with what it imports on its way."""
    work = Path(folder)
    before = time.process_time()
    with stopwatch() as seconds:
        from loram_hub.reporting import report

        written = report(
            [work / "release", work / "run", work / "evaluation.json"],
            work / "report.html",
            importance=work / "importance.safetensors",
            overwrite=True,
        )
    return {
        "seconds": seconds(),
        "processor_seconds": time.process_time() - before,
        "page_bytes": written.nbytes,
        "pictures": len(written.pictures),
        "picture_bytes": sum(path.stat().st_size for path in written.pictures),
    }


if __name__ == "__main__":
    serve_actions(make_inputs, measure)
    main()
