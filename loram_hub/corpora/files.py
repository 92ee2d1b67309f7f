"""The files of a local corpus: which they are, of which kind, and what tells them from others."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from loram_hub.corpora.corpus import Corpus
from loram_hub.errors import InvalidRequestError, MissingDependencyError

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
"""The part of `datasets` that reads a kind of file."""
COMPRESSIONS = (".gz", ".zst")
WHOLE_FILE_BYTES = 256 * 1024 * 1024
"""A text or a JSON list is read in one piece; beyond this it is a corpus that should be in another format."""
_EDGE_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusFiles:
    """The files of one corpus."""

    root: Path
    """The folder; of a single file the one it lies in."""
    paths: tuple[Path, ...]
    """Files that are not empty, in the order in which they are read."""
    builder: str
    """What of `datasets` reads them."""

    @property
    def digest(self) -> str:
        """A hash of names, sizes, first and last 64 KiB of the files: corpora are too large to read at each start."""
        state = hashlib.sha256()
        for path in self.paths:
            size = path.stat().st_size
            state.update(f"{path.relative_to(self.root).as_posix()}\0{size}\0".encode())
            with path.open("rb") as file:
                state.update(file.read(_EDGE_BYTES))
                file.seek(max(size - _EDGE_BYTES, 0))
                state.update(file.read(_EDGE_BYTES))
        return state.hexdigest()


def suffix_of(path: Path) -> str:
    """Return the suffix that tells the kind of file, without that of a compression."""
    inner = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return inner.suffix


def find_files(corpus: Corpus) -> CorpusFiles:
    """Find what is to be read of a local corpus.

    Args:
        corpus: one whose source is an existing file or folder.

    Returns:
        Its files, a folder's in the order of their paths; hidden, empty and other files are left out.

    Raises:
        InvalidRequestError: there is none, of several kinds, one too large for its kind, or the corpus names a
            configuration, split or revision.
        MissingDependencyError: a file is compressed with zstd and `zstandard` is not installed.
    """
    if corpus.config is not None or corpus.revision is not None or corpus.split != "train":
        raise InvalidRequestError(
            f"{corpus.source} is a local corpus: configuration, split and revision are for datasets on the Hub."
        )
    path = corpus.path
    root = path if path.is_dir() else path.parent
    known = [file for file in (_below(path) if path.is_dir() else [path]) if suffix_of(file) in BUILDERS]
    if not known:
        raise InvalidRequestError(f"{corpus.source} is or holds no file of a known kind: {', '.join(BUILDERS)}.")
    kinds = Counter(BUILDERS[suffix_of(file)] for file in known)
    if len(kinds) > 1:
        found = ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items()))
        raise InvalidRequestError(
            f"{corpus.source} holds files of several kinds ({found}). Put each kind into a folder, and name both as "
            "corpora."
        )
    files = tuple(file for file in known if file.stat().st_size > 0)
    if not files:
        raise InvalidRequestError(f"The corpus {corpus.source} is empty: its files hold not one byte.")
    for file in files:
        _check_file(file)
    return CorpusFiles(root=root, paths=files, builder=next(iter(kinds)))


def _below(folder: Path) -> list[Path]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return sorted(visible, key=lambda file: file.relative_to(folder).as_posix())


def _check_file(file: Path) -> None:
    size = file.stat().st_size
    if suffix_of(file) in (".txt", ".json") and size > WHOLE_FILE_BYTES:
        raise InvalidRequestError(
            f"{file} is {size:,} bytes; a file of its kind is read in one piece, and at most {WHOLE_FILE_BYTES:,} are. "
            "Write it as .jsonl, one document per line."
        )
    if file.suffix == ".zst" and find_spec("zstandard") is None:
        raise MissingDependencyError(f"Reading {file} needs: pip install zstandard")
