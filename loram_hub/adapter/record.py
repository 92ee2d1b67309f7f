"""`loram.json` of a recovered adapter: where it comes from, and the hashes of its files.

The record is sealed: it holds a hash of itself, so that a flipped bit in it is found too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loram_hub.adapter.config import CONFIG, AdapterConfig
from loram_hub.adapter.tensors import WEIGHTS
from loram_hub.errors import IncompatibleError, VerificationError
from loram_hub.files import read_json, sha256_of
from loram_hub.seals import check_seal, seal

RECORD = "loram.json"
"""Where an adapter comes from; written beside a recovered one, read beside a pruned one if it is there."""

RECOVERED = "recovered adapter"
"""Value of `kind` in the record of a recovered adapter."""

RECORD_FORMAT = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LISTED = (CONFIG, WEIGHTS)
_FIELDS = frozenset({"format", "kind", "base", "release", "trained", "files"})
_SCALE = "scale"
"""The one field that only some records have."""
_SCALE_FIELDS = frozenset({"factor", "losses", "standard_error", "examples", "tokens", "data_sha256", "base_commit"})
_MAX_SCALES = 100
_TRAINED = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})

MASKED_FIELD = "masked"
"""Says of an adapter, true, that it was trained masked; not there for others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileHash:
    """Content of a file."""

    sha256: str
    """64 hexadecimal digits."""
    size: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleRecord:
    """How the number was chosen that every lora_B was multiplied by after recovery."""

    factor: float
    """What lora_B was multiplied by, above 0; 1.0 if no other was better."""
    losses: tuple[tuple[float, float], ...]
    """(scale, mean loss in nats per token) of each scale that was tried, ascending; `factor` and 1.0 are among them."""
    standard_error: float
    """Of the difference in loss between `factor` and 1.0, over the examples, in nats per token."""
    examples: int
    """Sequences of the development set."""
    tokens: int
    """Tokens scored in it."""
    data_sha256: str
    """SHA-256 of the development set as token ids."""
    base_commit: str | None
    """Commit of the model that was run; None for a folder that is not from the Hub."""

    def to_values(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"losses": [list(pair) for pair in self.losses]}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRecord:
    """Where a recovered adapter comes from."""

    base_id: str
    """The original model: Hub id, or a folder's name."""
    base_commit: str | None
    """Its commit on the Hub."""
    base_config_sha256: str
    """SHA-256 of its config.json."""
    release_id: str
    """The release it was trained on: Hub id, or a folder's name."""
    release_commit: str | None
    """Its commit on the Hub."""
    plan_sha256: str
    """Digest of the plan: which channel groups the release keeps."""
    trained: Mapping[str, Any]
    """Ranks and alphas in training, and whether the update was masked."""
    files: Mapping[str, FileHash]
    """Config and weights of the adapter, by file name."""
    scale: ScaleRecord | None = None
    """How lora_B was rescaled; None if the trained numbers were copied as they are."""

    def to_json(self) -> str:
        """Return the text of `loram.json`, a function of the values alone."""
        values: dict[str, Any] = {
            "format": RECORD_FORMAT,
            "kind": RECOVERED,
            "base": {"id": self.base_id, "commit": self.base_commit, "config_sha256": self.base_config_sha256},
            "release": {"id": self.release_id, "commit": self.release_commit, "plan_sha256": self.plan_sha256},
            "trained": dict(self.trained),
            "files": {name: {"sha256": file.sha256, "size": file.size} for name, file in self.files.items()},
        }
        if self.scale is not None:
            values[_SCALE] = self.scale.to_values()
        return seal(values)


def hash_files(folder: Path) -> dict[str, FileHash]:
    """Hash the config and the weights of an adapter folder, for its record."""
    return {
        name: FileHash(sha256=sha256_of(folder / name), size=(folder / name).stat().st_size) for name in sorted(_LISTED)
    }


def training_of(config: AdapterConfig, *, masked: bool = False) -> dict[str, Any]:
    """Return what the record says of the training: ranks and alphas as the trained adapter declared them.

    Args:
        config: of the trained adapter.
        masked: whether its update was masked; see `loram_hub.masked_lora`.
    """
    return {
        **({MASKED_FIELD: True} if masked else {}),
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
    }


def read_record(folder: Path) -> AdapterRecord:
    """Read the record of a recovered adapter from an untrusted folder; strict to the byte.

    Raises:
        CheckpointError: there is none.
        IncompatibleError: its format is newer than this loram-hub knows.
        VerificationError: it is no such record, or was altered.
    """
    path = folder / RECORD
    values = read_json(path)
    found = values.get("format")
    if isinstance(found, int) and not isinstance(found, bool) and found > RECORD_FORMAT:
        raise IncompatibleError(
            f"{path} has format {found}; this loram-hub reads up to {RECORD_FORMAT}. Upgrade loram-hub."
        )
    if found != RECORD_FORMAT or values.get("kind") != RECOVERED:
        raise VerificationError(
            f"{path} has format {found!r:.50} and kind {values.get('kind')!r:.50}; a recovered adapter has format "
            f"{RECORD_FORMAT} and kind {RECOVERED!r}. Copy or recover the adapter again."
        )
    return _parse(check_seal(path, values), str(path))


