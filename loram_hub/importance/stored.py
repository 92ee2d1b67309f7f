"""Scores in a file: what a plan was made from, for pictures and for further plans without another Taylor pass.

A safetensors file of fp32 scores, one per channel group, under the names that `mask_index.safetensors` has for what was
kept of them:

    model.layers.{i}.self_attn.kv_heads   (num_key_value_heads,)
    model.layers.{i}.mlp.channels         (intermediate_size,)

Its header says which method, base model and calibration they come from, and has a hash of all of it. Equal scores give
equal bytes. The file is no part of a release.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from loram_hub.architecture import LAYER_PREFIX, Space
from loram_hub.errors import CheckpointError, IncompatibleError, InvalidRequestError, VerificationError
from loram_hub.files import fsync_file, fsync_folder, parse_json, resource_errors
from loram_hub.importance.groups import Scores
from loram_hub.importance.methods import parse_importance
from loram_hub.tensors import TensorInfo, read_array, read_headers

FORMAT = 1
_HEADER = "loram_importance"  # one key: safetensors writes several in no fixed order
_FIELDS = frozenset({"format", "importance", "seed", "base", "calibration", "sha256"})
_BASE_FIELDS = frozenset({"id", "commit", "config_sha256"})
_CALIBRATION_FIELDS = frozenset({"samples", "tokens", "sha256"})
_NAME = re.compile(rf"{re.escape(LAYER_PREFIX)}\.(0|[1-9][0-9]{{0,5}})\.(self_attn\.kv_heads|mlp\.channels)")
_SPACES: Mapping[str, Space] = {"self_attn.kv_heads": "kv_heads", "mlp.channels": "channels"}
_MAX_BYTES = 1024 * 1024 * 1024
_MAX_COUNT = 10**12
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class StoredScores:
    """Importance scores, and where they come from."""

    scores: Scores
    """Per layer and space (`kv_heads`, `channels`) one fp32 score per group, finite; higher is more important."""
    importance: str
    """Method and variant, as `parse_importance` reads them."""
    seed: int
    """Of random scores and of the choice of calibration texts."""
    base_id: str
    """The base model: Hub id, or the folder's name."""
    base_commit: str | None
    """Its commit on the Hub."""
    base_config_sha256: str
    """SHA-256 of its config.json."""
    calibration: Mapping[str, Any] | None
    """Samples, tokens and digest of the calibration ids; None if none were used."""

    def check_base(self, *, commit: str | None, config_sha256: str, source: str) -> None:
        """Check that a base model is the one that was scored.

        A folder that is not from the Hub has no commit. It is then known by its config alone: weights that were trained
        further under the same config are not told apart.

        Args:
            commit: of the base model on the Hub; None for a folder.
            config_sha256: of its config.json.
            source: names the file with the scores in errors.

        Raises:
            IncompatibleError: it is another model, or another state of it.
        """
        is_other = None not in (commit, self.base_commit) and commit != self.base_commit
        if is_other or config_sha256 != self.base_config_sha256:
            raise IncompatibleError(
                f"{source} has scores of {self.base_id} at commit {self.base_commit} with config "
                f"{self.base_config_sha256[:12]}...; this base is at {commit} with config {config_sha256[:12]}.... "
                "Give the base that was scored, or score this one."
            )


