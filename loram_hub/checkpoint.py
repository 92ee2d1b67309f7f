"""A transformers checkpoint folder, read and written tensor by tensor.

Reading: `Checkpoint` indexes the shards by their headers and reads single tensors with `pread`. Memory-mapped shards
would count as resident memory and grow with everything that was ever read; a 70B model would look like 140 GB.

Writing: `ShardWriter` streams tensors to safetensors shards without holding a shard in memory, which the safetensors
package does not offer. It reserves room for the header, streams the tensors, and fills the header in at the end.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from safetensors import SafetensorError, safe_open

from loram_hub.errors import CheckpointError, VerificationError
from loram_hub.files import MAX_INDEX_BYTES, dump_json, read_json, resource_errors
from loram_hub.tensors import MAX_TENSORS
from loram_hub.tensors import TensorInfo as TensorInfo
from loram_hub.tensors import read_headers as read_headers

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""transformers' own default has moved between 5 and 50 GB; 5 GB keeps a retried download short."""

COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.jinja", "LICENSE*", "NOTICE*", "Notice*", "USE_POLICY*",
)  # fmt: skip
"""What travels with a model besides config and weights: tokenizer, generation defaults, licence. Never code."""

_NO_COMPANIONS = (
    ".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1", ".js", ".html", ".htm",
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".zip", ".safetensors",
)  # fmt: skip
# What the Hub, git and file managers keep beside a model, by folder: nothing loads any of it.
_NEVER_LOADED: Mapping[str, tuple[str, ...]] = {
    "": (
        "README.md", "*.png", "*.svg", "LICENSE*", "NOTICE*", "Notice*", "USE_POLICY*",
        ".gitattributes", ".gitignore", ".DS_Store",
    ),
    "pictures": ("*.png",),
    ".eval_results": ("*.yaml",),
}  # fmt: skip
_LOADED: Mapping[str, tuple[str, ...]] = {"": COMPANIONS, "additional_chat_templates": ("*.jinja",)}
_SETTINGS = ("generation_config.json", "tokenizer_config.json")
_PLAIN_NAME = re.compile(r"[\w.+()-][\w .+()-]*[\w+()-]", re.ASCII)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
_ALIGNMENT = 8
_CODES: Mapping[str, str] = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL",
}  # fmt: skip


class Checkpoint:
    """A folder with `config.json` and safetensors weights; tensors are read one at a time.

    Use as a context manager: shards stay open (file descriptors, no memory) until it ends.
    """

    def __init__(self, folder: Path) -> None:
        """Index the shards by reading their headers.

        Args:
            folder: the checkpoint.

        Raises:
            CheckpointError: the folder is no checkpoint, has only pickled weights, or lacks a shard or a tensor.
            VerificationError: a header or the index is damaged.
        """
        self.folder = folder
        self.config = read_config(folder)
        self.tensors = index_tensors(folder)
        self._open_files = ExitStack()
        self._handles: dict[Path, Any] = {}

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the shards."""
        self._handles.clear()
        self._open_files.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory, on the CPU, in its stored dtype.

        Raises:
            CheckpointError: no such tensor, or the shard ends too early.
        """
        with self._shard_of(name) as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows `start` to `stop` (at least one) of a tensor; nothing else of it comes into memory.

        Raises:
            CheckpointError: no such tensor, or the shard ends too early.
        """
        with self._shard_of(name) as shard:
            rows: torch.Tensor = shard.get_slice(name)[start:stop]
        return rows

    @contextmanager
    def _shard_of(self, name: str) -> Iterator[Any]:
        if name not in self.tensors:
            raise CheckpointError(f"Tensor {name!r} is not in the checkpoint {self.folder}.")
        file = self.tensors[name].file
        try:
            if file not in self._handles:
                self._handles[file] = self._open_files.enter_context(safe_open(file, framework="pt", backend="pread"))
            yield self._handles[file]
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"Tensor {name!r} cannot be read from {file}: {err}") from err


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's `config.json`; raises `CheckpointError` with the likely reason if there is none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder with a checkpoint in it.")
    if not (folder / CONFIG).is_file():
        hint = " It looks like a PEFT adapter." if (folder / "adapter_config.json").is_file() else ""
        raise CheckpointError(f"{folder} is no checkpoint: it has no {CONFIG}.{hint}")
    return read_json(folder / CONFIG)


def is_companion(name: str) -> bool:
    """Whether a file, by its name inside the folder, is a tokenizer, licence, card, picture or evaluation result."""
    return is_never_loaded(name) or _fits(name, _LOADED)


def is_never_loaded(name: str) -> bool:
    """Whether a file, by its name inside the folder, is one that no library opens: a card, picture or licence."""
    return _fits(name, _NEVER_LOADED)


def _fits(name: str, patterns: Mapping[str, tuple[str, ...]]) -> bool:
    inside, _, leaf = name.rpartition("/")
    return not _may_hold_code(name) and any(fnmatchcase(leaf, pattern) for pattern in patterns.get(inside, ()))


def _may_hold_code(name: str) -> bool:
    return name.lower().endswith(_NO_COMPANIONS)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config and licence files of a checkpoint to another folder.

    Left out is what a release may not hold: names that some systems read otherwise, and `auto_map`, which names code.
    """
    taken: set[str] = set()
    with resource_errors(f"Writing {target}"):
        for path in sorted({path for pattern in COMPANIONS for path in source.glob(pattern)}):
            if not path.is_file() or _may_hold_code(path.name):
                continue
            if path.name.casefold() in taken:
                logger.warning("Leaving out %r: it is one file with another where case does not count", path.name)
                continue
            taken.add(path.name.casefold())
            if _PLAIN_NAME.fullmatch(path.name) is None:
                logger.warning("Leaving out %r: a name of plain ASCII letters is needed", path.name)
            elif path.name in _SETTINGS and b'"auto_map"' in path.read_bytes():
                logger.warning("Leaving auto_map out of %s: a release names no code", path.name)
                values = {key: value for key, value in read_json(path).items() if key != "auto_map"}
                (target / path.name).write_text(dump_json(values), encoding="utf-8")
            else:
                shutil.copyfile(path, target / path.name)


