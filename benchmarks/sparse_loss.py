"""Held-out loss of SmolLM2-135M-Instruct after magnitude pruning, Wanda and SparseGPT, at the same densities.

Nothing is trained. The model is that of `loram demo`; calibration are Python's help topics and long docstrings, of
which one text in ten is held out and scored. The same rows calibrate Wanda and SparseGPT. The paper calibrates on
128 x 2,048 tokens of C4; `--samples` and `--tokens` say how many are taken here. fp32 on the CPU.

    python benchmarks/sparse_loss.py [--quick] [--samples 32] [--tokens 256] [--work-dir DIR]

With `--work-dir` what was measured stays there, a file per release; a run that was cut off goes on from it. A file's
name ends with a digest of base, calibration and scored texts: what was measured with others is not taken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import report, scratch_folder, stopwatch

if TYPE_CHECKING:
    import torch

METHODS = ("magnitude", "wanda", "sparsegpt")
DENSITIES: Mapping[str, Mapping[str, Any]] = {
    "4:8": {"pattern": "4:8"},
    "2:4": {"pattern": "2:4"},
    "50 %": {"sparsity": 0.5},
    "55 %": {"sparsity": 0.55},
}
HELD_OUT_EVERY = 10
LONGEST = 256
SAMPLES, TOKENS, SCORED_TEXTS, TEXT_CHARACTERS = 32, 256, 24, 1200
QUICK_SAMPLES, QUICK_TOKENS, QUICK_SCORED_TEXTS = 2, 32, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every release is made from and scored on."""

    base: Path
    ids: torch.Tensor
    """Rows of calibration."""
    held_out: Sequence[str]
    """Texts to score."""
    work: Path
    """Where what was measured goes."""

    def digest(self) -> str:
        """Return 12 hexadecimal digits that stand for all that a loss depends on but the method."""
        from loram_hub.checkpoint import weight_files
        from loram_hub.digests import remembered_sha256

        weights = {path.name: remembered_sha256(path) for path in weight_files(self.base)}
        facts = [weights, self.ids.tolist(), list(self.held_out), LONGEST]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out loss after magnitude pruning, Wanda and SparseGPT.")
    parser.add_argument("--quick", action="store_true", help="one density, few texts: shows that the script works")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"rows of calibration; default {SAMPLES}")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"tokens of a row; default {TOKENS}")
    parser.add_argument("--seed", type=int, default=0, help="which texts calibrate")
    parser.add_argument("--work-dir", type=Path, help="where measurements and the release in work go; kept")
    options = parser.parse_args()
    with scratch_folder("sparse-loss", None) as scratch:
        work = options.work_dir or scratch
        work.mkdir(parents=True, exist_ok=True)
        samples, tokens = (QUICK_SAMPLES, QUICK_TOKENS) if options.quick else (options.samples, options.tokens)
        scored = QUICK_SCORED_TEXTS if options.quick else SCORED_TEXTS
        job = _job(work, samples=samples, tokens=tokens, scored=scored, seed=options.seed)
        measured = measure(job, {"4:8": DENSITIES["4:8"]} if options.quick else DENSITIES)
    losses = {density: {method: found["loss"] for method, found in row.items()} for density, row in measured.items()}
    report(
        "sparse_loss",
        quick=options.quick,
        figures={
            "base": _base_loss(job),
            "calibration": {"samples": samples, "tokens": tokens, "seed": options.seed},
            "densities": measured,
        },
        target="SparseGPT below magnitude at every density, Wanda no worse than magnitude",
        met=all(row["sparsegpt"] < row["magnitude"] and row["wanda"] <= row["magnitude"] for row in losses.values()),
    )


def _job(work: Path, *, samples: int, tokens: int, scored: int, seed: int) -> Job:
    from transformers import AutoTokenizer

    from loram_hub.demo.base_model import base_model
    from loram_hub.demo.corpus import stdlib_texts
    from loram_hub.texts import calibration_ids

    base, texts = base_model(), stdlib_texts()
    seen = [text for idx, text in enumerate(texts) if idx % HELD_OUT_EVERY]
    tokenizer = AutoTokenizer.from_pretrained(base)
    return Job(
        base=base,
        ids=calibration_ids(seen, tokenizer, samples=samples, tokens=tokens, seed=seed),
        held_out=[text[:TEXT_CHARACTERS] for text in texts[::HELD_OUT_EVERY][:scored]],
        work=work,
    )


def measure(job: Job, densities: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    digest = job.digest()
    return {
        density: {method: _release_loss(job, digest, method, asked) for method in METHODS}
        for density, asked in densities.items()
    }


def _release_loss(job: Job, digest: str, method: str, asked: Mapping[str, Any]) -> dict[str, float]:
    """Make a release, score it, and delete it."""
    import torch

    from loram_hub import evaluate
    from loram_hub.sparsification import SparsitySettings, sparsify

    name = "-".join([method, *map(str, asked.values()), *map(str, job.ids.shape), digest]).replace(":", "of")
    place, out = job.work / f"{name}.json", job.work / name
    if place.exists():
        known: dict[str, float] = json.loads(place.read_text(encoding="utf-8"))
        return known
    settings = SparsitySettings(method=method, **asked)
    with stopwatch() as seconds:
        release = sparsify(job.base, out, settings=settings, calibration=job.ids, overwrite=True)
    made = seconds()
    table = evaluate(job.held_out, release=out, max_tokens=LONGEST, dtype=torch.float32)
    loss = table.loss_of("pruned")
    assert loss is not None
    kept = release.manifest.parameters / release.manifest.base.parameters
    found = {"loss": loss, "text_tokens": table.tokens, "kept_parameters": kept, "seconds": round(made, 1)}
    place.write_text(json.dumps(found), encoding="utf-8")
    shutil.rmtree(out)
    return found


def _base_loss(job: Job) -> float:
    import torch

    from loram_hub import evaluate

    loss = evaluate(job.held_out, base=job.base, max_tokens=LONGEST, dtype=torch.float32).loss_of("base")
    assert loss is not None
    return loss


if __name__ == "__main__":
    main()
