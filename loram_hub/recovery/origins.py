"""Which release an adapter was trained on, and whether that is the one at hand.

An adapter names its release by a path or a Hub id, of which there may be several revisions; stock PEFT records none.
Two releases of one ratio have equal shapes and keep other groups: the wrong one must not be taken without a word.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from loram_hub.adapter import Adapter
from loram_hub.errors import (
    AccessError,
    CheckpointError,
    IncompatibleError,
    InvalidRequestError,
    LoramError,
    PlanMismatchError,
    VerificationError,
)
from loram_hub.hub import METADATA_FILES, cached_commits, resolve, source_of
from loram_hub.release import Release, open_metadata

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The release an adapter was trained on."""

    release: Release
    """Opened; its weights need not be there."""
    id: str
    """Hub id, or the folder's name."""
    commit: str | None
    """Commit on the Hub; None for a folder outside of its cache."""
    assumed: bool = False
    """Whether nothing said which revision; see `RecoveredAdapter`."""


def find_origin(
    adapter: Adapter,
    trained_on: Release | None,
    known: str | None,
    release: str | os.PathLike[str] | None,
    revision: str | None,
    token: str | bool | None,
) -> Origin:
    """Open the release that an adapter was trained on, without its weights.

    Args:
        adapter: what training gave.
        trained_on: the release of the opened model it lives on, if it does.
        known: plan digest that it is known to have been trained on.
        release: what the caller names, folder or Hub id; None for what the adapter names.
        revision: of a Hub id; None for what the adapter names.
        token: of the Hub.

    Raises:
        InvalidRequestError: no release is known, or several revisions of it come into question.
        CheckpointError: what is named is no release.
        VerificationError: a file is damaged.
        AccessError: the Hub refused or could not be reached.
    """
    if release is None and trained_on is not None:
        return _origin(trained_on)
    config = adapter.config
    name = config.base if release is None else os.fspath(release)
    if name is None:
        raise InvalidRequestError(
            f"{adapter.source} does not say which release it was trained on. Give the release, as a folder or Hub id."
        )
    if name == config.base:
        revision = revision or config.revision
    try:
        if revision or _is_folder(name):
            return _open_origin(name, revision, token)
        return _open_unpinned(adapter, name, known, token)
    except CheckpointError as err:
        if release is not None:
            raise
        raise CheckpointError(
            f"{adapter.source} says that it was trained on {name}, which is no release here: {err} "
            "Give the release, as a folder or Hub id."
        ) from err


def _open_unpinned(adapter: Adapter, name: str, known: str | None, token: str | bool | None) -> Origin:
    """Open a Hub id of which nobody said the revision: at the commit that was loaded here, for the name may have moved.

    On a sparse release recovery is the same whatever was removed. One will do, but none is known to be the right one.

    Raises:
        InvalidRequestError: commits with different plans were loaded here.
    """
    here = [origin for origin in _origins_here(name, token) if known in (None, origin.release.plan.digest)]
    differ = len({origin.release.plan.digest for origin in here}) > 1
    if differ and not all(origin.release.is_sparse for origin in here):
        commits = ", ".join(f"{origin.commit} (plan {origin.release.plan.digest[:12]})" for origin in here)
        raise InvalidRequestError(
            f"{adapter.source} does not say which revision of {name} it was trained on, and the weights of several "
            f"with different plans are on this machine: {commits}. Give the one it was trained on (--revision)."
        )
    if here:
        logger.info("Nothing says which revision of %s; taken is %s, whose weights are here", name, here[0].commit)
        return replace(here[0], assumed=differ)
    latest = _open_origin(name, None, token)
    if known is not None:
        return latest
    if not latest.release.is_sparse:
        logger.warning(
            "Nothing says which revision of %s %s was trained on, and no weights of it are on this machine; the latest "
            "is taken. If that keeps other channel groups, the recovered adapter is worthless",
            name,
            adapter.source,
        )
    return replace(latest, assumed=True)


