"""Which conditions of a licence a repository meets, and how to meet the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from loram_hub.licences.documents import LICENCE_FILE, NOTICE_FILE, POLICY_FILE, plain, texts_named
from loram_hub.licences.records import CHANGES, Licence


@dataclass(frozen=True, kw_only=True, slots=True)
class Duty:
    """One condition of a licence, looked at in one repository."""

    what: str
    """The condition."""
    met: bool
    """Whether the repository meets it."""
    how: str
    """What to do where it does not."""


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
    return any(plain(sentence) in plain(text) for text in texts_named(documents, NOTICE_FILE).values())


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
    texts = texts_named(documents, LICENCE_FILE).values()
    marker = licence.text_holds
    return Duty(
        what="a licence file travels along (its text was not compared)"
        if marker is None
        else f"a copy of the {licence.title} travels along",
        met=any(text.strip() and (marker is None or plain(marker) in plain(text)) for text in texts),
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
                met=any(text.strip() for text in texts_named(documents, POLICY_FILE).values()),
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
            met=any(plain(line) in plain(_body(card)) for line in licence.display),
            how=f"Write {lines} into README.md, where readers see it (loram card does).",
        ),
    )


def _changes_duty(licence: Licence, card: str) -> tuple[Duty, ...]:
    if not licence.states_changes:
        return ()
    return (
        Duty(
            what="the card says what was changed",
            met=plain(CHANGES) in plain(_body(card)),
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


def _at(link: str | None) -> str:
    return "" if link is None else f" (it is also at {link})"
