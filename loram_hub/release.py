"""A release on disk: pruned weights, mask indexes, manifest, config, tokenizer. docs/format.md has it to the byte.

`write_release` builds one atomically; `open_release` reads one and checks all that is cheap to check before a tensor is
built; `open_metadata` does so where no weights are at hand; `verify` hashes every byte as well. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from loram_hub.architecture import LAYER_PREFIX, Architecture, Indices, Space, architecture_of
from loram_hub.checkpoint import CONFIG, TensorInfo, index_tensors, is_companion, read_config, read_headers
from loram_hub.errors import CheckpointError, PlanMismatchError, VerificationError
from loram_hub.files import atomic_folder, dump_json, parse_json, resource_errors, sha256_of
from loram_hub.manifest import MANIFEST, FileEntry, Manifest, file_entries, read_manifest, tool_versions
from loram_hub.plan import NF4_BLOCK, NF4_NESTED_BLOCK, Plan

MASK_INDEX = "mask_index.safetensors"
MODEL_TYPE_PREFIX = "loram_"
"""Releases carry a `model_type` of their own: with the base's, stock transformers opens an NF4 release without a word
and builds modules of the wrong declared size."""

NF4_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
"""What bitsandbytes stores beside the codes of an NF4 matrix."""
ADAPTER_CONFIG = "adapter_config.json"

_MASK_NAME = re.compile(rf"{re.escape(LAYER_PREFIX)}\.(0|[1-9][0-9]{{0,5}})\.(self_attn\.kv_heads|mlp\.channels)")
_SPACE_OF_MASK: Mapping[str, Space] = {"self_attn.kv_heads": "kv_heads", "mlp.channels": "channels"}
_MAX_MASK_BYTES = 256 * 1024 * 1024
_STATE = ".quant_state.bitsandbytes__nf4"
_MAX_STATE_BYTES = 4096
_STATE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Release:
    """An opened release."""

    folder: Path
    manifest: Manifest
    plan: Plan
    config: Mapping[str, Any]
    """`config.json` of the release."""

    @property
    def architecture(self) -> Architecture:
        """The base model's architecture."""
        return self.plan.architecture

    @property
    def is_quantized(self) -> bool:
        """Whether the projections are NF4."""
        return self.manifest.quantization is not None


def is_release(folder: Path) -> bool:
    """Whether a folder claims to be a release."""
    return (folder / MANIFEST).is_file() and (folder / MASK_INDEX).is_file()


def base_config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a release's config back into the base model's: its own `model_type`, no `loram` mark.

    Raises:
        VerificationError: the config carries no `loram_` model_type, or wants code to be run (`auto_map`).
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type.startswith(MODEL_TYPE_PREFIX):
        raise VerificationError(
            f"{CONFIG} has model_type {model_type!r}; a release has one that starts with {MODEL_TYPE_PREFIX!r}."
        )
    if "auto_map" in config:
        raise VerificationError(
            f"{CONFIG} has an auto_map, which would run code from the release. loram-hub never does."
        )
    if "transformers_weights" in config:
        raise VerificationError(
            f"{CONFIG} has transformers_weights, which would load another file than the one that was checked."
        )
    base = {key: value for key, value in config.items() if key != "loram"}
    base["model_type"] = model_type.removeprefix(MODEL_TYPE_PREFIX)
    return base


