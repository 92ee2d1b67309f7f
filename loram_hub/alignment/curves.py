"""The log of a run, one JSON object a line, and what is made of it: a picture, and losses for the manifest.

A record holds what one step brought: `step`, `loss` (nats per token), `losses` by corpus, `learning_rate`,
`gradient_norm`, `tokens` so far, `tokens_per_second`, `memory_bytes`, and `held_out` losses by corpus where they were
measured. Any may be missing. Numbers that are not finite are kept as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loram_hub.cards.pictures import Curve, draw_losses, draw_rates, figure, png
from loram_hub.errors import VerificationError
from loram_hub.files import fsync_file, fsync_folder, resource_errors

Record = Mapping[str, Any]


class RunLog:
    """The JSON-lines log of a run.

    A kill while a line is written leaves a part of it at the end; it is dropped by whatever opens the log next.

    Args:
        path: of the file; created by the first record.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._is_whole = False

    def append(self, record: Record) -> None:
        """Add a record; when this returns, it is on disk.

        Raises:
            ResourceError: the disk is full or cannot be written to.
        """
        line = json.dumps(_finite(record), sort_keys=True, allow_nan=False) + "\n"
        with resource_errors(f"Writing {self._path}"):
            if not self._is_whole:
                self._drop_torn_line()
            self._is_whole = False  # until the line is: a disk that is full takes a part of it
            with self._path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())  # so that no checkpoint is ahead of the log
            self._is_whole = True

    def cut_back(self, step: int) -> None:
        """Drop records of steps after this one, as a run does that goes on from its checkpoint. Safe to kill.

        Raises:
            VerificationError: a line of the log is no record.
            ResourceError: the disk is full or cannot be written to.
        """
        records = self.read()
        kept = [record for record in records if record["step"] <= step]
        if len(kept) == len(records):
            return
        aside = self._path.with_name(f".{self._path.name}.partial")
        with resource_errors(f"Writing {self._path}"):
            lines = [json.dumps(record, sort_keys=True, allow_nan=False) + "\n" for record in kept]
            aside.write_text("".join(lines), encoding="utf-8")
            fsync_file(aside)
            os.replace(aside, self._path)
            fsync_folder(self._path.parent)
        self._is_whole = True

    def read(self) -> list[dict[str, Any]]:
        """Return all records, in order; none if there is no log yet.

        Raises:
            VerificationError: a line of the log is no record.
            ResourceError: it cannot be read.
        """
        with resource_errors(f"Reading {self._path}"):
            content = self._path.read_bytes() if self._path.exists() else b""
        lines = content.split(b"\n")[:-1]  # what follows the last line end is nothing, or torn
        return [_record(line, f"line {number} of {self._path}") for number, line in enumerate(lines, start=1)]

    def _drop_torn_line(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self._path, whole)


def losses_for_manifest(records: Sequence[Record], *, most: int = 2000) -> list[list[int | float]]:
    """Return the training loss as [step, loss] pairs, evenly thinned to at most so many, the first and the last kept.

    Args:
        records: of a `RunLog`.
        most: pairs to return, at least 2.
    """
    points = [[record["step"], record["loss"]] for record in records if record.get("loss") is not None]
    return _thinned(points, most)


def held_out_for_manifest(records: Sequence[Record], *, most: int = 200) -> list[list[Any]]:
    """Return the held-out losses as [step, {corpus: loss}] pairs, thinned as `losses_for_manifest` does."""
    return _thinned([[record["step"], dict(record["held_out"])] for record in records if record.get("held_out")], most)


def held_out_summary(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Return, by corpus, the held-out loss `before` alignment and `after` it: the first and the last one measured."""
    summary: dict[str, dict[str, float]] = {}
    for record in records:
        for corpus, loss in (record.get("held_out") or {}).items():
            if loss is not None:
                summary.setdefault(corpus, {"before": loss})["after"] = loss
    return dict(sorted(summary.items()))


def draw_curves(records: Sequence[Record]) -> bytes:
    """Draw the curves of a run: losses in training and on held-out texts, and the learning rate below.

    Args:
        records: of a `RunLog`; they may be those of a run that is still going on.

    Returns:
        A PNG file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    held_out: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for corpus, loss in (record.get("held_out") or {}).items():
            if loss is not None:
                held_out.setdefault(corpus, []).append((record["step"], loss))
    with figure(7.0, 4.4) as picture:
        losses, rates = picture.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        draw_losses(losses, _curve(records, "loss"), {name: tuple(held_out[name]) for name in sorted(held_out)})
        draw_rates(rates, _curve(records, "learning_rate"))
        rates.set_xlabel("step")
        return png(picture)


def _curve(records: Sequence[Record], key: str) -> Curve:
    return tuple((float(record["step"]), float(record[key])) for record in records if record.get(key) is not None)


def _thinned(points: list[Any], most: int) -> list[Any]:
    if len(points) <= most:
        return points
    last = len(points) - 1
    return [points[index * last // (most - 1)] for index in range(most)]


def _finite(value: object) -> object:
    """Put null for what JSON cannot hold: a loss that is not finite is news, and must not break the log."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as err:
        raise VerificationError(f"{where} is no JSON: {err}. Remove the line, or the log.") from err
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise VerificationError(f"{where} is no record of a step. Remove the line, or the log.")
    return record
