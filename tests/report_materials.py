"""What reports are made of, at sizes that take no time: a release, adapters, a run, an evaluation, a study."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from builders import half_plan, projections, random_factors, save_adapter, save_metadata_release, tiny_config

from loram_hub.architecture import Architecture, Space, architecture_of
from loram_hub.files import dump_json
from loram_hub.manifest import BaseModel, Manifest, Pruning
from loram_hub.plan import Plan, parameter_counts
from loram_hub.recovery import recover
from loram_hub.release import release_config, write_release
from loram_hub.studies.records import Row

LAYERS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Folders and files that a report takes."""

    release: Path
    trained: Path
    recovered: Path
    plain: Path
    run: Path
    evaluation: Path
    study: Path

    @property
    def all(self) -> list[Path]:
        return [self.release, self.run, self.recovered, self.evaluation, self.study]


def save_sources(folder: Path, *, base_id: str = "org/base", data: str = "texts.jsonl") -> Sources:
    """Write one of each; `base_id` and `data` stand where a stranger could write anything."""
    config = tiny_config(layers=LAYERS)
    architecture = architecture_of(config)
    plan, whole = half_plan(architecture), Plan(architecture, {})
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "finetune.json").write_text(dump_json(run_record(base_id, data)))
    (folder / "evaluation.json").write_text(dump_json(evaluation(architecture, plan)))
    return Sources(
        release=save_aligned_release(folder / "release", config, plan, base_id=base_id, data=data),
        recovered=save_recovered(folder, config, plan),
        trained=folder / "trained",
        plain=save_adapter(folder / "plain", random_factors(projections(whole), seed=7), base="org/base"),
        run=folder / "run",
        evaluation=folder / "evaluation.json",
        study=save_study(folder / "study"),
    )


def save_recovered(folder: Path, config: dict[str, Any], plan: Plan) -> Path:
    """Recover an adapter with random factors that was trained on a release of this plan."""
    release = save_metadata_release(folder / "trained-on", config, plan)
    trained = save_adapter(folder / "trained", random_factors(projections(plan), seed=1), base=release)
    recover(trained, folder / "recovered", release=release, dtype="float32")
    return folder / "recovered"


def save_aligned_release(folder: Path, config: dict[str, Any], plan: Plan, *, base_id: str, data: str) -> Path:
    """Write a release without weights whose manifest says that it was aligned."""
    counts = parameter_counts(plan.architecture, plan.layers)
    manifest = Manifest(
        base=BaseModel(id=base_id, commit=None, config_sha256="1" * 64, parameters=counts.original_parameters),
        pruning=Pruning(
            method="structured", importance="taylor:param_first", pruning_ratio=0.5, keep_first=1, keep_last=1,
            round_to=None, seed=3, calibration={"samples": 4, "tokens": 16, "sha256": "2" * 64},
            plan_sha256=plan.digest,
        ),
        parameters=counts.pruned_parameters,
        alignment={
            "steps": 40, "tokens": 640, "learning_rate": 1e-3, "corpora": [data],
            "losses": [[step, 4 - step / 40] for step in range(1, 41)],
            "held_out": [[step, {data: 4.25 - step / 50}] for step in (0, 20, 40)],
        },
        tools={"loram-hub": "0.1.0"},
    )  # fmt: skip
    with write_release(folder, manifest=manifest, plan=plan, config=release_config(config)):
        pass
    return folder


def scores_of(plan: Plan, *, seed: int = 0) -> dict[int, dict[Space, Any]]:
    """Return scores by which this plan is the one to be made: kept groups have the larger ones."""
    rng = np.random.default_rng(seed)
    whole = plan.architecture.whole_layer
    sizes: dict[Space, int] = {"kv_heads": whole.kv_heads, "channels": whole.channels}
    found: dict[int, dict[Space, Any]] = {}
    for layer, spaces in plan.kept.items():
        found[layer] = {}
        for space, size in sizes.items():
            values = rng.uniform(0.1, 1.0, size)
            values[spaces[space]] += 1
            found[layer][space] = values.astype(np.float32)
    return found


def run_record(release: str, data: str) -> dict[str, Any]:
    """Return a record as `finetune` writes it, as far as a report reads it."""
    history: list[dict[str, Any]] = [{"step": step, "loss": 3.5 - step / 100} for step in range(1, 61)]
    history += [{"step": step, "eval_others_loss": 3.25 - step / 200} for step in (20, 40, 60)]
    return {
        "format": 1,
        "release": {"id": release, "commit": None, "plan_sha256": "0" * 64},
        "recipe": {
            "release": release, "preset": "paper", "seed": 5, "lora": {"r": 4, "alpha": 8, "targets": ["all-linear"]},
            "training": {"batch_size": 8, "learning_rate": 1e-3, "max_tokens": 64, "schedule": "cosine", "steps": 60},
        },
        "data": {"records": [{"source": {"source": f"/somewhere/private/{data}"}, "rows": 48, "sha256": "3" * 64}]},
        "schedule": {"steps": 60, "micro_batch": 4},
        "masked": False,
        "history": history,
        "steps": 60,
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "peak_device_bytes": None,
    }  # fmt: skip


def evaluation(architecture: Architecture, plan: Plan) -> dict[str, Any]:
    """Return what `loram eval --json` prints for all four models."""
    counts = parameter_counts(architecture, plan.layers)
    losses = {"base": 3.0, "pruned": 3.5, "pruned + adapter": 2.875, "base + recovered adapter": 2.75}
    rows = [
        {
            "model": model,
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "parameters": (counts.original_parameters if "base" in model else counts.pruned_parameters)
            + (100 if "adapter" in model else 0),
        }
        for model, loss in losses.items()
    ]
    return {"rows": rows, "examples": 10, "tokens": 1234, "cut_examples": 0, "dataset": None}


def save_study(folder: Path) -> Path:
    """Write the rows of a study of one method, two seeds and the three controls."""
    folder.mkdir(parents=True)
    rows = [_row("base", "base", 0, 3.0)]
    for seed, change in ((0, 0.0), (1, 0.01)):
        for kind, gain in (("plain", 0.4), ("whole layers", 0.1), ("loram", 0.3)):
            rows.append(_row(kind, "base", seed, 3.0))
            rows.append(_row(kind, "base + recovered adapter", seed, 3.0 - gain + change))
        rows.append(_row("loram", "pruned", seed, 3.6))
        rows.append(_row("loram", "pruned + adapter", seed, 3.1 + change))
    (folder / "results.jsonl").write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows))
    return folder


def _row(kind: Any, model: str, seed: int, loss: float) -> Row:
    is_loram = kind == "loram"
    return Row(
        study="tiny", cell=f"{('base', 'plain', 'whole layers', 'loram').index(kind)}{seed}".rjust(12, "a"), kind=kind,
        method="stru" if is_loram else "", ratio=0.5 if is_loram else None,
        importance="taylor" if is_loram else "", pattern="", alignment_steps=0, alignment_tokens=0, quantization="",
        masked=False, data="" if kind == "base" else "tasks", seed=seed,
        parameters=60 if is_loram else 100, model=model, held_out="held-out tasks", in_domain=True, loss=loss,
        tokens=500, making_seconds=None, tuning_seconds=None if kind == "base" else 2.0,
        peak_memory_bytes=None if kind == "base" else 10**8, threads=1,
    )  # fmt: skip
