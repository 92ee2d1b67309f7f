"""Look before you fetch, train or trust: parameter counts of a config, what a release is, if it is intact."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from loram_hub.architecture import architecture_of
from loram_hub.files import read_json
from loram_hub.hub import METADATA_FILES, resolve, resolve_config
from loram_hub.plan import ParameterCounts, PruningSettings, parameter_counts, planned_sizes
from loram_hub.release import Release, base_config_of, open_metadata
from loram_hub.release import verify as verify_folder


def count_parameters(
    model: str | os.PathLike[str],
    *,
    pruning_ratio: float = 0.85,
    keep_first: int = 4,
    keep_last: int = 2,
    round_to: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ParameterCounts:
    """Count what a structured plan would leave of a model, from its `config.json` alone.

    Args:
        model: folder, config file or Hub id of the base model; no weights are read.
        pruning_ratio: share removed of each prunable dimension of each pruned layer, in [0, 1).
        keep_first: layers at the start that stay whole.
        keep_last: layers at the end that stay whole.
        round_to: round kept MLP channels up to a multiple; None keeps the paper's counts.
        revision: of a Hub id.
        token: of the Hub.

    Returns:
        Parameters, bytes and kept groups per layer.

    Raises:
        UnsupportedModelError: an unknown family.
        InvalidRequestError: a ratio outside [0, 1), or one that empties a layer.
        AccessError: the Hub refused or could not be reached.

    Example:
        >>> from loram_hub import count_parameters  # doctest: +SKIP
        >>> count_parameters("meta-llama/Llama-3.1-70B", pruning_ratio=0.85).pruned_parameters  # doctest: +SKIP
        17849982976
    """
    settings = PruningSettings(
        pruning_ratio=pruning_ratio, keep_first=keep_first, keep_last=keep_last, round_to=round_to
    )
    architecture = architecture_of(read_json(resolve_config(model, revision=revision, token=token)))
    return parameter_counts(architecture, planned_sizes(architecture, settings))


def info(
    release: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> dict[str, Any]:
    """Describe a release from its manifest, mask indexes and config; of a Hub id nothing else is fetched.

    Returns:
        JSON values: base, pruning, alignment, quantization, parameter counts, bytes of weights, kept groups per layer.

    Raises:
        CheckpointError: no release.
        VerificationError: manifest or mask index was altered.
    """
    source = resolve(release, revision=revision, token=token, files=METADATA_FILES)
    opened: Release = open_metadata(source.folder)
    manifest = opened.manifest
    architecture = architecture_of(base_config_of(opened.config))
    return {
        "id": source.id,
        "commit": source.commit,
        "format": manifest.format,
        "base": asdict(manifest.base),
        "model_type": architecture.family.model_type,
        "pruning": asdict(manifest.pruning),
        "alignment": manifest.alignment,
        "quantization": manifest.quantization,
        **parameter_counts(architecture, opened.plan.layers).to_dict(),
        "file_bytes": sum(entry.size for entry in manifest.files.values()),
        "tools": dict(manifest.tools),
    }


def verify(release: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None) -> Release:
    """Check every byte of a release, in a folder or on the Hub, against its manifest, and its plan against its config.

    Returns:
        The release, if it is intact.

    Raises:
        VerificationError: names the first file that differs, is missing or was added.
        IncompatibleError: the format is newer, or weights and plan do not fit.
        AccessError: the Hub refused or could not be reached.
    """
    return verify_folder(resolve(release, revision=revision, token=token).folder)
