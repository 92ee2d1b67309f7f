"""The four variants of LoRAM on SmolLM2-135M-Instruct: the same alignment, the same fine-tuning, several seeds.

Rand and Stru lose channel groups, at a ratio that leaves as many parameters as Unst has weights; Semi (SparseGPT 4:8)
and Unst (SparseGPT, 55 %) keep every shape and have zeros. Each release is made by a recipe of `loram publish` and each
adapter by one of `loram finetune`; the recipes lie in the work folder. Semi and Unst are fine-tuned twice, with plain
LoRA and with masked LoRA. Controls: the base untouched, and plain LoRA on the base (a release of ratio 0).

    python benchmarks/variants.py run --work-dir DIR       # finished cells are skipped; seeds are the outermost loop
    python benchmarks/variants.py table --work-dir DIR     # the tables from the cells that are there
    python benchmarks/variants.py picture --work-dir DIR   # the same as DIR/variants.png

Measured: held-out loss of the release before fine-tuning, of the release with the adapter as trained, and of the base
with the recovered adapter; on tasks like those that were trained on (in domain) and on general text (out of domain).
Data: the standard library's docstrings (`loram_hub.demo.corpus`). fp32 on the CPU. Cells have seconds,
too, which the tables leave out: other work on the machine gets into them. A folder is of one base, one budget and one
set of data (study.json); `run` refuses to mix them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loram_hub import evaluate
from loram_hub.checkpoint import weight_files
from loram_hub.demo.base_model import base_model
from loram_hub.demo.corpus import stdlib_examples, stdlib_texts
from loram_hub.demo.training import LONGEST_TASK
from loram_hub.digests import remembered_sha256
from loram_hub.evaluation import encode_examples, held_out_loss
from loram_hub.files import dump_json, read_json
from loram_hub.finetuning import FinetuneResult, finetune
from loram_hub.pipeline import Published, publish
from loram_hub.release import open_release
from loram_hub.texts import Example

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT_EVERY = 10
HELD_OUT_SEQUENCES = 8
TEXT_TOKENS = 256
TEXT_CHARACTERS = 1200


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The same for every cell."""

    steps: int = 12
    batch_size: int = 8
    sequence_length: int = 128
    fine_tuning_steps: int = 12
    tasks_per_step: int = 16
    scored_tasks: int = 80
    scored_texts: int = 8
    calibration_samples: int = 32
    """Of SparseGPT; Taylor importance takes its default of 32 x 128."""
    calibration_tokens: int = 256


