"""What was measured, exactly: whoever has this can repeat a measurement and knows whether he has the same model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from loram_hub.adapter import CONFIG as ADAPTER_CONFIG
from loram_hub.adapter import WEIGHTS as ADAPTER_WEIGHTS
from loram_hub.checkpoint import CONFIG, weight_files
from loram_hub.digests import remembered_sha256
from loram_hub.evaluation.opening import Subjects
from loram_hub.hub import Source
from loram_hub.manifest import MANIFEST, tool_versions
from loram_hub.release import open_metadata

_READING = (
    "added_tokens.json", "chat_template.*", "generation_config.json", "merges.txt", "special_tokens_map.json",
    "tokenizer*", "vocab.*",
)  # fmt: skip
"""Files that decide how text becomes tokens and how answers are drawn."""
_TOOLS = ("datasets", "lm-eval", "peft", "vllm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A model or adapter, so that it can be told from every other."""

    part: str
    """`base`, `release`, `adapter` or `recovered`."""
    id: str
    """Hub id, or the name of a local folder."""
    commit: str | None
    """Commit on the Hub; None for a local folder."""
    files: Mapping[str, str]
    """SHA-256 by name: of a release its manifest, which holds the hashes of all else; of an adapter config and factors;
    of a base config, tokenizer, chat template and weights; without the weights where a commit names them."""
    plan_sha256: str | None = None
    """Of a release: what was kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What a measurement was made of and with."""

    parts: tuple[Identity, ...]
    """The models and adapters that were given."""
    settings: Mapping[str, Any]
    """The arguments that decide the result: JSON values."""
    versions: Mapping[str, str]
    """Of Python and of the packages that compute."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "parts": [asdict(part) for part in self.parts],
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }


def provenance_of(subjects: Subjects, settings: Mapping[str, Any]) -> Provenance:
    """Identify what is measured; the weights of a local base are read for it, once."""
    parts = [
        _identity("base", subjects.base, _base_files),
        _identity("release", subjects.release, lambda folder: [folder / MANIFEST]),
        _identity("adapter", subjects.adapter, _adapter_files),
        _identity("recovered", subjects.recovered, _adapter_files),
    ]
    return Provenance(
        parts=tuple(part for part in parts if part is not None), settings=dict(settings), versions=_versions()
    )


def _identity(part: str, source: Source | None, files: Callable[[Path], list[Path]]) -> Identity | None:
    if source is None:
        return None
    named = files(source.folder)
    if part == "base" and source.commit is None:
        named += weight_files(source.folder)
    return Identity(
        part=part,
        id=source.id,
        commit=source.commit,
        files={file.name: remembered_sha256(file) for file in sorted(named)},
        plan_sha256=open_metadata(source.folder).plan.digest if part == "release" else None,
    )


def _base_files(folder: Path) -> list[Path]:
    """Return what decides, besides the weights, what a base reads and says."""
    found = {file for pattern in _READING for file in folder.glob(pattern) if file.is_file()}
    return [folder / CONFIG, *found]


def _adapter_files(folder: Path) -> list[Path]:
    return [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS]


def _versions() -> dict[str, str]:
    versions = tool_versions()
    for name in _TOOLS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
