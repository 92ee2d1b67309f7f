"""Everything that can be checked of a release without its base model.

Every byte is read once; those of a sparse release's projections twice, the second time beside their masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from loram_hub.checkpoint import CONFIG, INDEX_FILE
from loram_hub.errors import InvalidRequestError, PlanMismatchError
from loram_hub.manifest import MANIFEST, Pruning, Sparsification
from loram_hub.masks import projection_shapes
from loram_hub.plan import PruningSettings, parameter_counts, planned_sizes
from loram_hub.release.configuration import check_companion
from loram_hub.release.contents import check_hashes, check_present, check_sizes, is_large
from loram_hub.release.mask_index import MASK_INDEX
from loram_hub.release.nf4 import check_values
from loram_hub.release.opening import Release, open_metadata, refuse_adapter, weights_of
from loram_hub.release.zeros import check_sparse_claims, check_zeros, zeros_digest
from loram_hub.tensors import sha256_of_finite

# Read by compiled parsers that take neither code nor paths from them, and too large to parse twice: only hashed.
_VOCABULARIES = ("tokenizer.json", "vocab.json")


def verify(
    folder: str | Path,
    *,
    sha256: Callable[[Path], str] = sha256_of_finite,
    ignored: Callable[[str], bool] = lambda _: False,
    once: Callable[[str, Callable[[], None]], None] = lambda _, check: check(),
) -> Release:
    """Check every byte of a release folder: names and links, hashes, configs, mask indexes, weights, code tables.

    Args:
        folder: the release.
        sha256: gives the hash of a file. By default each is read, and its numbers are checked to be finite in the same
            read; one that remembers files it has read before makes later checks quick.
        ignored: names of files that may lie there unlisted because nobody will open them; by default none may.
        once: is given the name of some content, by its hash, and a check of it. By default the check runs; one that
            remembers which content passed spares comparing the weights of a sparse release with their masks again.

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
    others = {name: entry for name, entry in files.items() if not is_large(name)}
    check_hashes(folder, others, sha256)
    _check_companions(release, [*others, *added])
    tensors = weights_of(release)
    if release.is_quantized:
        check_values(projection_shapes(release.plan), tensors)
    _check_claims(release)
    check_hashes(folder, {name: entry for name, entry in files.items() if is_large(name)}, sha256)
    pruning, masks = release.manifest.pruning, release.weight_masks
    if isinstance(pruning, Sparsification) and masks is not None:
        # After the hashes, which are what a check of these bytes is remembered by.
        once(zeros_digest(release.manifest), partial(check_zeros, folder, masks, tensors, pruning))
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
    _check_count(release, "base parameters", manifest.base.parameters, counts.original_parameters)
    if isinstance(manifest.pruning, Sparsification):
        check_sparse_claims(release.folder, plan, manifest, manifest.pruning)
        return
    _check_count(release, "parameters", manifest.parameters, counts.pruned_parameters)
    _check_ratio(release, manifest.pruning)


def _check_count(release: Release, what: str, claimed: int, counted: int) -> None:
    if claimed != counted:
        raise PlanMismatchError(
            f"{release.folder / MANIFEST} claims {claimed:,} {what}; config and plan make {counted:,}."
        )


def _check_ratio(release: Release, pruning: Pruning) -> None:
    plan = release.plan
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
