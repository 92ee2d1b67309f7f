"""Hold an adapter against the rules of one server."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loram_hub.adapter import CONFIG as ADAPTER_CONFIG
from loram_hub.adapter import MODEL_ID, RECORD, WEIGHTS, local_config
from loram_hub.doctor.commands import PLACEHOLDER, serving_command, unservable_name
from loram_hub.doctor.evidence import ADDED_TOKENS, Evidence, gather
from loram_hub.doctor.rules import RULES, TARGETS, Severity, Target
from loram_hub.errors import AccessError, CheckpointError, InvalidRequestError, VerificationError
from loram_hub.files import read_json
from loram_hub.hub import resolve, resolve_config

ADAPTER_FILES = (ADAPTER_CONFIG, WEIGHTS, RECORD, ADDED_TOKENS)
"""What is fetched of an adapter on the Hub; no pickles."""

_ORDER: tuple[Severity, ...] = ("refused", "wrong results", "warning")
_NOTES: Mapping[Target, tuple[str, ...]] = {
    "vllm": (
        "Use vLLM 0.18 or newer: older ones could run code of a model repository in spite of trust_remote_code=False "
        "(CVE-2025-66448, CVE-2026-22807, CVE-2026-27893).",
        "vLLM does not check which base an adapter was made for; that it loads proves nothing.",
    ),
    "sglang": (),
    "llamacpp": ("Run the converters in a checkout of llama.cpp, with its Python requirements.",),
    "peft": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One problem of an adapter on one server."""

    rule: str
    """Name of the rule that found it."""
    severity: Severity
    what: str
    """What is wrong in this adapter."""
    why: str
    """What the server does about it."""
    source: str
    """Version of the server, and how this is known: run or read."""
    remedy: str
    """What to do."""
    fixable: bool
    """Whether `fix` removes it without changing what the adapter computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What a server will do with an adapter."""

    target: Target
    adapter: str
    """Folder or Hub id."""
    base: str | None
    """Folder or Hub id of the base model; None if nobody said."""
    revision: str | None
    """Revision of the base; None if nobody said."""
    rank: int
    """Largest rank of a module."""
    findings: tuple[Finding, ...]
    """Problems, the gravest first."""
    command: tuple[str, ...] | None
    """Lines that serve it (for PEFT: lines of Python); None if the server refuses it or would answer wrongly,
    or if the base has no name that a command could hold (a note says so)."""
    not_checked: tuple[str, ...]
    """What could not be checked, and why."""
    notes: tuple[str, ...]
    """What holds for every adapter on this server."""

    @property
    def verdict(self) -> str:
        """`refused`, `wrong results` or `serves`."""
        gravest = self.findings[0].severity if self.findings else "warning"
        return "serves" if gravest == "warning" else gravest

    @property
    def is_fixable(self) -> bool:
        """Whether `fix` removes all that keeps it from being served right, and there is something to remove."""
        grave = [finding for finding in self.findings if finding.severity != "warning"]
        return bool(self.findings) and all(finding.fixable for finding in grave or self.findings)


def examine(
    adapter: str | os.PathLike[str],
    target: Target,
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Diagnosis:
    """Say whether a server will take an adapter and answer right, why not, and how to serve it.

    The server is not run. For an adapter in a folder the network is used only if `base` is a Hub id.

    Args:
        adapter: folder or Hub id; need not be sound.
        target: `vllm`, `sglang`, `llamacpp` or `peft`.
        base: folder or Hub id of the base model, of which the config is read; None for the one the adapter names.
        revision: of the base; None for the one the adapter names.
        token: of the Hub.

    Returns:
        Findings and the command.

    Raises:
        InvalidRequestError: an unknown target.
        CheckpointError: `adapter` is neither a folder nor a possible Hub id, or `base` has no config.
        VerificationError: the config of `base` is no sound JSON.
        AccessError: the Hub refused or could not be reached.

    Example:
        >>> from loram_hub.doctor import examine  # doctest: +SKIP
        >>> examine("my-adapter", "vllm").verdict  # doctest: +SKIP
        'serves'
    """
    if target not in TARGETS:
        raise InvalidRequestError(f"target is {target!r}; one of {', '.join(TARGETS)} is needed.")
    name = os.fspath(adapter)
    folder = resolve(adapter, token=token, files=ADAPTER_FILES).folder
    evidence = gather(folder)
    revision = revision or _pinned_revision(evidence, base)
    is_remote = not Path(name).expanduser().is_dir()
    base_config = _find_base_config(evidence, base, revision, token, is_remote=is_remote)
    evidence = replace(evidence, base=os.fspath(base) if base is not None else evidence.base, base_config=base_config)
    findings = tuple(sorted(_findings(evidence, target), key=lambda finding: _ORDER.index(finding.severity)))
    serves = all(finding.severity == "warning" for finding in findings)
    named = evidence.base or PLACEHOLDER
    unnamed = unservable_name(named, revision)
    command = None
    if serves and unnamed is None:
        command = serving_command(
            target, adapter=name, folder=folder, base=named, revision=revision, rank=evidence.rank
        )
    return Diagnosis(
        target=target,
        adapter=name,
        base=evidence.base,
        revision=revision,
        rank=evidence.rank,
        findings=findings,
        command=command,
        not_checked=tuple(_gaps(evidence)),
        notes=(*_NOTES[target], *([f"no command: {unnamed}"] if serves and unnamed is not None else ())),
    )


def _findings(evidence: Evidence, target: Target) -> Iterator[Finding]:
    for rule in RULES:
        effect = rule.effects.get(target)
        what = rule.find(evidence) if effect is not None else None
        if effect is not None and what is not None:
            yield Finding(
                rule=rule.name,
                severity=effect.severity,
                what=what,
                why=effect.why,
                source=effect.source,
                remedy=rule.remedy,
                fixable=rule.fixable,
            )


def _pinned_revision(evidence: Evidence, base: str | os.PathLike[str] | None) -> str | None:
    """Return the revision that the adapter names, if it is of the base in question."""
    found = evidence.setting("revision")
    is_same = base is None or os.fspath(base) == evidence.base
    return found if is_same and isinstance(found, str) and found else None


def _find_base_config(
    evidence: Evidence,
    base: str | os.PathLike[str] | None,
    revision: str | None,
    token: str | bool | None,
    *,
    is_remote: bool,
) -> dict[str, Any] | None:
    if base is not None:
        return read_json(resolve_config(base, revision=revision, token=token))
    try:
        if not is_remote:
            return local_config(evidence.base)
        if evidence.base is None or MODEL_ID.fullmatch(evidence.base) is None:
            return None  # a path of whoever published the adapter is none to open here
        return read_json(resolve_config(evidence.base, revision=revision, token=token))
    except (AccessError, CheckpointError, VerificationError):
        return None  # `_gaps` says what was not checked for want of it


def _gaps(evidence: Evidence) -> Iterator[str]:
    if evidence.weights_problem is not None:
        yield "tensors: the weights cannot be read"
    elif evidence.architecture is None and evidence.base_config is None:
        yield "shapes and targets: the base model's config is not at hand; give --base"
    elif evidence.architecture is None:
        kind = evidence.base_config.get("model_type") if evidence.base_config is not None else None
        yield f"shapes and targets: models of type {kind!r:.50} are not known here"
