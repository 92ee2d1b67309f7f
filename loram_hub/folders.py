"""Where the files of an untrusted folder may lie."""

from __future__ import annotations

import os
import re
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}")


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a link in a folder leads to a file elsewhere.

    A snapshot in a Hub cache consists of links: into `blobs` beside `snapshots/<commit>` and, for what came through
    xet, on into a store of the whole cache.
    """
    target, home = os.path.realpath(path), os.path.realpath(folder)
    snapshots, commit = os.path.split(home)
    homes = [home]
    if os.path.basename(snapshots) == "snapshots" and _COMMIT.fullmatch(commit):
        repository = os.path.dirname(snapshots)
        homes += [os.path.join(repository, "blobs"), os.path.join(os.path.dirname(repository), "blobs")]
    # The store may itself be a link, to a disk with more room.
    return not any(target.startswith(os.path.realpath(place) + os.sep) for place in homes)
