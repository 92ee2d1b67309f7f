"""`loram.json`: where a release comes from, how it was made, and the hash of every file in it.

See docs/format.md for the fields. Reading is strict: an unknown format version, a missing field, a wrong type, a hash
that is none or text that could steer a terminal is an error. The file seals itself, so a flipped bit in it is found.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from loram_hub.errors import IncompatibleError, InvalidRequestError, VerificationError
from loram_hub.files import read_json, sha256_of
from loram_hub.masks import parse_pattern
from loram_hub.plan import NF4_BLOCK
from loram_hub.seals import check_seal, seal

MANIFEST = "loram.json"
STRUCTURED_FORMAT = 1
"""Version of the release format that structured releases have, which lose channel groups."""
SPARSE_FORMAT = 2
"""Version of the release format that sparse releases have, which lose single weights."""
FORMAT = SPARSE_FORMAT
"""Newest version of the release format that this package reads."""

NF4_DESCRIPTION: Mapping[str, Any] = {"type": "nf4", "block": NF4_BLOCK, "double_quant": True}
"""What the manifest says of an NF4 release, besides `dtype`."""
FLOAT_TYPES = ("bfloat16", "float16", "float32")
"""Types that the unquantized weights of an NF4 release may have."""
STRUCTURED = "structured"
"""Method of the releases of format 1."""
SPARSE_METHODS = ("sparsegpt", "wanda", "magnitude")
"""Methods of the releases of format 2."""

_MAX_COUNT = 10**15
_MAX_SEED = 2**64
_MAX_TEXT = 256
_COUNTS = ("keep_first", "keep_last", "kept_weights")
_HEX = re.compile(r"[0-9a-f]+")
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

    @property
    def label(self) -> str:
        """What tells releases of one base apart, in a few words."""
        return f"ratio {self.pruning_ratio:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparsification:
    """How the kept weights of a sparse release were chosen."""

    method: str
    """`sparsegpt`, `wanda` or `magnitude`."""
    pattern: str
    """`unstructured`, or `n:m`: n of every m consecutive inputs of an output are kept."""
    sparsity: float
    """Share of the projections' weights that was to be removed."""
    kept_weights: int
    """Weights of the projections that are kept."""
    dampening: float | None
    """Of SparseGPT: share of the Hessian's mean diagonal that is added to it; None for the others."""
    block_size: int | None
    """Of SparseGPT: columns that are pruned before the others are updated; None for the others."""
    seed: int
    """Seed of the choice of calibration texts."""
    calibration: Mapping[str, Any] | None
    """Samples, tokens and digest of the calibration ids; None if none were used."""
    plan_sha256: str
    """Digest of the masks, see `Plan.digest`."""

    @property
    def label(self) -> str:
        """What tells releases of one base apart, in a few words."""
        name = {"sparsegpt": "SparseGPT", "wanda": "Wanda"}.get(self.method, self.method)
        return f"{name} {f'{self.sparsity:.4g}' if self.pattern == 'unstructured' else self.pattern}"


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
    pruning: Pruning | Sparsification
    parameters: int
    """Parameters of the pruned model; those of a sparse one that are not removed."""
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
    format: int = field(init=False)
    """Version of the release format, which follows from the way of pruning."""

    def __post_init__(self) -> None:
        """Set the format."""
        object.__setattr__(self, "format", SPARSE_FORMAT if self.is_sparse else STRUCTURED_FORMAT)

    @property
    def is_sparse(self) -> bool:
        """Whether single weights were removed, and no shape has changed."""
        return isinstance(self.pruning, Sparsification)

    def to_json(self) -> str:
        """Serialize to the text of `loram.json`, with the hash of itself."""
        return seal(asdict(self))


