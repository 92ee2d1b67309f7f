"""What an estimate is about: a release, or a base model with or without a pruning ratio. No weights are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loram_hub.architecture import Architecture, LayerSizes, architecture_of
from loram_hub.checkpoint import CONFIG
from loram_hub.errors import CheckpointError, InvalidRequestError, PlanMismatchError, VerificationError
from loram_hub.files import read_json
from loram_hub.hub import METADATA_FILES, Source, look_up, remote_headers, resolve
from loram_hub.masks import projection_shapes
from loram_hub.plan import PruningSettings, planned_sizes
from loram_hub.release import NF4_PARTS, Release, is_release, open_metadata, open_release
from loram_hub.release.contents import is_large, is_weights
from loram_hub.release.nf4 import check_parts
from loram_hub.release.opening import weights_of
from loram_hub.tensors import TensorInfo

_STATE = NF4_PARTS[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model whose training is estimated."""

    id: str
    """Hub id; for a folder or file its name."""
    commit: str | None
    """Commit on the Hub; None for what is local."""
    kind: Literal["release", "planned release", "base model"]
    """`planned release`: a base model with a pruning ratio."""
    architecture: Architecture
    """The base model's."""
    layers: tuple[LayerSizes, ...]
    """Sizes of each layer."""
    quantized: bool
    """Whether its projections are, or will be loaded as, NF4."""
    stored_bytes: int | None
    """Bytes of the tensors of a release, by its headers; None for what has no weights yet."""
    is_sparse: bool = False
    """Whether it is a release with zeros in matrices of the base's sizes."""


def find_subject(
    target: str | os.PathLike[str],
    *,
    settings: PruningSettings | None,
    quantized: bool | None,
    structure: Mapping[str, int] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Subject:
    """Find out what a name stands for; of a Hub id only configs, mask indexes and headers are fetched.

    Args:
        target: folder or Hub id of a release; config file, folder or Hub id of a base model.
        settings: how a base model would be pruned; None as it is.
        quantized: whether a base model is to be NF4, None for yes; a release says it itself.
        structure: settings of pruning that were given without a ratio, too; a release refuses them.
        revision: of a Hub id.
        token: of the Hub.

    Raises:
        InvalidRequestError: pruning settings, or a type, were given for a release.
        VerificationError: the release was altered.
        IncompatibleError: the family is unknown, or plan and weights do not fit.
        AccessError: the Hub refused or could not be reached.
    """
    path = Path(target).expanduser()
    if path.is_file():
        source = Source(folder=path.parent, id=path.name, commit=None)
        return _base(source, read_json(path), settings, quantized)
    source = resolve(target, revision=revision, token=token, files=METADATA_FILES)
    if not is_release(source.folder):
        config = source.folder / CONFIG
        if not config.is_file():
            raise CheckpointError(f"{target} has no {CONFIG}: it is neither a release nor a base model.")
        return _base(source, read_json(config), settings, quantized)
    if settings is not None or quantized is not None or structure:
        raise InvalidRequestError(
            f"{target} is a release: its pruning and its type are decided. Leave out the pruning ratio, the whole "
            "layers, the rounding and the type, or give the base model."
        )
    return _release(source, token, is_local=path.is_dir())


def _base(
    source: Source, config: Mapping[str, Any], settings: PruningSettings | None, quantized: bool | None
) -> Subject:
    architecture = architecture_of(config)
    whole = (architecture.whole_layer,) * architecture.num_hidden_layers
    return Subject(
        id=source.id,
        commit=source.commit,
        kind="base model" if settings is None else "planned release",
        architecture=architecture,
        layers=whole if settings is None else planned_sizes(architecture, settings),
        quantized=quantized is not False,
        stored_bytes=None,
    )


def _release(source: Source, token: str | bool | None, *, is_local: bool) -> Subject:
    if is_local:
        release = open_release(source.folder)
        tensors = weights_of(release)
    else:
        release = open_metadata(source.folder)
        tensors = _remote_weights(release, source, token)
    return Subject(
        id=source.id,
        commit=source.commit,
        kind="release",
        architecture=release.architecture,
        layers=release.plan.layers,
        quantized=release.is_quantized,
        stored_bytes=sum(info.nbytes for name, info in tensors.items() if not name.endswith(_STATE)),
        is_sparse=release.is_sparse,
    )


def _remote_weights(release: Release, source: Source, token: str | bool | None) -> dict[str, TensorInfo]:
    """Check weights and masks on the Hub: size and hash of files as the Hub states them, each weight by its header."""
    there = look_up(source.id, revision=source.commit, token=token)
    for name in sorted(filter(is_large, release.manifest.files)):
        found = None if there is None else there.files.get(name)
        entry = release.manifest.files[name]
        if found is None:
            raise VerificationError(f"{source.id} lacks {name}, which its manifest lists.")
        if found.size != entry.size or found.sha256 not in (None, entry.sha256):
            raise VerificationError(
                f"{name} of {source.id} is not the file of its manifest: {found.size:,} bytes, SHA-256 "
                f"{found.sha256}; {entry.size:,} bytes, {entry.sha256} are listed."
            )
    weights = sorted(filter(is_weights, release.manifest.files))
    tensors = remote_headers(source.id, weights, revision=source.commit, token=token)
    _check_tensors(release, tensors, source.id)
    return tensors


def _check_tensors(release: Release, tensors: Mapping[str, TensorInfo], name: str) -> None:
    shapes = release.plan.tensor_shapes()
    packed = projection_shapes(release.plan) if release.is_quantized else {}
    known = set(shapes) | {f"{matrix}.{part}" for matrix in packed for part in NF4_PARTS}
    for unknown in sorted(set(tensors) - known):
        raise PlanMismatchError(f"{name} has a tensor {unknown!r:.200}, which the plan knows nothing of.")
    for tensor, shape in shapes.items():
        if tensor in packed:
            check_parts(tensor, shape, tensors)
        elif tensor not in tensors or tensors[tensor].shape != shape:
            has = f"has shape {tensors[tensor].shape}" if tensor in tensors else "is missing"
            raise PlanMismatchError(f"Tensor {tensor!r} of {name} {has}; the plan gives it {shape}.")
