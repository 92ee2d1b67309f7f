"""From the names that a report is asked for to all that is known of them. Nothing is drawn or written here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loram_hub.adapter import CONFIG as ADAPTER_CONFIG
from loram_hub.adapter import parse_config
from loram_hub.cards.numbers import finite
from loram_hub.errors import InvalidRequestError, VerificationError
from loram_hub.files import read_json
from loram_hub.hub import METADATA_FILES, resolve, resolve_config
from loram_hub.release import is_release
from loram_hub.reporting.adapters import adapter_facts
from loram_hub.reporting.facts import (
    AdapterFacts,
    AlignmentFacts,
    Facts,
    ImportanceFacts,
    ReleaseFacts,
    RunFacts,
    StageFacts,
    StudyFacts,
)
from loram_hub.reporting.measured import evaluation_facts
from loram_hub.reporting.releases import importance_facts, release_facts
from loram_hub.reporting.sources import (
    DEMO_RECORD,
    EVALUATION_FILE,
    IMPORTANCE_FILE,
    STAGE_RECORDS,
    Found,
    find,
)
from loram_hub.reporting.studied import study_facts
from loram_hub.reporting.trainings import aligned_facts, logged_facts, run_facts
from loram_hub.seals import check_seal

Name = str | os.PathLike[str]

_STAGE_OUTPUTS = ("quantized", "aligned", "refitted", "pruned")
"""Releases in the work folder of a publication, the most finished first."""
_ALIGNMENT_RUN = "aligned-run"
_STAGES = ("prune", "refit", "teach", "align", "quantize", "evaluate", "card", "push")


def gather(
    sources: Sequence[Name],
    *,
    compare: Name | None = None,
    importance: Name | None = None,
    evaluations: Sequence[Name] = (),
    base: Name | None = None,
    token: str | bool | None = None,
) -> Facts:
    """Read everything that a report is made of.

    Args:
        sources: see `report`.
        compare: an adapter to lay beside the others.
        importance: file of importance scores.
        evaluations: files of `loram eval --json`.
        base: the model that adapters are for.
        token: of the Hub.

    Raises:
        CheckpointError: a source is nothing that a report can be made of, or `base` no model.
        VerificationError: a file is torn or altered.
        InvalidRequestError: no source, `compare` is no adapter, or an evaluation is malformed.
    """
    if isinstance(sources, str | os.PathLike):
        raise InvalidRequestError(f"sources is {os.fspath(sources)!r}; a list of names is needed: [{sources!r}].")
    if not sources:
        raise InvalidRequestError("There is nothing to report on: name at least one source.")
    found = [find(name, token=token) for name in sources]
    compared = None if compare is None else find(compare, token=token)
    if compared is not None and compared.kind not in ("adapter", "run"):
        raise InvalidRequestError(f"{compare} is a {compared.kind}; an adapter to compare with is needed.")
    reading = _Reading(token=token, base=None if base is None else _model(base, token))
    for one in found:
        reading.read(one)
    for file in evaluations:
        reading.evaluations.append(_stored(Path(file).expanduser()))
    if importance is not None:
        reading.scores.append(Path(importance).expanduser())
    return reading.finished(compared)


@dataclass(kw_only=True, slots=True)
class _Reading:
    """What has been read so far. Adapters, scores and evaluations come last: they want to know all releases."""

    token: str | bool | None
    base: Path | None
    releases: list[ReleaseFacts] = field(default_factory=list)
    alignments: list[AlignmentFacts] = field(default_factory=list)
    runs: list[RunFacts] = field(default_factory=list)
    evaluations: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """Name and content of each file."""
    studies: list[StudyFacts] = field(default_factory=list)
    stages: list[StageFacts] = field(default_factory=list)
    adapters: list[Found] = field(default_factory=list)
    scores: list[Path] = field(default_factory=list)

    def read(self, found: Found) -> None:
        """Take in a source."""
        match found.kind:
            case "release":
                self._release(found.path, name=found.id, commit=found.commit)
            case "adapter":
                self.adapters.append(found)
            case "run":
                self._run(found)
            case "alignment run":
                self._log(found.path, name=found.id)
            case "work folder":
                self._work_folder(found)
            case "demo":
                self._demo(found)
            case "study":
                self.studies.append(study_facts(found.path, name=found.id))
            case "evaluation":
                self.evaluations.append(_stored(found.path))

    def finished(self, compared: Found | None) -> Facts:
        """Read what had to wait, and return everything."""
        others = [] if compared is None else [*_adapters_of(compared)]
        named = _told_apart([*self.adapters, *others])
        is_compared = [False] * len(self.adapters) + [True] * len(others)
        adapters = tuple(self._adapter(*pair) for pair in zip(named, is_compared, strict=True))
        return Facts(
            releases=tuple(self.releases),
            alignments=tuple(self.alignments),
            importances=tuple(_importance(file, self.releases) for file in dict.fromkeys(self.scores)),
            runs=tuple(self.runs),
            adapters=adapters,
            evaluations=tuple(
                evaluation_facts(values, name=name, releases=self.releases, adapters=adapters)
                for name, values in self.evaluations
            ),
            studies=tuple(self.studies),
            stages=tuple(self.stages),
        )

    def _release(self, folder: Path, *, name: str, commit: str | None = None) -> None:
        facts = release_facts(folder, name=name, commit=commit)
        self.releases.append(facts)
        aligned = aligned_facts(facts.release.manifest, name=name)
        self.alignments += [] if aligned is None else [aligned]

    def _log(self, folder: Path, *, name: str) -> None:
        logged = logged_facts(folder, name=name)
        self.alignments += [] if logged is None else [logged]

    def _run(self, found: Found) -> None:
        self.runs.append(run_facts(found.path, name=found.id))
        self.adapters += _adapters_of(found)

    def _work_folder(self, found: Found) -> None:
        folder = found.path
        self.stages += _stages(folder / STAGE_RECORDS)
        stage = next((name for name in _STAGE_OUTPUTS if is_release(folder / name)), None)
        before = len(self.alignments)
        if stage is not None:
            self._release(folder / stage, name=f"{found.id}/{stage}")
        if len(self.alignments) == before and (folder / _ALIGNMENT_RUN).is_dir():
            self._log(folder / _ALIGNMENT_RUN, name=f"{found.id}/{_ALIGNMENT_RUN}")
        self.scores += [folder / IMPORTANCE_FILE] if (folder / IMPORTANCE_FILE).is_file() else []
        if (folder / EVALUATION_FILE).is_file():
            self.evaluations.append(_stored(folder / EVALUATION_FILE))

    def _demo(self, found: Found) -> None:
        self._release(found.path / "release", name=f"{found.id}/release")
        self.adapters += _adapters_of(found)
        measured = read_json(found.path / DEMO_RECORD).get("evaluation")
        if isinstance(measured, dict):
            self.evaluations.append((f"{found.id}/{DEMO_RECORD}", measured))

    def _adapter(self, found: Found, is_compared: bool) -> AdapterFacts:
        return adapter_facts(
            found.path,
            name=found.id,
            commit=found.commit,
            releases=self.releases,
            trained_on=found.release,
            base=self.base,
            is_compared=is_compared,
            token=self.token,
        )


def _adapters_of(found: Found) -> list[Found]:
    """Return the adapter that stands for a source: of a run the recovered one, which every server takes."""
    if found.kind == "adapter":
        return [found]
    for name in ("recovered", "adapter"):
        if (found.path / name / ADAPTER_CONFIG).is_file():
            release = _release_of(found.path / "adapter")
            return [Found(kind="adapter", path=found.path / name, id=f"{found.id}/{name}", release=release)]
    return []


def _release_of(trained: Path) -> Path | None:
    """Return the release that a run's adapter, as it was trained, names; None if it is no folder here."""
    if not (trained / ADAPTER_CONFIG).is_file():
        return None
    named = parse_config(read_json(trained / ADAPTER_CONFIG), source=str(trained / ADAPTER_CONFIG)).base
    return Path(named) if named is not None and os.path.isdir(named) and is_release(Path(named)) else None


