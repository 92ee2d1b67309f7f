"""The only module that talks to the network: names of models, releases and adapters become local folders.

A name is a folder if one exists under it, else a Hub id. Everything is fetched by huggingface_hub into its cache, at
one commit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import HFValidationError

from loram_hub.errors import AccessError, CheckpointError

CHECKPOINT_FILES = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "Notice*",
    "USE_POLICY*",
    "README.md",
)
"""What is fetched of a model: never pickles, never code."""

METADATA_FILES = ("*.json", "mask_index.safetensors")
"""What recovery needs of a release: manifest, mask indexes, config."""

# How huggingface_hub lays its cache out. Hub names may hold single hyphens, never two in a row.
_SNAPSHOT = re.compile(r"models--(?P<id>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model, release or adapter, resolved to a folder."""

    folder: Path
    """Where its files are."""
    id: str
    """Hub id; for a local folder the folder's name, so that no path leaves this machine."""
    commit: str | None
    """Commit on the Hub; None for a local folder."""


def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    files: Sequence[str] = CHECKPOINT_FILES,
) -> Source:
    """Return the local folder of a model, release or adapter, downloading it if it is a Hub id.

    Args:
        name: folder or Hub id (`org/name`).
        revision: branch, tag or commit on the Hub; ignored for a folder.
        token: Hub token; None uses the one that is logged in.
        cache_dir: cache folder of huggingface_hub; None for its default.
        local_files_only: do not use the network.
        files: patterns of the files to fetch.

    Raises:
        CheckpointError: neither a folder nor a possible Hub id.
        AccessError: the repository does not exist, is gated or private, or the Hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return source_of(folder)
    with _access_errors(str(name)):
        snapshot = snapshot_download(
            str(name),
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=list(files),
        )
    return source_of(Path(snapshot))


def source_of(folder: Path) -> Source:
    """Name a folder: by Hub id and commit if it is a snapshot in a Hub cache, else by its own name."""
    absolute = Path(os.path.abspath(folder))
    snapshot = _SNAPSHOT.search(absolute.as_posix())
    if snapshot is None:
        return Source(folder=folder, id=absolute.name, commit=None)
    return Source(folder=folder, id=snapshot["id"].replace("--", "/"), commit=snapshot["commit"])


def resolve_config(
    name: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Return the path of a model's `config.json`; `name` is a folder, the file itself, or a Hub id.

    Raises:
        CheckpointError: a folder without config, or a name that is neither a path nor a possible Hub id.
        AccessError: see `resolve`.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is no checkpoint: it has no config.json.")
        return path / "config.json"
    with _access_errors(str(name)):
        return Path(hf_hub_download(str(name), "config.json", revision=revision, token=token))


@contextmanager
def _access_errors(name: str) -> Iterator[None]:
    try:
        yield
    except HFValidationError as err:
        raise CheckpointError(f"{name!r} is neither an existing folder nor a Hub id (org/name).") from err
    except GatedRepoError as err:
        raise AccessError(
            f"{name} is gated: accept its terms on its Hub page and log in with 'hf auth login' (or pass token=...)."
        ) from err
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as err:
        raise AccessError(
            f"{name} is no local folder, is not in the Hub cache, and the Hub was not reached "
            f"(offline mode, or no network): {err}"
        ) from err
    except HfHubHTTPError as err:
        status = err.response.status_code if err.response is not None else None
        hint = (
            "It does not exist, or is private and you are not logged in."
            if status in (401, 403, 404)
            else "Try again later."
        )
        raise AccessError(f"{name} is no local folder, and the Hub answered {status} for it. {hint}") from err
    except OSError as err:
        raise AccessError(f"{name} is no local folder, and the Hub could not be reached: {err}") from err
