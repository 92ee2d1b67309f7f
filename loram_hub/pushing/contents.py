"""What a folder has to push: the files that were verified, and nothing else of it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

from loram_hub.adapter import CONFIG as ADAPTER_CONFIG
from loram_hub.adapter import RECORD, WEIGHTS, check_adapter, refuse_pruned
from loram_hub.architecture import architecture_of
from loram_hub.digests import remembered_sha256
from loram_hub.errors import AccessError, CheckpointError, InvalidRequestError
from loram_hub.files import read_json
from loram_hub.hub import UploadFile, resolve_config
from loram_hub.release import verify
from loram_hub.tensors import sha256_of_finite

logger = logging.getLogger(__name__)


ALLOWED = (
    "*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "Notice*", "USE_POLICY*",
    "README.md", "pictures/*.png", ".eval_results/*.yaml",
)  # fmt: skip
"""Names of files that are pushed if a folder has them. Never pickles and code, nothing of an optimizer or Trainer."""
_NEVER = ("trainer_state.json", "optimizer*", "scheduler*", "rng_state*", "training_args*", "*.bin", "*.pt", "*.py")
CARD = "README.md"
LICENCE_TEXTS = ("LICENSE*", "NOTICE*", "Notice*", "USE_POLICY*")
_COMPANIONS_OF_ADAPTERS = (CARD, *LICENCE_TEXTS, "pictures/*.png", ".eval_results/*.yaml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """A folder that was checked and may be pushed."""

    folder: Path
    kind: Literal["release", "recovered adapter", "PEFT adapter"]
    base_id: str
    base_commit: str | None
    files: dict[str, UploadFile]
    left_out: tuple[str, ...]
    message: str


def release_content(folder: Path) -> Content:
    """Verify a release and take what its manifest lists, and card and licence texts beside it."""
    release = verify(folder, sha256=partial(remembered_sha256, read=sha256_of_finite))
    manifest = release.manifest
    listed = {
        name: UploadFile(name=name, content=folder / name, size=entry.size, sha256=entry.sha256)
        for name, entry in manifest.files.items()
    }
    present = _present(folder)
    files = listed | {name: local_file(folder, name) for name in present if name not in listed and _may_be_pushed(name)}
    return Content(
        folder=folder,
        kind="release",
        base_id=manifest.base.id,
        base_commit=manifest.base.commit,
        files=files,
        left_out=tuple(sorted(set(present) - set(files))),
        message=f"LoRAM release of {manifest.base.id}, {manifest.pruning.label}",
    )


def adapter_content(folder: Path, token: str | bool | None) -> Content:
    """Verify a full-size adapter, against its base's config if that can be had, and take its files."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder} is no adapter: it has no {ADAPTER_CONFIG}.")
    base_id, revision = _named_base(folder)
    base_config = _base_config(base_id, revision, token)
    refuse_pruned(folder, base_config=base_config)
    checked = check_adapter(folder, architecture=None if base_config is None else architecture_of(base_config))
    present = _present(folder)
    names = [name for name in present if name in (ADAPTER_CONFIG, WEIGHTS, RECORD) or _is_companion(name)]
    return Content(
        folder=folder,
        kind=checked.kind,
        base_id=base_id,
        base_commit=revision,
        files={name: local_file(folder, name) for name in names},
        left_out=tuple(sorted(set(present) - set(names))),
        message=f"LoRA adapter for {base_id}",
    )


def _named_base(folder: Path) -> tuple[str, str | None]:
    config = read_json(folder / ADAPTER_CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise InvalidRequestError(
            f"{folder / ADAPTER_CONFIG} names no base model (base_model_name_or_path), so nobody could use it. "
            "Write the base's Hub id there."
        )
    return base, revision if isinstance(revision, str) else None


def _base_config(base_id: str, revision: str | None, token: str | bool | None) -> dict[str, Any] | None:
    """Return the base's config; None, with a warning, if it cannot be had."""
    try:
        return read_json(resolve_config(base_id, revision=revision, token=token))
    except (AccessError, CheckpointError) as err:
        logger.warning("Shapes are not compared with %s, whose config cannot be had: %s", base_id, err)
        return None


def _present(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in names if not name.startswith((".git/", ".cache/")) and name != ".gitattributes")


def _may_be_pushed(name: str) -> bool:
    return matches(name, ALLOWED) and not matches(name, _NEVER)


def _is_companion(name: str) -> bool:
    return matches(name, _COMPANIONS_OF_ADAPTERS) and not matches(name, _NEVER)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path fits a pattern of as many levels: `*.json` names no file in a folder."""
    return any(pattern.count("/") == name.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def local_file(folder: Path, name: str) -> UploadFile:
    """Describe a file of a folder."""
    path = folder / name
    return UploadFile(name=name, content=path, size=path.stat().st_size, sha256=remembered_sha256(path))


def generated_file(name: str, data: bytes) -> UploadFile:
    """Describe a file that is made for the push."""
    return UploadFile(name=name, content=data, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def texts_of(files: Mapping[str, UploadFile]) -> dict[str, str]:
    """Read the licence, notice and policy texts among the files to push."""
    named = {name: file.content for name, file in files.items() if matches(name, LICENCE_TEXTS)}
    data = {name: held if isinstance(held, bytes) else held.read_bytes() for name, held in named.items()}
    return {name: text.decode("utf-8", "replace") for name, text in data.items()}