def read_manifest(folder: Path) -> Manifest:
    """Read and check a release's manifest.

    Raises:
        CheckpointError: there is none.
        VerificationError: it is no valid JSON, not what was sealed, or a field is missing, of the wrong type or absurd.
        IncompatibleError: the format is newer than this package.
    """
    values = read_json(folder / MANIFEST)
    version = _known_version(folder, values)
    source = str(folder / MANIFEST)
    values = check_seal(folder / MANIFEST, values)
    _check_texts({key: value for key, value in values.items() if key != "files"}, source)  # names have stricter rules
    _check_fields(Manifest, values, source)
    files = _mapping(values, "files", source)
    tools = _mapping(values, "tools", source)
    manifest = Manifest(
        base=_record(BaseModel, _mapping(values, "base", source), source),
        pruning=_read_pruning(_mapping(values, "pruning", source), version, source),
        parameters=_typed(values, "parameters", int, source),
        alignment=_optional_mapping(values, "alignment", source),
        quantization=_optional_mapping(values, "quantization", source),
        recipe=_mapping(values, "recipe", source),
        tools={name: _typed(tools, name, str, source) for name in tools},
        files={name: _record(FileEntry, _mapping(files, name, source), source) for name in files},
    )
    _check_values(manifest, source)
    return manifest


def refuse_newer(folder: Path) -> None:
    """Raise `IncompatibleError` if there is a manifest of a newer format, which may want other files than this one."""
    if (folder / MANIFEST).is_file():
        _known_version(folder, read_json(folder / MANIFEST))


def _known_version(folder: Path, values: Mapping[str, Any]) -> int:
    version = values.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise VerificationError(f"{folder / MANIFEST} has format {version!r:.100}; a positive whole number is needed.")
    if version > FORMAT:
        raise IncompatibleError(
            f"{folder} is a release of format {_short(version)}; this loram-hub reads up to format {FORMAT}. "
            "Upgrade loram-hub."
        )
    return version


def _read_pruning(values: Mapping[str, Any], version: int, source: str) -> Pruning | Sparsification:
    methods = (STRUCTURED,) if version == STRUCTURED_FORMAT else SPARSE_METHODS
    if "method" in values and values["method"] not in methods:
        raise VerificationError(
            f"{source} has pruning.method {values['method']!r:.100}; format {version} has {' or '.join(methods)}."
        )
    if version == STRUCTURED_FORMAT:
        return _record(Pruning, values, source)
    found = _record(Sparsification, values, source)
    _check_sparsification(found, source)
    return found


def _check_sparsification(pruning: Sparsification, source: str) -> None:
    try:
        pattern = parse_pattern(pruning.pattern)
    except InvalidRequestError as err:
        raise VerificationError(f"{source} has pruning.pattern {pruning.pattern!r:.100}: {err}") from err
    if not 0 < pruning.sparsity < 1:  # also refuses NaN
        raise VerificationError(f"{source} has pruning.sparsity {pruning.sparsity}; a share between 0 and 1 is needed.")
    if pattern.sparsity is not None and pruning.sparsity != pattern.sparsity:
        raise VerificationError(
            f"{source} has pruning.sparsity {pruning.sparsity}, which is not that of {pruning.pattern}."
        )
    is_sparsegpt = pruning.method == "sparsegpt"
    for name in ("dampening", "block_size"):
        value = getattr(pruning, name)
        if (value is not None) != is_sparsegpt or (is_sparsegpt and not 0 < value < _MAX_COUNT):
            raise VerificationError(
                f"{source} has pruning.{name} {value!r:.100}; a positive number is needed with sparsegpt, none else."
            )


