"""What alignment, refit and distillation bring, on SmolLM2-135M-Instruct, with equal budgets and several seeds.

For each pruning ratio and seed the base is pruned once. From that release come five: as pruned; aligned with the
language-model loss (eq. 8); refitted in closed form; refitted, then aligned; distilled (aligned by KL to the base's
top-64 logits). Aligned ones see the same tokens in the same order. Each is then fine-tuned on the same tasks in the
same order with the same LoRA, the adapter is recovered, and the *base with the recovered adapter* is scored on held-out
tasks. Controls: the base untouched, and plain LoRA on the base (a release of ratio 0: nothing pruned, same code).

    python benchmarks/alignment_ablation.py run --work-dir DIR       # a day's pause is fine: finished cells are skipped
    python benchmarks/alignment_ablation.py table --work-dir DIR     # the table from the cells that are there

Data: the standard library's docstrings (`loram_hub.demo.corpus`): general text to align on, of which one text in ten
is held out, and tasks split by module. fp32 on the CPU. Cells may run in several processes, one ratio each.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import stopwatch
from transformers import AutoTokenizer

from loram_hub import evaluate, prune, recover
from loram_hub.alignment import AlignmentSettings, align
from loram_hub.checkpoint import Checkpoint
from loram_hub.corpora import Corpus
from loram_hub.demo.base_model import base_model
from loram_hub.demo.corpus import stdlib_examples, stdlib_texts
from loram_hub.demo.report import DemoSettings
from loram_hub.demo.training import LONGEST_TASK, fine_tune
from loram_hub.refitting import RefitSettings, refit
from loram_hub.release import Release, open_release
from loram_hub.teaching import TeachingSettings, teach
from loram_hub.texts import Example, calibration_ids

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "pruned": (),
    "aligned": ("align",),
    "refitted": ("refit",),
    "refitted, aligned": ("refit", "align"),
    "distilled": ("distil",),
}
PLAIN = "plain LoRA"
HELD_OUT_EVERY = 10
HELD_OUT_SEQUENCES = 8
TEXT_TOKENS = 256
TEXT_CHARACTERS = 1200


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The same for every cell."""

    steps: int = 24
    batch_size: int = 8
    sequence_length: int = 128
    fine_tuning_steps: int = 16
    tasks_per_step: int = 16
    scored_tasks: int = 100
    scored_texts: int = 24
    calibration_samples: int = 32


