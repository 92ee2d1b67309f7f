"""One cell of a study: what decides over it, and how its numbers come about."""

from __future__ import annotations

import math
import os
import platform
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from loram_hub.adapter import linear_modules
from loram_hub.architecture import LAYER_PREFIX
from loram_hub.errors import TrainingError
from loram_hub.evaluation import MODELS, HeldOutLoss, encode_examples
from loram_hub.files import read_json
from loram_hub.finetuning import FinetuneRecipe, FinetuneResult, finetune
from loram_hub.finetuning.recipe import CheckpointSection, DataSection, LoraSection, MemorySection
from loram_hub.finetuning.results import versions
from loram_hub.inspection import count_parameters
from loram_hub.release import Release
from loram_hub.studies.grid import Cell
from loram_hub.studies.making import Releases, digest_of
from loram_hub.studies.materials import Materials
from loram_hub.studies.measuring import PeakMemory, Sets, base_losses, pruned_losses
from loram_hub.studies.records import CELLS
from loram_hub.texts import read_examples

CELL_FORMAT = 1
BASE, PRUNED, PRUNED_ADAPTER, BASE_RECOVERED = MODELS
_LEFT_OVER = ("checkpoints", "data")
"""Parts of a fine-tuning run that nothing reads once its cell is measured."""


class NoLossError(TrainingError):
    """A cell's loss is no number; the others may well have one."""


