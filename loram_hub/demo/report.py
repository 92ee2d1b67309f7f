"""What the demo is asked for, and what it found, as JSON and as the text that `loram demo` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loram_hub.errors import InvalidRequestError
from loram_hub.evaluation import EvaluationRow, EvaluationTable


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """How much the demo does; the defaults fit five minutes on two cores with `SmolLM2-135M`."""

    pruning_ratio: float = 0.65
    """Share removed of each prunable dimension of each pruned layer, in [0, 1)."""
    calibration_samples: int = 32
    """Rows of text for Taylor importance."""
    calibration_tokens: int = 128
    """Tokens per row."""
    steps: int = 30
    """Optimizer steps."""
    batch_size: int = 16
    """Tasks per step."""
    learning_rate: float = 1e-3
    """Of AdamW, falling to zero along a cosine; LoRA has r 8 and alpha 16 on all projections."""
    held_out: int = 150
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
                "The adapter was trained on the pruned model alone; recovered, it lowers the original model's loss "
                f"from {base:.3f} to {recovered:.3f}."
            )
        return (
            f"It did not work here: the original model's loss is {base:.3f}, with the recovered adapter it is "
            f"{recovered:.3f}. Train longer, prune less, or align the pruned model before training."
        )


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
