"""Names of models, releases and adapters become local folders.

A name is a folder if one exists under it, else a Hub id. Everything is fetched by huggingface_hub into its cache, at
one commit, and compared with the hash that the Hub states for it: the client itself compares sizes alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers, filter_repo_objects, hf_raise_for_status, validate_repo_id

from loram_hub.checkpoint import COMPANIONS
from loram_hub.digests import check_once, git_sha1_of, remembered_sha256
from loram_hub.errors import CheckpointError, LoramError, VerificationError
from loram_hub.hub.access import access_errors, clean_token, persistently
from loram_hub.release import Release, verify
from loram_hub.tensors import sha256_of_finite

CHECKPOINT_FILES = ("*.json", "*.safetensors", "README.md", *COMPANIONS)
"""What is fetched of a model: never pickles, never code."""

_NEVER = ("*/*", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.sh", "*.so")
"""What no pattern fetches, however wide: models lie at the top of a repository, and are no code."""

METADATA_FILES = ("loram.json", "mask_index.safetensors", "config.json")
"""What recovery needs of a release: manifest, mask indexes, the base's config."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "loram.json")
"""What is fetched of an adapter."""

# How huggingface_hub lays its cache out. Hub names may hold single hyphens, never two in a row.
_SNAPSHOT = re.compile(r"models--(?P<id>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")
_SHORT_WAIT = 10.0
"""Seconds that the Hub has to answer where its answer can be done without."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


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
    compare: bool = True,
) -> Source:
    """Return the local folder of a model, release or adapter, downloading it if it is a Hub id.

    Args:
        name: folder or Hub id (`org/name`).
        revision: branch, tag or commit on the Hub; ignored for a folder.
        token: Hub token; None uses the one that is logged in.
        cache_dir: cache folder of huggingface_hub; None for its default.
        local_files_only: do not use the network.
        files: patterns of the files to fetch.
        compare: compare what is in the cache with the hashes that the Hub states; off where the caller has hashes of
            his own.

    Raises:
        CheckpointError: neither a folder nor a possible Hub id.
        AccessError: the repository does not exist, is gated or private, or the Hub cannot be reached.
        VerificationError: a file in the cache is not what the Hub says it holds, and cannot be fetched anew.
        ResourceError: the disk is full.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return source_of(folder)
    token = clean_token(token)
    offline = local_files_only or constants.HF_HUB_OFFLINE

    def download() -> list[Path]:
        snapshot = snapshot_download(
            str(name),
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=list(files),
            ignore_patterns=list(_NEVER),
        )
        present = {path.relative_to(snapshot).as_posix(): path for path in Path(snapshot).rglob("*") if path.is_file()}
        wanted = filter_repo_objects(present, allow_patterns=list(files), ignore_patterns=list(_NEVER))
        return [Path(snapshot), *(present[found] for found in sorted(wanted))]

    if compare:
        return source_of(_download_compared(str(name), download, offline=offline)[0])
    with access_errors(str(name)):
        return source_of(persistently(download)[0])


