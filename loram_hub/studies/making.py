"""The releases of a study, each made once and shared by the cells that need it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import AutoTokenizer

from loram_hub.alignment import align
from loram_hub.errors import LoramError
from loram_hub.files import dump_json, read_json, write_text
from loram_hub.pruning import prune
from loram_hub.quantization import quantize
from loram_hub.release import Release, open_release
from loram_hub.sparsification import SparsitySettings, sparsify
from loram_hub.studies.grid import Cell
from loram_hub.studies.materials import Materials
from loram_hub.texts import calibration_ids, read_texts

_DELETED = ".deleted-"
CALIBRATION_TEXTS = 10_000
"""Records that are read for calibration at most."""


def digest_of(values: Mapping[str, Any]) -> str:
    """Return the first 12 hexadecimal digits of the hash of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


class Releases:
    """Makes the releases of cells, in a folder that several processes may share.

    Args:
        materials: the study, found.
        folder: for releases, and for how long each took.
    """

    def __init__(self, materials: Materials, folder: Path) -> None:
        self._materials, self._folder, self._scoring = materials, folder, 0.0

    def stages_of(self, cell: Cell) -> list[dict[str, Any]]:
        """Return what decides over a cell's release, stage by stage; the first prunes, others may follow."""
        stages = [self._pruning_of(cell)]
        if cell.alignment_steps:
            alignment = self._materials.study.alignment
            stages.append(
                {
                    "stage": "align",
                    "settings": asdict(alignment.settings_of(cell.alignment_steps, cell.seed)),
                    "corpora": [
                        asdict(one) | {"source": self._materials.contents[one.source]} for one in alignment.corpora
                    ],
                }
            )
        if cell.quantization != "none":
            stages.append({"stage": "quantize", "type": cell.quantization})
        return stages

    def folder_of(self, stages: list[dict[str, Any]]) -> Path:
        """Return the folder of a release."""
        return self._folder / f"{stages[-1]['stage']}-{digest_of({'stages': stages})}"

    def make(self, cell: Cell) -> tuple[Release, float | None]:
        """Make a cell's release, or find it.

        Returns:
            The release, and the seconds that scoring and its stages took when they were made; None if one of them was
            cut off and went on, or was killed before the time was written down.
        """
        stages = self.stages_of(cell)
        makers: Mapping[str, Callable[[Cell, Path | None, Path], None]] = {
            "prune": self._prune, "align": self._align, "quantize": self._quantize,
        }  # fmt: skip
        seconds: list[float | None] = []
        previous = None
        for count in range(1, len(stages) + 1):
            out = self.folder_of(stages[:count])
            out.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(out.with_name(f"{out.name}.lock")):
                if not out.exists():
                    self._timed(out, lambda: makers[stages[count - 1]["stage"]](cell, previous, out))  # noqa: B023
                seconds.append(_seconds_of(out))
            previous = out
        assert previous is not None
        if cell.method is not None and not cell.method.is_sparse:
            seconds.append(_seconds_of(self._scores_of(cell)))
        known = [one for one in seconds if one is not None]
        return open_release(previous), sum(known) if len(known) == len(seconds) else None

    def remove(self, folders: Iterable[Path]) -> None:
        """Delete releases, and what their alignments left; a kill on the way leaves none that looks whole."""
        for folder in sorted(folders):
            with FileLock(folder.with_name(f"{folder.name}.lock")):
                for part in (folder, folder.with_name(f"{folder.name}-run")):
                    if part.exists():
                        part.rename(part.with_name(f"{_DELETED}{part.name}"))
        for left in self._folder.glob(f"{_DELETED}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _timed(self, out: Path, make: Callable[[], None]) -> None:
        """Make a release and note how long it took, unless it goes on with what an earlier call began."""
        note = _note_of(out)
        note.unlink(missing_ok=True)
        begun = any(out.parent.glob(f"{out.name}-run")) or any(out.parent.glob(f".{out.name}.*"))
        scored, started = self._scoring, time.perf_counter()
        make()
        if not begun:
            taken = time.perf_counter() - started - (self._scoring - scored)
            write_text(note, dump_json({"seconds": taken}))

    def _pruning_of(self, cell: Cell) -> dict[str, Any]:
        study, method = self._materials.study, cell.method
        facts: dict[str, Any] = {"stage": "prune", "base": self._materials.base_digest}
        if method is None:
            return facts | {"ratio": 0.0}
        facts |= {"method": method.method, "ratio": cell.ratio, "seed": cell.seed}
        if method.method == "semi":
            facts["pattern"] = method.pattern
        if not method.is_sparse:
            facts |= {"keep_first": study.keep_first, "keep_last": study.keep_last}
        if method.method == "stru":
            facts["importance"] = method.importance
        if method.method != "rand" and study.calibration is not None:
            facts["calibration"] = asdict(study.calibration) | {
                "source": self._materials.contents[study.calibration.source]
            }
        return facts

    def _prune(self, cell: Cell, _: Path | None, out: Path) -> None:
        study, base = self._materials.study, self._materials.source.folder
        if cell.method is None:
            prune(base, out, pruning_ratio=0.0, importance="magnitude", keep_first=0, keep_last=0)
        elif cell.method.is_sparse:
            assert study.calibration is not None
            settings = SparsitySettings(
                sparsity=cell.ratio,
                pattern=cell.method.pattern if cell.method.method == "semi" else None,
                samples=study.calibration.sparse_samples,
                tokens=study.calibration.sparse_tokens,
            )
            sparsify(
                base, out, settings=settings, calibration=study.calibration.source, seed=cell.seed,
                device=study.device, overwrite=True,
            )  # fmt: skip
        else:
            assert cell.ratio is not None
            importance = "random" if cell.method.method == "rand" else cell.method.importance
            scores = self._scores_of(cell)
            with FileLock(scores.with_suffix(".lock")):
                is_scored, started = scores.exists(), time.time()
                needs_texts = importance.startswith("taylor") and not is_scored
                prune(
                    base, out, pruning_ratio=cell.ratio, seed=cell.seed, device=study.device,
                    keep_first=study.keep_first, keep_last=study.keep_last,
                    importance=f"file:{scores}" if is_scored else importance,
                    importance_out=None if is_scored else scores,
                    calibration=self._calibration(cell.seed) if needs_texts else None,
                )  # fmt: skip
                if not is_scored:  # the file is written when scoring is done, and before the weights are
                    taken = max(0.0, scores.stat().st_mtime - started)
                    write_text(_note_of(scores), dump_json({"seconds": taken}))
                    self._scoring += taken

    def _scores_of(self, cell: Cell) -> Path:
        """Return the file of the scores that all ratios of a method and seed share; equal to scoring anew."""
        facts = {name: fact for name, fact in self._pruning_of(cell).items() if name != "ratio"}
        return self._folder / f"scores-{digest_of(facts)}.safetensors"

    def _calibration(self, seed: int) -> Any:  # noqa: ANN401 (a tensor, and torch is not imported here)
        calibration = self._materials.study.calibration
        assert calibration is not None
        return calibration_ids(
            read_texts(calibration.source, limit=CALIBRATION_TEXTS),
            AutoTokenizer.from_pretrained(self._materials.source.folder),
            samples=calibration.samples,
            tokens=calibration.tokens,
            seed=seed,
        )

    def _align(self, cell: Cell, previous: Path | None, out: Path) -> None:
        assert previous is not None
        alignment = self._materials.study.alignment
        align(
            previous, out, corpora=alignment.corpora, device=self._materials.study.device,
            settings=alignment.settings_of(cell.alignment_steps, cell.seed),
        )  # fmt: skip

    def _quantize(self, _: Cell, previous: Path | None, out: Path) -> None:
        assert previous is not None
        quantize(previous, out, device=self._materials.study.device)


def _note_of(made: Path) -> Path:
    return made.with_name(f"{made.name}.json")


def _seconds_of(made: Path) -> float | None:
    """Return how long something took to make; None if that is not known."""
    try:
        return float(read_json(_note_of(made))["seconds"])
    except (LoramError, KeyError, TypeError, ValueError):
        return None