class Cells:
    """Fills the cells of a study.

    Args:
        materials: the study, found.
        folder: the work folder.
    """

    def __init__(self, materials: Materials, folder: Path) -> None:
        self.materials, self.study, self.folder = materials, materials.study, folder
        self.releases = Releases(materials, folder / "releases")
        self._dtype: torch.dtype = getattr(torch, self.study.dtype)
        self._sets_made: Sets | None = None

    def place_of(self, cell: Cell) -> Path:
        """Return the file of a cell's record."""
        return self.folder / CELLS / f"{digest_of(self._facts(cell))}.json"

    def _facts(self, cell: Cell) -> dict[str, Any]:
        """Return all that decides over the numbers of a cell, as far as it does not depend on the machine."""
        study = self.study
        facts: dict[str, Any] = {
            "format": CELL_FORMAT,
            "kind": cell.kind,
            "base": self.materials.base_digest,
            "held_out": [self.materials.identified(one) for one in study.held_out],
            "device": study.device,
            "dtype": study.dtype,
        }
        if cell.kind == "base":
            return facts
        facts |= {
            "release": self.releases.stages_of(cell),
            "data": [
                asdict(one) | {"source": self.materials.contents[one.source]} for one in self._training_data(cell)
            ],
            "data_name": cell.data,
            "seed": cell.seed,
            "lora": asdict(study.lora),
            "training": asdict(study.training),
            "masked": cell.masked,
        }
        if cell.kind == "whole layers":
            facts |= {"keep_first": study.keep_first, "keep_last": study.keep_last}
        return facts

    def _training_data(self, cell: Cell) -> tuple[Any, ...]:
        return next(data.train for data in self.study.data if data.name == cell.data)

    def fill(self, cell: Cell) -> dict[str, Any]:
        """Run a cell: make its release, fine-tune, recover, measure.

        Returns:
            The record of the cell, as JSON values.

        Raises:
            NoLossError: a loss is no number.
            LoramError: what pruning, alignment, fine-tuning and measuring raise.
        """
        if cell.kind == "base":
            losses = {BASE: base_losses(self._base, self._sets, adapter=None, device=self._device, dtype=self._dtype)}
            return self._record(cell, losses, parameters=self._base_parameters)
        release, making_seconds = self.releases.make(cell)
        run = self.folder / "runs" / self.place_of(cell).stem
        goes_on = run.exists()  # then this process sees a part of the work alone
        memory, started = PeakMemory(self._device), time.perf_counter()
        result = finetune(self._recipe(cell, release), run)
        tuning_seconds, peak = time.perf_counter() - started, memory.nbytes
        record = self._record(
            cell,
            self._losses(cell, release, result),
            parameters=release.manifest.parameters,
            making_seconds=None if cell.kind != "loram" or making_seconds is None else round(making_seconds, 1),
            tuning_seconds=None if goes_on else round(tuning_seconds, 1),
            peak_memory_bytes=None if goes_on else peak,
        )
        for part in _LEFT_OVER:
            shutil.rmtree(run / part, ignore_errors=True)
        alignment = release.manifest.alignment
        return record | {"training": read_json(run / "finetune.json"), "alignment": alignment}

    def _losses(self, cell: Cell, release: Release, result: FinetuneResult) -> dict[str, dict[str, HeldOutLoss]]:
        placed: dict[str, Any] = {"device": self._device, "dtype": self._dtype}
        found: dict[str, dict[str, HeldOutLoss]] = {}
        if cell.kind == "loram":
            found[PRUNED], found[PRUNED_ADAPTER] = pruned_losses(
                release.folder, self._sets, adapter=result.adapter, masked=cell.masked, **placed
            )
        found[BASE_RECOVERED] = base_losses(self._base, self._sets, adapter=result.recovered, **placed)
        return found

    def _recipe(self, cell: Cell, release: Release) -> FinetuneRecipe:
        study = self.study
        lora: dict[str, Any] = asdict(study.lora)
        if cell.kind == "whole layers":
            lora["targets"] = self._whole_modules(release)
        if cell.method is not None and cell.method.is_sparse:
            lora["masked"] = cell.masked
        steps = study.training.steps
        return FinetuneRecipe(
            release=str(release.folder),
            seed=cell.seed,
            device=study.device,
            dtype=study.dtype,
            data=DataSection(train=self._training_data(cell)),
            lora=LoraSection(**lora),
            training=study.training,
            memory=MemorySection(gradient_checkpointing=False) if study.device == "cpu" else MemorySection(),
            checkpoints=CheckpointSection(every=steps, keep=1, recover=False),
        )

    def _whole_modules(self, release: Release) -> tuple[str, ...]:
        layers = release.architecture.num_hidden_layers
        whole = {*range(self.study.keep_first), *range(layers - self.study.keep_last, layers)}
        prefixes = tuple(f"{LAYER_PREFIX}.{layer}." for layer in sorted(whole))
        return tuple(module for module in linear_modules(release.architecture) if module.startswith(prefixes))

    def _record(
        self,
        cell: Cell,
        losses: dict[str, dict[str, HeldOutLoss]],
        *,
        parameters: int,
        making_seconds: float | None = None,
        tuning_seconds: float | None = None,
        peak_memory_bytes: int | None = None,
    ) -> dict[str, Any]:
        for model, by_set in losses.items():
            for name, found in by_set.items():
                if not math.isfinite(found.loss):
                    raise NoLossError(f"the loss of {model} on {name} is {found.loss}.")
        in_domain_of = {one.name: one.of for one in self.study.held_out}
        settings = self.study.alignment.settings
        row = {
            "cell": self.place_of(cell).stem,
            "kind": cell.kind,
            "method": "" if cell.method is None else cell.method.method,
            "ratio": cell.ratio,
            "importance": "" if cell.method is None else cell.method.scoring,
            "pattern": "" if cell.method is None else cell.method.kept,
            "alignment_steps": cell.alignment_steps,
            "alignment_tokens": cell.alignment_steps * settings.batch_size * settings.sequence_length,
            "quantization": "" if cell.quantization == "none" else cell.quantization,
            "masked": cell.masked,
            "data": cell.data,
            "seed": cell.seed,
            "parameters": parameters,
            "making_seconds": making_seconds,
            "tuning_seconds": tuning_seconds,
            "peak_memory_bytes": peak_memory_bytes,
            "threads": torch.get_num_threads(),
        }
        rows = [
            row
            | {"model": model, "held_out": name, "in_domain": bool(cell.data) and in_domain_of[name] == cell.data}
            | {"loss": found.loss, "tokens": found.tokens}
            for model, by_set in losses.items()
            for name, found in by_set.items()
        ]
        return {
            "format": CELL_FORMAT,
            "label": cell.label,
            "facts": self._facts(cell),
            "versions": versions(),
            "machine": _machine(),
            "rows": rows,
        }

    @property
    def _base(self) -> Path:
        return self.materials.source.folder

    @property
    def _device(self) -> str:
        return self.study.device

    @property
    def _base_parameters(self) -> int:
        return count_parameters(self._base, pruning_ratio=0.0, keep_first=0, keep_last=0).original_parameters

    @property
    def _sets(self) -> Sets:
        if self._sets_made is None:
            tokenizer = AutoTokenizer.from_pretrained(self._base)
            self._sets_made = {
                one.name: encode_examples(
                    read_examples(one.source, limit=one.limit), tokenizer, max_tokens=one.max_tokens
                )[0]
                for one in self.study.held_out
            }
        return self._sets_made


def _machine() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