def _told_apart(adapters: Sequence[Found]) -> list[Found]:
    """Name adapters whose folders have one name by the folder above as well."""
    ids = [found.id for found in adapters]
    return [
        replace(found, id=f"{Path(os.path.abspath(found.path)).parent.name}/{found.id}")
        if ids.count(found.id) > 1 and found.commit is None and "/" not in found.id
        else found
        for found in adapters
    ]


def _model(name: Name, token: str | bool | None) -> Path:
    """Return where the model that the caller names lies; of a Hub id its config and mask indexes are fetched."""
    config = resolve_config(name, token=token)
    if "loram" in read_json(config) and not Path(name).expanduser().exists():
        return resolve(name, token=token, files=METADATA_FILES).folder
    return config


def _stored(path: Path) -> tuple[str, Mapping[str, Any]]:
    return path.name, read_json(path)


def _importance(file: Path, releases: Sequence[ReleaseFacts]) -> ImportanceFacts:
    from loram_hub.importance import read_scores  # with torch, which nothing else here needs

    stored = read_scores(file)
    scored = [facts for facts in releases if facts.release.manifest.base.config_sha256 == stored.base_config_sha256]
    return importance_facts(stored.scores, name=file.name, method=stored.importance, releases=scored)


def _stages(records: Path) -> list[StageFacts]:
    """Read what a publication remembers of its stages, in the order in which they come."""
    found = []
    for path in (records / f"{stage}.json" for stage in _STAGES):
        if not path.is_file():
            continue
        values = check_seal(path, read_json(path))
        seconds, nbytes = finite(values.get("seconds")), values.get("nbytes")
        if seconds is None or not (isinstance(nbytes, int) and 0 <= nbytes < 2**60):
            raise VerificationError(
                f"{path} has {values.get('seconds')!r:.40} s and {nbytes!r:.40} bytes, which no stage takes."
            )
        found.append(StageFacts(name=path.stem, seconds=seconds, nbytes=nbytes))
    return found
