"""Everything that can be checked of a release without its base model; every byte is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from loram_hub.checkpoint import CONFIG, INDEX_FILE
from loram_hub.errors import InvalidRequestError, PlanMismatchError
from loram_hub.manifest import MANIFEST
from loram_hub.plan import PruningSettings, parameter_counts, planned_sizes
from loram_hub.release.configuration import check_companion
from loram_hub.release.contents import check_hashes, check_present, check_sizes, is_weights
from loram_hub.release.mask_index import MASK_INDEX
from loram_hub.release.nf4 import check_values
from loram_hub.release.opening import Release, open_metadata, refuse_adapter, weights_of
from loram_hub.release.weights import packed_matrices
from loram_hub.tensors import sha256_of_finite

# Read by compiled parsers that take neither code nor paths from them, and too large to parse twice: only hashed.
_VOCABULARIES = ("tokenizer.json", "vocab.json")


def verify(
    folder: str | Path,
    *,
    sha256: Callable[[Path], str] = sha256_of_finite,
    ignored: Callable[[str], bool] = lambda _: False,
) -> Release:
    """Check every byte of a release folder: names and links, hashes, configs, mask indexes, weights, code tables.

    Args:
        folder: the release.
        sha256: gives the hash of a file. By default each is read, and its numbers are checked to be finite in the same
            read; one that remembers files it has read before makes later checks quick.
        ignored: names of files that may lie there unlisted because nobody will open them; by default none may.

    Returns:
        The release, if all is well.

    Raises:
        CheckpointError: the folder is no release, or a file is missing.
        VerificationError: names the first file that differs, may not be there, or holds what it must not.
        IncompatibleError: the format is newer, or plan, config and weights do not fit.
    """
    folder = Path(folder)
    release = open_metadata(folder)
    files = release.manifest.files
    refuse_adapter(folder)
    added = check_present(folder, files, ignored, with_tokenizer=release.was_saved)
    check_sizes(folder, files)
    others = {name: entry for name, entry in files.items() if not is_weights(name)}
    check_hashes(folder, others, sha256)
    _check_companions(release, [*others, *added])
    tensors = weights_of(release)
    if release.is_quantized:
        check_values(packed_matrices(release.plan), tensors)
    _check_claims(release)
    check_hashes(folder, {name: entry for name, entry in files.items() if is_weights(name)}, sha256)
    return release


def check_described(folder: Path) -> None:
    """Check everything of a release but its weights: what its maker can still mend.

    Raises:
        LoramError: see `verify`.
    """
    release = open_metadata(folder)
    check_present(folder, release.manifest.files, lambda _: False, with_tokenizer=False)
    _check_companions(release, release.manifest.files)


def _check_companions(release: Release, names: Iterable[str]) -> None:
    for name in names:
        if name.endswith(".json") and name not in (CONFIG, INDEX_FILE, MASK_INDEX, *_VOCABULARIES):
            check_companion(release.folder / name, vocab_size=release.architecture.vocab_size)


def _check_claims(release: Release) -> None:
    """Check what the manifest says of sizes against the plan: cards and tables quote it."""
    manifest, plan = release.manifest, release.plan
    counts = parameter_counts(plan.architecture, plan.layers)
    for what, claimed, counted in (
        ("parameters", manifest.parameters, counts.pruned_parameters),
        ("base parameters", manifest.base.parameters, counts.original_parameters),
    ):
        if claimed != counted:
            raise PlanMismatchError(
                f"{release.folder / MANIFEST} claims {claimed:,} {what}; config and plan make {counted:,}."
            )
    pruning = manifest.pruning
    try:
        settings = PruningSettings(
            pruning_ratio=pruning.pruning_ratio,
            keep_first=pruning.keep_first,
            keep_last=pruning.keep_last,
            round_to=pruning.round_to,
        )
        planned = planned_sizes(plan.architecture, settings)
    except InvalidRequestError as err:
        raise PlanMismatchError(f"{release.folder / MANIFEST} claims a pruning that cannot be: {err}") from err
    for layer, (found, expected) in enumerate(zip(plan.layers, planned, strict=True)):
        if found != expected:
            raise PlanMismatchError(
                f"{release.folder / MANIFEST} claims pruning_ratio {pruning.pruning_ratio:g}, which leaves layer "
                f"{layer} {expected.kv_heads} KV heads and {expected.channels:,} channels; the mask index keeps "
                f"{found.kv_heads} and {found.channels:,}."
            )
