"""What a study names, found: the base's folder, data files, and hashes of all of it.

Sources that begin with `demo:` are made here, from what every Python installation brings along
(`loram_hub.demo.corpus`) or from a generator (`loram_hub.demo.arithmetic`), and written into the work folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loram_hub.architecture import architecture_of
from loram_hub.checkpoint import CONFIG, weight_files
from loram_hub.corpora import Corpus
from loram_hub.digests import remembered_sha256
from loram_hub.errors import InvalidRequestError, VerificationError
from loram_hub.files import read_json, write_text
from loram_hub.hub import Source, resolve
from loram_hub.hub.revisions import dataset_commit
from loram_hub.instructions import DataSource
from loram_hub.plan import PruningSettings, planned_sizes
from loram_hub.studies.specification import Calibration, HeldOutSet, Study
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


_DECIDING = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "additional_chat_templates/*.jinja",
)
"""Files of a base, besides config and weights, that decide over what is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Materials:
    """A study with every source found."""

    asked: Study
    """As it was given."""
    study: Study
    """The same with sources that are files, or ids on the Hub."""
    source: Source
    """The base: folder, id, commit."""
    base_digest: str
    """Hash of the base's weights, config and tokenizer, or its commit on the Hub."""
    contents: Mapping[str, str]
    """What tells the content of each source, when the study was opened: a hash, or a commit on the Hub."""

    def identified(self, source: Calibration | Corpus | DataSource | HeldOutSet) -> dict[str, Any]:
        """Return a source as JSON values that tell its content, wherever it lies."""
        return asdict(source) | {"source": self.contents[source.source]}

    def check_unchanged(self) -> None:
        """Check that no source was changed since the study was opened.

        Raises:
            VerificationError: one was; names it.
        """
        for source, content in self.contents.items():
            if Path(source).expanduser().exists() and content_of(source) != content:
                raise VerificationError(
                    f"{source} was changed while the study was running. The cell at work is not kept; run it again."
                )


def find_materials(study: Study, folder: Path, *, token: str | bool | None = None) -> Materials:
    """Find what a study names; data that it asks to be made are written to a folder, unless they are there.

    Args:
        study: what is asked for.
        folder: for data that are made.
        token: of the Hub.

    Raises:
        InvalidRequestError: a source of `demo:` has no such name, there is no such model, it has too few layers, or a
            held-out set is what is trained on.
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
    source = _find_base(study, token)
    _check_layers(study, source.folder)
    contents = {name: content_of(name, token=token) for name in _sources(found)}
    _refuse_training_data(found, contents)
    return Materials(asked=study, study=found, source=source, base_digest=_base_digest(source), contents=contents)


def _sources(study: Study) -> list[str]:
    calibration = [] if study.calibration is None else [study.calibration.source]
    corpora = [corpus.source for corpus in study.alignment.corpora]
    training = [one.source for data in study.data for one in data.train]
    return [*calibration, *corpora, *training, *(one.source for one in study.held_out)]


def _check_layers(study: Study, base: Path) -> None:
    """Refuse a base that the study's structured pruning cannot prune, before its controls are run."""
    architecture = architecture_of(read_json(base / CONFIG))
    for method in study.methods:
        for ratio in () if method.is_sparse else method.ratios:
            settings = PruningSettings(pruning_ratio=ratio, keep_first=study.keep_first, keep_last=study.keep_last)
            planned_sizes(architecture, settings)


def _refuse_training_data(study: Study, contents: Mapping[str, str]) -> None:
    trained = {contents[one.source]: one.source for data in study.data for one in data.train}
    for held_out in study.held_out:
        on_hub = contents[held_out.source].partition("@")[0] == held_out.source.partition(":")[0]
        if contents[held_out.source] in trained and not on_hub:  # of a dataset on the Hub, splits may differ
            raise InvalidRequestError(
                f"held_out {held_out.name!r} has the content of {trained[contents[held_out.source]]}, which is trained "
                "on. Name data that no cell trains on."
            )


def _base_digest(source: Source) -> str:
    if source.commit is not None:
        return f"{source.id}@{source.commit}"
    companions = {path for pattern in _DECIDING for path in source.folder.glob(pattern) if path.is_file()}
    files = (source.folder / CONFIG, *weight_files(source.folder), *sorted(companions))
    return _hash_of({path.relative_to(source.folder).as_posix(): remembered_sha256(path) for path in files})


def _hash_of(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def content_of(source: str, *, token: str | bool | None = None) -> str:
    """Return what tells a source's content: the hash of a file or of all files of a folder; a commit on the Hub.

    Args:
        source: file, folder, or id of a dataset, also with `@revision` or `:config`.
        token: of the Hub.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return remembered_sha256(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _hash_of({file.relative_to(path).as_posix(): remembered_sha256(file) for file in files})
    name, _, revision = source.partition("@")
    name = name.partition(":")[0]
    return f"{name}@{dataset_commit(name, revision=revision or None, token=token)}"


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
    write_text(path, text)
