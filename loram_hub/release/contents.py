"""Which files a release may hold, under which names, and that each is what the manifest says.

Names come from whoever made the folder, and go into paths, terminals and pages: only plain ones pass. Links may stay
inside the folder, or lead to the blobs of the Hub cache that the folder is a snapshot of; nothing else is followed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from loram_hub.checkpoint import CONFIG, INDEX_FILE, SINGLE_FILE, is_companion, is_never_loaded
from loram_hub.errors import CheckpointError, VerificationError
from loram_hub.folders import leads_out
from loram_hub.manifest import MANIFEST, FileEntry, Manifest
from loram_hub.masks import WEIGHT_MASKS
from loram_hub.release.mask_index import MASK_INDEX

_WEIGHTS = re.compile(rf"{re.escape(SINGLE_FILE)}|model-[0-9]{{5}}-of-[0-9]{{5}}\.safetensors")
_IGNORED = (".git", ".cache/huggingface")
"""Folders that git and huggingface_hub keep beside the files; nothing in them is ever loaded."""
_MAX_FILES = 10_000
_MAX_NAME, _MAX_PART = 1024, 255
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".msgpack", ".h5", ".keras")
_PROGRAMS = (
    ".py", ".pyc", ".pyd", ".pth.py", ".so", ".dll", ".dylib", ".exe", ".sh", ".bash", ".bat", ".cmd", ".ps1", ".js",
    ".jar", ".ipynb", ".whl", ".cu", ".cpp",
)  # fmt: skip
# Names that Windows gives to devices, whatever follows the dot.
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def is_weights(name: str) -> bool:
    """Whether a file of a release, by its name, holds weights."""
    return name.endswith(".safetensors") and name not in (MASK_INDEX, WEIGHT_MASKS)


def is_large(name: str) -> bool:
    """Whether a file of a release, by its name, may be gigabytes: weights, and masks of single weights."""
    return is_weights(name) or name == WEIGHT_MASKS


def check_listed(folder: Path, manifest: Manifest) -> None:
    """Check the names that a manifest lists.

    Raises:
        VerificationError: a file that counts is not listed, a name is a trick, or a kind that no release holds.
    """
    files = manifest.files
    for name in files:
        why = _trick_in(name)
        if why is not None:
            raise VerificationError(
                f"{folder / MANIFEST} lists {name!r:.200}, which is no name of a file in the release: {why}."
            )
    _check_alike(files, source=str(folder / MANIFEST))
    if not {CONFIG, MASK_INDEX} <= set(files):
        raise VerificationError(f"{folder / MANIFEST} does not list {CONFIG} and {MASK_INDEX}.")
    if manifest.is_sparse != (WEIGHT_MASKS in files):
        what = "does not list" if manifest.is_sparse else "lists"
        has = "has the masks of its weights there" if manifest.is_sparse else "keeps all weights of a group"
        raise VerificationError(
            f"{folder / MANIFEST} {what} {WEIGHT_MASKS}; a release that was pruned by {manifest.pruning.method} {has}."
        )
    for name in files:
        if (
            name not in (CONFIG, MASK_INDEX, WEIGHT_MASKS, INDEX_FILE)
            and not _WEIGHTS.fullmatch(name)
            and not is_companion(name)
        ):
            raise VerificationError(f"{folder / MANIFEST} lists {name!r}: {_kind_of(name)}, which no release holds.")


def check_present(
    folder: Path, files: Mapping[str, FileEntry], ignored: Callable[[str], bool], *, with_tokenizer: bool
) -> list[str]:
    """Check every file that is in a folder, listed or not, without reading any.

    Args:
        folder: the release.
        files: what its manifest lists.
        ignored: names of files that are not listed and that nobody will open.
        with_tokenizer: whether a tokenizer may lie there unlisted, as where a model was saved and its tokenizer after.

    Returns:
        Names of the files that are not listed, may be there and may be loaded.

    Raises:
        VerificationError: a name is a trick, a link leads out, a file is no plain file, or may not be there.
    """
    present = {name for name in _walk(folder) if name in files or not ignored(name)} - {MANIFEST}
    _check_alike(present | set(files), source=str(folder))
    added = sorted(present - set(files))
    for name in added:
        if not is_never_loaded(name) and not (with_tokenizer and _is_of_tokenizer(name)):
            raise VerificationError(f"{folder} holds {name}, which its manifest does not list: {_kind_of(name)}.")
    return [name for name in added if not is_never_loaded(name)]


def check_repository(names: Collection[str], files: Mapping[str, FileEntry], *, source: str) -> None:
    """Check the names of all files of a repository on the Hub, of which only some are fetched.

    Args:
        names: as the Hub lists them.
        files: what the manifest of the release lists.
        source: names the repository in errors.

    Raises:
        VerificationError: a name is a trick, or that of a file that may not be there.
    """
    for name in sorted(names):
        if why := _trick_in(name):
            raise VerificationError(f"{source} holds a file under the name {name!r:.200}: {why}.")
    _check_alike({*names, *files}, source=source)
    for name in sorted(set(names) - set(files) - {MANIFEST}):
        if not is_never_loaded(name):
            raise VerificationError(f"{source} holds {name}, which its manifest does not list: {_kind_of(name)}.")


def _is_of_tokenizer(name: str) -> bool:
    return is_companion(name) and name != "generation_config.json"


def check_sizes(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Check that listed files are there in their sizes.

    Raises:
        CheckpointError: one is missing.
        VerificationError: one has another size.
    """
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its manifest lists. Download or copy it again.")
        size = path.stat().st_size
        if size != entry.size:
            raise VerificationError(
                f"{path} has {size:,} bytes, the manifest says {entry.size:,}. Download or copy it again."
            )


