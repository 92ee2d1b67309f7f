"""Sources opened: files found and hashed, datasets on the Hub pinned to a commit, and the records that are taken."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loram_hub.errors import (
    AccessError,
    InvalidRequestError,
    LoramError,
    MissingDependencyError,
    ResourceError,
    VerificationError,
)
from loram_hub.files import DISK_FULL
from loram_hub.hub.access import clean_token
from loram_hub.hub.revisions import dataset_commit
from loram_hub.instructions.files import PlacedRecord, content_sha256, find_files, records_of
from loram_hub.instructions.sampling import position_keys
from loram_hub.instructions.sources import DataSource

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]  # ships no types

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSource:
    """A source whose records can be read, any number of times."""

    source: DataSource
    """What was asked for; a Hub dataset's source names its commit."""
    commit: str | None
    """Commit of a Hub dataset; None for files."""
    sha256: str | None
    """SHA-256 of the file, or of names and hashes of a folder's files; None for a Hub dataset."""
    _files: tuple[Path, ...]
    _dataset: Dataset | None

    def records(self, *, seed: int) -> Iterator[PlacedRecord]:
        """Yield the records that the source's limit leaves, in their order.

        Raises:
            InvalidRequestError: a JSON file holds no list of objects, or is too large.
            VerificationError: a file is damaged.
            MissingDependencyError: pyarrow is not installed.
        """
        if self.source.limit is None:
            yield from self._all()
            return
        total = len(self._dataset) if self._dataset is not None else sum(1 for _ in self._all())
        chosen = np.sort(np.argsort(position_keys(total, seed=seed), kind="stable")[: self.source.limit])
        if self._dataset is not None:
            for number, record in zip(chosen, self._dataset.select(chosen), strict=True):
                yield self._place(int(number)), record
            return
        everything, position = self._all(), 0
        for number in chosen:
            yield from islice(everything, int(number) - position, int(number) - position + 1)
            position = int(number) + 1

    def _all(self) -> Iterator[PlacedRecord]:
        if self._dataset is None:
            for file in self._files:
                yield from records_of(file)
        else:
            yield from ((self._place(number), record) for number, record in enumerate(self._dataset))

    def _place(self, number: int) -> str:
        return f"{self.source.repository} ({self.source.split}) row {number + 1}"


def open_source(source: DataSource, *, token: str | bool | None = None) -> OpenSource:
    """Open a source.

    Args:
        source: what to read.
        token: for private and gated datasets; None: the one that is logged in.

    Returns:
        The source, one on the Hub at a commit, downloaded.

    Raises:
        InvalidRequestError: there is no such file, subset or split, or no file of a known kind.
        VerificationError: a file of the dataset is damaged.
        AccessError: the dataset does not exist or is closed, or the Hub cannot be reached.
        MissingDependencyError: `datasets` is not installed.
        ResourceError: the disk is full.
    """
    source.check_place()
    if source.is_local:
        files = find_files(source.path)
        sha256 = content_sha256(source.path, files)
        return OpenSource(source=source, commit=None, sha256=sha256, _files=files, _dataset=None)
    if find_spec("datasets") is None:
        raise MissingDependencyError(f"Reading {source.source} from the Hub needs: pip install datasets")
    named = source.revision
    is_commit = named is not None and _COMMIT.fullmatch(named) is not None
    commit = named if is_commit else dataset_commit(source.repository, revision=named, token=token)
    pinned = replace(source, source=f"{source.repository}@{commit}")
    with _loading_errors(source):
        dataset = _load(pinned, token)
    return OpenSource(source=pinned, commit=commit, sha256=None, _files=(), _dataset=dataset)


def _load(source: DataSource, token: str | bool | None) -> Dataset:
    import datasets

    return datasets.load_dataset(
        source.repository, source.subset, split=source.split, revision=source.revision, token=clean_token(token)
    )


@contextmanager
def _loading_errors(source: DataSource) -> Iterator[None]:
    """Translate what `datasets` raises when it downloads and converts a dataset."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError  # type: ignore[import-untyped]
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except LoramError:
        raise
    except DatasetNotFoundError as err:
        raise AccessError(f"The dataset {source.repository} cannot be had from the Hub: {err}") from err
    except (HTTPError, ConnectionError, TimeoutError) as err:
        raise AccessError(
            f"The connection to the Hub broke off at {source.repository} ({type(err).__name__}). Run it again: what "
            "has arrived is kept."
        ) from err
    except DatasetGenerationError as err:
        _refuse_full_disk(source, err.__cause__)
        raise VerificationError(f"The dataset {source.repository} is damaged: {err.__cause__ or err}") from err
    except (ValueError, FileNotFoundError, RuntimeError) as err:  # the message lists subsets and splits that there are
        raise InvalidRequestError(f"The dataset {source.repository} cannot be read: {err}") from err
    except OSError as err:
        _refuse_full_disk(source, err)
        raise


def _refuse_full_disk(source: DataSource, err: BaseException | None) -> None:
    if isinstance(err, OSError) and err.errno in DISK_FULL:
        raise ResourceError(
            f"Downloading {source.repository} failed: {err}. Free some space, or set HF_HOME elsewhere."
        ) from err
