"""Opening a release: everything that is cheap to check, before a tensor is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loram_hub.architecture import Architecture
from loram_hub.checkpoint import CONFIG, read_config
from loram_hub.errors import CheckpointError, VerificationError
from loram_hub.files import sha256_of
from loram_hub.manifest import MANIFEST, Manifest, Sparsification, read_manifest, refuse_newer
from loram_hub.masks import WEIGHT_MASKS, MaskFile
from loram_hub.plan import Plan
from loram_hub.release.configuration import architecture_in, check_config, check_settings
from loram_hub.release.contents import check_hashes, check_listed, check_sizes, is_large
from loram_hub.release.mask_index import MASK_INDEX, read_mask_index
from loram_hub.release.weights import check_weights
from loram_hub.release.zeros import open_masks
from loram_hub.tensors import TensorInfo

ADAPTER_CONFIG = "adapter_config.json"


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

    @property
    def is_sparse(self) -> bool:
        """Whether single weights were removed, and every shape is the base's."""
        return self.manifest.is_sparse

    @property
    def weight_masks(self) -> MaskFile | None:
        """The masks of a sparse release, opened anew at each call; None of a structured one.

        Raises:
            CheckpointError: they are not there, as where only the metadata of a release was fetched.
            VerificationError: their header is damaged.
            PlanMismatchError: they are not those of this model.
        """
        pruning = self.manifest.pruning
        return open_masks(self.folder, self.plan, pruning) if isinstance(pruning, Sparsification) else None

    @property
    def was_saved(self) -> bool:
        """Whether `save_pretrained` made it, from a model that may have been trained."""
        return "saved" in self.manifest.recipe


def is_release(folder: Path) -> bool:
    """Whether a folder claims to be a release."""
    return (folder / MANIFEST).is_file() and (folder / MASK_INDEX).is_file()


def open_release(folder: Path) -> Release:
    """Open a release and check it without reading the weights.

    Checked: manifest, file sizes, hashes of everything but weights and their masks, mask indexes against the base
    config, and the shape of every weight and mask against the plan. `verify` also reads the weights.

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
    refuse_adapter(folder)
    others = {name: entry for name, entry in release.manifest.files.items() if not is_large(name)}
    check_sizes(folder, release.manifest.files)
    check_hashes(folder, others, sha256_of)
    weights_of(release)
    _ = release.weight_masks  # opening them checks their header
    return release


def refuse_adapter(folder: Path) -> None:
    """Raise `VerificationError` if an adapter lies beside the weights."""
    if (folder / ADAPTER_CONFIG).exists():
        raise VerificationError(
            f"{folder} holds {ADAPTER_CONFIG}: transformers would put that adapter on the model without a word. "
            "Keep adapters in folders of their own."
        )


def weights_of(release: Release) -> dict[str, TensorInfo]:
    """Find every tensor of a release by the headers of its weight files, and check each against plan and format.

    Raises:
        VerificationError: a header is damaged, or a file is not listed.
        IncompatibleError: plan and weights do not fit.
    """
    return check_weights(release.folder, release.plan, release.manifest)


def open_metadata(folder: Path) -> Release:
    """Open a release by its manifest, config and mask indexes alone: no weights need be there.

    Recovery needs no more than this, so nobody downloads a model to recover an adapter.

    Raises:
        CheckpointError: the folder is no release.
        VerificationError: one of the three files differs from the manifest.
        IncompatibleError: the format is newer than this package, or the plan does not fit the base config.
    """
    if not is_release(folder):
        refuse_newer(folder)
        read_config(folder)  # the better error if it is no checkpoint at all
        raise CheckpointError(f"{folder} is a checkpoint but no LoRAM release: it lacks {MANIFEST} or {MASK_INDEX}.")
    manifest = read_manifest(folder)
    check_listed(folder, manifest)
    if manifest.alignment is not None and not manifest.alignment:
        raise VerificationError(f"{folder / MANIFEST} has an empty alignment; what was done, or null, is needed.")
    needed = {name: manifest.files[name] for name in (CONFIG, MASK_INDEX)}
    check_sizes(folder, needed)
    check_hashes(folder, needed, sha256_of)
    config = read_config(folder)
    architecture = architecture_in(config)
    check_config(config, manifest, source=str(folder / CONFIG))
    check_settings(config, architecture, source=str(folder / CONFIG))
    plan = read_mask_index(folder / MASK_INDEX, architecture)
    if manifest.is_sparse:
        plan = _sparse_plan(plan, manifest, folder)
    if plan.digest != manifest.pruning.plan_sha256:
        file = WEIGHT_MASKS if manifest.is_sparse else MASK_INDEX
        raise VerificationError(f"{folder / file} is not the plan that {MANIFEST} was written for.")
    return Release(folder=folder, manifest=manifest, plan=plan, config=config)


def _sparse_plan(plan: Plan, manifest: Manifest, folder: Path) -> Plan:
    """Return the plan of a sparse release: no group is gone, and masks of single weights are named by their hash."""
    if plan.kept:
        raise VerificationError(
            f"{folder / MASK_INDEX} removes channel groups; the manifest says that {manifest.pruning.method} removed "
            "single weights."
        )
    return replace(plan, masks_sha256=manifest.files[WEIGHT_MASKS].sha256)
