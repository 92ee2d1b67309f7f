"""What an evaluation was made of: the models and adapters that it names, held against those of the report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from loram_hub.cards.escaping import visible
from loram_hub.cards.evaluations import Evaluation, check_adapter_size, check_identity, read_evaluation
from loram_hub.errors import InvalidRequestError
from loram_hub.manifest import MANIFEST
from loram_hub.reporting.facts import AdapterFacts, EvaluationFacts, MeasuredPart, ReleaseFacts
from loram_hub.reporting.wording import joined

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARTS = ("base", "release", "adapter", "recovered")
_MOST_SETTINGS = 40
Hashes = Mapping[str, str]


def evaluation_facts(
    values: Mapping[str, object], *, name: str, releases: Sequence[ReleaseFacts], adapters: Sequence[AdapterFacts]
) -> EvaluationFacts:
    """Read an evaluation, and find out whether it is one of what is at hand.

    Args:
        values: the JSON of `loram eval`.
        name: of its file.
        releases: of the report.
        adapters: of the report.

    Raises:
        InvalidRequestError: it is malformed.
    """
    evaluation = read_evaluation(values, parameters={})
    at_hand: dict[str, list[tuple[str, Hashes]]] = {
        "base": [],
        "release": [(one.name, {MANIFEST: one.manifest_sha256}) for one in releases],
        "adapter": [(one.name, one.files) for one in adapters if one.kind == "pruned adapter"],
        "recovered": [(one.name, one.files) for one in adapters if one.kind != "pruned adapter"],
    }
    provenances = [*_provenances(values)]
    parts = [part for provenance in provenances for part in _parts(provenance, at_hand)]
    return EvaluationFacts(
        name=name,
        evaluation=evaluation,
        parts=tuple(part for idx, part in enumerate(parts) if part not in parts[:idx]),
        settings=tuple(dict.fromkeys(row for provenance in provenances for row in _settings(provenance))),
        misfit=_misfit(evaluation, [one for one in adapters if one.kind != "pruned adapter"]),
    )


def _provenances(values: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """Yield what is said of the losses and of the tasks: they may have been measured apart."""
    for measured in (values, values.get("tasks")):
        provenance = measured.get("provenance") if isinstance(measured, Mapping) else None
        if isinstance(provenance, Mapping):
            yield provenance


def _parts(
    provenance: Mapping[str, object], at_hand: Mapping[str, Sequence[tuple[str, Hashes]]]
) -> Iterator[MeasuredPart]:
    listed = provenance.get("parts")
    for values in listed[: 2 * len(_PARTS)] if isinstance(listed, list) else ():
        if not isinstance(values, Mapping) or values.get("part") not in _PARTS:
            continue
        part, commit, named = str(values["part"]), values.get("commit"), values.get("files")
        files = {
            visible(name): digest
            for name, digest in (named.items() if isinstance(named, Mapping) else ())
            if isinstance(digest, str) and _SHA256.fullmatch(digest)
        }
        here = next((name for name, hashes in at_hand[part] if _is_same(part, files, hashes)), None)
        yield MeasuredPart(
            part=part,
            id=visible(values.get("id")),
            commit=commit if isinstance(commit, str) else None,
            files=files,
            here=here,
            is_other=bool(files and at_hand[part]) and here is None,
        )


def _is_same(part: str, files: Hashes, hashes: Hashes) -> bool:
    try:
        check_identity({"provenance": {"parts": [{"part": part, "files": files}]}}, part, hashes)
    except InvalidRequestError:
        return False
    return bool(files)


def _misfit(evaluation: Evaluation, adapters: Sequence[AdapterFacts]) -> str | None:
    """Say why an evaluation can be one of none of these adapters, by their sizes; None if it can."""
    others: list[str] = []
    for adapter in adapters:
        try:
            check_adapter_size(evaluation, adapter.parameters)
        except InvalidRequestError:
            others.append(f"{visible(adapter.name)} ({adapter.parameters:,} numbers)")
        else:
            return None
    if not others:
        return None
    return f"By the size of its 'base + recovered adapter' it is of another adapter than {joined(others)}."


def _settings(provenance: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    settings, versions = provenance.get("settings"), provenance.get("versions")
    for name, value in [*settings.items()][:_MOST_SETTINGS] if isinstance(settings, Mapping) else ():
        if value is not None:
            yield visible(name), _text(value)
    if isinstance(versions, Mapping):
        yield "measured with", ", ".join(visible(f"{key} {value}") for key, value in [*versions.items()][:20])


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return visible(", ".join(f"{key} {inner}" for key, inner in [*value.items()][:20]))
    return visible(", ".join(map(str, value[:20])) if isinstance(value, list) else value)
