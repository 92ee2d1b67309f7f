"""From a folder to the Hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from loram_hub.errors import AccessError, InvalidRequestError
from loram_hub.hub import Gate, publish_files
from loram_hub.licences import licence_of
from loram_hub.pushing.contents import Content, adapter_content, release_content, texts_of
from loram_hub.pushing.documents import completed, kept_card, licence_duties, licence_texts
from loram_hub.pushing.planning import (
    Request,
    ask_hub,
    check_names,
    choose_visibility,
    find_leftovers,
    find_problems,
)
from loram_hub.pushing.records import Pushed, PushedFile

logger = logging.getLogger(__name__)


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
        license: the Hub's identifier of the base's licence; None for the one that its owner, card, licence text or name
            tells.
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
    content = release_content(Path(release).expanduser())
    request = Request(
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
    request = Request(
        repo_id=repo_id, private=private, gated=gated, licence=license, evaluation=evaluation, tag=tag,
        collection=collection, message=message, overwrite=overwrite, token=token,
    )  # fmt: skip
    return _push(adapter_content(Path(adapter).expanduser(), token), request, dry_run=dry_run)


def _push(content: Content, request: Request, *, dry_run: bool) -> Pushed:
    check_names(request)
    facts = ask_hub(content, request, dry_run=dry_run)
    documents = licence_texts(content, request, facts.base)
    texts = texts_of(content.files | documents)
    on_card = facts.base.licence if facts.base else None
    licence = licence_of(content.base_id, declared=request.licence, on_card=on_card, documents=texts)
    kept = kept_card(content, request, facts.target)
    files = content.files | completed(content, request, licence, documents | kept)
    private, gated = choose_visibility(request, facts, content)
    held = facts.held
    deleted, foreign = find_leftovers(request, facts, files, keeps_card=bool(kept))
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
        duties=licence_duties(licence, request, files),
        private=private,
        gated=gated,
        tag=request.tag,
        collection=request.collection,
        notes=tuple(facts.notes),
        problems=(),
    )
    planned = replace(planned, problems=tuple(find_problems(planned, content, facts, files, foreign, request.token)))
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
