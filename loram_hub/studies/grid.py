"""The cells of a study, in the order in which they run: seed by seed, controls first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from loram_hub.studies.records import Kind
from loram_hub.studies.specification import Method, Quantization, Study


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run: a model, trained on once, measured."""

    kind: Kind
    method: Method | None = None
    """None for controls."""
    ratio: float | None = None
    alignment_steps: int = 0
    quantization: Quantization = "none"
    masked: bool = False
    data: str = ""
    seed: int = 0

    @property
    def label(self) -> str:
        """What it is, for progress and messages."""
        if self.kind == "base":
            return "base untouched"
        name = {"plain": "plain LoRA", "whole layers": "LoRA on the whole layers"}.get(self.kind, "")
        if self.method is not None:
            name = self.method.method.capitalize()
            name += f" ({self.method.scoring})" if self.method.scoring not in ("", "random", "taylor") else ""
            name += f" {self.method.pattern}" if self.method.method == "semi" else f" {self.ratio:g}"
        aligned = f", {self.alignment_steps} alignment steps" if self.alignment_steps else ""
        masked = ", masked" if self.masked else ""
        quantized = "" if self.quantization == "none" else f", {self.quantization}"
        return f"{name}{aligned}{quantized}{masked}, {self.data}, seed {self.seed}"


def cells_of(study: Study, seeds: Sequence[int] | None = None) -> list[Cell]:
    """Return the cells of a study, with all seeds or those that are named."""
    return [Cell(kind="base"), *(cell for seed in seeds or study.seeds for cell in _cells(study, seed))]


def _cells(study: Study, seed: int) -> Iterator[Cell]:
    for kind, quantization, data in product(("plain", "whole layers"), study.quantization, study.data):
        yield Cell(kind=kind, quantization=quantization, data=data.name, seed=seed)  # type: ignore[arg-type]
    for method in study.methods:
        axes = (
            method.ratios or (None,), study.alignment.steps, study.quantization, method.masked, study.data,
        )  # fmt: skip
        for ratio, steps, quantization, masked, data in product(*axes):
            yield Cell(
                kind="loram", method=method, ratio=ratio, alignment_steps=steps, quantization=quantization,
                masked=masked, data=data.name, seed=seed,
            )  # fmt: skip