QUICK = Budget(
    steps=2, batch_size=2, sequence_length=32, fine_tuning_steps=2, tasks_per_step=2, scored_tasks=4, scored_texts=2,
    calibration_samples=2, calibration_tokens=32,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A way of making a release, and of training on it."""

    label: str
    release: str
    """Name of the release; those that share it are fine-tuned on the same one."""
    prune: Mapping[str, Any]
    """Section `prune` of its recipe, without the calibration."""
    aligned: bool = True
    masked: bool | None = None
    """Whether the LoRA update is masked; None where nothing could be."""


STRUCTURED_RATIO = 0.7
"""75.7 M parameters of 134.5 M, where 55 % sparsity keeps 76.1 M; of the 3 KV heads 1 is left, so steps are coarse."""
_SEMI = {"method": "sparsegpt", "pattern": "4:8"}
_UNST = {"method": "sparsegpt", "sparsity": 0.55}
VARIANTS: Mapping[str, Variant] = {
    "plain": Variant(
        label="plain LoRA on the base",
        release="whole",
        prune={"pruning_ratio": 0.0, "importance": "magnitude"},
        aligned=False,
    ),
    "rand": Variant(
        label="Rand 0.7", release="rand", prune={"pruning_ratio": STRUCTURED_RATIO, "importance": "random"}
    ),
    "stru": Variant(
        label="Stru 0.7", release="stru", prune={"pruning_ratio": STRUCTURED_RATIO, "importance": "taylor"}
    ),
    "semi": Variant(label="Semi 4:8, plain LoRA", release="semi", prune=_SEMI, masked=False),
    "semi-masked": Variant(label="Semi 4:8, masked LoRA", release="semi", prune=_SEMI, masked=True),
    "unst": Variant(label="Unst 55 %, plain LoRA", release="unst", prune=_UNST, masked=False),
    "unst-masked": Variant(label="Unst 55 %, masked LoRA", release="unst", prune=_UNST, masked=True),
}
PLAIN = "plain"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table", "picture"])
    parser.add_argument("--work-dir", type=Path, required=True, help="cells, recipes, releases and data; kept")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="default: all")
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1, 2")
    parser.add_argument("--base", help="another base than SmolLM2-135M-Instruct")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that the script works")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if arguments.action == "picture":
        draw(read_cells(arguments.work_dir), arguments.work_dir / "variants.png")
        return
    if arguments.action == "table":
        print(table(read_cells(arguments.work_dir)))
        return
    study = Study(arguments.work_dir.absolute(), QUICK if arguments.quick else Budget(), arguments.base)
    for seed in arguments.seed or [0, 1, 2]:
        for name in arguments.variant or VARIANTS:
            study.run(name, seed)


class Study:
    """A grid of cells, each a JSON file; recipes, releases and data that cells share lie beside them."""

    def __init__(self, folder: Path, budget: Budget, base: str | None) -> None:
        self.folder, self.budget = folder, budget
        self.base = Path(base) if base else base_model()
        texts = stdlib_texts()
        self.texts = [text[:TEXT_CHARACTERS] for text in texts[::HELD_OUT_EVERY][: budget.scored_texts]]
        self.tasks, held_out = stdlib_examples()
        self.scored_tasks = held_out[: budget.scored_tasks]
        seen = [text for idx, text in enumerate(texts) if idx % HELD_OUT_EVERY]
        keep_to_one_study(folder, self.facts(seen))
        (folder / "recipes").mkdir(exist_ok=True)
        self.corpus = written(folder / "texts.jsonl", [{"text": text} for text in seen])

    def facts(self, seen: Sequence[str]) -> dict[str, Any]:
        """Return what all cells of a folder have in common."""
        tasks = [[asdict(task) for task in tasks] for tasks in (self.tasks, self.scored_tasks)]
        return {
            "budget": asdict(self.budget),
            "base_sha256": {path.name: remembered_sha256(path) for path in weight_files(self.base)},
            "data_sha256": hashlib.sha256(json.dumps([self.texts, list(seen), tasks]).encode()).hexdigest(),
        }

    def run(self, name: str, seed: int) -> None:
        """Fill a cell if it is not there yet."""
        cell = self.folder / f"cell-{seed}-{name}.json"
        if cell.exists():
            return
        variant = VARIANTS[name]
        published = publish(self.publish_recipe(variant, seed), work_dir=self.folder / f"{variant.release}-{seed}")
        result = finetune(
            self.finetune_recipe(name, variant, published.release, seed), self.folder / f"{name}-{seed}-run"
        )
        found = {
            "variant": name,
            "seed": seed,
            "budget": asdict(self.budget),
            "parameters": open_release(published.release).manifest.parameters,
            "making_seconds": round(sum(stage.seconds for stage in published.stages), 1),
            "tuning_seconds": round(float(read_json(result.folder / "finetune.json")["seconds"]), 1),
            "base": self.base_losses(),
            **self.losses(published, result),
        }
        save_cell(cell, found)
        print(json.dumps(found), flush=True)

    def losses(self, published: Published, result: FinetuneResult) -> dict[str, dict[str, float | None]]:
        """Score the release, the release with its adapter, and the base with the recovered one."""
        tables = {
            "tasks": evaluate(
                self.scored_tasks, release=published.release, adapter=result.adapter, max_tokens=LONGEST_TASK,
                dtype=torch.float32,
            ),
            "texts": evaluate(
                self.texts, release=published.release, adapter=result.adapter, max_tokens=TEXT_TOKENS,
                dtype=torch.float32,
            ),
        }  # fmt: skip
        recovered = self.scores(lambda model: PeftModel.from_pretrained(model, result.recovered))
        return {
            "before": {data: found.loss_of("pruned") for data, found in tables.items()},
            "trained": {data: found.loss_of("pruned + adapter") for data, found in tables.items()},
            "recovered": dict(recovered),
        }

    def base_losses(self) -> dict[str, float]:
        """Score the base untouched, once."""
        place = self.folder / "base.json"
        if not place.exists():
            save_cell(place, self.scores(lambda model: model))
        return dict(read_json(place))

    def scores(self, changed: Callable[[Any], Any]) -> dict[str, float]:
        """Score the base, with or without something on it, as stock transformers and PEFT load it."""
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        model = changed(AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32))
        texts = [Example(prompt="", completion=text) for text in self.texts]
        data = {"tasks": (self.scored_tasks, LONGEST_TASK), "texts": (texts, TEXT_TOKENS)}
        return {
            name: held_out_loss(model, encode_examples(examples, tokenizer, max_tokens=longest)[0]).loss
            for name, (examples, longest) in data.items()
        }

    def publish_recipe(self, variant: Variant, seed: int) -> Path:
        budget = self.budget
        calibrated = {} if variant.prune.get("importance") in ("random", "magnitude") else self.calibration(variant)
        recipe: dict[str, Any] = {
            "base": str(self.base),
            "repo_id": f"org/SmolLM2-135M-{variant.release}",
            "license": "apache-2.0",
            "license_file": str(ROOT / "LICENSE"),
            "seed": seed,
            "prune": {**variant.prune, **calibrated},
        }
        if variant.aligned:
            recipe["align"] = {
                "corpora": [{"source": str(self.corpus)}], "steps": budget.steps, "batch_size": budget.batch_size,
                "micro_batch_size": budget.batch_size, "sequence_length": budget.sequence_length,
                "learning_rate": 3e-4, "warmup_steps": budget.steps // 10, "trainable": "no-embeddings",
                "precision": "fp32", "held_out": HELD_OUT_SEQUENCES, "save_every": budget.steps,
                "keep_checkpoints": 1,
            }  # fmt: skip
        return self.recipe(f"publish-{variant.release}-{seed}", recipe)

    def calibration(self, variant: Variant) -> dict[str, Any]:
        if "method" not in variant.prune:
            return {"calibration": str(self.corpus)}
        budget = self.budget
        return {
            "calibration": str(self.corpus),
            "samples": budget.calibration_samples,
            "tokens": budget.calibration_tokens,
        }

    def finetune_recipe(self, name: str, variant: Variant, release: Path, seed: int) -> Path:
        budget = self.budget
        count = budget.fine_tuning_steps * budget.tasks_per_step
        order = torch.randperm(len(self.tasks), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [asdict(self.tasks[idx]) for idx in order[:count]]
        tasks = written(self.folder / f"tasks-{seed}.jsonl", chosen)
        masked = {} if variant.masked is None else {"masked": variant.masked}
        return self.recipe(
            f"finetune-{name}-{seed}",
            {
                "release": str(release),
                "seed": seed,
                "device": "cpu",
                "dtype": "float32",
                "data": {"train": [{"source": str(tasks)}]},
                "lora": {"dropout": 0.0, **masked},
                "training": {
                    "steps": budget.fine_tuning_steps, "batch_size": budget.tasks_per_step,
                    "max_tokens": LONGEST_TASK,
                },
                "memory": {"gradient_checkpointing": False},
                "checkpoints": {"every": budget.fine_tuning_steps, "recover": False},
            },
        )  # fmt: skip

    def recipe(self, name: str, values: Mapping[str, Any]) -> Path:
        path = self.folder / "recipes" / f"{name}.yaml"
        path.write_text(dump_json(values), encoding="utf-8")  # JSON is YAML
        return path


def keep_to_one_study(folder: Path, facts: Mapping[str, Any]) -> None:
    """Note in a folder what its cells have in common, or stop if those that are there are of another study."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "study.json"
    if place.exists():
        known = read_json(place)
        other = [name for name, fact in facts.items() if known.get(name) != fact]
        if other:
            raise SystemExit(f"{folder} is of another study: {', '.join(other)} differ. Name another --work-dir.")
        return
    if any(folder.glob("cell-*.json")) or (folder / "base.json").exists():
        raise SystemExit(f"{folder} has cells, but no study.json: of which study is unknown. Name another --work-dir.")
    save_cell(place, facts)


def written(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write records as JSON lines, unless the file has them already: its time of change is part of what is known."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if not path.exists() or path.read_text(encoding="utf-8") != lines:
        path.write_text(lines, encoding="utf-8")
    return path


def save_cell(cell: Path, found: Mapping[str, Any]) -> None:
    temporary = cell.with_suffix(".partial")
    temporary.write_text(json.dumps(found), encoding="utf-8")
    temporary.rename(cell)


def read_cells(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("cell-*.json"))]


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, mean and standard deviation over seeds: both kinds of held-out data, then masked against plain."""
    parts = [_table(cells, data, title) for data, title in (("tasks", "In domain"), ("texts", "Out of domain"))]
    parts.append(_masked_against_plain(cells))
    return "\n\n".join(part for part in parts if part)


def _table(cells: Sequence[Mapping[str, Any]], data: str, title: str) -> str:
    columns = (
        "release, fine-tuned with", "seeds", "parameters", "before fine-tuning", "with the adapter",
        "**base + recovered**", "against plain LoRA",
    )  # fmt: skip
    lines = [f"{title}:", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    if cells:
        base = statistics.mean(cell["base"][data] for cell in cells)
        lines.append(f"| base, not fine-tuned | | {_millions(cells, PLAIN)} | | | {base:.3f} | |")
    return "\n".join([*lines, *_rows(cells, data)])


def _rows(cells: Sequence[Mapping[str, Any]], data: str) -> Iterator[str]:
    plain = {cell["seed"]: cell for cell in cells if cell["variant"] == PLAIN}
    for name, variant in VARIANTS.items():
        group = [cell for cell in cells if cell["variant"] == name]
        if not group:
            continue
        against = [
            cell["recovered"][data] - plain[cell["seed"]]["recovered"][data] for cell in group if cell["seed"] in plain
        ]
        columns = [
            variant.label,
            str(len(group)),
            _millions(cells, name),
            *(_spread([cell[key][data] for cell in group]) for key in ("before", "trained")),
            f"**{_spread([cell['recovered'][data] for cell in group])}**",
            "" if name == PLAIN else _spread(against, sign="+"),
        ]
        yield "| " + " | ".join(columns) + " |"


MARKS = {
    "before": ("o", "#9a9a9a", "release, before fine-tuning"),
    "trained": ("s", "#d98032", "release with the adapter"),
    "recovered": ("D", "#1f5fa8", "base with the recovered adapter"),
}
"""Mark, colour and name of each measured loss in the picture."""


def draw(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the losses of all variants, a row each: mean over the seeds, and the seeds themselves as small points."""
    from matplotlib.figure import Figure

    names = [name for name in VARIANTS if any(cell["variant"] == name for cell in cells)]
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    plots = figure.subplots(1, 2, sharey=True)
    for axes, (data, title) in zip(plots, (("tasks", "in domain"), ("texts", "out of domain")), strict=True):
        for row, name in enumerate(names):
            for kind, (mark, colour, label) in MARKS.items():
                losses = [cell[kind][data] for cell in cells if cell["variant"] == name]
                axes.plot(losses, [row] * len(losses), ".", color=colour, alpha=0.5, markersize=4)
                shown = label if row == 0 else "_"
                axes.plot(statistics.mean(losses), row, mark, color=colour, markersize=7, label=shown)
        axes.axvline(cells[0]["base"][data], color="#555555", linewidth=1, linestyle="--", label="base, not fine-tuned")
        axes.set(title=title, xlabel="held-out loss, nats per token", yticks=range(len(names)))
        axes.grid(axis="x", linewidth=0.4, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    plots[0].set_yticklabels([VARIANTS[name].label for name in names])
    plots[0].invert_yaxis()
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def _masked_against_plain(cells: Sequence[Mapping[str, Any]]) -> str:
    """Compare masked with plain LoRA on the same release, seed by seed; below 0 masked is better."""
    by_place = {(cell["variant"], cell["seed"]): cell for cell in cells}
    rows = []
    for name in ("semi", "unst"):
        pairs = [
            (by_place[f"{name}-masked", seed], by_place[name, seed])
            for seed in sorted({cell["seed"] for cell in cells})
            if {(name, seed), (f"{name}-masked", seed)} <= by_place.keys()
        ]
        if pairs:
            differences = {
                (key, data): [masked[key][data] - unmasked[key][data] for masked, unmasked in pairs]
                for key in ("trained", "recovered")
                for data in ("tasks", "texts")
            }
            shown = (f"{_spread(found, sign='+')}" for found in differences.values())
            rows.append(f"| {name.capitalize()} | {len(pairs)} | {' | '.join(shown)} |")
    if not rows:
        return ""
    columns = (
        "masked - plain", "seeds", "with the adapter, in domain", "out of domain", "base + recovered, in domain",
        "out of domain",
    )  # fmt: skip
    return "\n".join(["Masked against plain:", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *rows])


def _millions(cells: Sequence[Mapping[str, Any]], name: str) -> str:
    found = [cell["parameters"] for cell in cells if cell["variant"] == name]
    return f"{statistics.mean(found) / 1e6:.1f} M" if found else ""


def _spread(values: Sequence[float], *, sign: str = "") -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()
