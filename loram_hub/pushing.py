"""Publish a release or a recovered adapter on the Hub.

What is pushed is what was verified: the files of the manifest and a card, licence texts and pictures beside them, and
nothing else of the folder. Duties of the base model's licence are looked at first, and an unmet one stops the push. The
push itself has two phases (see `hub.publishing`): readers see a complete and compared release, or none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants

from loram_hub.adapter import CONFIG as ADAPTER_CONFIG
from loram_hub.adapter import RECORD, WEIGHTS, check_adapter, refuse_pruned
from loram_hub.architecture import architecture_of
from loram_hub.cards import GENERATED, make_card
from loram_hub.digests import remembered_sha256
from loram_hub.errors import AccessError, CheckpointError, InvalidRequestError, LoramError
from loram_hub.files import read_json
from loram_hub.hub import (
    Gate,
    RemoteFile,
    RemoteRepository,
    UploadFile,
    is_fetched,
    look_up,
    publish_files,
    resolve,
    resolve_config,
    why_not_writable,
)
from loram_hub.licences import Duty, Licence, duties, licence_of, notice_file
from loram_hub.manifest import MANIFEST
from loram_hub.release import MASK_INDEX, verify
from loram_hub.tensors import sha256_of_finite

logger = logging.getLogger(__name__)

ALLOWED = (
    "*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "Notice*", "USE_POLICY*",
    "README.md", "pictures/*.png", ".eval_results/*.yaml",
)  # fmt: skip
"""Names of files that are pushed if a folder has them. Never pickles and code, nothing of an optimizer or Trainer."""

_NEVER = ("trainer_state.json", "optimizer*", "scheduler*", "rng_state*", "training_args*", "*.bin", "*.pt", "*.py")
_CARD = "README.md"
_LICENCE_TEXTS = ("LICENSE*", "NOTICE*", "Notice*", "USE_POLICY*")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_COMPANIONS_OF_ADAPTERS = (_CARD, *_LICENCE_TEXTS, "pictures/*.png", ".eval_results/*.yaml")


@dataclass(frozen=True, kw_only=True, slots=True)
class PushedFile:
    """A file of a push."""

    name: str
    size: int
    """Bytes."""
    is_new: bool
    """Whether `main` on the Hub lacks it or holds other content under its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """What a push did, or, from a dry run, what it would do."""

    repo_id: str
    url: str
    kind: Literal["release", "recovered adapter", "PEFT adapter"]
    base_id: str
    commit: str | None
    """Commit on `main`; None from a dry run."""
    files: tuple[PushedFile, ...]
    left_out: tuple[str, ...]
    """Files of the folder that are not pushed."""
    deleted: tuple[str, ...]
    """Files on the Hub that go: those of an earlier push, with `overwrite` also others that loaders would open."""
    licence: str
    """The Hub's identifier."""
    duties: tuple[Duty, ...]
    """Conditions of the licence."""
    private: bool
    gated: Gate
    tag: str | None
    collection: str | None
    notes: tuple[str, ...]
    """What was decided on the way, and why."""
    problems: tuple[str, ...]
    """What stops the push; always empty but in a dry run."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def new_bytes(self) -> int:
        """Bytes of the files that the Hub does not have."""
        return sum(file.size for file in self.files if file.is_new)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"nbytes": self.nbytes, "new_bytes": self.new_bytes}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Content:
    """A folder that was checked and may be pushed."""

    folder: Path
    kind: Literal["release", "recovered adapter", "PEFT adapter"]
    base_id: str
    base_commit: str | None
    files: dict[str, UploadFile]
    left_out: tuple[str, ...]
    message: str


def push(
    release: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    gated: Gate | None = None,
    license: str | None = None,
    evaluation: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    tag: str | None = None,
    collection: str | None = None,
    message: str | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Publish a release on the Hub: uploaded aside, compared there, then made visible in one commit.

    A push that was interrupted is completed by running it again. A folder without README.md gets a generated card; one
    that was edited on the Hub stays as long as the same release is pushed.

    Args:
        release: folder of the release.
        repo_id: `org/name` on the Hub; created if there is none.
        private: visibility in the end. None: as the repository is; a new one is public, unless its base is gated,
            private or unknown to the Hub. What is to be private is hidden before anything is uploaded.
        gated: how access is granted. None: as the repository is, but like its base at least: `auto` if that is gated.
        license: the Hub's identifier of the base's licence; None for the one that the base's card or name tells.
        evaluation: what `loram eval --json` printed, file or values, for the card.
        tag: tag for the commit, such as `v1`.
        collection: slug of a collection, or the title of one in the same namespace, created if there is none.
        message: title of the commit.
        overwrite: delete files in the repository that no earlier push put there and that loaders would open.
        token: of the Hub, with the right to write.
        dry_run: check everything and say what would be pushed, and what would stop it, without changing anything.

    Returns:
        What was pushed.

    Raises:
        VerificationError: the release is not intact, or what arrived on the Hub is not what was sent.
        InvalidRequestError: a duty of the licence is not met, the licence is unknown, or the tag is taken.
        AccessError: the Hub refused or could not be reached; run it again to go on.

    Example:
        >>> from loram_hub import push  # doctest: +SKIP
        >>> push("llama-nf4", "org/Llama-3.1-70B-LoRAM-0.85", tag="v1")  # doctest: +SKIP
    """
    content = _release_content(Path(release).expanduser())
    request = _Request(
        repo_id=repo_id, private=private, gated=gated, licence=license, evaluation=evaluation, tag=tag,
        collection=collection, message=message, overwrite=overwrite, token=token,
    )  # fmt: skip
    return _push(content, request, dry_run=dry_run)


