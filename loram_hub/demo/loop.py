"""The demo's loop, stage by stage; each leaves a folder that the next one reads."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer

from loram_hub.auto import supported_dtype
from loram_hub.demo.base_model import base_model
from loram_hub.demo.corpus import stdlib_examples, stdlib_texts
from loram_hub.demo.report import DemoReport, DemoSettings
from loram_hub.demo.training import LONGEST_TASK, fine_tune
from loram_hub.evaluation import EvaluationTable, evaluate
from loram_hub.files import dump_json, resource_errors
from loram_hub.hub import Source, resolve
from loram_hub.pruning import prune
from loram_hub.recovery import recover
from loram_hub.texts import Example, calibration_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loram_hub.release import Release

logger = logging.getLogger(__name__)

WORK_DIR = "loram-demo"


def run_demo(
    model: str | os.PathLike[str] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    *,
    settings: DemoSettings | None = None,
    device: str | None = None,
) -> DemoReport:
    """Prune, quantize, train, recover and evaluate a model; everything that is made stays in one folder.

    Args:
        model: base model, a folder or Hub id; None for SmolLM2-135M-Instruct from its wheel.
        work_dir: folder for what is made, results of an earlier demo are replaced; None for `loram-demo` in the
            current folder.
        settings: how much to do; None for the defaults.
        device: where models run; None for the CPU.

    Returns:
        The report, also written to `report.json`.

    Raises:
        MissingDependencyError: peft, trl, datasets, or the demo's model are not installed.
        InvalidRequestError: a setting is out of range.
        UnsupportedModelError: the model is of a family that cannot be pruned.

    Example:
        >>> from loram_hub.demo import run_demo  # doctest: +SKIP
        >>> print(run_demo())  # doctest: +SKIP
    """
    chosen, folder, where = settings or DemoSettings(), Path(work_dir or WORK_DIR), device or "cpu"
    # Not bf16 on a CPU, even where it is fast: the figures should not depend on the machine.
    dtype = torch.float32 if where == "cpu" else supported_dtype(where.partition(":")[0])
    clock = _Clock()
    with resource_errors(f"Writing {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with clock.stage("load"):
            source = resolve(base_model() if model is None else model)
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.folder)
            train, held_out = _tasks(chosen)
            _write_tasks(folder / "train.jsonl", train)
            _write_tasks(folder / "held_out.jsonl", held_out)
        with clock.stage("prune"):
            release = _prune(source, folder / "release", tokenizer, settings=chosen, device=device)
        with clock.stage("fine-tune"):
            fine_tune(release, folder / "adapter", train, tokenizer, settings=chosen, device=where, dtype=dtype)
        with clock.stage("recover"):
            recover(folder / "adapter", folder / "recovered", release=release.folder, overwrite=True)
        with clock.stage("evaluate"):
            evaluation = _evaluate(source, folder, held_out, settings=chosen, device=where, dtype=dtype)
        report = DemoReport(
            base=source.id,
            base_path=str(source.folder if source.commit is None else model),
            work_dir=folder,
            settings=chosen,
            evaluation=evaluation,
            disk_bytes=_disk_bytes(source.folder, folder),
            seconds=clock.seconds,
            peak_memory_bytes=_peak_memory_bytes(),
        )
        (folder / "report.json").write_text(dump_json(report.to_dict()), encoding="utf-8")
    return report


def _tasks(settings: DemoSettings) -> tuple[list[Example], list[Example]]:
    """Choose the tasks to train on, in order, and the held-out ones to score."""
    train, held_out = stdlib_examples()
    generator = random.Random(settings.seed)
    generator.shuffle(train)
    generator.shuffle(held_out)
    return train[: settings.steps * settings.batch_size], held_out[: settings.held_out]


def _write_tasks(path: Path, tasks: Sequence[Example]) -> None:
    path.write_text("".join(json.dumps(asdict(task)) + "\n" for task in tasks), encoding="utf-8")


def _prune(
    source: Source, out_dir: Path, tokenizer: PreTrainedTokenizerBase, *, settings: DemoSettings, device: str | None
) -> Release:
    calibration = calibration_ids(
        stdlib_texts(),
        tokenizer,
        samples=settings.calibration_samples,
        tokens=settings.calibration_tokens,
        seed=settings.seed,
    )
    return prune(
        source.folder,
        out_dir,
        pruning_ratio=settings.pruning_ratio,
        calibration=calibration,
        seed=settings.seed,
        quantize=True,
        device=device,
        overwrite=True,
    )


def _evaluate(
    source: Source, folder: Path, tasks: Sequence[Example], *, settings: DemoSettings, device: str, dtype: torch.dtype
) -> EvaluationTable:
    return evaluate(
        tasks,
        base=source.folder,
        release=folder / "release",
        adapter=folder / "adapter",
        recovered=folder / "recovered",
        max_tokens=LONGEST_TASK,
        batch_size=settings.batch_size,
        device=device,
        dtype=dtype,
    )


def _disk_bytes(base: Path, work_dir: Path) -> dict[str, int]:
    whole, pruned = _weight_bytes(base), _weight_bytes(work_dir / "release")
    return {
        "base": whole,
        "pruned": pruned,
        "pruned + adapter": pruned + _weight_bytes(work_dir / "adapter"),
        "base + recovered adapter": whole + _weight_bytes(work_dir / "recovered"),
    }


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _peak_memory_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Clock:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        logger.info("%s ...", name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        logger.info("%s: %.1f s", name, self.seconds[name])
