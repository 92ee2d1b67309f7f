"""Which conditions of a licence a repository meets, and how to meet the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loram_hub.files import resource_errors
from loram_hub.licences.records import CHANGES, Licence

_MAX_DOCUMENT_BYTES = 1024 * 1024
_LICENCE_FILE = re.compile(r"(LICEN[SC]E|COPYING).*", re.IGNORECASE)
_NOTICE_FILE = re.compile(r"NOTICE(\.txt|\.md)?", re.IGNORECASE)
_POLICY_FILE = re.compile(r"USE_POLICY.*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Duty:
    """One condition of a licence, looked at in one repository."""

    what: str
    """The condition."""
    met: bool
    """Whether the repository meets it."""
    how: str
    """What to do where it does not."""


def licence_documents(folder: Path) -> dict[str, str]:
    """Read the texts that `duties` looks at: LICENSE, Notice and USE_POLICY files of a folder, by name.

    Raises:
        ResourceError: one cannot be read.
    """
    patterns = (_LICENCE_FILE, _NOTICE_FILE, _POLICY_FILE)
    with resource_errors(f"Reading {folder}"):
        return {
            path.name: path.read_bytes()[:_MAX_DOCUMENT_BYTES].decode("utf-8", "replace")
            for path in sorted(folder.iterdir())
            if path.is_file() and any(pattern.fullmatch(path.name) for pattern in patterns)
        }


def notice_file(licence: Licence, documents: Mapping[str, str]) -> tuple[str, str] | None:
    """Return name and text of the Notice file that a folder still lacks; None if nothing is asked for or it is there.

    Args:
        licence: of the base model.
        documents: what the folder has, see `licence_documents`; none of it is to be changed.
    """
    if licence.notice is None or _has_notice(licence.notice, documents):
        return None
    taken = {name.lower() for name in documents}  # some file systems know no difference between Notice and NOTICE
    changes = f"\n{CHANGES} its files were modified, as README.md says.\n" if licence.states_changes else ""
    return "Notice.txt" if "notice" in taken else "Notice", f"{licence.notice}\n{changes}"


def _has_notice(sentence: str, documents: Mapping[str, str]) -> bool:
    return any(_plain(sentence) in _plain(text) for text in _texts(documents, _NOTICE_FILE))


def duties(licence: Licence, *, repo_name: str, documents: Mapping[str, str], card: str) -> tuple[Duty, ...]:
    """Look at every condition of a licence in a repository that is to be published.

    Args:
        licence: of the base model.
        repo_name: Hub id of the repository, or the part after the slash.
        documents: text by name of its licence, Notice and use policy files, see `licence_documents`.
        card: text of its README.md, metadata included.

    Returns:
        The conditions, the unmet ones with what to do.
    """
    return (
        *_name_duty(licence, repo_name.rpartition("/")[2]),
        _text_duty(licence, documents),
        *_notice_duty(licence, documents),
        *_policy_duty(licence, documents, card),
        *_display_duty(licence, card),
        *_changes_duty(licence, card),
        _metadata_duty(licence, card),
    )


def _name_duty(licence: Licence, name: str) -> tuple[Duty, ...]:
    if licence.name_prefix is None:
        return ()
    written = licence.name_prefix.replace(" ", "-")  # names on the Hub hold no spaces
    return (
        Duty(
            what=f"the name begins with {licence.name_prefix!r}",
            met=_joined(name).startswith(_joined(licence.name_prefix)),
            how=f"Choose a repository name that begins with {written!r}, such as {written}-{name}; found {name!r}.",
        ),
    )


def _joined(name: str) -> str:
    return re.sub(r"[\s_-]", "", name)


def _text_duty(licence: Licence, documents: Mapping[str, str]) -> Duty:
    texts = _texts(documents, _LICENCE_FILE)
    marker = licence.text_holds
    return Duty(
        what=f"a copy of the {licence.title} travels along",
        met=any(text.strip() and (marker is None or _plain(marker) in _plain(text)) for text in texts),
        how=f"Copy the licence file of the base model into the folder as LICENSE{_at(licence.link)}."
        + (f" The one that is there does not hold the words {marker!r}." if texts else ""),
    )


def _notice_duty(licence: Licence, documents: Mapping[str, str]) -> tuple[Duty, ...]:
    if licence.notice is None:
        return ()
    return (
        Duty(
            what="a Notice file holds the sentence that the licence prescribes",
            met=_has_notice(licence.notice, documents),
            how=f"Write a text file Notice (loram card does) with: {licence.notice}",
        ),
    )


def _policy_duty(licence: Licence, documents: Mapping[str, str], card: str) -> tuple[Duty, ...]:
    if licence.use_policy is None:
        return ()
    if licence.has_policy_file:
        return (
            Duty(
                what="a copy of the use policy travels along",
                met=any(text.strip() for text in _texts(documents, _POLICY_FILE)),
                how=f"Copy USE_POLICY.md of the base model into the folder{_at(licence.use_policy)}.",
            ),
        )
    return (
        Duty(
            what="the card names the use policy",
            met=licence.use_policy in card,
            how=f"Write into README.md (loram card does) that use is subject to {licence.use_policy}",
        ),
    )


def _display_duty(licence: Licence, card: str) -> tuple[Duty, ...]:
    if not licence.display:
        return ()
    lines = " or ".join(repr(line) for line in licence.display)
    return (
        Duty(
            what=f"the card shows {lines}",
            met=any(_plain(line) in _plain(_body(card)) for line in licence.display),
            how=f"Write {lines} into README.md, where readers see it (loram card does).",
        ),
    )


def _changes_duty(licence: Licence, card: str) -> tuple[Duty, ...]:
    if not licence.states_changes:
        return ()
    return (
        Duty(
            what="the card says what was changed",
            met=_plain(CHANGES) in _plain(_body(card)),
            how=f"Write into README.md (loram card does): {CHANGES} ..., and which.",
        ),
    )


def _metadata_duty(licence: Licence, card: str) -> Duty:
    wanted = {key: value for key, value in licence.metadata.items() if key != "license_link"}
    front = card[: len(card) - len(_body(card))]
    lines = {line.strip().replace('"', "").replace("'", "") for line in front.splitlines()}
    shown = ", ".join(f"{key}: {value}" for key, value in wanted.items())
    return Duty(
        what=f"the card's metadata say {shown}",
        met={f"{key}: {value}" for key, value in wanted.items()} <= lines,
        how=f"Put {shown} between the --- lines at the top of README.md (loram card does).",
    )


def _body(card: str) -> str:
    """Return a card without its metadata."""
    found = re.match(r"\s*---\r?\n.*?\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    return card if found is None else card[found.end() :]


def _texts(documents: Mapping[str, str], pattern: re.Pattern[str]) -> list[str]:
    return [text for name, text in documents.items() if pattern.fullmatch(name)]


def _at(link: str | None) -> str:
    return "" if link is None else f" (it is also at {link})"


def _plain(text: str) -> str:
    """Make texts comparable: licences come as plain text and as Markdown, with one sign for copyright or another."""
    text = text.replace("©", "(c)").lower()
    return re.sub(r"\s+", " ", re.sub(r"[*_\\“”\"]", "", text))
