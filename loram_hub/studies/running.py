"""`run_study`: cell by cell; run again, finished cells are skipped."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoTokenizer

from loram_hub.adapter import linear_modules
from loram_hub.architecture import LAYER_PREFIX
from loram_hub.errors import InvalidRequestError
from loram_hub.evaluation import MODELS, HeldOutLoss, encode_examples
from loram_hub.files import dump_json, read_json
from loram_hub.finetuning import FinetuneRecipe, FinetuneResult, finetune
from loram_hub.finetuning.recipe import CheckpointSection, DataSection, LoraSection, MemorySection
from loram_hub.finetuning.results import versions
from loram_hub.release import Release
from loram_hub.studies.grid import Cell, cells_of
from loram_hub.studies.making import Releases, digest_of
from loram_hub.studies.materials import Materials, content_of, find_materials
from loram_hub.studies.measuring import PeakMemory, Sets, base_losses, pruned_losses
from loram_hub.studies.records import CELLS, RESULTS, Row, rows_of, write_rows
from loram_hub.studies.specification import Study, read_study
from loram_hub.texts import read_examples

logger = logging.getLogger(__name__)

CELL_FORMAT = 1
BASE, PRUNED, PRUNED_ADAPTER, BASE_RECOVERED = MODELS
_LEFT_OVER = ("checkpoints", "data")
"""Parts of a fine-tuning run that nothing reads once its cell is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """What `run_study` did."""

    study: Study
    folder: Path
    """The work folder: results.jsonl, cells, releases, runs."""
    rows: tuple[Row, ...]
    """Of all finished cells of the study, whichever seeds were asked for."""
    cells: int
    """Cells of the study."""
    missing: int
    """Of these, cells that are not finished."""
    made: int
    """Cells that this call ran."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyPreview:
    """What `run_study` would do."""

    study: Study
    folder: Path
    finished: tuple[str, ...]
    """Labels of cells that are there."""
    missing: tuple[str, ...]
    """Labels of those that would be run."""


def run_study(
    study: Study | str | os.PathLike[str],
    work_dir: str | os.PathLike[str],
    *,
    profile: str | None = None,
    seeds: Sequence[int] | None = None,
    only: str | None = None,
    keep_releases: bool = False,
    token: str | bool | None = None,
) -> StudyResult:
    """Run the cells of a study that are not finished; each is pruned, aligned, fine-tuned, recovered and measured.

    Several processes may run the same study in one folder, and several studies may share it: a cell is known by what
    decides over it, so none is run twice. A cell that was cut off goes on from the last stage or checkpoint that is
    whole.

    Args:
        study: the study, its file, or the name of a ready-made one.
        work_dir: folder for results and all that is made on the way.
        profile: name of a profile of the file.
        seeds: those to run; None for all of the study.
        only: run the cells whose label contains this text; None for all. `check_study` returns the labels.
        keep_releases: keep releases that no unfinished cell of the study needs; they are large.
        token: of the Hub.

    Returns:
        The rows of all finished cells, which `results.jsonl` has as well.

    Raises:
        InvalidRequestError: the study cannot be, or has no such seed or cell.
        LoramError: what pruning, alignment, fine-tuning and the Hub raise.
    """
    return _Run(*_opened(study, work_dir, profile, token), seeds, only).do(keep_releases)


def check_study(
    study: Study | str | os.PathLike[str],
    work_dir: str | os.PathLike[str],
    *,
    profile: str | None = None,
    seeds: Sequence[int] | None = None,
    only: str | None = None,
    token: str | bool | None = None,
) -> StudyPreview:
    """Say which cells `run_study` would run; data that the study asks to be made are written, nothing else.

    Arguments and errors are those of `run_study`.
    """
    run = _Run(*_opened(study, work_dir, profile, token), seeds, only)
    finished = {cell for cell in run.cells if run.place_of(cell).exists()}
    return StudyPreview(
        study=run.study,
        folder=run.folder,
        finished=tuple(cell.label for cell in run.cells if cell in finished),
        missing=tuple(cell.label for cell in run.cells if cell not in finished),
    )


def _opened(
    study: Study | str | os.PathLike[str],
    work_dir: str | os.PathLike[str],
    profile: str | None,
    token: str | bool | None,
) -> tuple[Materials, Path]:
    chosen = study if isinstance(study, Study) else read_study(study, profile=profile)
    folder = Path(work_dir).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return find_materials(chosen, folder / "data", token=token), folder


def _chosen_cells(study: Study, seeds: Sequence[int] | None, only: str | None) -> list[Cell]:
    unknown = set(seeds or ()) - set(study.seeds)
    if unknown:
        raise InvalidRequestError(f"The study has seeds {list(study.seeds)}; {sorted(unknown)} are none of them.")
    cells = cells_of(study, seeds)
    chosen = [cell for cell in cells if only is None or only.lower() in cell.label.lower()]
    if not chosen:
        raise InvalidRequestError(f"No cell has {only!r:.80} in its label, as {cells[-1].label!r} has. See --dry-run.")
    return chosen


class _Run:
    """One call of `run_study`."""

    def __init__(self, materials: Materials, folder: Path, seeds: Sequence[int] | None, only: str | None) -> None:
        self.materials, self.study, self.folder = materials, materials.study, folder
        self.cells = _chosen_cells(self.study, seeds, only)
        self._releases = Releases(materials, folder / "releases")
        self._dtype: torch.dtype = getattr(torch, self.study.dtype)
        self._sets_made: Sets | None = None

    def do(self, keep_releases: bool) -> StudyResult:
        took: list[float] = []
        for number, cell in enumerate(self.cells, start=1):
            place = self.place_of(cell)
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(place.with_suffix(".lock")):
                if place.exists():
                    continue
                self._announce(number, took)
                started = time.perf_counter()
                record = self._fill(cell)
                took.append(time.perf_counter() - started)
                _save(place, record | {"seconds": round(took[-1], 1)})
            self.collect()
            if not keep_releases:
                self._remove_unneeded()
        return self._result(len(took))

    def _announce(self, number: int, took: Sequence[float]) -> None:
        """Say which cell is next and, once one was run, how long the rest will take at that pace."""
        rest = [cell for cell in self.cells[number - 1 :] if not self.place_of(cell).exists()]
        pace = f", about {sum(took) / len(took) * len(rest) / 60:.0f} min left" if took else ""
        logger.info("cell %d of %d: %s%s", number, len(self.cells), self.cells[number - 1].label, pace)

    def place_of(self, cell: Cell) -> Path:
        """Return the file of a cell's record."""
        return self.folder / CELLS / f"{digest_of(self._facts(cell))}.json"

    def collect(self) -> list[Row]:
        """Write the rows of all finished cells of the study, in the order of its cells."""
        rows: list[Row] = []
        for cell in cells_of(self.study):
            place = self.place_of(cell)
            if place.exists():
                rows += rows_of(read_json(place), study=self.study.name)
        (self.folder / self.study.name).mkdir(exist_ok=True)
        with FileLock(self.folder / self.study.name / ".lock"):
            write_rows(self.folder / self.study.name / RESULTS, rows)
        return rows

    def _result(self, made: int) -> StudyResult:
        everything = cells_of(self.study)
        return StudyResult(
            study=self.study,
            folder=self.folder,
            rows=tuple(self.collect()),
            cells=len(everything),
            missing=sum(not self.place_of(cell).exists() for cell in everything),
            made=made,
        )

    def _facts(self, cell: Cell) -> dict[str, Any]:
        """Return all that decides over the numbers of a cell, as far as it does not depend on the machine."""
        study = self.study
        facts: dict[str, Any] = {
            "format": CELL_FORMAT,
            "kind": cell.kind,
            "base": self.materials.base_digest,
            "held_out": [asdict(one) | {"source": content_of(one.source)} for one in study.held_out],
            "device": study.device,
            "dtype": study.dtype,
        }
        if cell.kind == "base":
            return facts
        facts |= {
            "release": self._releases.stages_of(cell),
            "data": [asdict(one) | {"source": content_of(one.source)} for one in self._training_data(cell)],
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

    def _fill(self, cell: Cell) -> dict[str, Any]:
        """Run a cell: make its release, fine-tune, recover, measure."""
        if cell.kind == "base":
            losses = {BASE: base_losses(self._base, self._sets, adapter=None, device=self._device, dtype=self._dtype)}
            return self._record(cell, losses, parameters=self._base_parameters)
        release, making_seconds = self._releases.make(cell)
        memory, started = PeakMemory(self._device), time.perf_counter()
        run = self.folder / "runs" / self.place_of(cell).stem
        result = finetune(self._recipe(cell, release), run)
        tuning_seconds, peak = time.perf_counter() - started, memory.nbytes
        record = self._record(
            cell,
            self._losses(cell, release, result),
            parameters=release.manifest.parameters,
            making_seconds=None if cell.kind != "loram" else round(making_seconds, 1),
            tuning_seconds=round(tuning_seconds, 1),
            peak_memory_bytes=peak,
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
        in_domain_of = {one.name: one.of for one in self.study.held_out}
        settings = self.study.alignment.settings
        row = {
            "cell": self.place_of(cell).stem,
            "kind": cell.kind,
            "method": "" if cell.method is None else cell.method.method,
            "ratio": cell.ratio,
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

    def _remove_unneeded(self) -> None:
        """Delete releases and merge nothing: those that an unfinished cell of the study will need stay."""
        needed: set[Path] = set()
        for cell in cells_of(self.study):
            if cell.kind != "base" and not self.place_of(cell).exists():
                stages = self._releases.stages_of(cell)
                needed |= {self._releases.folder_of(stages[:count]) for count in range(1, len(stages) + 1)}
        mine = {
            self._releases.folder_of(self._releases.stages_of(cell)[:count])
            for cell in self.cells
            if cell.kind == "loram"
            for count in range(1, len(self._releases.stages_of(cell)) + 1)
        }
        for folder in sorted(mine - needed):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(folder.with_name(f"{folder.name}-run"), ignore_errors=True)

    @property
    def _base(self) -> Path:
        return self.materials.source.folder

    @property
    def _device(self) -> str:
        return self.study.device

    @property
    def _base_parameters(self) -> int:
        from loram_hub.inspection import count_parameters

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


def _save(place: Path, record: dict[str, Any]) -> None:
    partial = place.with_suffix(".partial")
    partial.write_text(dump_json(record), encoding="utf-8")
    partial.replace(place)
