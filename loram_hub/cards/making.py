"""The card of whatever a folder holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from loram_hub.adapter import CONFIG as ADAPTER_CONFIG
from loram_hub.cards.adapters import adapter_card, read_facts
from loram_hub.cards.folders import Card
from loram_hub.cards.releases import release_card
from loram_hub.errors import CheckpointError
from loram_hub.licences import Licence, licence_documents, licence_of
from loram_hub.release import is_release, open_metadata


def make_card(
    folder: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    license: str | None = None,
    evaluation: Mapping[str, object] | None = None,
    documents: Mapping[str, str] | None = None,
) -> Card:
    """Make the card of a release or an adapter of full size; `write_card` puts it into the folder.

    Args:
        folder: the release or adapter.
        repo_id: Hub id under which it will be published; None leaves a placeholder in the code on the card.
        license: of the base model, as its card declares it; None for the one that is known of the base.
        evaluation: the JSON of `loram eval --json`; None leaves "not measured" on the card.
        documents: licence texts that will be published with it and are not in the folder, by name.

    Returns:
        The card, a pure function of the arguments and the folder's files.

    Raises:
        CheckpointError: the folder is neither.
        VerificationError: a file is torn or altered.
        UnsupportedAdapterError: the adapter fits a pruned model and was not recovered yet.
        InvalidRequestError: no licence can be told, `license` would replace one that binds, `repo_id` is no Hub id, or
            the evaluation is of another model.
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    path = Path(folder).expanduser()
    if is_release(path):
        release = open_metadata(path)
        licence = _licence(path, release.manifest.base.id, license, documents)
        return release_card(release, repo_id=repo_id, licence=licence, evaluation=evaluation, documents=documents)
    if (path / ADAPTER_CONFIG).is_file():
        adapter = read_facts(path)
        licence = _licence(path, adapter.base_id, license, documents)
        return adapter_card(adapter, repo_id=repo_id, licence=licence, evaluation=evaluation, documents=documents)
    raise CheckpointError(f"{path} is neither a release nor an adapter: there is nothing to write a card for.")


def _licence(folder: Path, base_id: str, declared: str | None, documents: Mapping[str, str] | None) -> Licence:
    return licence_of(base_id, declared=declared, documents={**licence_documents(folder), **(documents or {})})
