"""What is asked of a push, what the Hub says beforehand, and what follows from both."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loram_hub.adapter import WEIGHTS
from loram_hub.cards import GENERATED
from loram_hub.errors import AccessError, InvalidRequestError, LoramError
from loram_hub.files import read_json
from loram_hub.hub import (
    Gate,
    RemoteFile,
    RemoteRepository,
    UploadFile,
    is_fetched,
    look_up,
    resolve,
    why_not_writable,
)
from loram_hub.manifest import MANIFEST
from loram_hub.pushing.contents import Content
from loram_hub.pushing.records import Pushed
from loram_hub.release import MASK_INDEX

logger = logging.getLogger(__name__)


_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the caller asked for."""

    repo_id: str
    private: bool | None
    gated: Gate | None
    licence: str | None
    evaluation: str | os.PathLike[str] | Mapping[str, Any] | None
    tag: str | None
    collection: str | None
    message: str | None
    overwrite: bool
    token: str | bool | None


def check_names(request: Request) -> None:
    """Raise `InvalidRequestError` for names that no repository, tag or collection can have."""
    if _REPO_ID.fullmatch(request.repo_id) is None:
        raise InvalidRequestError(f"{request.repo_id!r:.200} is no Hub id; give one as org/name.")
    if request.tag is not None and (_TAG.fullmatch(request.tag) is None or request.tag == "main"):
        raise InvalidRequestError(f"{request.tag!r:.200} is no name for a tag; something like v1 or 2026-11 is.")
    if request.collection is not None and not request.collection.strip():
        raise InvalidRequestError("The collection has no name. Give its slug, or a title.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the Hub says beforehand."""

    base: RemoteRepository | None = None
    target: RemoteRepository | None = None
    refusal: str | None = None
    """Why this token may not write; None if it may, as far as is known."""
    notes: list[str] = field(default_factory=list)

    @property
    def held(self) -> Mapping[str, RemoteFile]:
        """Files on `main` of the repository that is pushed to."""
        return {} if self.target is None else self.target.files


def ask_hub(content: Content, request: Request, *, dry_run: bool) -> Facts:
    """Look up base and repository; a dry run does without an answer, and says so."""
    try:
        return Facts(
            base=look_up(content.base_id, token=request.token) if "/" in content.base_id else None,
            target=look_up(request.repo_id, refs=True, token=request.token),
            refusal=why_not_writable(request.repo_id, token=request.token),
        )
    except AccessError as err:
        if not dry_run:
            raise
        return Facts(notes=[f"The Hub was not asked about {content.base_id} and {request.repo_id}: {err}"])


def choose_visibility(request: Request, facts: Facts, content: Content) -> tuple[bool, Gate]:
    """Choose what the repository shall be in the end; why goes to the notes."""
    base, target, notes = facts.base, facts.target, facts.notes
    is_new = target is None or target.is_unfinished
    mark = MANIFEST if content.kind == "release" else WEIGHTS
    private, gated = request.private, request.gated
    if gated is None:
        gated = False if target is None else target.gated
        if base is not None and base.gated and not gated:
            gated = "auto"
            notes.append(f"{content.base_id} is gated, so {request.repo_id} will be, too (gated='auto').")
    if private is None and target is not None and (mark in target.files or target.private) and not is_new:
        private = target.private
        if private and mark not in target.files:
            notes.append(f"{request.repo_id} exists and is private; it stays so (private=False shows it).")
    if private is None:
        restricted = base is not None and (base.private or bool(base.gated))
        private = restricted or (base is None and is_new)
        if private:
            why = "is not on the Hub, or hidden" if base is None else "is private" if base.private else "is gated"
            notes.append(f"{content.base_id} {why}, so {request.repo_id} will be private (private=False shows it).")
    return private, gated


def find_leftovers(
    request: Request, facts: Facts, files: Mapping[str, UploadFile], *, keeps_card: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divide what else is on `main`: files of an earlier push, which go, and others that loaders would open."""
    rest = sorted(set(facts.held) - set(files))
    earlier = _earlier_files(request, facts.target) if rest else set()
    own = tuple(name for name in rest if name in earlier or (name in GENERATED and not keeps_card))
    opened = tuple(name for name in rest if name not in own and is_fetched(name))
    return (tuple(sorted({*own, *opened})), ()) if request.overwrite else (own, opened)


def _earlier_files(request: Request, target: RemoteRepository | None) -> set[str]:
    """Return what the manifest or record of an earlier push lists."""
    if target is None or MANIFEST not in target.files:
        return set()
    try:
        folder = resolve(request.repo_id, revision=target.commit, token=request.token, files=(MANIFEST,)).folder
        listed = read_json(folder / MANIFEST).get("files")
    except LoramError as err:
        logger.warning("The manifest of the earlier push cannot be read: %s", err)
        return set()
    return {MANIFEST, *listed} if isinstance(listed, dict) else {MANIFEST}


def find_problems(
    planned: Pushed,
    content: Content,
    facts: Facts,
    files: Mapping[str, UploadFile],
    foreign: tuple[str, ...],
    token: str | bool | None,
) -> Iterator[str]:
    """Say everything that stops a push, each with what to do."""
    if facts.refusal is not None:
        yield f"It cannot be written to: {facts.refusal}."
    unmet = [duty for duty in planned.duties if not duty.met]
    if unmet:
        listed = " ".join(f"({number}) {duty.what}: {duty.how}" for number, duty in enumerate(unmet, start=1))
        yield f"It does not meet the licence of {planned.base_id} ({planned.licence}). Missing: {listed}"
    others = MASK_INDEX if content.kind != "release" else WEIGHTS
    if others in facts.held:
        kind = "an adapter" if content.kind == "release" else "a release"
        yield f"The repository holds {kind}; choose another name."
    if foreign:
        yield (
            f"The repository holds {', '.join(foreign[:5])}, which no earlier push put there and which loaders would "
            "open. Choose another repository, or delete them by overwrite=True (--overwrite)."
        )
    taken = None if facts.target is None or planned.tag is None else facts.target.tags.get(planned.tag)
    if taken is not None:
        tagged = look_up(planned.repo_id, revision=taken, token=token)
        if tagged is None or not all(file.is_stored_as(tagged.files.get(name)) for name, file in files.items()):
            yield f"The tag {planned.tag} is on commit {taken[:12]}, which holds other files. Choose another."
