"""What the Hub holds of a release that was pushed: whether it is what the recipe asks for, and whose card it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loram_hub.digests import git_sha1_of
from loram_hub.errors import InvalidRequestError, VerificationError
from loram_hub.hub import RemoteRepository, look_up
from loram_hub.manifest import MANIFEST
from loram_hub.pipeline.recipe import Recipe

CARD = "README.md"


def check_pushed(recipe: Recipe, commit: str, *, token: str | bool | None) -> None:
    """Compare the repository of a release with the commit that was pushed and with what the recipe says of it.

    Raises:
        VerificationError: it is at another commit, its tag is gone or elsewhere, or others can see it than were meant.
        AccessError: the Hub could not be reached.
    """
    stage, repo_id = recipe.push, recipe.repo_id
    assert stage is not None
    held = look_up(repo_id, refs=stage.tag is not None, token=token)
    if held is None or held.commit != commit:
        found = "nothing" if held is None else f"commit {held.commit[:12]}"
        raise VerificationError(f"{repo_id} is at {found}, not at {commit[:12]}.")
    if stage.private is not None and held.private != stage.private:
        raise VerificationError(f"{repo_id} is {_visibility(held.private)}, not {_visibility(stage.private)}.")
    if stage.gated is not None and held.gated != stage.gated:
        raise VerificationError(f"gated of {repo_id} is {_shown(held.gated)}, not {_shown(stage.gated)}.")
    if stage.tag is not None:
        _check_tag(held, repo_id, stage.tag, token=token)


def _check_tag(held: RemoteRepository, repo_id: str, tag: str, *, token: str | bool | None) -> None:
    """Check that a tag is on the release; on an earlier commit of the same content a push leaves it where it is."""
    tagged = held.tags.get(tag)
    if tagged is None:
        raise VerificationError(f"{repo_id} has no tag {tag}.")
    if tagged == held.commit:
        return
    there = look_up(repo_id, revision=tagged, token=token)
    if there is None or any(there.files.get(name) != held.files.get(name) for name in (MANIFEST, CARD)):
        raise VerificationError(f"The tag {tag} of {repo_id} is on commit {tagged[:12]}, which holds other files.")


def refuse_to_replace_card(
    recipe: Recipe, release: Path, pushed: Mapping[str, Any], *, token: str | bool | None
) -> None:
    """Raise `InvalidRequestError` if a push would replace a card that did not come from here.

    Args:
        recipe: names the repository.
        release: folder of the release that is to be pushed.
        pushed: what was remembered of the last push, with git's id of its card; empty if there was none.
        token: of the Hub.
    """
    assert recipe.push is not None
    held = None if recipe.push.overwrite else look_up(recipe.repo_id, token=token)
    there = None if held is None else held.files.get(CARD)
    if held is None or there is None or there.git_sha1 == pushed.get("card"):
        return
    card = release / CARD
    if card.is_file() and there.git_sha1 == git_sha1_of(card):
        return
    raise InvalidRequestError(
        f"{CARD} of {recipe.repo_id}, at commit {held.commit[:12]}, is not the one that was pushed from "
        f"{release.parent}: it was edited on the Hub, or pushed from elsewhere. To keep it, copy it to {card}; to "
        "replace it, set push.overwrite to true."
    )


def _visibility(private: bool) -> str:
    return "private" if private else "public"


def _shown(gated: str | bool) -> str:
    return gated if isinstance(gated, str) else str(gated).lower()