def weight_files(folder: Path) -> list[Path]:
    """Safetensors weight files of a checkpoint, in order; raises `CheckpointError` if one is missing."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]  # first, as transformers has it, so that both always mean the same tensors
    if (folder / INDEX_FILE).is_file():
        weight_map = _weight_map(folder)
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(files)} shards, first {missing[0]:.200}. "
                "Download or copy it again."
            )
        return files
    pickled = [name for name in _PICKLES if (folder / name).exists()]
    if pickled:
        raise CheckpointError(
            f"{folder} holds its weights as a pickle ({pickled[0]}), which can run code when opened. "
            "Convert it to safetensors: load it with transformers and save_pretrained it."
        )
    raise CheckpointError(f"{folder} has a config but no weights ({SINGLE_FILE} or {INDEX_FILE}).")


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX_FILE, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise VerificationError(f"{folder / INDEX_FILE} has no weight_map.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise VerificationError(
                f"{folder / INDEX_FILE} places {name!r:.200} in {file!r:.200}; "
                "a file name in the same folder is needed."
            )
    return weight_map


def index_tensors(folder: Path, *, most: int = MAX_TENSORS) -> dict[str, TensorInfo]:
    """Find every tensor of a checkpoint by the headers of its weight files.

    Args:
        folder: the checkpoint.
        most: tensors over all files; no header is read once there are more.

    Raises:
        CheckpointError: see `weight_files`; or the index places a tensor in a file that does not hold it.
        VerificationError: a header or the index is damaged, a tensor is in two files, or there are too many.
    """
    files = weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_headers(file).items():
            if name in tensors:
                raise VerificationError(
                    f"Tensor {name!r:.200} is in two shards: {tensors[name].file.name} and {file.name}."
                )
            tensors[name] = info
        if len(tensors) > most:
            raise VerificationError(f"{folder} holds {len(tensors):,} tensors or more; at most {most:,} are believed.")
    if files[0].name != SINGLE_FILE:
        weight_map = _weight_map(folder)
        for name, shard in weight_map.items():
            if name not in tensors or tensors[name].file.name != shard:
                raise CheckpointError(
                    f"{folder / INDEX_FILE} places {name!r:.200} in {shard:.200}, which does not hold it."
                )
    return tensors


class ShardWriter:
    """Stream tensors into `model*.safetensors` with an index, in transformers' naming.

    Large tensors go to disk as they come. Small ones, and those whose size would misalign what follows, wait in memory
    until the shard is closed: readers map tensors in place and need each at a multiple of its item size, and the format
    allows no holes.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Prepare to write into an existing folder."""
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._shard: _Shard | None = None
        self._finished: list[tuple[Path, list[str]]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor (any device; stored contiguous, in its dtype).

        Raises:
            CheckpointError: a dtype that is not written here (8-bit floats, complex numbers).
            ResourceError: the disk is full or not writable.
        """
        if str(tensor.dtype) not in _CODES:
            raise CheckpointError(
                f"Tensor {name!r} is {tensor.dtype}, which is not written here. Start from bfloat16 or float32."
            )
        nbytes = tensor.numel() * tensor.element_size()
        with resource_errors(f"Writing weights to {self._folder}"):
            if self._shard is not None and not self._shard.has_room(name, nbytes, self._max_shard_bytes):
                self._close_shard()
            if self._shard is None:
                self._shard = _Shard(self._folder / f".shard-{len(self._finished):05d}.part")
            self._shard.add(name, tensor)
        self._total_bytes += nbytes

    def finish(self) -> list[Path]:
        """Close the last shard, give the shards their final names, write the index if there are several.

        Returns:
            The weight files, in order.
        """
        with resource_errors(f"Writing weights to {self._folder}"):
            if self._shard is not None:
                self._close_shard()
            count, files = len(self._finished), []
            weight_map: dict[str, str] = {}
            for number, (part, names) in enumerate(self._finished, start=1):
                name = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
                files.append(part.rename(self._folder / name))
                weight_map |= dict.fromkeys(names, name)
            if count > 1:
                index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
                (self._folder / INDEX_FILE).write_text(dump_json(index), encoding="utf-8")
        return files

    def _close_shard(self) -> None:
        assert self._shard is not None
        self._finished.append((self._shard.path, self._shard.close()))
        self._shard = None