def _check_values(manifest: Manifest, source: str) -> None:
    """Check what a type alone does not say: hashes, counts, names, and the choices that the format has."""
    base, pruning, quantization = manifest.base, manifest.pruning, manifest.quantization
    _check_hash("base.config_sha256", base.config_sha256, 64, source)
    _check_hash("pruning.plan_sha256", pruning.plan_sha256, 64, source)
    if base.commit is not None:
        _check_hash("base.commit", base.commit, 40, source)
    for name, entry in manifest.files.items():
        _check_hash(f"files[{name!r:.200}].sha256", entry.sha256, 64, source)
        _check_count(f"files[{name!r:.200}].size", entry.size, source)
    for what, count in (
        ("parameters", manifest.parameters),
        ("base.parameters", base.parameters),
        *((f"pruning.{name}", getattr(pruning, name)) for name in _COUNTS if hasattr(pruning, name)),
    ):
        _check_count(what, count, source)
    _check_count("pruning.seed", pruning.seed, source, most=_MAX_SEED)
    if quantization is not None and (
        set(quantization) != {*NF4_DESCRIPTION, "dtype"}
        or any(type(quantization[key]) is not type(value) for key, value in NF4_DESCRIPTION.items())
        or {**quantization, "dtype": None} != {**NF4_DESCRIPTION, "dtype": None}
        or quantization["dtype"] not in FLOAT_TYPES
    ):
        raise VerificationError(
            f"{source} has quantization {dict(quantization)!r:.200}; releases have {dict(NF4_DESCRIPTION)!r} and "
            f"a dtype of {', '.join(FLOAT_TYPES)}."
        )
    texts = [("base.id", base.id)]
    if isinstance(pruning, Pruning):
        texts.append(("pruning.importance", pruning.importance))
    for what, text in texts:
        if not 0 < len(text) <= _MAX_TEXT or not text.isprintable():
            raise VerificationError(
                f"{source} has {what} {text!r:.100}; 1 to {_MAX_TEXT} printable characters are needed."
            )
    if base.id.startswith(("/", "~")) or "\\" in base.id or ".." in base.id.split("/") or base.id.count("/") > 1:
        raise VerificationError(f"{source} has base.id {base.id!r:.100}; a Hub id or a bare name is needed, no path.")


def _check_hash(what: str, value: str, digits: int, source: str) -> None:
    if len(value) != digits or _HEX.fullmatch(value) is None:
        raise VerificationError(f"{source} has {what} {value!r:.100}; {digits} hexadecimal digits are needed.")


def _check_count(what: str, value: int, source: str, *, most: int = _MAX_COUNT) -> None:
    if not 0 <= value <= most:
        raise VerificationError(f"{source} has {what} {_short(value)}; 0 to {most:.0e} is what is believed.")


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**12 else f"about 10^{len(str(abs(value))) - 1}"


def _check_texts(values: Mapping[str, Any], source: str) -> None:
    """Refuse control characters, which steer terminals, and half characters, which cannot be printed at all."""
    for text in _texts(values):
        bad = next((c for c in text if not c.isprintable() and c not in "\n\t\u3000\xa0"), None)
        if bad is not None:
            raise VerificationError(f"{source} holds text with the control character {bad!r}: {text!r:.100}.")


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


_T = TypeVar("_T")

_FIELD_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (float, int),
    "float | None": (float, int, type(None)),
    "Mapping[str, Any] | None": (dict, type(None)),
}


def _record(kind: type[_T], values: Mapping[str, Any], source: str) -> _T:
    """Build a frozen record from untrusted JSON: every field present, of its declared type, and no other."""
    fields = _check_fields(kind, values, source)
    for name, declared in fields.items():
        value = values[name]
        if not isinstance(value, _FIELD_TYPES[declared.type]) or isinstance(value, bool):
            raise VerificationError(f"{source}: {kind.__name__}.{name} is {value!r:.100}; {declared.type} is needed.")
    return kind(**values)


def _check_fields(kind: type, values: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]  # always a dataclass here
    if set(values) != set(fields):
        odd = sorted(set(values) ^ set(fields))
        raise VerificationError(f"{source}: {kind.__name__} has missing or unknown fields {odd!r:.300}.")
    return fields


def _typed(values: Mapping[str, Any], key: str, kind: type, source: str) -> Any:  # noqa: ANN401 (checked here)
    value = values.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise VerificationError(f"{source} has {key:.100} = {value!r:.100}; {kind.__name__} is needed.")
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
