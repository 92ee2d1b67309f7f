"""Layers that are pruned, on disk beside the release to be: what a killed run goes on from.

    run.json               what the run is: base, settings, calibration, versions; sealed
    layer-00007.safetensors   the pruned matrices of a layer, and for each its mask
    layer-00007.json          the hash of that file, and of run.json, how many threads computed it, and what dampening
                              each matrix took; sealed

A layer counts once its second file is there and the first is what that says. Layers are finished in order, since each
is fed by those before it. The folder is removed when the release is there.

Sums in fp32 differ in their last bits with the number of threads, and so may the bytes of a release. It is as good: the
layers of a run with another number are taken up, with a warning.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loram_hub.errors import CheckpointError, ResourceError, VerificationError
from loram_hub.files import fsync_file, fsync_folder, read_json, resource_errors, sha256_of
from loram_hub.masks import Pattern, decode_mask, encode_mask
from loram_hub.seals import check_seal, seal
from loram_hub.sparsification.matrices import SparseMatrix

logger = logging.getLogger(__name__)

RUN = "run.json"
_MASK = "mask"
_NOTED = {"run", "file", "threads", "dampenings"}


def work_folder(out: Path) -> Path:
    """Return where the finished layers of a release lie that is being made."""
    return out.with_name(f".{out.name}.sparsifying")


@contextmanager
def only_process(out: Path) -> Iterator[None]:
    """Keep other processes from making the same release; what the block raises stays as it is.

    Raises:
        ResourceError: another process is at it, or the folder cannot be written to.
    """
    path = out.with_name(f".{out.name}.sparsifying.lock")
    lock = FileLock(path, timeout=0)
    with resource_errors(f"Writing {out}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as err:
            raise ResourceError(f"Another process is making {out} (lock {path.name}).") from err
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is released: after that it may be another's
        lock.release()


class FinishedLayers:
    """The finished layers of a run, in a folder of its own."""

    def __init__(self, folder: Path, run: Mapping[str, Any], pattern: Pattern) -> None:
        """Open the folder; what another run has left there is removed.

        Args:
            folder: from `work_folder`; is made if need be.
            run: all that decides over the layers, plain JSON values.
            pattern: of the masks.

        Raises:
            ResourceError: the disk is full or not writable.
        """
        self.folder, self._pattern = folder, pattern
        self._run = hashlib.sha256(seal(run).encode()).hexdigest()
        with resource_errors(f"Writing {folder}"):
            if folder.exists() and not self._holds(run):
                logger.warning("%s is of another run, or damaged; this one begins at its first layer", folder)
                shutil.rmtree(folder)
            if not folder.exists():
                folder.mkdir(parents=True)
                self._write_text(RUN, seal(run))
        self.count = 0
        self.dampenings: dict[str, float | None] = {}
        """What SparseGPT added for each finished matrix, by full name; None where no update was made."""
        threads: set[int] = set()
        while (found := self._finished(self.count)) is not None:
            threads.add(found["threads"])
            self.dampenings |= found["dampenings"]
            self.count += 1
        if self.count:
            logger.info("going on after %d layers that were finished before", self.count)
        if threads - {torch.get_num_threads()}:
            logger.warning(
                "layers were finished with %s threads, and the others will be with %d: the release will be as good, "
                "but its bytes may differ from those of a run with one number of threads (see OMP_NUM_THREADS)",
                " and ".join(map(str, sorted(threads))),
                torch.get_num_threads(),
            )

    def add(self, layer: int, matrices: Mapping[str, SparseMatrix]) -> None:
        """Write the next layer; it counts whole or not at all.

        Args:
            layer: its number, one more than that of the last one.
            matrices: by full name, on the CPU.

        Raises:
            ResourceError: the disk is full or not writable.
        """
        assert layer == self.count
        tensors: dict[str, torch.Tensor] = {}
        for name, matrix in matrices.items():
            tensors[name] = matrix.weight_OI.contiguous()
            tensors[f"{name}.{_MASK}"] = torch.from_numpy(encode_mask(matrix.mask_OI.numpy(), self._pattern))
        path = self.folder / _layer_file(layer)
        part = path.with_name(f".{path.name}.part")
        with resource_errors(f"Writing {path}"):
            save_file(tensors, part)
            fsync_file(part)
            part.rename(path)
            dampenings = {name: matrix.dampening for name, matrix in matrices.items()}
            found = {
                "run": self._run,
                "file": sha256_of(path),
                "threads": torch.get_num_threads(),
                "dampenings": dampenings,
            }
            self._write_text(f"{path.stem}.json", seal(found))
        self.dampenings |= dampenings
        self.count += 1

    def weight(self, layer: int, name: str) -> torch.Tensor:
        """Read a pruned matrix of a finished layer, by its full name; raises `CheckpointError`."""
        tensor: torch.Tensor = self._read(layer, name, framework="pt")
        return tensor

    def mask(self, layer: int, name: str, columns: int) -> npt.NDArray[np.bool_]:
        """Read what is kept of a matrix of a finished layer, bool (out_features, in_features)."""
        rows = self._read(layer, f"{name}.{_MASK}", framework="np")
        return decode_mask(rows, columns, self._pattern, source=f"The mask of {name!r} in {self.folder}")

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _holds(self, run: Mapping[str, Any]) -> bool:
        found = _read_sealed(self.folder / RUN)
        return found is not None and seal(found) == seal(run)

    def _finished(self, layer: int) -> dict[str, Any] | None:
        """Return what is noted of a layer, or None if it does not count."""
        path = self.folder / _layer_file(layer)
        found = _read_sealed(path.with_suffix(".json"))
        if found is None or set(found) != _NOTED or found["run"] != self._run or not path.is_file():
            return None
        if found["file"] != sha256_of(path):
            logger.warning("%s is damaged; that layer is pruned anew", path)
            return None
        return found

    def _read(self, layer: int, name: str, *, framework: str) -> Any:  # noqa: ANN401 (a tensor of the framework)
        path = self.folder / _layer_file(layer)
        try:
            with safe_open(path, framework=framework) as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as err:
            raise CheckpointError(f"{name!r} cannot be read from the finished layer {path}: {err}") from err

    def _write_text(self, name: str, text: str) -> None:
        part = self.folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        fsync_file(part)
        part.rename(self.folder / name)
        fsync_folder(self.folder)


def _layer_file(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def _read_sealed(path: Path) -> dict[str, Any] | None:
    """Return what a sealed file says, or None if it is not there, or not whole."""
    try:
        return check_seal(path, read_json(path))
    except (CheckpointError, VerificationError):
        return None
