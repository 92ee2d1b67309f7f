"""The state of a run in files, as torch.distributed.checkpoint (DCP) has them: each rank writes and reads its own part.

DCP keeps its index, and whatever in a state is no tensor, as pickles, which could run code. Here they are opened with
an allow-list: the index may hold DCP's own records, the rest plain values. So a checkpoint that came from elsewhere can
give wrong numbers at worst.

Every rank of the process group calls these functions together, and all raise if one fails.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from loram_hub.alignment.launch import peers_needed
from loram_hub.errors import IncompatibleError, LoramError, VerificationError
from loram_hub.files import resource_errors

INDEX = ".metadata"
"""DCP's file that says which part of which tensor lies where."""

_RECORDS = ("_StorageInfo", "_StoragePrefix")
_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): Path,
    ("pathlib._local", "PosixPath"): Path,  # its name from Python 3.13 on
    ("collections", "OrderedDict"): dict,
}


def write_state(state: dict[str, Any], folder: Path, *, group: dist.ProcessGroup | None = None) -> None:
    """Write a state, each rank the part that it holds.

    Args:
        state: tensors, DTensors and plain values, in nested dicts.
        folder: exists; seen by all ranks.
        group: the ranks; default: all.

    Raises:
        ResourceError: a disk is full or a file cannot be written, on whichever rank.
        TrainingError: another rank has ended.
    """
    with resource_errors(f"Writing {folder}"), _single_process_allowed(), peers_needed(), _first_failure():
        save(state, storage_writer=FileSystemWriter(folder), process_group=group)


def read_index(folder: Path) -> Metadata:
    """Read which part of which tensor lies where in a folder.

    Raises:
        VerificationError: the file is no index, or refers to something that no index needs.
    """
    with (folder / INDEX).open("rb") as file:
        try:
            index = _Index(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError) as err:
            raise VerificationError(f"{folder / INDEX} is no index: {err}") from err
    if not isinstance(index, Metadata):
        raise VerificationError(f"{folder / INDEX} is no index: it holds {type(index).__name__}.")
    return index


def read_state(state: dict[str, Any], folder: Path, index: Metadata, *, group: dist.ProcessGroup | None = None) -> None:
    """Read a state in place, for any number of ranks.

    Args:
        state: as given to `write_state`, of the same keys and whole shapes; its values are replaced.
        folder: what `write_state` wrote, checked.
        index: from `read_index`, the same on all ranks.
        group: the ranks; default: all.

    Raises:
        IncompatibleError: the files hold another state: keys or shapes differ.
        VerificationError: a value is neither a tensor nor plain.
        ResourceError: a file cannot be read.
        TrainingError: another rank has ended.
    """
    try:
        with resource_errors(f"Reading {folder}"), _single_process_allowed(), peers_needed(), _first_failure():
            load(state, storage_reader=_Reader(folder, index), planner=_Planner(), process_group=group)
    except (RuntimeError, ValueError, KeyError, AssertionError) as err:
        if isinstance(err, LoramError):
            raise
        raise IncompatibleError(
            f"{folder} does not fit this run: {err}. Was it made from the same release, with the same settings?"
        ) from err


class _Index(pickle.Unpickler):
    """Opens DCP's index: its own dataclasses, sizes, dtypes, nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module == metadata.__name__:
            found = vars(metadata).get(name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module == filesystem.__name__ and name in _RECORDS:
            return getattr(filesystem, name)
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return getattr(torch, name)
        raise VerificationError(f"{INDEX} of a checkpoint refers to {module}.{name}, which no index needs.")


class _Reader(FileSystemReader):
    """DCP's reader, with an index that was read already."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._opened = index

    def read_metadata(self) -> Metadata:
        return self._opened


class _Planner(DefaultLoadPlanner):
    """DCP's planner, with values that are no tensors opened as weights are: plain types only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        try:
            torch.save(torch.load(value, weights_only=True), plain)
        except pickle.UnpicklingError as err:
            raise VerificationError(f"{read_item.storage_index.fqn} holds more than plain values: {err}") from err
        plain.seek(0)
        super().load_bytes(read_item, plain)


@contextlib.contextmanager
def _first_failure() -> Iterator[None]:
    """Raise what went wrong on the first rank that failed; DCP tells all ranks, in a `BaseException` of its own."""
    try:
        yield
    except CheckpointException as err:
        rank = min(err.failures)
        failure, _ = err.failures[rank]
        raise failure from err


@contextlib.contextmanager
def _single_process_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield
