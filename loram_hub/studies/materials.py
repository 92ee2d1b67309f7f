"""What a study names, found: the base's folder, data files, and hashes of all of it.

Sources that begin with `demo:` are made here, from what every Python installation brings along
(`loram_hub.demo.corpus`) or from a generator (`loram_hub.demo.arithmetic`), and written into the work folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loram_hub.checkpoint import weight_files
from loram_hub.digests import remembered_sha256
from loram_hub.errors import InvalidRequestError
from loram_hub.hub import Source, resolve
from loram_hub.studies.specification import Study
from loram_hub.texts import Example

DEMO = "demo"
_HELD_OUT_EVERY = 10
_TEXT_CHARACTERS = 1200
"""Held-out texts are cut, so that each counts about as much."""


def _tasks() -> list[Example]:
    from loram_hub.demo.corpus import stdlib_examples

    return stdlib_examples()[0]


def _held_out_tasks() -> list[Example]:
    from loram_hub.demo.corpus import stdlib_examples

    return stdlib_examples()[1]


def _texts() -> list[str]:
    from loram_hub.demo.corpus import stdlib_texts

    return [text for idx, text in enumerate(stdlib_texts()) if idx % _HELD_OUT_EVERY]


def _held_out_texts() -> list[str]:
    from loram_hub.demo.corpus import stdlib_texts

    return [text[:_TEXT_CHARACTERS] for text in stdlib_texts()[::_HELD_OUT_EVERY]]


def _arithmetic() -> list[Example]:
    from loram_hub.demo.arithmetic import arithmetic_examples

    return arithmetic_examples()[0]


def _held_out_arithmetic() -> list[Example]:
    from loram_hub.demo.arithmetic import arithmetic_examples

    return arithmetic_examples()[1]


_MADE: Mapping[str, Callable[[], Sequence[Example | str]]] = {
    "demo:tasks": _tasks,
    "demo:held-out tasks": _held_out_tasks,
    "demo:texts": _texts,
    "demo:held-out texts": _held_out_texts,
    "demo:arithmetic": _arithmetic,
    "demo:held-out arithmetic": _held_out_arithmetic,
}


@dataclass(frozen=True, kw_only=True)
class Materials:
    """A study with every source found."""

    study: Study
    """Its sources are files, or ids on the Hub."""
    source: Source
    """The base: folder, id, commit."""

    @cached_property
    def base_digest(self) -> str:
        """Hash of the base's weights, or its commit on the Hub."""
        if self.source.commit is not None:
            return f"{self.source.id}@{self.source.commit}"
        digests = {path.name: remembered_sha256(path) for path in weight_files(self.source.folder)}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def find_materials(study: Study, folder: Path, *, token: str | bool | None = None) -> Materials:
    """Find what a study names; data that it asks to be made are written to a folder, unless they are there.

    Args:
        study: what is asked for.
        folder: for data that are made.
        token: of the Hub.

    Raises:
        InvalidRequestError: a source of `demo:` has no such name, or there is no such model.
        MissingDependencyError: the demo's model is wanted, and its wheel is not installed.
        AccessError: the Hub refused or could not be reached.
    """
    placed = _Places(folder)
    calibration, alignment = study.calibration, study.alignment
    if calibration is not None:
        calibration = replace(calibration, source=placed.of(calibration.source))
    corpora = tuple(replace(corpus, source=placed.of(corpus.source)) for corpus in alignment.corpora)
    found = replace(
        study,
        calibration=calibration,
        alignment=replace(alignment, corpora=corpora),
        data=tuple(
            replace(data, train=tuple(replace(one, source=placed.of(one.source)) for one in data.train))
            for data in study.data
        ),
        held_out=tuple(replace(one, source=placed.of(one.source)) for one in study.held_out),
    )
    return Materials(study=found, source=_find_base(study, token))


def content_of(source: str) -> str:
    """Return what tells a source's content: the hash of a file or of all files of a folder; an id on the Hub itself."""
    path = Path(source).expanduser()
    if path.is_file():
        return remembered_sha256(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        digests = {file.relative_to(path).as_posix(): remembered_sha256(file) for file in files}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return source


def _find_base(study: Study, token: str | bool | None) -> Source:
    if study.base == DEMO:
        from loram_hub.demo.base_model import base_model

        return resolve(base_model())
    return resolve(study.base, revision=study.revision, token=token)


class _Places:
    """Files for the sources of a study that are made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, source: str) -> str:
        if not source.startswith(f"{DEMO}:"):
            return source
        make = _MADE.get(source)
        if make is None:
            raise InvalidRequestError(f"There is no source {source!r:.80}; there are {', '.join(_MADE)}.")
        path = self._folder / f"{source.removeprefix(f'{DEMO}:').replace(' ', '-')}.jsonl"
        records: list[dict[str, Any]] = [{"text": one} if isinstance(one, str) else asdict(one) for one in make()]
        _write(path, "".join(json.dumps(record) + "\n" for record in records))
        return str(path)


def _write(path: Path, text: str) -> None:
    """Write a file unless it has that text already: its time of change is part of what is known of it."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
