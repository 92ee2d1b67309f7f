"""`loram demo`: the whole LoRAM loop on a small real model, on this machine, in a few minutes.

    base -> prune (Taylor, NF4) -> open with AutoLoramModel -> LoRA with PEFT and TRL -> recover -> evaluate on the base

The task is made from Python itself (`loram_hub.stdlib_corpus`): say what a function of the standard library does, given
its signature. The question is whether the adapter that was trained on the pruned model makes the *original* model better
on modules that training never saw; the report says so either way.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

from loram_hub.auto import AutoLoramModel, supported_dtype
from loram_hub.demo_model import demo_model
from loram_hub.errors import InvalidRequestError, MissingDependencyError
from loram_hub.evaluation import EvaluationRow, EvaluationTable, evaluate
from loram_hub.files import atomic_folder, dump_json, resource_errors
from loram_hub.hub import resolve
from loram_hub.pruning import prune
from loram_hub.recovery import recover
from loram_hub.stdlib_corpus import stdlib_examples, stdlib_texts
from loram_hub.texts import Example, calibration_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

    from loram_hub.release import Release

logger = logging.getLogger(__name__)

WORK_DIR = "loram-demo"
_LONGEST_TASK = 256
"""Tokens; the longest signature with its summary has about 120."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """How much the demo does; the defaults fit five minutes on two cores with `SmolLM2-135M`."""

    pruning_ratio: float = 0.65
    """Share removed of each prunable dimension of each pruned layer, in [0, 1)."""
    calibration_samples: int = 32
    """Rows of text for Taylor importance."""
    calibration_tokens: int = 128
    """Tokens per row."""
    steps: int = 60
    """Optimizer steps."""
    batch_size: int = 16
    """Tasks per step."""
    learning_rate: float = 1e-3
    """Of AdamW, falling to zero along a cosine; LoRA has r 8, alpha 16, dropout 0.05 on all seven projections."""
    held_out: int = 200
    """Held-out tasks that are scored."""
    seed: int = 0
    """Of calibration, order of tasks and LoRA's initial factors."""

    def __post_init__(self) -> None:
        """Check the counts; raises `InvalidRequestError`."""
        for name in ("steps", "batch_size", "held_out"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; the demo needs at least 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """What the demo found; `str(report)` is the text that `loram demo` prints."""

    base: str
    """Hub id or name of the original model."""
    base_path: str
    """Hub id or folder, as later commands take it."""
    work_dir: Path
    """Where `release`, `adapter`, `recovered`, `held_out.jsonl` and `report.json` are."""
    settings: DemoSettings
    evaluation: EvaluationTable
    """Held-out losses of the four models."""
    disk_bytes: Mapping[str, int]
    """Bytes of weights on disk by name of the model, adapters included."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time by stage, in order."""
    peak_memory_bytes: int | None = None
    """Largest resident memory of this process so far; None where the system does not tell."""

    @property
    def recovered_beats_base(self) -> bool:
        """Whether the original model got better by the recovered adapter."""
        return self._loss("base + recovered adapter") < self._loss("base")

    def _loss(self, model: str) -> float:
        return next(row.loss for row in self.evaluation.rows if row.model == model)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "base": self.base,
            "work_dir": str(self.work_dir),
            "settings": asdict(self.settings),
            "evaluation": self.evaluation.to_dict(),
            "disk_bytes": dict(self.disk_bytes),
            "seconds": dict(self.seconds),
            "peak_memory_bytes": self.peak_memory_bytes,
            "recovered_beats_base": self.recovered_beats_base,
            "next_steps": list(self.next_steps),
        }

    @property
    def next_steps(self) -> tuple[str, ...]:
        """Commands that go on from here."""
        folder = self.work_dir
        return (
            f"loram info {folder / 'release'}",
            f"loram eval {folder / 'held_out.jsonl'} --base {self.base_path} --recovered {folder / 'recovered'}",
            f"loram merge {self.base_path} {folder / 'recovered'} {folder / 'merged'}",
        )

    def __str__(self) -> str:
        lines = [f"{'model':<26}{'parameters':>14}{'on disk':>10}{'in memory':>11}{'held-out loss':>15}"]
        lines += [self._line(row) for row in self.evaluation.rows]
        times = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in self.seconds.items())
        memory = "" if self.peak_memory_bytes is None else f"; peak memory {_megabytes(self.peak_memory_bytes)}"
        steps = "\n".join(f"  {step}" for step in self.next_steps)
        return "\n".join(
            [
                *lines,
                f"Loss: nats per token over {self.evaluation.tokens:,} tokens from modules that training never saw.",
                f"Seconds: {times}; together {sum(self.seconds.values()):.0f}{memory}.",
                "",
                self._verdict(),
                f"Next:\n{steps}",
            ]
        )

    def _line(self, row: EvaluationRow) -> str:
        disk, memory = _megabytes(self.disk_bytes[row.model]), _megabytes(row.memory_bytes)
        return f"{row.model:<26}{row.parameters:>14,}{disk:>10}{memory:>11}{row.loss:>15.3f}"

    def _verdict(self) -> str:
        base, recovered = self._loss("base"), self._loss("base + recovered adapter")
        if self.recovered_beats_base:
            return (
                f"The adapter was trained on the pruned model alone. Recovered, it lowers the loss of the original model "
                f"from {base:.3f} to {recovered:.3f}."
            )
        return (
            f"It did not work here: with the recovered adapter the original model's loss is {recovered:.3f}, without it "
            f"{base:.3f}. Train longer, prune less, or align the pruned model before training."
        )


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
    chosen = settings or DemoSettings()
    folder = Path(work_dir or WORK_DIR)
    where = device or "cpu"
    # Not bf16 on a CPU, even where it is fast: the figures should be the same on every machine.
    dtype = torch.float32 if where == "cpu" else supported_dtype(where.partition(":")[0])
    _check_packages()
    clock = _Clock()
    with clock.stage("load"), resource_errors(f"Writing {folder}"):
        source = resolve(demo_model() if model is None else model)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.folder)
        train, held_out = _tasks(chosen)
        _write_tasks(folder / "held_out.jsonl", held_out)
        calibration = calibration_ids(
            stdlib_texts(),
            tokenizer,
            samples=chosen.calibration_samples,
            tokens=chosen.calibration_tokens,
            seed=chosen.seed,
        )
    with clock.stage("prune"):
        release = prune(
            source.folder,
            folder / "release",
            pruning_ratio=chosen.pruning_ratio,
            calibration=calibration,
            seed=chosen.seed,
            quantize=True,
            device=device,
            overwrite=True,
        )
    with clock.stage("fine-tune"):
        _fine_tune(release, folder / "adapter", train, tokenizer, settings=chosen, device=where, dtype=dtype)
    with clock.stage("recover"):
        recover(folder / "adapter", folder / "recovered", release=release.folder, overwrite=True)
    with clock.stage("evaluate"):
        evaluation = evaluate(
            held_out,
            base=source.folder,
            release=release.folder,
            adapter=folder / "adapter",
            recovered=folder / "recovered",
            max_tokens=_LONGEST_TASK,
            batch_size=chosen.batch_size,
            device=where,
            dtype=dtype,
        )
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
    return train, held_out[: settings.held_out]