def write_scores(path: Path, stored: StoredScores) -> None:
    """Write scores to a file; it appears whole or not at all, and replaces what is there.

    Raises:
        ResourceError: the disk is full or not writable.
    """
    names = {space: name for name, space in _SPACES.items()}
    arrays = {
        f"{LAYER_PREFIX}.{layer}.{names[space]}": np.ascontiguousarray(values, dtype=np.float32)
        for layer, spaces in stored.scores.items()
        for space, values in spaces.items()
    }
    values = {
        "format": FORMAT,
        "importance": stored.importance,
        "seed": stored.seed,
        "base": {"id": stored.base_id, "commit": stored.base_commit, "config_sha256": stored.base_config_sha256},
        "calibration": None if stored.calibration is None else dict(stored.calibration),
    }
    header = json.dumps({**values, "sha256": _digest(values, arrays)}, sort_keys=True)
    aside = path.with_name(f".{path.name}.partial")
    with resource_errors(f"Writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(save(arrays, metadata={_HEADER: header}))
        fsync_file(aside)
        aside.replace(path)
        fsync_folder(path.parent)


def read_scores(path: Path) -> StoredScores:
    """Read scores from an untrusted file.

    Raises:
        CheckpointError: there is no such file.
        IncompatibleError: its format is newer than this loram-hub knows.
        VerificationError: it is no file of scores, or was altered or torn; a score is not finite.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; scores that 'loram prune --importance-out' wrote are needed there.")
    if path.stat().st_size > _MAX_BYTES:
        raise VerificationError(f"{path} is larger than {_MAX_BYTES:,} bytes; no file of scores is.")
    infos = read_headers(path)
    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get(_HEADER)
    if text is None:
        raise VerificationError(f"{path} holds no importance scores: its header does not say what they are.")
    values = parse_json(text, source=f"The header of {path}")
    if values.get("format") != FORMAT:
        raise IncompatibleError(
            f"{path} has scores of format {values.get('format')!r:.20}; this loram-hub reads format {FORMAT}. Upgrade "
            "loram-hub, or score again."
        )
    arrays = {name: _read(path, name, info) for name, info in infos.items()}
    if values.pop("sha256", None) != _digest(values, arrays):
        raise VerificationError(
            f"{path} was altered: it is not what its own SHA-256 says. Copy it again, or score again."
        )
    return _checked(path, values, _by_layer(path, arrays))


def _digest(values: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[np.float32]]) -> str:
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape};".encode())
        digest.update(arrays[name].astype("<f4", copy=False).data)
    return digest.hexdigest()


def _read(path: Path, name: str, info: TensorInfo) -> npt.NDArray[np.float32]:
    if _NAME.fullmatch(name) is None or info.dtype != "F32" or len(info.shape) != 1 or info.shape[0] == 0:
        raise VerificationError(
            f"{path} holds {name!r:.200}, {info.dtype} of shape {info.shape}, which is no list of scores."
        )
    values: npt.NDArray[np.float32] = read_array(info)
    if not np.isfinite(values).all():
        raise VerificationError(f"{path} has scores of {name} that are NaN or infinite. Score again.")
    return values


def _by_layer(path: Path, arrays: Mapping[str, npt.NDArray[np.float32]]) -> Scores:
    scores: dict[int, dict[Space, npt.NDArray[np.float32]]] = {}
    for name, values in arrays.items():
        found = _NAME.fullmatch(name)
        assert found is not None  # _read refused others
        scores.setdefault(int(found[1]), {})[_SPACES[found[2]]] = values
    for layer, spaces in scores.items():
        if len(spaces) != len(_SPACES):
            raise VerificationError(f"{path} has scores of layer {layer} for {sorted(spaces)} alone. Score again.")
    if not scores:
        raise VerificationError(f"{path} has scores of no layer. Score again.")
    return dict(sorted(scores.items()))


def _checked(path: Path, values: Mapping[str, Any], scores: Scores) -> StoredScores:
    """Check what the header says; the hash shows accidents only, whoever made the file can make one."""
    base, calibration = values.get("base"), values.get("calibration")
    is_sound = (
        set(values) == _FIELDS - {"sha256"}
        and _is_method(values["importance"])
        and _is_count(values["seed"], least=0, most=2**63)
        and isinstance(base, dict)
        and set(base) == _BASE_FIELDS
        and _is_text(base["id"])
        and (base["commit"] is None or _is_hash(base["commit"], _COMMIT))
        and _is_hash(base["config_sha256"], _SHA256)
        and (calibration is None or _is_calibration(calibration))
    )
    if not is_sound:
        raise VerificationError(f"{path} has a header that no loram-hub writes: {dict(values)!r:.300}. Score again.")
    assert isinstance(base, dict)
    return StoredScores(
        scores=scores,
        importance=values["importance"],
        seed=values["seed"],
        base_id=base["id"],
        base_commit=base["commit"],
        base_config_sha256=base["config_sha256"],
        calibration=calibration,
    )


def _is_method(value: object) -> bool:
    try:
        return isinstance(value, str) and str(parse_importance(value)) == value
    except InvalidRequestError:
        return False


def _is_calibration(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == _CALIBRATION_FIELDS
        and _is_count(value["samples"], least=1, most=_MAX_COUNT)
        and _is_count(value["tokens"], least=1, most=_MAX_COUNT)
        and _is_hash(value["sha256"], _SHA256)
    )


def _is_count(value: object, *, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1_000 and value.isprintable()


def _is_hash(value: object, digits: re.Pattern[str]) -> bool:
    return isinstance(value, str) and digits.fullmatch(value) is not None
