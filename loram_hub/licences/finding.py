"""Which licence a base model has: what its owner, its card, its licence file and its name say, and what is declared.

A release names its base, and anyone can copy a model under a name of their own. So a licence that binds is looked for
in four places, and what is found there outweighs what anybody says afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from loram_hub.errors import InvalidRequestError
from loram_hub.licences.documents import LICENCE_FILE, plain, texts_named
from loram_hub.licences.records import HUB_IDS, LICENCES, Licence

_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pointer:
    """What says that a base model has a licence that binds."""

    licence: Licence
    says: str
    """Clause that the name of the licence completes."""


def licence_of(
    base_id: str,
    *,
    declared: str | None = None,
    on_card: str | None = None,
    documents: Mapping[str, str] | None = None,
) -> Licence:
    """Find the licence of a base model.

    A licence that binds (`Licence.binds`) cannot be declared away, by user or card. The first of these that points to
    one decides: the base's owner, its card, the text of a licence file, its name (a copy of a known model under another
    name space). Where none does, what the user says counts, then the card, the text, what its owner is known to use.

    Args:
        base_id: Hub id of the base model, or its folder's name.
        declared: what the user says it is.
        on_card: what the base's card declares, see `declared_licence`.
        documents: licence files of the base or of what was made from it, by name, see `licence_documents`. One that
            binds is known by its words, whatever else the file holds; Apache-2.0 and MIT are told by a file that begins
            as they do and is the only one.

    Returns:
        The licence; one without known conditions if it is declared but not known here.

    Raises:
        InvalidRequestError: no licence can be told, or the one declared would replace one that binds.
    """
    known = next((licence for licence in LICENCES if re.fullmatch(licence.models, base_id)), None)
    texts = texts_named(documents or {}, LICENCE_FILE)
    binding = _binding(base_id, known, on_card, texts)
    said = on_card if declared is None else declared
    if said is not None:
        _refuse_replacement(base_id, binding, said, by_user=declared is not None)
        return _named(base_id, said)
    found = binding[0].licence if binding else _permissive(texts) or known
    if found is None:
        raise InvalidRequestError(
            f"The licence of {base_id!r} is not known here. Look at its card and pass it: license='apache-2.0', say."
        )
    return found


def declared_licence(metadata: Mapping[str, object]) -> str | None:
    """Return the licence that a card's metadata declare, `license_name` where `license` is `other`; None if none."""
    licence, name = metadata.get("license"), metadata.get("license_name")
    if licence == "other":
        licence = name
    return licence if isinstance(licence, str) and licence else None


def _binding(
    base_id: str, known: Licence | None, on_card: str | None, texts: Mapping[str, str]
) -> tuple[_Pointer, ...]:
    """Return what the strongest source says of a licence that binds: one pointer, one for each text, or none."""
    if known is not None and known.binds:
        return (_Pointer(licence=known, says="its owner publishes it under"),)
    listed = None if on_card is None else _listed(on_card)
    if listed is not None and listed.binds:
        return (_Pointer(licence=listed, says="its card declares"),)
    held = _held(texts)
    if held:
        return held
    likely = next((licence for licence in LICENCES if licence.binds and _matches_name(licence, base_id)), None)
    return () if likely is None else (_Pointer(licence=likely, says="it is named like a model under"),)


def _held(texts: Mapping[str, str]) -> tuple[_Pointer, ...]:
    comparable = {name: plain(text) for name, text in texts.items()}
    return tuple(
        _Pointer(licence=licence, says=f"its licence file {name!r} holds the text of")
        for name, text in comparable.items()
        for licence in LICENCES
        if licence.binds and licence.text_holds is not None and plain(licence.text_holds) in text
    )


def _matches_name(licence: Licence, base_id: str) -> bool:
    name = base_id.rpartition("/")[2]
    return any(re.fullmatch(licence.models, f"{owner}/{name}") for owner in ("meta-llama", "google", "Qwen"))


def _refuse_replacement(base_id: str, binding: tuple[_Pointer, ...], said: str, *, by_user: bool) -> None:
    ids = list(dict.fromkeys(pointer.licence.id for pointer in binding))
    if not ids or _normal(said) in ids:
        return
    licence = binding[0].licence
    source = f"The licence of {base_id} was given as" if by_user else f"The card of {base_id} gives its licence as"
    raise InvalidRequestError(
        f"{source} {said!r}, but {binding[0].says} the {licence.title} ({licence.id}), which a derivative cannot "
        f"leave. Pass license={' or '.join(map(repr, ids))}."
    )


def _named(base_id: str, said: str) -> Licence:
    identifier = _normal(said)
    if identifier in ("other", "unknown") or _LICENCE_ID.fullmatch(identifier) is None:
        raise InvalidRequestError(
            f"The licence of {base_id} was given as {identifier!r}, which names none. Pass the Hub's identifier "
            "(license='apache-2.0'), or the name that the base's card has under license_name."
        )
    return _listed(identifier) or Licence(id=identifier, title=identifier, on_hub=identifier in HUB_IDS)


def _listed(said: str) -> Licence | None:
    return next((licence for licence in LICENCES if licence.id == _normal(said)), None)


def _normal(said: str) -> str:
    return said.strip().lower()


def _permissive(texts: Mapping[str, str]) -> Licence | None:
    """Return the licence without duties of its own that the only licence file begins as.

    Its words somewhere in the text would say too little: other terms are made from Apache's and MIT's, and refer to
    them. A second file may hold the terms of something else.
    """
    if len(texts) != 1:
        return None
    (text,) = texts.values()
    beginning = plain(text).lstrip("# ").removeprefix("the ")
    return next(
        (
            licence
            for licence in LICENCES
            if not licence.binds and licence.text_holds is not None
            if beginning.startswith((plain(licence.title), plain(licence.text_holds)))
        ),
        None,
    )