def check_hashes(folder: Path, files: Mapping[str, FileEntry], sha256: Callable[[Path], str]) -> None:
    """Check the content of listed files; raises `VerificationError` for the first that differs."""
    for name, entry in files.items():
        if sha256(folder / name) != entry.sha256:
            raise VerificationError(
                f"{folder / name} was changed: its SHA-256 is not the manifest's. Download or copy it again."
            )


def _walk(folder: Path) -> Iterator[str]:
    """Names of all files below a folder; refuses what is neither a plain file nor a folder, and links that lead out."""
    waiting, count = [""], 0
    while waiting:
        inside = waiting.pop()
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                name = f"{inside}/{entry.name}" if inside else entry.name
                count += 1
                if count > _MAX_FILES:
                    raise VerificationError(
                        f"{folder} holds more than {_MAX_FILES:,} files; a release has some twenty."
                    )
                if why := _trick_in(name):
                    raise VerificationError(f"{folder} holds a file under the name {name!r:.200}: {why}.")
                if entry.is_dir(follow_symlinks=False):
                    waiting.extend([] if name in _IGNORED else [name])
                    continue
                _check_plain(Path(entry.path), name, folder)
                yield name


def _check_plain(path: Path, name: str, folder: Path) -> None:
    if path.is_symlink():
        if leads_out(path, folder):
            raise VerificationError(f"{path} is a link that leads out of the release. Copy the file itself.")
        if not path.exists():
            raise CheckpointError(f"{path} is a link to nowhere. Download it again.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise VerificationError(f"{name!r} in {path.parent} is no plain file, but a folder behind a link or a device.")


def _trick_in(name: str) -> str | None:
    """Say why a name is none that every file system, terminal and page can hold as it is; None if it is plain."""
    parts = name.split("/")
    if name.startswith("/"):
        return "it is an absolute path"
    if any(part in ("", ".", "..") for part in parts):
        return "it has a part that leads elsewhere"
    if len(name) > _MAX_NAME or any(len(part) > _MAX_PART for part in parts):
        return "it is too long"
    if not name.isascii():
        return "it has characters outside of ASCII, which can look like others"
    if not name.isprintable():
        return "it has control characters"
    if "\\" in name:
        return "a backslash separates folders on Windows"
    if ":" in name:
        return "a colon names a drive on Windows"
    if any(part[-1] in ". " or part[0] == " " or _DEVICES.fullmatch(part) for part in parts):
        return "Windows has another meaning for it"
    return None


def _check_alike(names: Collection[str], *, source: str) -> None:
    seen: dict[str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise VerificationError(
                f"{source} has both {other!r} and {name!r}, which are one file where upper and lower case are the same."
            )


def _kind_of(name: str) -> str:
    lower = name.lower()
    if lower.endswith(_PICKLES):
        return "a pickle or another format that can run code when it is opened"
    if lower.endswith(_PROGRAMS):
        return "a program"
    if lower.endswith(".safetensors"):
        return "weights that belong to no model here"
    if is_companion(name):
        return "it would be loaded with the model, unchecked. Have it there when the release is made"
    return "a kind of file that no release needs"
