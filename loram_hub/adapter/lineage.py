"""Is this the base model that an adapter was recovered for?"""

from __future__ import annotations

import os
import re
from pathlib import Path

from loram_hub.adapter.config import CONFIG, parse_config
from loram_hub.adapter.record import RECORD, RECOVERED, read_record
from loram_hub.errors import IncompatibleError
from loram_hub.files import read_json, sha256_of

_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_base(
    adapter: Path, base: Path, *, commit: str | None, name: str | None = None, may_differ: bool = True
) -> None:
    """Compare a base model with the one that an adapter names, by commit, or by config where one has none.

    Weights that moved on since the release was pruned take the adapter without an error and answer worse.

    Args:
        adapter: folder of the adapter.
        base: folder of the base model.
        commit: its commit on the Hub; None for a folder that is not from there.
        name: what the adapter is called in errors; None for its folder.
        may_differ: whether the caller has an option to go on all the same, which errors then name.

    Raises:
        IncompatibleError: it is another state of the model.
        VerificationError: a file of the adapter is torn or altered.
    """
    named, config_sha256 = _named_base(adapter)
    called = name or str(adapter)
    spite = "; to merge or evaluate in spite of it, give --allow-base-mismatch" if may_differ else ""
    remedy = f"Load that state of the base{spite}."
    if named is not None and commit is not None:
        if named != commit:
            raise IncompatibleError(
                f"{called} was made for commit {named[:12]} of its base; {base} is at {commit[:12]}. {remedy}"
            )
    elif config_sha256 is not None and sha256_of(base / "config.json") != config_sha256:
        raise IncompatibleError(
            f"{called} was made for a base whose config.json has the SHA-256 {config_sha256[:12]}...; that of {base} "
            f"differs. {remedy}"
        )


def pinned_revision(adapter: Path, base: str | os.PathLike[str]) -> str | None:
    """Return the revision at which an adapter names its base, if `base` is the name it gives it."""
    config = parse_config(read_json(adapter / CONFIG), source=str(adapter / CONFIG))
    return config.revision if config.base == str(base) else None


def _named_base(adapter: Path) -> tuple[str | None, str | None]:
    """Return commit and config hash of the base, as far as the adapter knows them."""
    if (adapter / RECORD).is_file() and read_json(adapter / RECORD).get("kind") == RECOVERED:
        record = read_record(adapter)
        return record.base_commit, record.base_config_sha256
    revision = parse_config(read_json(adapter / CONFIG), source=str(adapter / CONFIG)).revision
    return (revision if revision is not None and _COMMIT.fullmatch(revision) else None), None
