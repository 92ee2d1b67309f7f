"""Ways of altering a sound release or adapter, for the corpus to combine.

Where an attack lies in what a file means, the manifest is made anew, as whoever publishes a release can: then no hash
tells, and the check of the meaning must.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from trust.subjects import reseal, write_manifest

from loram_hub.architecture import architecture_of
from loram_hub.checkpoint import CONFIG, SINGLE_FILE
from loram_hub.errors import LoramError
from loram_hub.manifest import MANIFEST
from loram_hub.release import MASK_INDEX, base_config_of, read_mask_index

HEADS, CHANNELS = "model.layers.1.self_attn.kv_heads", "model.layers.1.mlp.channels"
GATE, NORM, EMBEDDING = "model.layers.1.mlp.gate_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
STATE = f"{GATE}.quant_state.bitsandbytes__nf4"

Alter = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Alteration:
    """One way of altering a sound artefact."""

    kind: str
    """What was done, in words."""
    subject: str
    """Which of `SUBJECTS` it was done to."""
    alter: Alter
    """Does it, in place."""
    exit_code: int
    """What `loram verify` must end with: 3 verification failed, 4 incompatible."""
    message: str
    """A regular expression that the error's message must match, and no other's of the corpus."""


def of(subject: str, kind: str, alter: Alter, exit_code: int, message: str) -> Alteration:
    """One line of the corpus."""
    return Alteration(kind=kind, subject=subject, alter=alter, exit_code=exit_code, message=message)


def write(name: str, content: str | bytes = "content") -> Alter:
    """Put a file into the folder, unlisted."""

    def alter(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return alter


def remove(name: str) -> Alter:
    return lambda folder: (folder / name).unlink()


def sealed(*alters: Alter) -> Alter:
    """Alter, and make the manifest anew."""

    def alter(folder: Path) -> None:
        for each in alters:
            each(folder)
        reseal(folder)

    return alter


def listed(name: str) -> Alter:
    """Have the manifest list a name."""
    return manifest(lambda values: values["files"].update({name: {"sha256": "0" * 64, "size": 1}}))


def manifest(change: Callable[[dict[str, Any]], object]) -> Alter:
    """Change the manifest and seal it."""

    def alter(folder: Path) -> None:
        values = json.loads((folder / MANIFEST).read_text())
        change(values)
        write_manifest(folder, values)

    return alter


def text(name: str, change: Callable[[str], str]) -> Alter:
    """Change the text of a file."""
    return lambda folder: (folder / name).write_text(
        change((folder / name).read_text(encoding="utf-8")), encoding="utf-8"
    )


def data(name: str, change: Callable[[bytes], bytes]) -> Alter:
    """Change the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def values_of(name: str, **changes: Any) -> Alter:
    """Set keys of a JSON file."""
    return text(name, lambda content: json.dumps(json.loads(content) | changes))


def config(**changes: Any) -> Alter:
    """Set keys of `config.json`, manifest made anew."""
    return sealed(values_of(CONFIG, **changes))


def tensors(change: Callable[[Tensors], object], name: str = SINGLE_FILE) -> Alter:
    """Change tensors of a file."""

    def alter(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        save_file({key: value.contiguous() for key, value in found.items()}, folder / name, metadata={"format": "pt"})

    return alter


def state(**changes: Any) -> Alter:
    """Set keys of the quantization state of one matrix; the manifest is made anew."""

    def change(found: Tensors) -> None:
        values = json.loads(found[STATE].numpy().tobytes()) | changes
        found[STATE] = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)

    return sealed(tensors(change))


def state_text(change: Callable[[str], str]) -> Alter:
    def edit(found: Tensors) -> None:
        content = change(found[STATE].numpy().tobytes().decode())
        found[STATE] = torch.tensor(list(content.encode()), dtype=torch.uint8)

    return sealed(tensors(edit))


def masks(change: Callable[[dict[str, np.ndarray[Any, Any]]], object]) -> Alter:
    """Change mask indexes; the manifest is made anew, with the digest of the new plan if it is one."""

    def alter(folder: Path) -> None:
        arrays = load_arrays(folder / MASK_INDEX)
        change(arrays)
        save_arrays(arrays, folder / MASK_INDEX)
        reseal(folder)
        architecture = architecture_of(base_config_of(json.loads((folder / CONFIG).read_text())))
        try:
            digest = read_mask_index(folder / MASK_INDEX, architecture).digest
        except LoramError:
            return
        manifest(lambda values: values["pruning"].update(plan_sha256=digest))(folder)

    return alter


def mask(name: str, *indices: int, dtype: Any = np.int32) -> Alter:
    return masks(lambda arrays: arrays.update({name: np.array(indices, dtype=dtype)}))


def header(change: Callable[[str], str], name: str = SINGLE_FILE, *, tail: bytes = b"") -> Alter:
    """Change the header of a safetensors file as text, and append bytes to the file."""

    def edit(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        changed = change(content[8 : 8 + length].decode().rstrip()).encode()
        return len(changed).to_bytes(8, "little") + changed + content[8 + length :] + tail

    return data(name, edit)


def entries(change: Callable[[dict[str, Any]], object], name: str = SINGLE_FILE, *, tail: bytes = b"") -> Alter:
    """Change the entries of a safetensors header; the manifest is made anew."""

    def edit(content: str) -> str:
        found = json.loads(content)
        change(found)
        return json.dumps(found)

    return sealed(header(edit, name, tail=tail))


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def first_shards(folder: Path) -> tuple[Path, Path]:
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    return first, second


def swap_shards(folder: Path) -> None:
    first, second = first_shards(folder)
    spare = folder / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def merge_shards(folder: Path) -> None:
    first, second = first_shards(folder)
    save_file(load_file(first) | load_file(second), second)


def link(name: str, target: str) -> Alter:
    def alter(folder: Path) -> None:
        (folder.parent / "secret").write_text("{}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return alter


def replace(old: str, new: str) -> Callable[[str], str]:
    def change(content: str) -> str:
        assert old in content
        return content.replace(old, new, 1)

    return change


def nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def sparse(path: Path) -> None:
    """Make a file of 200 MB without writing it: a header length that fits, and nothing but zeros."""
    with path.open("wb") as file:
        file.write((150_000_000).to_bytes(8, "little") + b"{")
        file.truncate(200_000_000)


def open_hole(path: Path) -> None:
    """Move the last tensor up by 64 bytes, where anything could hide."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    found = json.loads(content[8 : 8 + length])
    last = max((name for name in found if name != "__metadata__"), key=lambda name: found[name]["data_offsets"][0])
    first, end = found[last]["data_offsets"]
    found[last]["data_offsets"] = [first + 64, end + 64]
    changed = json.dumps(found).encode()
    body = content[8 + length :]
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + body[:first] + b"\0" * 64 + body[first:])


def unlist_first_shard(folder: Path) -> None:
    """Have the manifest forget a file that the weights need."""
    manifest(lambda values: values["files"].pop(first_shards(folder)[0].name))(folder)