class _Shard:
    """One safetensors file in the making: room for the header, streamed data, small tensors at the end."""

    HEADER_BYTES = 512 * 1024  # a multiple of the alignment
    """Room reserved once data is streamed, for about 4,000 tensors; the rest is filled with spaces, as the format
    allows."""
    _SMALL_BYTES = 1024 * 1024

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self._header_bytes = 64
        self._file: BinaryIO | None = None
        self._entries: dict[str, dict[str, Any]] = {}
        self._offset = 0
        self._waiting: list[tuple[str, torch.Tensor]] = []

    def has_room(self, name: str, nbytes: int, max_bytes: int) -> bool:
        return self.nbytes + nbytes <= max_bytes and self._header_bytes + _entry_bytes(name) <= self.HEADER_BYTES

    def add(self, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        nbytes = tensor.numel() * tensor.element_size()
        self.nbytes += nbytes
        self._header_bytes += _entry_bytes(name)
        if nbytes < self._SMALL_BYTES or nbytes % _ALIGNMENT:
            self._waiting.append((name, tensor.clone()))
            return
        if self._file is None:
            self._file = self.path.open("wb")
            self._file.seek(8 + self.HEADER_BYTES)
        self._write(self._file, name, tensor)

    def close(self) -> list[str]:
        """Write what waits (widest items first, so each lies aligned) and the header; return the tensors' names."""
        waiting = sorted(self._waiting, key=lambda item: (-item[1].element_size(), item[0]))
        streamed = self._file is not None
        file = self._file or self.path.open("wb")
        with file:
            if not streamed:
                file.seek(8 + -(-self._header_bytes // _ALIGNMENT) * _ALIGNMENT)
            start = file.tell() - self._offset
            for name, tensor in waiting:
                self._write(file, name, tensor)
            header = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}, separators=(",", ":")).encode()
            file.seek(0)
            file.write((start - 8).to_bytes(8, "little"))
            file.write(header.ljust(start - 8))
        return list(self._entries)

    def _write(self, file: BinaryIO, name: str, tensor: torch.Tensor) -> None:
        import torch

        data = tensor.reshape(-1).view(torch.uint8).numpy()
        file.write(data.data)
        end = self._offset + data.nbytes
        self._entries[name] = {
            "dtype": _CODES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, end],
        }
        self._offset = end


def _entry_bytes(name: str) -> int:
    """Upper bound of a header entry: the name, up to eight axes and two offsets of 15 digits."""
    return len(json.dumps(name)) + 180