def _origins_here(name: str, token: str | bool | None) -> list[Origin]:
    """Open the commits of a Hub id whose weights are on this machine, those that arrived last first."""
    found = []
    for commit in cached_commits(name):
        try:
            found.append(_open_commit(name, commit, token))
        except (AccessError, IncompatibleError, VerificationError) as err:
            logger.warning("%s at %s opens as no release, and is passed over: %s", name, commit, err)
    return found


def _open_commit(name: str, commit: str, token: str | bool | None) -> Origin:
    """Open a commit from the cache alone; if it is damaged there, with the help of the Hub."""
    try:
        return _open_origin(name, commit, token, local_files_only=True)
    except VerificationError:
        return _open_origin(name, commit, token)


def _open_origin(
    name: str, revision: str | None, token: str | bool | None, *, local_files_only: bool = False
) -> Origin:
    source = resolve(name, revision=revision, token=token, local_files_only=local_files_only, files=METADATA_FILES)
    return _origin(open_metadata(source.folder))


def _origin(release: Release) -> Origin:
    source = source_of(release.folder)
    return Origin(release=release, id=source.id, commit=source.commit)


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


def check_plan(adapter: Adapter, known: str | None, origin: Origin, token: str | bool | None) -> None:
    """Compare the plan with the one the adapter was trained on, where that is at hand.

    Two releases of one ratio give equal shapes and different kept groups: the factors would land on the wrong channels.

    Args:
        adapter: what training gave.
        known: plan digest that it is known to have been trained on; None to look at the release that it names.
        origin: the release that was taken.
        token: of the Hub.

    Raises:
        PlanMismatchError: it is another plan.
    """
    digest = _named_digest(adapter, origin, token) if known is None else known
    if digest is not None and digest != origin.release.plan.digest:
        raise PlanMismatchError(
            f"{adapter.source} was trained on plan {digest[:12]} (release {adapter.config.base}); {origin.id} has plan "
            f"{origin.release.plan.digest[:12]}, which keeps other {_kept(origin.release)}. Give the release it was "
            "trained on, or retrain on this one."
        )


def _kept(release: Release) -> str:
    """Say what the plan of a release keeps."""
    return "weights" if release.is_sparse else "channel groups"


def known_digest(adapter: Adapter, trained_on: Release | None) -> str | None:
    """Return the digest that record or mark of the adapter give, or that of the model it lives on, if it names that."""
    recorded = adapter.record.get("plan_sha256")
    if isinstance(recorded, str):
        return recorded
    # A live adapter has the mark of the model it lives on, unless it was loaded with another.
    if trained_on is None or adapter.marked_plan not in (None, trained_on.plan.digest):
        return adapter.marked_plan
    base, revision = adapter.config.base, adapter.config.revision
    source = source_of(trained_on.folder)
    if source.commit is not None and base == source.id:
        is_named = revision in (None, "", source.commit)
    else:
        is_named = base is None or Path(base) == Path(os.path.abspath(trained_on.folder))
    return trained_on.plan.digest if is_named else None


def _named_digest(adapter: Adapter, origin: Origin, token: str | bool | None) -> str | None:
    """Return the plan digest of the release that the adapter itself names; None, with a warning, if it is gone.

    A Hub id without a revision names no plan. What was opened is then held against the commits that were loaded here,
    but the caller's word stands: they need not be what it was trained on.
    """
    base, revision = adapter.config.base, adapter.config.revision
    try:
        if base is None:
            raise CheckpointError("it names none.")
        if revision or _is_folder(base):
            return _open_origin(base, revision, token, local_files_only=True).release.plan.digest
        if origin.commit is not None and origin.id == base:
            return None
        if origin.release.plan.digest in {here.release.plan.digest for here in _origins_here(base, token)}:
            return None
        raise CheckpointError(f"it names {base} without a revision.")
    except LoramError as err:
        logger.warning(
            "%s cannot be compared with the release it was trained on: %s Shapes fit %s; if that keeps other %s, %s",
            adapter.source,
            err,
            origin.id,
            _kept(origin.release),
            "the recovered adapter is the same" if origin.release.is_sparse else "the recovered adapter is worthless",
        )
        return None
