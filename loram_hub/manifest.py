"""`loram.json`: where a release comes from, how it was made, and the hash of every file in it.

See docs/format.md for the fields. Reading is strict: an unknown format version, a missing field or a wrong type is an
error.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from loram_hub.errors import IncompatibleError, VerificationError
from loram_hub.files import dump_json, read_json, sha256_of

MANIFEST = "loram.json"
FORMAT = 1
"""Version of the release format that this package writes; it reads this one and none newer."""

_TOOLS = ("loram-hub", "torch", "transformers", "bitsandbytes", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """The model a release was pruned from."""

    id: str
    """Hub id, or the folder's name if it was never on the Hub; never a local path."""
    commit: str | None
    """Commit of the Hub repository; None for a local folder."""
    config_sha256: str
    """SHA-256 of the base's `config.json`."""
    parameters: int
    """Parameters of the base, tied embeddings counted once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruning:
    """How the kept groups were chosen."""

    method: str
    """`structured`."""
    importance: str
    """`random`, `magnitude:l1`, `magnitude:l2`, `taylor:param_first`, ..."""
    pruning_ratio: float
    """Share removed of each prunable dimension of each pruned layer."""
    keep_first: int
    """Whole layers at the start."""
    keep_last: int
    """Whole layers at the end."""
    round_to: int | None
    """Multiple the kept channels were rounded to; None for the exact count."""
    seed: int
    """Seed of random scores and of the choice of calibration texts."""
    calibration: Mapping[str, Any] | None
    """Samples, tokens and digest of the calibration ids; None if none were used."""
    plan_sha256: str
    """Digest of the kept indices, see `Plan.digest`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """A file as it was when the release was made."""

    sha256: str
    """64 hexadecimal digits."""
    size: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of `loram.json`."""

    base: BaseModel
    pruning: Pruning
    parameters: int
    """Parameters of the pruned model."""
    alignment: Mapping[str, Any] | None = None
    """Corpora, tokens, steps and losses of continual pre-training; None if the weights are the base's own."""
    quantization: Mapping[str, Any] | None = None
    """`{"type": "nf4", "block": 64, "double_quant": true, "dtype": "bfloat16"}`, or None for unquantized weights."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The arguments of the call that made the release, verbatim."""
    tools: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages involved."""
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    """Every other file of the release by name."""
    format: int = FORMAT
    """Version of the release format."""

    def to_json(self) -> str:
        """Serialize to the text of `loram.json`."""
        return dump_json(asdict(self))


def read_manifest(folder: Path) -> Manifest:
    """Read and check a release's manifest.

    Raises:
        CheckpointError: there is none.
        VerificationError: it is not valid JSON or a field is missing or of the wrong type.
        IncompatibleError: the format is newer than this package.
    """
    values = read_json(folder / MANIFEST)
    version = values.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise VerificationError(f"{folder / MANIFEST} has format {version!r}; a positive whole number is needed.")
    if version > FORMAT:
        raise IncompatibleError(
            f"{folder} is a release of format {version}; this loram-hub reads up to format {FORMAT}. Upgrade loram-hub."
        )
    source = str(folder / MANIFEST)
    _check_fields(Manifest, values, source)
    files = _mapping(values, "files", source)
    tools = _mapping(values, "tools", source)
    return Manifest(
        base=_record(BaseModel, _mapping(values, "base", source), source),
        pruning=_record(Pruning, _mapping(values, "pruning", source), source),
        parameters=_typed(values, "parameters", int, source),
        alignment=_optional_mapping(values, "alignment", source),
        quantization=_optional_mapping(values, "quantization", source),
        recipe=_mapping(values, "recipe", source),
        tools={name: _typed(tools, name, str, source) for name in tools},
        files={name: _record(FileEntry, _mapping(files, name, source), source) for name in files},
        format=version,
    )


_T = TypeVar("_T")

_FIELD_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (float, int),
    "Mapping[str, Any] | None": (dict, type(None)),
}


def _record(kind: type[_T], values: Mapping[str, Any], source: str) -> _T:
    """Build a frozen record from untrusted JSON: every field present, of its declared type, and no other."""
    fields = _check_fields(kind, values, source)
    for name, declared in fields.items():
        value = values[name]
        if not isinstance(value, _FIELD_TYPES[declared.type]) or isinstance(value, bool):
            raise VerificationError(f"{source}: {kind.__name__}.{name} is {value!r}; {declared.type} is needed.")
    return kind(**values)


def _check_fields(kind: type, values: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]  # always a dataclass here
    if set(values) != set(fields):
        odd = sorted(set(values) ^ set(fields))
        raise VerificationError(f"{source}: {kind.__name__} has missing or unknown fields {odd}.")
    return fields


def _typed(values: Mapping[str, Any], key: str, kind: type, source: str) -> Any:  # noqa: ANN401 (checked here)
    value = values.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise VerificationError(f"{source} has {key} = {value!r}; {kind.__name__} is needed.")
    return value


def _mapping(values: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    found: dict[str, Any] = _typed(values, key, dict, source)
    return found


def _optional_mapping(values: Mapping[str, Any], key: str, source: str) -> dict[str, Any] | None:
    return None if values.get(key) is None else _mapping(values, key, source)


def file_entries(folder: Path, *, only: Collection[str] | None = None) -> dict[str, FileEntry]:
    """Hash every file of a release folder, or `only` those named, except the manifest itself."""
    return {
        path.relative_to(folder).as_posix(): FileEntry(sha256=sha256_of(path), size=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path != folder / MANIFEST
        and (only is None or path.relative_to(folder).as_posix() in only)
    }


def tool_versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a release."""
    versions = {"python": platform.python_version()}
    for name in _TOOLS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
