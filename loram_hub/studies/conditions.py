"""Under what conditions the rows of a study were measured: the study itself, its profile, machines and versions.

They lie beside the rows in `conditions.json`, so that a page is written anew for the study that was run, and for no
other one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loram_hub.errors import IncompatibleError, VerificationError
from loram_hub.files import dump_json, read_json
from loram_hub.studies.records import Row, is_name, is_study_name
from loram_hub.studies.specification import Study, ready_studies

CONDITIONS = "conditions.json"
_WORDING = ("title", "question", "mirrors", "shows")
"""Keys of a study that decide over its page alone."""
_SOURCES = ("base", "source")
_ABSENT = "(nothing)"
_MOST_NAMED = 6
"""Keys that an error names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """Under what conditions the rows of a study were measured."""

    study: Mapping[str, Any]
    """The study as JSON values, see `study_values`; its name alone if nothing else is known of it."""
    profile: str | None
    """Profile of the study's file; None for none."""
    machines: tuple[Mapping[str, Any], ...]
    """Every machine that cells ran on: system, processor, cores, threads of torch, GPU."""
    versions: tuple[Mapping[str, str], ...]
    """Every set of versions of Python and of libraries."""
    seconds: float
    """Time that all cells took together."""

    @property
    def command(self) -> str:
        """What gives the numbers and the page again."""
        name = str(self.study["name"])
        profile = "" if self.profile is None else f" --profile {shlex.quote(self.profile)}"
        return f"loram study {name if name in ready_studies() else f'{name}.yaml'}{profile} --work-dir DIR --out DIR2"

    @property
    def digest(self) -> str:
        """Hash of all of the study but the wording of its page, 64 hexadecimal digits."""
        return hashlib.sha256(dump_json(_deciding(self.study)).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the text of `conditions.json`; command and digest follow from the rest, and are there to be read."""
        return dump_json(asdict(self) | {"command": self.command, "digest": self.digest})


def study_values(study: Study) -> dict[str, Any]:
    """Return a study as JSON values that are the same on every machine.

    Args:
        study: as `read_study` returns it. Sources that are files or folders go by their names without the folders that
            they lie in; what they hold is told by the cells.
    """
    values: dict[str, Any] = _portable(json.loads(json.dumps(asdict(study))))
    return values


def read_conditions(
    cells: Path, rows: Sequence[Row], study: Study | None = None, *, profile: str | None = None
) -> Conditions:
    """Gather the conditions of rows from the records of their cells.

    Args:
        cells: folder of the records.
        rows: what was measured.
        study: the study that they are of, as it was read; None if nothing but its name is known.
        profile: the profile of the study's file.

    Raises:
        VerificationError: a record is missing or damaged.
    """
    records = [read_json(cells / f"{name}.json") for name in sorted({row.cell for row in rows})]
    try:
        return Conditions(
            study={"name": rows[0].study if rows else ""} if study is None else study_values(study),
            profile=profile,
            machines=_each(_machine(record["machine"]) for record in records),
            versions=_each(_versions(record["versions"]) for record in records),
            seconds=round(sum(_seconds(record.get("seconds", 0.0)) for record in records), 1),
        )
    except (KeyError, TypeError, ValueError) as err:
        raise VerificationError(f"A record in {cells} does not say what it was measured with: {err!r:.200}.") from err


def stored_conditions(folder: Path, study: Study | None = None) -> Conditions:
    """Read the conditions that `write_results` has written.

    Args:
        folder: where it wrote.
        study: the study that they have to be of; None for any.

    Raises:
        VerificationError: they are missing or damaged.
        IncompatibleError: what was run there is not this study; the message names the keys that differ.
    """
    values = read_json(folder / CONDITIONS)
    try:
        found = Conditions(
            study=_study(values["study"]),
            profile=_profile(values["profile"]),
            machines=tuple(_machine(machine) for machine in values["machines"]),
            versions=tuple(_versions(versions) for versions in values["versions"]),
            seconds=_seconds(values["seconds"]),
        )
        digest = values["digest"]
    except (KeyError, TypeError, ValueError) as err:
        raise VerificationError(
            f"{folder / CONDITIONS} does not have what it should: {err!r:.200}. Write it again, from the work folder: "
            "loram study STUDY --work-dir DIR --out DIR2."
        ) from err
    if digest != found.digest:
        raise VerificationError(f"{folder / CONDITIONS} was altered: its study is not the one of its digest.")
    if study is not None:
        _check_same(found, study, folder)
    return found


def stored_shows(folder: Path) -> tuple[str, ...] | None:
    """Return the parts of the page of a study's results, none for all; None where only rows lie in the folder.

    Args:
        folder: with `results.jsonl`.

    Raises:
        VerificationError: the conditions are damaged.
    """
    if not (folder / CONDITIONS).exists():
        return None
    return tuple(stored_conditions(folder).study["shows"])


def _deciding(study: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in study.items() if key not in _WORDING}


def _check_same(found: Conditions, study: Study, folder: Path) -> None:
    given, there = _leaves(_deciding(study_values(study))), _leaves(_deciding(found.study))
    keys = sorted(given.keys() | there.keys())
    differing = [key for key in keys if given.get(key, _ABSENT) != there.get(key, _ABSENT)]
    if differing:
        named = "; ".join(
            f"{key} was {there.get(key, _ABSENT)!r:.60}, is {given.get(key, _ABSENT)!r:.60}"
            for key in differing[:_MOST_NAMED]
        )
        rest = f"; and {len(differing) - _MOST_NAMED} more" if len(differing) > _MOST_NAMED else ""
        raise IncompatibleError(
            f"{folder} has the results of another study or profile: {named}{rest}. It was written by "
            f"`{found.command}`. Give that study and profile, or run this one with --work-dir and --out."
        )


def _leaves(value: object, path: str = "") -> dict[str, object]:
    """Return the plain values of JSON values by their paths, as in `methods[0].ratios[1]`."""
    below: Iterator[tuple[str, object]]
    if isinstance(value, Mapping) and value:
        below = ((f"{path}.{key}" if path else str(key), inner) for key, inner in value.items())
    elif isinstance(value, list) and value:
        below = ((f"{path}[{idx}]", inner) for idx, inner in enumerate(value))
    else:
        return {path: value}
    return {key: leaf for inner_path, inner in below for key, leaf in _leaves(inner, inner_path).items()}


def _portable(value: Any) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(value, dict):
        return {
            key: os.path.basename(inner.rstrip("/")) if key in _SOURCES and os.path.isabs(inner) else _portable(inner)
            for key, inner in value.items()
        }
    return [_portable(inner) for inner in value] if isinstance(value, list) else value


def _each(records: Iterator[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Return each of several equal records once, in a fixed order."""
    texts = sorted({json.dumps(record, sort_keys=True) for record in records})
    return tuple(json.loads(text) for text in texts)


def _study(values: object) -> Mapping[str, Any]:
    if not isinstance(values, dict) or not isinstance(values["name"], str) or not is_study_name(values["name"]):
        raise TypeError(f"study is {values!r:.80}")
    shows = values["shows"]
    if not isinstance(shows, list) or not all(isinstance(name, str) for name in shows):
        raise TypeError(f"shows is {shows!r:.80}")
    return values


def _machine(values: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("cpus", "threads"):
        if values.get(key) is not None and type(values[key]) is not int:
            raise TypeError(f"{key} is {values[key]!r:.80}")
    return dict(values)


def _versions(values: Mapping[str, str]) -> dict[str, str]:
    return {str(name): str(version) for name, version in dict(values).items()}


def _profile(value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or not is_name(value) or "`" in value):  # a page shows it
        raise TypeError(f"profile is {value!r:.80}")
    return value


def _seconds(value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"seconds is {value!r:.80}")
    return float(value)
