"""`run_study`: cell by cell; run again, finished cells are skipped."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from loram_hub.errors import InvalidRequestError, TrainingError
from loram_hub.files import dump_json, read_json, write_text
from loram_hub.studies.filling import Cells, NoLossError
from loram_hub.studies.grid import Cell, cells_of
from loram_hub.studies.materials import Materials, find_materials
from loram_hub.studies.records import RESULTS, Row, rows_of, write_rows
from loram_hub.studies.specification import Study, read_study
from loram_hub.studies.workers import Workers

logger = logging.getLogger(__name__)


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
    decides over it, so none is run twice, and each process takes those that no other one is at. A cell that was cut off
    goes on from the last stage or checkpoint that is whole; what its fine-tuning took is then not known.

    Args:
        study: the study, its file, or the name of a ready-made one.
        work_dir: folder for results and all that is made on the way.
        profile: name of a profile of the file.
        seeds: those to run; None for all of the study.
        only: run the cells whose label contains this text; None for all. `check_study` returns the labels.
        keep_releases: keep releases that no unfinished cell of the study needs. They are large, and are deleted by the
            last process that is at work in the folder.
        token: of the Hub.

    Returns:
        The rows of all finished cells, which `results.jsonl` has as well.

    Raises:
        InvalidRequestError: the study cannot be, or has no such seed or cell.
        TrainingError: cells gave no finite loss; the others were run.
        VerificationError: data were changed while the study was running.
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
    finished = {cell for cell in run.cells if run.is_finished(cell)}
    return StudyPreview(
        study=run.materials.asked,
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
        self._cells = Cells(materials, folder)
        self._workers = Workers(folder)
        self._took: list[float] = []
        self._without_loss: list[str] = []

    def do(self, keep_releases: bool) -> StudyResult:
        """Run the cells: first those that no other process is at, then, as they become free, the others."""
        with self._workers.registered():
            held = self._run(self.cells, keep_releases, wait=False)
            self._run(held, keep_releases, wait=True)
        if self._without_loss:
            raise TrainingError(
                f"{len(self._without_loss)} of {len(self.cells)} cells gave no finite loss and are missing: "
                f"{'; '.join(self._without_loss)}. Lower the learning rate."
            )
        return self._result(len(self._took))

    def _run(self, cells: Sequence[Cell], keep_releases: bool, *, wait: bool) -> list[Cell]:
        """Run cells; returns those that other processes are at, if they are not waited for."""
        held = []
        for cell in cells:
            place = self._cells.place_of(cell)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(place.with_suffix(".lock"), blocking=wait):
                    if place.exists():
                        continue
                    self._run_one(cell, place)
            except Timeout:
                held.append(cell)
                continue
            self.collect()
            if not keep_releases:
                self._remove_unneeded()
        return held

    def _run_one(self, cell: Cell, place: Path) -> None:
        self._announce(cell)
        started = time.perf_counter()
        try:
            record = self._cells.fill(cell)
        except NoLossError as err:
            logger.error("%s: %s", cell.label, err)
            self._without_loss.append(cell.label)
            return
        self._took.append(time.perf_counter() - started)
        self.materials.check_unchanged()
        write_text(place, dump_json(record | {"seconds": round(self._took[-1], 1)}))

    def _announce(self, cell: Cell) -> None:
        """Say which cell is next and, once one was run, how long the rest will take at that pace."""
        number, took = self.cells.index(cell), self._took
        rest = [one for one in self.cells[number:] if not self.is_finished(one)]
        pace = f", about {sum(took) / len(took) * len(rest) / 60:.0f} min left" if took else ""
        logger.info("cell %d of %d: %s%s", number + 1, len(self.cells), cell.label, pace)

    def is_finished(self, cell: Cell) -> bool:
        """Whether the record of a cell is there."""
        return self._cells.place_of(cell).exists()

    def collect(self) -> list[Row]:
        """Write the rows of all finished cells of the study, in the order of its cells."""
        rows: list[Row] = []
        for cell in cells_of(self.study):
            place = self._cells.place_of(cell)
            if place.exists():
                rows += rows_of(read_json(place), study=self.study.name)
        (self.folder / self.study.name).mkdir(exist_ok=True)
        with FileLock(self.folder / self.study.name / ".lock"):
            write_rows(self.folder / self.study.name / RESULTS, rows)
        return rows

    def _result(self, made: int) -> StudyResult:
        everything = cells_of(self.study)
        return StudyResult(
            study=self.materials.asked,
            folder=self.folder,
            rows=tuple(self.collect()),
            cells=len(everything),
            missing=sum(not self.is_finished(cell) for cell in everything),
            made=made,
        )

    def _remove_unneeded(self) -> None:
        """Delete releases that no unfinished cell of the study needs, unless another process may be using them."""
        needed = {folder for cell in cells_of(self.study) if not self.is_finished(cell) for folder in self._of(cell)}
        mine = {folder for cell in self.cells if cell.kind == "loram" for folder in self._of(cell)}
        with self._workers.alone() as alone:
            if alone:
                self._cells.releases.remove(mine - needed)

    def _of(self, cell: Cell) -> list[Path]:
        """Return the folders of the releases that a cell needs, stage by stage."""
        if cell.kind == "base":
            return []
        stages = self._cells.releases.stages_of(cell)
        return [self._cells.releases.folder_of(stages[:count]) for count in range(1, len(stages) + 1)]