def release_config(
    base_config: Mapping[str, Any], *, quantization_config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Make the `config.json` of a release from the base model's."""
    config = {key: value for key, value in base_config.items() if key not in ("auto_map", "_name_or_path")}
    config["model_type"] = MODEL_TYPE_PREFIX + str(base_config["model_type"])
    config["loram"] = {"format": 1}
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    return config


@contextmanager
def write_release(
    out_dir: Path, *, manifest: Manifest, plan: Plan, config: Mapping[str, Any], overwrite: bool = False
) -> Iterator[Path]:
    """Write a release atomically: the block adds weights and other files to the folder it is given.

    Mask indexes, config and, last of all, the manifest with the hash of every file are written here.

    Args:
        out_dir: folder to create.
        manifest: all but `files` and `tools`, which are filled in.
        plan: the kept groups.
        config: the release's `config.json`, from `release_config`.
        overwrite: replace an existing folder.

    Yields:
        The folder to write weights to.

    Raises:
        InvalidRequestError: the folder exists and is not empty.
        ResourceError: the disk is full or not writable.
    """
    with atomic_folder(out_dir, overwrite=overwrite) as folder:
        (folder / CONFIG).write_text(dump_json(config), encoding="utf-8")
        yield folder
        seal_release(folder, manifest=manifest, plan=plan)


def seal_release(folder: Path, *, manifest: Manifest, plan: Plan, only: Collection[str] | None = None) -> None:
    """Write mask indexes and manifest into a folder that holds everything else.

    Args:
        folder: with config and weights.
        manifest: all but `files` and `tools`, which are filled in.
        plan: the kept groups.
        only: names of the files that belong to the release; None for every file in the folder.
    """
    with resource_errors(f"Writing {folder}"):
        write_mask_index(folder / MASK_INDEX, plan)
        complete = replace(manifest, files=file_entries(folder, only=only), tools=tool_versions())
        (folder / MANIFEST).write_text(complete.to_json(), encoding="utf-8")


def write_mask_index(path: Path, plan: Plan) -> None:
    """Write the kept indices, int32, under the names of docs/format.md."""
    names = {space: name for name, space in _SPACE_OF_MASK.items()}
    arrays = {
        f"{LAYER_PREFIX}.{layer}.{names[space]}": np.ascontiguousarray(indices)
        for layer, spaces in plan.kept.items()
        for space, indices in spaces.items()
    }
    path.write_bytes(save(arrays))  # not save_file, which makes the file readable to its owner alone


def read_mask_index(path: Path, architecture: Architecture) -> Plan:
    """Read kept indices from an untrusted file.

    Raises:
        VerificationError: the file is torn, too large, or has a tensor under a foreign name.
        PlanMismatchError: an index breaks the rules (type, order, range) or does not fit the architecture.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}; it is no release.")
    if path.stat().st_size > _MAX_MASK_BYTES:
        raise VerificationError(f"{path} is larger than {_MAX_MASK_BYTES:,} bytes.")
    masks: dict[str, tuple[int, Space]] = {}
    for name, info in read_headers(path).items():
        match = _MASK_NAME.fullmatch(name)
        if match is None:
            raise VerificationError(f"{path} holds {name!r}, which is no mask index.")
        if info.dtype != "I32":
            raise PlanMismatchError(f"Mask index {name} has dtype {info.dtype}; I32 is needed.")
        masks[name] = (int(match[1]), _SPACE_OF_MASK[match[2]])
    kept: dict[int, dict[Space, Indices]] = {}
    try:
        with safe_open(path, framework="np") as file:
            for name, (layer, space) in masks.items():
                kept.setdefault(layer, {})[space] = file.get_tensor(name)
    except SafetensorError as err:
        raise VerificationError(f"{path} cannot be read: {err}") from err
    return Plan(architecture, kept)


def open_release(folder: Path) -> Release:
    """Open a release and check it without reading the weights.

    Checked: manifest, file sizes, hashes of everything but the weights, mask indexes against the base config, and the
    shape of every weight against the plan. `verify` also hashes the weights.

    Args:
        folder: the release.

    Returns:
        The release.

    Raises:
        CheckpointError: the folder is no release or a file is missing.
        VerificationError: a file differs from the manifest.
        IncompatibleError: the format is newer than this package, or plan and weights do not fit.
    """
    release = open_metadata(folder)
    if (folder / ADAPTER_CONFIG).exists():
        raise VerificationError(
            f"{folder} holds {ADAPTER_CONFIG}: transformers would put that adapter on the model without a word. "
            "Keep adapters in folders of their own."
        )
    _check_files(folder, release.manifest.files, hash_weights=False)
    _check_weights(release)
    return release


def open_metadata(folder: Path) -> Release:
    """Open a release by its manifest, config and mask indexes alone: no weights need be there.

    Recovery needs no more than this, so nobody downloads a model to recover an adapter.

    Raises:
        CheckpointError: the folder is no release.
        VerificationError: one of the three files differs from the manifest.
        IncompatibleError: the format is newer than this package, or the plan does not fit the base config.
    """
    if not is_release(folder):
        read_config(folder)  # the better error if it is no checkpoint at all
        raise CheckpointError(f"{folder} is a checkpoint but no LoRAM release: it lacks {MANIFEST} or {MASK_INDEX}.")
    manifest = read_manifest(folder)
    needed = {name: entry for name, entry in manifest.files.items() if name in (CONFIG, MASK_INDEX)}
    _check_files(folder, needed, hash_weights=False)
    config = read_config(folder)
    architecture = architecture_of(base_config_of(config))
    plan = read_mask_index(folder / MASK_INDEX, architecture)
    if plan.digest != manifest.pruning.plan_sha256:
        raise VerificationError(f"{folder / MASK_INDEX} is not the plan that {MANIFEST} was written for.")
    return Release(folder=folder, manifest=manifest, plan=plan, config=config)


def verify(folder: str | Path) -> Release:
    """Check every byte of a release folder against its manifest, then everything that `open_release` checks.

    Returns:
        The release, if all is well.

    Raises:
        VerificationError: names the first file that differs, is missing or was added.
        IncompatibleError: see `open_release`.
    """
    folder = Path(folder)
    release = open_release(folder)
    _check_files(folder, release.manifest.files, hash_weights=True)
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    # A tokenizer, card or licence may be put beside a finished release; it changes nothing of the rest.
    added = sorted(name for name in present - set(release.manifest.files) if not is_companion(name))
    if added:
        raise VerificationError(f"{folder} holds {added[0]}, which its manifest does not list.")
    return release


def _check_files(folder: Path, files: Mapping[str, FileEntry], *, hash_weights: bool) -> None:
    if not {CONFIG, MASK_INDEX} <= set(files):
        raise VerificationError(f"{folder / MANIFEST} does not list {CONFIG} and {MASK_INDEX}.")
    for name, entry in files.items():
        path = folder / name
        if not _is_inside(name):
            raise VerificationError(f"{folder / MANIFEST} lists {name!r}, which is no name of a file in the release.")
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its manifest lists. Download or copy it again.")
        size = path.stat().st_size
        if size != entry.size:
            raise VerificationError(
                f"{path} has {size:,} bytes, the manifest says {entry.size:,}. Download or copy it again."
            )
        is_weight = name.endswith(".safetensors") and name != MASK_INDEX
        if (hash_weights or not is_weight) and sha256_of(path) != entry.sha256:
            raise VerificationError(f"{path} was changed: its SHA-256 is not the manifest's.")


def _is_inside(name: str) -> bool:
    """Whether a name from the manifest is a plain relative path that a file system can hold."""
    parts = name.split("/")
    return len(name) <= 1024 and all(
        part not in ("", ".", "..") and "\0" not in part and len(part.encode("utf-8", "replace")) <= 255
        for part in parts
    )


def _check_weights(release: Release) -> None:
    found = index_tensors(release.folder)
    shapes = release.plan.tensor_shapes()
    listed = release.manifest.files
    for file in sorted({info.file.name for info in found.values()}):
        if file not in listed:
            raise VerificationError(f"{release.folder} has weights in {file}, which its manifest does not list.")
    matrices = {f".{weight.name}" for weight in release.architecture.projections} if release.is_quantized else set()
    packed = {
        name: shape
        for name, shape in shapes.items()
        if name.startswith(LAYER_PREFIX) and any(name.endswith(matrix) for matrix in matrices)
    }
    for name, shape in shapes.items():
        if name not in found:
            raise CheckpointError(f"{release.folder} has no tensor {name!r}.")
        if name not in packed and found[name].shape != shape:
            raise PlanMismatchError(f"Tensor {name!r} has shape {found[name].shape}; the plan gives it {shape}.")
    for name, shape in packed.items():
        _check_packed(name, shape, found)
    _check_packed_states(packed, found)
    known = set(shapes) | {f"{name}.{part}" for name in packed for part in NF4_PARTS}
    foreign = sorted(set(found) - known)
    if foreign:
        raise PlanMismatchError(f"{release.folder} has a tensor {foreign[0]!r}, which the plan knows nothing of.")


def _check_packed(name: str, shape: tuple[int, ...], found: Mapping[str, TensorInfo]) -> None:
    """Check the parts of an NF4 matrix: bitsandbytes trusts them, and reads past their end where they are too short."""
    elements = math.prod(shape)
    scales = -(-elements // NF4_BLOCK)
    expected = {
        name: ("U8", (-(-elements // 2), 1)),
        f"{name}.absmax": ("U8", (scales,)),
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.nested_absmax": ("F32", (-(-scales // NF4_NESTED_BLOCK),)),
        f"{name}.nested_quant_map": ("F32", (256,)),
    }
    for part, (dtype, part_shape) in expected.items():
        info = found.get(part)
        if info is None or (info.dtype, info.shape) != (dtype, part_shape):
            has = "is missing" if info is None else f"is {info.dtype} {info.shape}"
            raise PlanMismatchError(f"{part!r} {has}; NF4 of the planned {shape} has {dtype} {part_shape} there.")


def _check_packed_states(packed: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorInfo]) -> None:
    """Check what bitsandbytes takes its own shapes, types and block sizes from, one pass per file."""
    by_file: dict[Path, list[str]] = {}
    for name in packed:
        state = f"{name}{_STATE}"
        if (
            state not in found
            or found[state].dtype != "U8"
            or not 0 < math.prod(found[state].shape) <= _MAX_STATE_BYTES
        ):
            raise VerificationError(f"{state!r} is missing, or not the small piece of JSON that it should be.")
        by_file.setdefault(found[state].file, []).append(name)
    for file, members in by_file.items():
        with safe_open(file, framework="np") as shard:
            for name in members:
                text = shard.get_tensor(f"{name}{_STATE}").tobytes().decode("utf-8", "replace")
                _check_state(parse_json(text, source=f"{file}: {name}{_STATE}"), packed[name], name)


def _check_state(state: Mapping[str, Any], shape: tuple[int, ...], name: str) -> None:
    fixed = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK,
        "nested_blocksize": NF4_NESTED_BLOCK,
        "nested_dtype": "float32",
        "shape": list(shape),
    }
    for key, value in fixed.items():
        if state.get(key) != value:
            raise PlanMismatchError(
                f"The quantization state of {name!r} has {key} {state.get(key)!r}; {value!r} is needed."
            )
    if set(state) != {*fixed, "dtype", "nested_offset"} or not isinstance(state["nested_offset"], float):
        raise VerificationError(
            f"The quantization state of {name!r} has missing, unknown or ill-typed keys: {sorted(state)}."
        )
    if state["dtype"] not in _STATE_DTYPES:
        raise VerificationError(
            f"The quantization state of {name!r} has dtype {state['dtype']!r}; one of {_STATE_DTYPES} is needed."
        )
