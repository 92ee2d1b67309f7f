"""A card as files, and how they get into a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loram_hub.cards.metadata import EVAL_RESULTS, TASK_RESULTS
from loram_hub.cards.pictures import ALIGNMENT_LOSS, KEPT_GROUPS
from loram_hub.errors import InvalidRequestError
from loram_hub.files import fsync_folder, resource_errors
from loram_hub.licences import Licence, licence_documents, notice_file
from loram_hub.manifest import MANIFEST, read_manifest
from loram_hub.release import is_release

README = "README.md"
GENERATED = (README, KEPT_GROUPS, ALIGNMENT_LOSS, EVAL_RESULTS, TASK_RESULTS)
"""Files that belong to a card whatever it says: an older card's are removed where the new one has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A model card, not yet written anywhere."""

    text: str
    """Text of README.md."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What goes along, by path in the repository: pictures, evaluation results, a Notice file."""

    @property
    def all_files(self) -> dict[str, bytes]:
        """Every file, README.md first."""
        return {README: self.text.encode(), **self.files}


def notice_files(folder: Path, licence: Licence, documents: Mapping[str, str] | None) -> dict[str, bytes]:
    """Return the Notice file that the licence asks for and that neither folder nor `documents` have."""
    notice = notice_file(licence, {**licence_documents(folder), **(documents or {})})
    return {} if notice is None else {notice[0]: notice[1].encode()}


def write_card(folder: Path, card: Card) -> tuple[str, ...]:
    """Write a card into a release or adapter, each file whole or not at all; README.md, which names the others, last.

    Args:
        folder: the release or adapter.
        card: from `make_card`.

    Returns:
        Names of the written files.

    Raises:
        InvalidRequestError: the manifest of the release lists one of the files: writing it would break the release; or
            a folder in it is a link.
        ResourceError: the disk is full or not writable.
    """
    listed = set(read_manifest(folder).files) if is_release(folder) else set()
    fixed = sorted(listed & (set(card.all_files) | set(GENERATED)))
    if fixed:
        raise InvalidRequestError(
            f"{folder} has {fixed[0]} in its {MANIFEST}: it is part of the release, and a new one would make it fail "
            "verification. Prune into a folder without it, then write the card."
        )
    _refuse_links(folder, [*card.all_files, *GENERATED])
    written: dict[str, Path] = {}
    with resource_errors(f"Writing the card into {folder}"):
        try:
            for name, content in reversed(card.all_files.items()):
                written[name] = _partial(folder, name)
                _write(written[name], content)
            _exchange(folder, written, outdated=[name for name in GENERATED[1:] if name not in card.files])
        finally:
            for partial in written.values():
                partial.unlink(missing_ok=True)
    return tuple(card.all_files)


def _refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse links on the way to a file: whoever made the folder would choose where the card is written."""
    for parent in sorted({parent for name in names for parent in Path(name).parents if parent != Path()}):
        if (folder / parent).is_symlink():
            raise InvalidRequestError(
                f"{folder / parent} is a link; a card is written into the folder itself. Remove the link."
            )


def _partial(folder: Path, name: str) -> Path:
    """Name a file beside the folder: a killed run leaves nothing in it that verification would refuse."""
    root = Path(os.path.realpath(folder))
    return root.with_name(f".{root.name}.{name.replace('/', '.')}.partial")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _exchange(folder: Path, written: Mapping[str, Path], *, outdated: list[str]) -> None:
    """Put a card in the place of an older one, now that all of it is on the disk."""
    for name in outdated:
        (folder / name).unlink(missing_ok=True)
    for name, partial in written.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        partial.replace(target)
        fsync_folder(target.parent)
