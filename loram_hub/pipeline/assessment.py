"""Which stages hold and which have to be run, and why.

A stage holds if what its output was made of is what it would be made of now (its part of the recipe, the digests of its
inputs, the versions of the tools) and the output is still there, unchanged. Whatever depends on a stage that does not
hold has to wait for it; if that comes out as it was, they hold after all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Literal

from loram_hub.errors import LoramError
from loram_hub.manifest import tool_versions
from loram_hub.pipeline.stages import Stage
from loram_hub.pipeline.workspace import Record, Workspace

State = Literal["holds", "freed", "to do"]
_STREAMING_TOOLS = ("datasets", "tokenizers")
"""Packages that decide over training texts, besides those that a manifest lists."""
_LONGEST = 12
"""Digits of a hash that are shown."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Assessed:
    """A stage and what is to become of it."""

    stage: Stage
    state: State
    why: str
    """What has to be done and for what reason, or since what it holds."""
    record: Record | None
    """What is remembered of it."""
    made_of: Mapping[str, Any]
    """What its output would be made of; digests of inputs that are not there yet are None."""
    resumes: bool = False
    """Whether a half-done run of just this is there."""


def assess(
    stages: Sequence[Stage], materials: Mapping[str, str], work: Workspace, *, ignore_versions: bool
) -> tuple[Assessed, ...]:
    """Look at every stage of a recipe.

    Args:
        stages: from `stages_of`, in their order.
        materials: digests of what comes from outside.
        work: where outputs and records are.
        ignore_versions: keep what other versions of the tools have made.
    """
    digests: dict[str, str | None] = dict(materials)
    found: list[Assessed] = []
    for stage in stages:
        one, digests[stage.name] = _assess(stage, digests, work, ignore_versions=ignore_versions)
        found.append(one)
    return _with_freed(found)


def _assess(
    stage: Stage, digests: Mapping[str, str | None], work: Workspace, *, ignore_versions: bool
) -> tuple[Assessed, str | None]:
    """Return a stage with its state, and the digest of its output if it holds."""
    made_of = {
        "recipe": dict(stage.part),
        "inputs": {name: digests.get(name) for name in stage.inputs},
        "tools": _tools(stage),
    }
    record = work.record(stage.name)
    started = work.started(stage.name) if stage.resumes else None
    resumes = started is not None and not differences(started, made_of, ignore_versions=ignore_versions)

    def to_do(why: str) -> tuple[Assessed, None]:
        if resumes:
            why = f"{why}; goes on where it was cut off"
        elif started is not None and not waiting:
            lost = "; ".join(differences(started, made_of, ignore_versions=ignore_versions))
            why = f"{why}; a half-done run of other settings is dropped ({lost})"
        return Assessed(stage=stage, state="to do", why=why, record=record, made_of=made_of, resumes=resumes), None

    waiting = [name for name, digest in made_of["inputs"].items() if digest is None]
    if record is None:
        return to_do("not made yet")
    if waiting:
        return to_do(f"{' and '.join(waiting)} will be made anew")
    changed = differences(record.made_of, made_of, ignore_versions=ignore_versions)
    if changed:
        return to_do("; ".join(changed))
    if record.freed:
        why = "made, and deleted when nothing needed it any more"
        return Assessed(stage=stage, state="freed", why=why, record=record, made_of=made_of), record.digest
    try:
        digest = stage.digest(record.facts)
    except LoramError as err:
        return to_do(str(err))
    if digest != record.digest and not stage.may_be_edited:
        return to_do("its output was changed")
    why = "made before" if digest == record.digest else "made before, edited since"
    return Assessed(stage=stage, state="holds", why=why, record=record, made_of=made_of), digest


def _with_freed(found: list[Assessed]) -> tuple[Assessed, ...]:
    """Have stages whose output was deleted run again where it is needed."""
    needed: dict[str, str] = {}
    for idx in range(len(found) - 1, -1, -1):
        one = found[idx]
        if one.state == "freed" and one.stage.name in needed:
            found[idx] = one = replace(one, state="to do", why=f"was deleted; {needed[one.stage.name]} needs it")
        if one.state == "to do":
            needed |= dict.fromkeys(one.stage.inputs, one.stage.name)
    return tuple(found)


def _tools(stage: Stage) -> dict[str, str]:
    if not stage.uses_tools:
        return {name: version for name, version in tool_versions().items() if name == "loram-hub"}
    versions = tool_versions()
    if "corpora" in stage.inputs:
        versions |= {name: metadata.version(name) for name in _STREAMING_TOOLS}
    return versions


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, ignore_versions: bool) -> list[str]:
    """Say in which points two outputs are made of other things; nothing if they are made of the same."""
    kinds: Mapping[str, Callable[[str, object, object], str]] = {
        "recipe": lambda name, old, new: f"{name} {_shown(old)} -> {_shown(new)}",
        "inputs": lambda name, old, new: f"{name} changed ({_shown(old)} -> {_shown(new)})",
        "tools": lambda name, old, new: f"{name} {_shown(old)} -> {_shown(new)}",
    }
    found = []
    for kind, describe in kinds.items():
        if kind == "tools" and ignore_versions:
            continue
        old, new = before.get(kind, {}), now.get(kind, {})
        for name in [*old, *(name for name in new if name not in old)]:
            if old.get(name) != new.get(name):
                found.append(describe(name, old.get(name), new.get(name)))
    return found


def _shown(value: object) -> str:
    text = "not there" if value is None else str(value)
    return text[:_LONGEST] if len(text) in (40, 64) else text
