"""Base models: a checkpoint that a step can start from, and the one that a release was pruned from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from loram_hub.architecture import Architecture, architecture_of
from loram_hub.checkpoint import CONFIG, Checkpoint
from loram_hub.errors import IncompatibleError, InvalidRequestError, UnsupportedModelError
from loram_hub.hub.fetching import Source, resolve_config, source_of
from loram_hub.release import Release, check_base_config, check_settings, release_config


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundBase:
    """The base of a release: its config is here and is the right one, its weights need not be here yet."""

    name: str | os.PathLike[str]
    """Folder or Hub id, as `resolve` takes it."""
    revision: str | None
    """Commit to resolve it at; None for a folder."""
    config: Path
    """Its `config.json`."""
    commit: str | None
    """Commit that was found; None where it cannot be told."""


def find_base(
    release: Release, base: str | os.PathLike[str] | None = None, *, token: str | bool | None = None
) -> FoundBase:
    """Find the base that a release was pruned from, and check its config; no weights are fetched.

    Args:
        release: opened.
        base: folder or Hub id; None for the one that the manifest names, at its commit.
        token: of the Hub.

    Raises:
        InvalidRequestError: the release names no base that can be found.
        IncompatibleError: the base is another one, or at another commit.
        AccessError: the Hub refused or could not be reached.
    """
    named = release.manifest.base
    if base is None and named.commit is None:
        raise InvalidRequestError(
            f"The release was pruned from a local folder, {named.id!r}; say where it is with --base."
        )
    wanted = named.id if base is None else base
    revision = named.commit if str(wanted) == named.id else None
    config = resolve_config(wanted, revision=revision, token=token)
    found = source_of(config.parent)
    if found.id == named.id and named.commit is not None and found.commit not in (None, named.commit):
        raise IncompatibleError(
            f"{config.parent} is {found.id} at commit {found.commit}; the release was pruned from {named.commit}. "
            "Give that commit."
        )
    check_base_config(release, config)
    return FoundBase(name=wanted, revision=revision, config=config, commit=found.commit or revision)


def check_base_checkpoint(checkpoint: Checkpoint, source: Source) -> Architecture:
    """Check that a checkpoint is a base model that can be pruned: unquantized, of a known family, whole.

    Args:
        checkpoint: open.
        source: names it in errors.

    Returns:
        Its architecture.

    Raises:
        UnsupportedModelError: it is quantized, or breaks the pattern of its family.
        VerificationError: its config has settings that no release may have.
    """
    if "quantization_config" in checkpoint.config:
        raise UnsupportedModelError(
            f"{source.id} is itself quantized ({checkpoint.config['quantization_config'].get('quant_method')}). "
            "Prune the original 16-bit model; a release can be quantized afterwards."
        )
    architecture = architecture_of(checkpoint.config)
    architecture.check_tensors(checkpoint.shapes, source=source.id)
    check_settings(release_config(checkpoint.config), architecture, source=f"{source.id}: {CONFIG}")
    return architecture