def push_adapter(
    adapter: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    gated: Gate | None = None,
    license: str | None = None,
    evaluation: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    tag: str | None = None,
    collection: str | None = None,
    message: str | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Publish a full-size adapter on the Hub, where PEFT and vLLM open it by its id.

    Arguments, result and errors are those of `push`.

    Raises:
        UnsupportedAdapterError: the adapter was trained on a release and not recovered yet.
    """
    request = _Request(
        repo_id=repo_id, private=private, gated=gated, licence=license, evaluation=evaluation, tag=tag,
        collection=collection, message=message, overwrite=overwrite, token=token,
    )  # fmt: skip
    return _push(_adapter_content(Path(adapter).expanduser(), token), request, dry_run=dry_run)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
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


def _push(content: _Content, request: _Request, *, dry_run: bool) -> Pushed:
    _check_names(request)
    facts = _ask_hub(content, request, dry_run=dry_run)
    documents = _documents(content, request, facts.base)
    texts = _texts(content.files | documents)
    on_card = facts.base.licence if facts.base else None
    licence = licence_of(content.base_id, declared=request.licence, on_card=on_card, documents=texts)
    kept = _kept_card(content, request, facts.target)
    files = content.files | _with_card(content, request, licence, documents | kept)
    private, gated = _visibility(request, facts, content)
    held = facts.held
    deleted, foreign = _leftovers(request, facts, files, keeps_card=bool(kept))
    planned = Pushed(
        repo_id=request.repo_id,
        url=f"{constants.ENDPOINT}/{request.repo_id}",
        kind=content.kind,
        base_id=content.base_id,
        commit=None,
        files=tuple(
            PushedFile(name=name, size=file.size, is_new=not file.is_stored_as(held.get(name)))
            for name, file in sorted(files.items())
        ),
        left_out=content.left_out,
        deleted=deleted,
        licence=licence.id,
        duties=_licence_duties(licence, request, files),
        private=private,
        gated=gated,
        tag=request.tag,
        collection=request.collection,
        notes=tuple(facts.notes),
        problems=(),
    )
    planned = replace(planned, problems=tuple(_problems(planned, content, facts, files, foreign, request.token)))
    if dry_run:
        return planned
    if facts.refusal is not None:
        raise AccessError(f"{request.repo_id} cannot be written to: {facts.refusal}.")
    if planned.problems:
        raise InvalidRequestError(f"Nothing was pushed to {request.repo_id}. {' '.join(planned.problems)}")
    for note in planned.notes:
        logger.info("%s", note)
    published = publish_files(
        [files[name] for name in sorted(files)],
        request.repo_id,
        message=request.message or content.message,
        private=private,
        gated=gated,
        seen=facts.target,
        delete=deleted,
        tag=request.tag,
        collection=request.collection,
        token=request.token,
    )
    return replace(planned, commit=published.commit)


def _check_names(request: _Request) -> None:
    if _REPO_ID.fullmatch(request.repo_id) is None:
        raise InvalidRequestError(f"{request.repo_id!r:.200} is no Hub id; give one as org/name.")
    if request.tag is not None and (_TAG.fullmatch(request.tag) is None or request.tag == "main"):
        raise InvalidRequestError(f"{request.tag!r:.200} is no name for a tag; something like v1 or 2026-11 is.")
    if request.collection is not None and not request.collection.strip():
        raise InvalidRequestError("The collection has no name. Give its slug, or a title.")


def _release_content(folder: Path) -> _Content:
    release = verify(folder, sha256=partial(remembered_sha256, read=sha256_of_finite))
    manifest = release.manifest
    listed = {
        name: UploadFile(name=name, content=folder / name, size=entry.size, sha256=entry.sha256)
        for name, entry in manifest.files.items()
    }
    present = _present(folder)
    files = listed | {name: _local(folder, name) for name in present if name not in listed and _may_be_pushed(name)}
    return _Content(
        folder=folder,
        kind="release",
        base_id=manifest.base.id,
        base_commit=manifest.base.commit,
        files=files,
        left_out=tuple(sorted(set(present) - set(files))),
        message=f"LoRAM release of {manifest.base.id}, ratio {manifest.pruning.pruning_ratio:g}",
    )


def _adapter_content(folder: Path, token: str | bool | None) -> _Content:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder} is no adapter: it has no {ADAPTER_CONFIG}.")
    base_id, revision = _named_base(folder)
    base_config = _base_config(base_id, revision, token)
    refuse_pruned(folder, base_config=base_config)
    checked = check_adapter(folder, architecture=None if base_config is None else architecture_of(base_config))
    present = _present(folder)
    names = [name for name in present if name in (ADAPTER_CONFIG, WEIGHTS, RECORD) or _is_companion(name)]
    return _Content(
        folder=folder,
        kind=checked.kind,
        base_id=base_id,
        base_commit=revision,
        files={name: _local(folder, name) for name in names},
        left_out=tuple(sorted(set(present) - set(names))),
        message=f"LoRA adapter for {base_id}",
    )


def _named_base(folder: Path) -> tuple[str, str | None]:
    config = read_json(folder / ADAPTER_CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise InvalidRequestError(
            f"{folder / ADAPTER_CONFIG} names no base model (base_model_name_or_path), so nobody could use it. "
            "Write the base's Hub id there."
        )
    return base, revision if isinstance(revision, str) else None


def _base_config(base_id: str, revision: str | None, token: str | bool | None) -> dict[str, Any] | None:
    """Return the base's config; None, with a warning, if it cannot be had."""
    try:
        return read_json(resolve_config(base_id, revision=revision, token=token))
    except (AccessError, CheckpointError) as err:
        logger.warning("Shapes are not compared with %s, whose config cannot be had: %s", base_id, err)
        return None


def _present(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in names if not name.startswith((".git/", ".cache/")) and name != ".gitattributes")


def _may_be_pushed(name: str) -> bool:
    return _matches(name, ALLOWED) and not _matches(name, _NEVER)


def _is_companion(name: str) -> bool:
    return _matches(name, _COMPANIONS_OF_ADAPTERS) and not _matches(name, _NEVER)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path fits a pattern of as many levels: `*.json` names no file in a folder."""
    return any(pattern.count("/") == name.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def _local(folder: Path, name: str) -> UploadFile:
    path = folder / name
    return UploadFile(name=name, content=path, size=path.stat().st_size, sha256=remembered_sha256(path))


def _generated(name: str, data: bytes) -> UploadFile:
    return UploadFile(name=name, content=data, size=len(data), sha256=hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
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


def _ask_hub(content: _Content, request: _Request, *, dry_run: bool) -> _Facts:
    """Look up base and repository; a dry run does without an answer, and says so."""
    try:
        return _Facts(
            base=look_up(content.base_id, token=request.token) if "/" in content.base_id else None,
            target=look_up(request.repo_id, refs=True, token=request.token),
            refusal=why_not_writable(request.repo_id, token=request.token),
        )
    except AccessError as err:
        if not dry_run:
            raise
        return _Facts(notes=[f"The Hub was not asked about {content.base_id} and {request.repo_id}: {err}"])


def _problems(
    planned: Pushed,
    content: _Content,
    facts: _Facts,
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


def _leftovers(
    request: _Request, facts: _Facts, files: Mapping[str, UploadFile], *, keeps_card: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divide what else is on `main`: files of an earlier push, which go, and others that loaders would open."""
    rest = sorted(set(facts.held) - set(files))
    earlier = _earlier_files(request, facts.target) if rest else set()
    own = tuple(name for name in rest if name in earlier or (name in GENERATED and not keeps_card))
    opened = tuple(name for name in rest if name not in own and is_fetched(name))
    return (tuple(sorted({*own, *opened})), ()) if request.overwrite else (own, opened)


def _kept_card(content: _Content, request: _Request, target: RemoteRepository | None) -> dict[str, UploadFile]:
    """Return the card on the Hub if it stays: of the same release, where neither folder nor evaluation give another."""
    mark = MANIFEST if content.kind == "release" else WEIGHTS
    if target is None or _CARD in content.files or request.evaluation is not None or _CARD not in target.files:
        return {}
    if not content.files[mark].is_stored_as(target.files.get(mark)):
        return {}
    source = resolve(request.repo_id, revision=target.commit, token=request.token, files=(_CARD,))
    return {_CARD: _local(source.folder, _CARD)}


def _earlier_files(request: _Request, target: RemoteRepository | None) -> set[str]:
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


def _documents(content: _Content, request: _Request, base: RemoteRepository | None) -> dict[str, UploadFile]:
    """Fetch licence texts of the base that the folder lacks."""
    if base is None or any(_matches(name, ("LICENSE*",)) for name in content.files):
        return {}
    try:
        source = resolve(content.base_id, revision=content.base_commit, token=request.token, files=_LICENCE_TEXTS)
    except LoramError as err:
        logger.warning("The licence texts of %s cannot be fetched: %s", content.base_id, err)
        return {}
    names = [path.name for path in sorted(source.folder.iterdir()) if _matches(path.name, _LICENCE_TEXTS)]
    return {name: _local(source.folder, name) for name in names if name not in content.files}


def _with_card(
    content: _Content, request: _Request, licence: Licence, documents: Mapping[str, UploadFile]
) -> dict[str, UploadFile]:
    """Add what the folder lacks: licence texts, the notice that the licence asks for, a card and its pictures."""
    added = dict(documents)
    notice = notice_file(licence, _texts(content.files | added))
    if notice is not None:
        added[notice[0]] = _generated(notice[0], notice[1].encode())
    if _CARD not in content.files | added:
        measured = request.evaluation
        values = read_json(Path(measured)) if isinstance(measured, str | os.PathLike) else measured
        card = make_card(
            content.folder,
            repo_id=request.repo_id,
            license=licence.id,
            evaluation=values,
            documents=_texts(content.files | added),
        )
        made = {name: data for name, data in card.all_files.items() if name not in content.files | added}
        added |= {name: _generated(name, data) for name, data in made.items()}
    return added


def _texts(files: Mapping[str, UploadFile]) -> dict[str, str]:
    """Read the licence, notice and policy texts among the files to push."""
    named = {name: file.content for name, file in files.items() if _matches(name, _LICENCE_TEXTS)}
    data = {name: held if isinstance(held, bytes) else held.read_bytes() for name, held in named.items()}
    return {name: text.decode("utf-8", "replace") for name, text in data.items()}


def _licence_duties(licence: Licence, request: _Request, files: Mapping[str, UploadFile]) -> tuple[Duty, ...]:
    held = files[_CARD].content
    card = (held if isinstance(held, bytes) else held.read_bytes()).decode("utf-8", "replace")
    return duties(licence, repo_name=request.repo_id, documents=_texts(files), card=card)


def _visibility(request: _Request, facts: _Facts, content: _Content) -> tuple[bool, Gate]:
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