def _write_tasks(path: Path, tasks: Sequence[Example]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(task)) + "\n" for task in tasks), encoding="utf-8")


def _fine_tune(
    release: Release,
    out_dir: Path,
    tasks: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: DemoSettings,
    device: str,
    dtype: torch.dtype,
) -> None:
    """Train LoRA on the release as anyone would: PEFT and TRL as they are."""
    from datasets import Dataset, disable_progress_bars, enable_progress_bars
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    model = AutoLoramModel.from_pretrained(release.folder, device_map={"": device}, dtype=dtype)
    targets = sorted({weight.module.rpartition(".")[2] for weight in release.architecture.projections})
    set_seed(settings.seed)
    adapted = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")
    )
    disable_progress_bars()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        # transformers 5.23 renames gradient_checkpointing, and TRL itself still sets the old name.
        warnings.simplefilter("ignore", FutureWarning)
        trainer = SFTTrainer(
            model=adapted,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, settings.steps // 20),
                max_length=_LONGEST_TASK,
                gradient_checkpointing=False,
                use_cpu=device == "cpu",
                bf16=dtype == torch.bfloat16,
                fp16=dtype == torch.float16,
                dataloader_pin_memory=device != "cpu",
                seed=settings.seed,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([asdict(task) for task in tasks]),
            processing_class=tokenizer,
            callbacks=[_loss_logger()],
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, where the report goes
        trainer.train()
    enable_progress_bars()
    with atomic_folder(out_dir, overwrite=True) as folder:
        adapted.save_pretrained(str(folder))
    del trainer, adapted, model
    gc.collect()  # a trainer and its model refer to each other; evaluation loads models of its own


def _loss_logger() -> TrainerCallback:
    from transformers import TrainerCallback

    class LossLogger(TrainerCallback):
        def on_log(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:  # noqa: ANN401
            if "loss" in (logs := kwargs.get("logs") or {}):
                logger.info(
                    "step %d of %d: training loss %.3f", state.global_step, state.max_steps, float(logs["loss"])
                )

    return LossLogger()


def _check_packages() -> None:
    """Fail before minutes of pruning, not after."""
    missing = [name for name in ("bitsandbytes", "datasets", "peft", "trl") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"The demo needs {', '.join(missing)}: pip install 'loram-hub[demo]'")


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


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


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