QUICK = Budget(
    steps=2, batch_size=2, sequence_length=32, fine_tuning_steps=2, tasks_per_step=2, scored_tasks=4, scored_texts=2,
    calibration_samples=2,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--work-dir", type=Path, required=True, help="cells, releases and data; kept")
    parser.add_argument("--ratio", type=float, action="append", help="default: 0.35 and 0.7")
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1, 2")
    parser.add_argument("--base", help="another base than SmolLM2-135M-Instruct")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that the script works")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if arguments.action == "table":
        print(table(read_cells(arguments.work_dir)))
        return
    study = Study(arguments.work_dir, QUICK if arguments.quick else Budget(), arguments.base)
    for seed in arguments.seed or [0, 1, 2]:
        for ratio in arguments.ratio or [0.35, 0.7]:
            study.run(ratio, seed)


class Study:
    """A grid of cells, each a JSON file; what cells share lies beside them."""

    def __init__(self, folder: Path, budget: Budget, base: str | None) -> None:
        self.folder, self.budget = folder, budget
        self.base = Path(base) if base else base_model()
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        folder.mkdir(parents=True, exist_ok=True)
        texts = stdlib_texts()
        self.texts = [text for idx, text in enumerate(texts) if idx % HELD_OUT_EVERY]
        self.held_out_texts = [text[:TEXT_CHARACTERS] for text in texts[::HELD_OUT_EVERY][: budget.scored_texts]]
        self.tasks, self.held_out_tasks = stdlib_examples()
        self.corpus = folder / "texts.jsonl"
        lines = "".join(json.dumps({"text": text}) + "\n" for text in self.texts)
        if not self.corpus.exists() or self.corpus.read_text(encoding="utf-8") != lines:
            self.corpus.write_text(lines, encoding="utf-8")

    def run(self, ratio: float, seed: int) -> None:
        """Fill the cells of a ratio and a seed that are not there yet."""
        wanted = {name: self.folder / f"cell-{ratio}-{seed}-{name}.json" for name in VARIANTS}
        plain = self.folder / f"cell-0-{seed}-{PLAIN}.json"
        if not plain.exists():
            self.fill(plain, self.pruned(0.0, seed), ratio=0.0, seed=seed, variant=PLAIN, seconds=0.0)
        for name, cell in wanted.items():
            if not cell.exists():
                with stopwatch() as seconds:
                    release = self.pruned(ratio, seed)
                    for step in VARIANTS[name]:
                        release = getattr(self, step)(release, ratio, seed)
                self.fill(cell, release, ratio=ratio, seed=seed, variant=name, seconds=seconds())

    def fill(self, cell: Path, release: Release, *, ratio: float, seed: int, variant: str, seconds: float) -> None:
        """Fine-tune, recover, score."""
        place = cell.with_suffix("")
        settings = DemoSettings(steps=self.budget.fine_tuning_steps, batch_size=self.budget.tasks_per_step, seed=seed)
        with stopwatch() as tuning_seconds:
            fine_tune(
                release, place / "adapter", self.shuffled_tasks(seed), self.tokenizer, settings=settings,
                device="cpu", dtype=torch.float32,
            )  # fmt: skip
        recover(place / "adapter", place / "recovered", release=release.folder, overwrite=True)
        scored = self.held_out_tasks[: self.budget.scored_tasks]
        tasks = evaluate(
            scored, base=self.base, recovered=place / "recovered", release=release.folder, adapter=place / "adapter",
            max_tokens=LONGEST_TASK, dtype=torch.float32,
        )  # fmt: skip
        texts = evaluate(self.held_out_texts, release=release.folder, max_tokens=TEXT_TOKENS, dtype=torch.float32)
        found = {
            "ratio": ratio,
            "seed": seed,
            "variant": variant,
            "budget": asdict(self.budget),
            "parameters": release.manifest.parameters,
            "task_tokens": tasks.tokens,
            "text_tokens": texts.tokens,
            "base": tasks.loss_of("base"),
            "tasks_before": tasks.loss_of("pruned"),
            "tasks_trained": tasks.loss_of("pruned + adapter"),
            "tasks_recovered": tasks.loss_of("base + recovered adapter"),
            "texts": texts.loss_of("pruned"),
            "distance": distance(release, self.pruned(ratio, seed)),
            "seconds": round(seconds, 1),
            "tuning_seconds": round(tuning_seconds(), 1),
        }
        temporary = cell.with_suffix(".partial")
        temporary.write_text(json.dumps(found), encoding="utf-8")
        temporary.rename(cell)
        print(json.dumps(found), flush=True)

    def pruned(self, ratio: float, seed: int) -> Release:
        out = self.folder / f"pruned-{ratio}-{seed}"
        if out.exists():
            return open_release(out)
        ids = calibration_ids(
            self.texts, self.tokenizer, samples=self.budget.calibration_samples, tokens=128, seed=seed
        )
        return prune(self.base, out, pruning_ratio=ratio, calibration=ids, seed=seed)

    def refit(self, release: Release, ratio: float, seed: int) -> Release:
        out = self.folder / f"refit-{ratio}-{seed}"
        if out.exists():
            return open_release(out)
        settings = RefitSettings(samples=64, tokens=128, seed=seed)
        return refit(release.folder, out, base=self.base, calibration=self.texts, settings=settings)

    def align(self, release: Release, ratio: float, seed: int) -> Release:
        return self.aligned(release, f"{release.folder.name}-aligned", self.settings(seed))

    def distil(self, release: Release, ratio: float, seed: int) -> Release:
        settings = replace(self.settings(seed), distillation=1.0)
        return self.aligned(release, f"{release.folder.name}-distilled", settings, teacher=self.teacher(seed))

    def aligned(self, release: Release, name: str, settings: AlignmentSettings, teacher: Path | None = None) -> Release:
        out = self.folder / name
        if out.exists():
            return open_release(out)
        return align(release.folder, out, corpora=[Corpus(source=str(self.corpus))], settings=settings, teacher=teacher)

    def settings(self, seed: int) -> AlignmentSettings:
        return AlignmentSettings(
            steps=self.budget.steps, batch_size=self.budget.batch_size, micro_batch_size=self.budget.batch_size,
            sequence_length=self.budget.sequence_length, learning_rate=3e-4, warmup_steps=self.budget.steps // 10,
            trainable="no-embeddings", precision="fp32", held_out=HELD_OUT_SEQUENCES, seed=seed,
        )  # fmt: skip

    def teacher(self, seed: int) -> Path:
        out = self.folder / f"teacher-{seed}"
        if out.exists():
            return out
        settings = TeachingSettings(
            sequences=self.budget.steps * self.budget.batch_size, sequence_length=self.budget.sequence_length,
            held_out=HELD_OUT_SEQUENCES, seed=seed,
        )  # fmt: skip
        teach(self.base, out, corpora=[Corpus(source=str(self.corpus))], settings=settings)
        return out

    def shuffled_tasks(self, seed: int) -> list[Example]:
        order = torch.randperm(len(self.tasks), generator=torch.Generator().manual_seed(seed)).tolist()
        return [self.tasks[idx] for idx in order[: self.budget.fine_tuning_steps * self.budget.tasks_per_step]]


def distance(release: Release, before: Release) -> float:
    """Norm of what was added to the pruned layers' weights, in parts of their own."""
    moved = own = 0.0
    with Checkpoint(release.folder) as after, Checkpoint(before.folder) as kept:
        for name in kept.tensors:
            if ".layers." in name:
                old = kept.read(name).float()
                moved += float((after.read(name).float() - old).square().sum())
                own += float(old.square().sum())
    return math.sqrt(moved / own)


def read_cells(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("cell-*.json"))]


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds, and the difference to `pruned` seed by seed."""
    columns = (
        "ratio", "release", "seeds", "text", "tasks, before", "tasks, tuned", "**base + recovered**", "against pruned",
        "share", "moved",
    )  # fmt: skip
    return "\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *_rows(cells)])


def _rows(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    plain = {cell["seed"]: cell for cell in cells if cell["variant"] == PLAIN}
    groups: dict[tuple[float, str], dict[int, Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["ratio"], cell["variant"]), {})[cell["seed"]] = cell
    order = [PLAIN, *VARIANTS]
    for (ratio, variant), group in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        pruned = groups.get((ratio, "pruned"), {})
        against = [group[s]["tasks_recovered"] - pruned[s]["tasks_recovered"] for s in group if s in pruned]
        share = [_share(group[s], plain[s]) for s in group if s in plain]
        columns = [
            f"{ratio:g}",
            variant,
            str(len(group)),
            *(_spread([c[key] for c in group.values()]) for key in ("texts", "tasks_before", "tasks_trained")),
            f"**{_spread([c['tasks_recovered'] for c in group.values()])}**",
            "" if variant in (PLAIN, "pruned") else _spread(against, sign="+"),
            _spread(share, digits=2),
            _spread([c["distance"] for c in group.values()], digits=3),
        ]
        yield "| " + " | ".join(columns) + " |"
    if plain:
        base = statistics.mean(cell["base"] for cell in plain.values())
        yield f"\nThe base untouched: {base:.3f} on the tasks."


def _share(cell: Mapping[str, Any], plain: Mapping[str, Any]) -> float:
    """Of what plain LoRA on the base gains, how much the recovered adapter does."""
    return float((cell["base"] - cell["tasks_recovered"]) / (plain["base"] - plain["tasks_recovered"]))


def _spread(values: Sequence[float], *, digits: int = 3, sign: str = "") -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