def fetch_release(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    remember: bool = True,
) -> tuple[Source, Release]:
    """Return a release with its weights, every byte of it verified. A file that was damaged is fetched once more.

    Args:
        name: folder or Hub id.
        revision: see `resolve`, as for the following.
        token: of the Hub.
        cache_dir: of huggingface_hub.
        local_files_only: do not use the network.
        remember: do not read again what was verified before and has not changed since.

    Raises:
        VerificationError: the release was altered or torn.
        IncompatibleError: its format is newer, or weights and plan do not fit.
        AccessError: the Hub refused or could not be reached.
    """
    check = (
        partial(verify, sha256=partial(remembered_sha256, read=sha256_of_finite), once=check_once)
        if remember
        else verify
    )
    fetch = partial(
        resolve, name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    source = fetch(compare=False)
    if source.commit is None or Path(name).expanduser().is_dir():
        return source, check(source.folder)
    try:
        return source, check(source.folder, ignored=lambda name: not is_fetched(name))
    except LoramError:
        source = fetch(compare=True)
    return source, check(source.folder, ignored=lambda name: not is_fetched(name))


def is_fetched(name: str) -> bool:
    """Whether a file of a repository is fetched with a model; what is not is never opened here."""
    found = filter_repo_objects([name], allow_patterns=list(CHECKPOINT_FILES), ignore_patterns=list(_NEVER))
    return bool(list(found))


def source_of(folder: Path) -> Source:
    """Name a folder: by Hub id and commit if it is a snapshot in a Hub cache, else by its own name."""
    absolute = Path(os.path.abspath(folder))
    snapshot = _SNAPSHOT.search(absolute.as_posix())
    if snapshot is None:
        return Source(folder=folder, id=absolute.name, commit=None)
    return Source(folder=folder, id=snapshot["id"].replace("--", "/"), commit=snapshot["commit"])


def cached_commits(name: str, cache_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """Return the commits of a Hub id whose weights are in this machine's cache, those that arrived last first.

    What was trained on here is among them. A snapshot of metadata alone was described or recovered with, not loaded.

    Args:
        name: Hub id.
        cache_dir: of huggingface_hub; None for its default.

    Raises:
        CheckpointError: no possible Hub id.
    """
    with access_errors(name):
        validate_repo_id(name)
    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir)
    arrived: dict[str, float] = {}
    for weights in (cache / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/model*.safetensors"):
        commit = weights.parent.name
        if _SHA1.fullmatch(commit) and weights.is_file():
            # Of the link: its blob may have come with an earlier commit.
            arrived[commit] = max(arrived.get(commit, 0.0), weights.lstat().st_mtime)
    return sorted(arrived, key=lambda commit: (-arrived[commit], commit))


def cached_config(name: str, *, revision: str | None = None) -> Path | None:
    """Return the `config.json` of a Hub id as this machine's cache has it; None if it has none. Asks nobody.

    Args:
        name: what may be a Hub id.
        revision: branch, tag or commit; None for the default branch.
    """
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def ask_once(name: str, file: str, *, revision: str | None = None, token: str | bool | None = None) -> None:
    """Ask the Hub for a file with a single request and a short wait, for what may as well be left out.

    Args:
        name: Hub id.
        file: in its repository.
        revision: branch, tag or commit; None for the default branch.
        token: of the Hub.

    Raises:
        CheckpointError: no possible Hub id.
        AccessError: the Hub refused, could not be reached, or does not answer now.
    """
    with access_errors(name):
        validate_repo_id(name)
        answer = get_session().head(
            hf_hub_url(name, file, revision=revision),
            headers=build_hf_headers(token=clean_token(token)),
            follow_redirects=True,
            timeout=_SHORT_WAIT,
        )
        hf_raise_for_status(answer)


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
    token = clean_token(token)

    def download() -> list[Path]:
        return [Path(hf_hub_download(str(name), "config.json", revision=revision, token=token))]

    return _download_compared(str(name), download, offline=constants.HF_HUB_OFFLINE)[0]


def _download_compared(name: str, download: Callable[[], list[Path]], *, offline: bool) -> list[Path]:
    """Download until every file has the content that the Hub states for it; what is damaged is fetched once more."""
    with access_errors(name):
        paths = persistently(download)
        damaged = [path for path in paths if not _has_stated_content(path)]
        if damaged and not offline:
            for path in damaged:
                _remove_from_cache(path)
            paths = persistently(download)
            damaged = [path for path in paths if not _has_stated_content(path)]
    if damaged:
        remedy = "Go online, and it is fetched again." if offline else "Is a proxy between you and the Hub?"
        raise VerificationError(
            f"{damaged[0].name} of {name} is not what the Hub says it holds ({len(damaged)} files damaged). {remedy}"
        )
    return paths


def _has_stated_content(path: Path) -> bool:
    """Whether a file in the cache has the hash that it is named by; true for what the cache names otherwise.

    A file in a snapshot is a link to a blob, which is named by the ETag that the Hub sent: the SHA-256 of LFS files,
    git's blob id of the others. What came through xet is in turn a link into a store that names content its own way.
    """
    if not path.is_symlink():
        return True
    blob = path.parent / path.readlink()
    if blob.parent.name != "blobs":
        return True
    if _SHA256.fullmatch(blob.name):
        return remembered_sha256(path) == blob.name
    return _SHA1.fullmatch(blob.name) is None or git_sha1_of(path) == blob.name


def _remove_from_cache(path: Path) -> None:
    """Remove a file from a snapshot and everything that it is a link to."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def list_files(repo_id: str, revision: str | None, token: str | bool | None) -> list[str]:
    """Return the names of all files of a repository, also of those that are never fetched.

    Raises:
        AccessError: the repository does not exist, is gated or private, or the Hub cannot be reached.
    """
    api = HfApi(token=clean_token(token))
    with access_errors(repo_id):
        return sorted(persistently(lambda: api.list_repo_files(repo_id, revision=revision)))
