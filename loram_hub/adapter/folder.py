"""Which files an adapter folder may hold: safetensors, JSON and what people read; no pickle, no code, no link out."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from loram_hub.adapter.config import CONFIG
from loram_hub.adapter.record import RECORD
from loram_hub.adapter.tensors import WEIGHTS
from loram_hub.errors import VerificationError
from loram_hub.folders import leads_out

# Besides config, weights and record: card, tokenizer, licence. By path inside the folder.
_COMPANIONS = (
    "README.md", "*.png", "*.svg", "pictures/*.png", "pictures/*.svg", ".eval_results/*.yaml", "LICENSE*", "NOTICE*",
    "Notice*", "USE_POLICY*", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja",
    ".gitattributes",
)  # fmt: skip
_IGNORED_FOLDERS = (".git", ".cache/huggingface")  # what git and huggingface_hub keep in a folder
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".bat", ".ps1", ".exe", ".jar", ".wasm", ".ipynb")
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf", ".onnx", ".h5", ".msgpack")
_PLAIN_NAME = re.compile(r"[\w][\w .+()-]*|\.[\w][\w.-]*", re.ASCII)
_MAX_FILES = 1_000


def check_files(folder: Path) -> dict[str, int]:
    """Check which files an adapter folder holds, and that they lie in it.

    Args:
        folder: the adapter.

    Returns:
        Size in bytes of every file by its path inside the folder.

    Raises:
        VerificationError: names the first file that has no place here, and says why.
    """
    if not folder.is_dir():
        raise VerificationError(f"{folder} is no folder with an adapter in it.")
    sizes: dict[str, int] = {}
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        _check_name(name, folder)
        _check_place(path, name, folder)
        sizes[name] = path.stat().st_size
        if len(sizes) > _MAX_FILES:
            raise VerificationError(f"{folder} holds more than {_MAX_FILES:,} files; no adapter does.")
    twins: dict[str, str] = {}
    for name in sorted(sizes):
        twin = twins.setdefault(name.casefold(), name)
        if twin != name:
            raise VerificationError(f"{twin!r} and {name!r} in {folder} are one file where letter case does not count.")
    return sizes


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        inside = Path(root).relative_to(folder)
        folders[:] = sorted(name for name in folders if (inside / name).as_posix() not in _IGNORED_FOLDERS)
        linked = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in [*linked, *sorted(names)]:
            yield Path(root) / name


def _check_name(name: str, folder: Path) -> None:
    if not all(_PLAIN_NAME.fullmatch(part) for part in PurePosixPath(name).parts):
        raise VerificationError(f"{name!r} in {folder} is no name that a file of an adapter has. Remove it.")
    if name in (CONFIG, WEIGHTS, RECORD):
        return
    last = name.rpartition("/")[2].lower()
    if last.endswith(_PICKLES):
        raise VerificationError(
            f"{name!r} in {folder} is a pickle or an array file, which can run code when opened; safetensors and JSON "
            "are all that an adapter needs. Remove it, or write a clean copy: loram doctor ADAPTER --fix OUT."
        )
    if last.endswith(_CODE):
        raise VerificationError(f"{name!r} in {folder} is code; an adapter needs none. Remove it.")
    if last.endswith(_WEIGHTS):
        raise VerificationError(
            f"{name!r} in {folder} holds weights beside {WEIGHTS}; which ones count depends on the reader. Remove it."
        )
    if not any(fnmatchcase(name, pattern) for pattern in _COMPANIONS) or name.count("/") > 1:
        raise VerificationError(
            f"{name!r} in {folder} is no part of an adapter (config, weights, record, card, tokenizer, licence). "
            "Remove it."
        )


def _check_place(path: Path, name: str, folder: Path) -> None:
    """Refuse special files, and links that leave the folder; a Hub cache's own links to its blobs may."""
    if path.is_symlink() and leads_out(path, folder):
        raise VerificationError(f"{name!r} in {folder} is a link that leads out of the folder. Copy the file there.")
    if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
        raise VerificationError(f"{name!r} in {folder} is no regular file. Remove it, or copy the adapter again.")
