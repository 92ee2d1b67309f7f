"""What a push adds to a folder's files: licence texts, the notice a licence asks for, a card."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from loram_hub.adapter import WEIGHTS
from loram_hub.cards import make_card
from loram_hub.errors import LoramError
from loram_hub.files import read_json
from loram_hub.hub import RemoteRepository, UploadFile, resolve
from loram_hub.licences import Duty, Licence, duties, notice_file
from loram_hub.manifest import MANIFEST
from loram_hub.pushing.contents import CARD, LICENCE_TEXTS, Content, generated_file, local_file, matches, texts_of
from loram_hub.pushing.planning import Request

logger = logging.getLogger(__name__)


def licence_texts(content: Content, request: Request, base: RemoteRepository | None) -> dict[str, UploadFile]:
    """Fetch licence texts of the base that the folder lacks."""
    if base is None or any(matches(name, ("LICENSE*",)) for name in content.files):
        return {}
    try:
        source = resolve(content.base_id, revision=content.base_commit, token=request.token, files=LICENCE_TEXTS)
    except LoramError as err:
        logger.warning("The licence texts of %s cannot be fetched: %s", content.base_id, err)
        return {}
    names = [path.name for path in sorted(source.folder.iterdir()) if matches(path.name, LICENCE_TEXTS)]
    return {name: local_file(source.folder, name) for name in names if name not in content.files}


def kept_card(content: Content, request: Request, target: RemoteRepository | None) -> dict[str, UploadFile]:
    """Return the card on the Hub if it stays: of the same release, where neither folder nor evaluation give another."""
    mark = MANIFEST if content.kind == "release" else WEIGHTS
    if target is None or CARD in content.files or request.evaluation is not None or CARD not in target.files:
        return {}
    if not content.files[mark].is_stored_as(target.files.get(mark)):
        return {}
    source = resolve(request.repo_id, revision=target.commit, token=request.token, files=(CARD,))
    return {CARD: local_file(source.folder, CARD)}


def completed(
    content: Content, request: Request, licence: Licence, documents: Mapping[str, UploadFile]
) -> dict[str, UploadFile]:
    """Add what the folder lacks: licence texts, the notice that the licence asks for, a card and its pictures."""
    added = dict(documents)
    notice = notice_file(licence, texts_of(content.files | added))
    if notice is not None:
        added[notice[0]] = generated_file(notice[0], notice[1].encode())
    if CARD not in content.files | added:
        measured = request.evaluation
        values = read_json(Path(measured)) if isinstance(measured, str | os.PathLike) else measured
        card = make_card(
            content.folder,
            repo_id=request.repo_id,
            license=licence.id,
            evaluation=values,
            documents=texts_of(content.files | added),
        )
        made = {name: data for name, data in card.all_files.items() if name not in content.files | added}
        added |= {name: generated_file(name, data) for name, data in made.items()}
    return added


def licence_duties(licence: Licence, request: Request, files: Mapping[str, UploadFile]) -> tuple[Duty, ...]:
    """Look at every condition of the licence in what is pushed."""
    held = files[CARD].content
    card = (held if isinstance(held, bytes) else held.read_bytes()).decode("utf-8", "replace")
    return duties(licence, repo_name=request.repo_id, documents=texts_of(files), card=card)