def _parse(values: Mapping[str, Any], source: str) -> AdapterRecord:
    fields = _Fields(source)
    fields.keys(values, _FIELDS | ({_SCALE} & values.keys()), "the record")
    base = fields.members(values["base"], {"id", "commit", "config_sha256"}, "base")
    release = fields.members(values["release"], {"id", "commit", "plan_sha256"}, "release")
    files = fields.members(values["files"], set(_LISTED), "files")
    return AdapterRecord(
        base_id=fields.text(base["id"], "base.id"),
        base_commit=fields.text_or_none(base["commit"], "base.commit"),
        base_config_sha256=fields.digest(base["config_sha256"], "base.config_sha256"),
        release_id=fields.text(release["id"], "release.id"),
        release_commit=fields.text_or_none(release["commit"], "release.commit"),
        plan_sha256=fields.digest(release["plan_sha256"], "release.plan_sha256"),
        trained=fields.training(values["trained"]),
        files={name: fields.file(files[name], f"files[{name!r}]") for name in sorted(files)},
        scale=fields.scale(values[_SCALE]) if _SCALE in values else None,
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to the values of an untrusted record."""

    source: str

    def keys(self, found: Mapping[str, Any], needed: frozenset[str] | set[str], name: str) -> None:
        if set(found) != needed:
            odd = sorted(set(found) ^ needed)[0]
            state = "is missing" if odd in needed else "is unknown"
            raise VerificationError(
                f"{odd!r:.100} of {name} in {self.source} {state}. Copy or recover the adapter again."
            )

    def members(self, value: object, needed: frozenset[str] | set[str], name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._refusal(value, name, "an object is")
        self.keys(value, needed, name)
        return value

    def text(self, value: object, name: str) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= 1_000:
            raise self._refusal(value, name, "text of 1 to 1,000 letters is")
        return value

    def text_or_none(self, value: object, name: str) -> str | None:
        return None if value is None else self.text(value, name)

    def digest(self, value: object, name: str) -> str:
        if not isinstance(value, str) or _SHA256.fullmatch(value) is None:
            raise self._refusal(value, name, "64 hexadecimal digits are")
        return value

    def training(self, value: object) -> dict[str, Any]:
        was_masked = isinstance(value, dict) and MASKED_FIELD in value
        trained = self.members(value, _TRAINED | ({MASKED_FIELD} if was_masked else set()), "trained")
        if was_masked and trained[MASKED_FIELD] is not True:
            raise self._refusal(trained[MASKED_FIELD], f"trained.{MASKED_FIELD}", "true, or no such field, is")
        patterns = [trained["rank_pattern"], trained["alpha_pattern"]]
        numbers = [trained["r"], trained["lora_alpha"]]
        for pattern in patterns:
            if not isinstance(pattern, dict):
                raise self._refusal(pattern, "a pattern of trained", "an object is")
            numbers += pattern.values()
        if not isinstance(trained["use_rslora"], bool) or not all(type(number) in (int, float) for number in numbers):
            raise self._refusal(trained, "trained", "numbers, and true or false for use_rslora, are")
        return trained

    def file(self, value: object, name: str) -> FileHash:
        entry = self.members(value, {"sha256", "size"}, name)
        if isinstance(entry["size"], bool) or not isinstance(entry["size"], int) or entry["size"] < 0:
            raise self._refusal(entry["size"], f"{name}.size", "a number of bytes is")
        return FileHash(sha256=self.digest(entry["sha256"], f"{name}.sha256"), size=entry["size"])

    def scale(self, value: object) -> ScaleRecord:
        entry = self.members(value, set(_SCALE_FIELDS), _SCALE)
        factor, losses = self.number(entry["factor"], "scale.factor"), self.losses(entry["losses"])
        if not {factor, 1.0} <= dict(losses).keys():
            raise self._refusal(factor, "scale.factor", "one of the scales tried, with 1.0 among them, is")
        return ScaleRecord(
            factor=factor,
            losses=losses,
            standard_error=self.number(entry["standard_error"], "scale.standard_error"),
            examples=self.count(entry["examples"], "scale.examples"),
            tokens=self.count(entry["tokens"], "scale.tokens"),
            data_sha256=self.digest(entry["data_sha256"], "scale.data_sha256"),
            base_commit=self.text_or_none(entry["base_commit"], "scale.base_commit"),
        )

    def losses(self, value: object) -> tuple[tuple[float, float], ...]:
        needed = f"at most {_MAX_SCALES} pairs of scale and loss, scales ascending, are"
        if not isinstance(value, list) or not 0 < len(value) <= _MAX_SCALES:
            raise self._refusal(value, "scale.losses", needed)
        found: list[tuple[float, float]] = []
        for pair in value:
            if not isinstance(pair, list) or len(pair) != 2:
                raise self._refusal(pair, "a pair of scale.losses", needed)
            scale, loss = (self.number(number, "a number of scale.losses") for number in pair)
            if scale <= (found[-1][0] if found else 0.0):
                raise self._refusal(pair, "a pair of scale.losses", needed)
            found.append((scale, loss))
        return tuple(found)

    def number(self, value: object, name: str) -> float:
        if not isinstance(value, float) or not 0 <= value < math.inf:  # a whole number may be too large for a float
            raise self._refusal(value, name, "a decimal number of at least 0 is")
        return value

    def count(self, value: object, name: str) -> int:
        if type(value) is not int or value < 1:
            raise self._refusal(value, name, "a count of at least 1 is")
        return value

    def _refusal(self, value: object, name: str, needed: str) -> VerificationError:
        return VerificationError(f"{name} in {self.source} is {value!r:.100}; {needed} needed.")
