"""Look before you fetch, train or trust: parameter counts of a config, what a release is, if it is intact."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, overload

from loram_hub.adapter import check_adapter, check_base, pinned_revision
from loram_hub.architecture import architecture_of
from loram_hub.checkpoint import read_config
from loram_hub.errors import AccessError, InvalidRequestError, UnsupportedModelError
from loram_hub.estimation import SparseCounts, planned_sparse_counts, sparse_counts
from loram_hub.files import read_json
from loram_hub.hub import METADATA_FILES, Source, fetch_release, find_base, resolve, resolve_config, source_of
from loram_hub.hub.fetching import list_files
from loram_hub.manifest import MANIFEST, Sparsification
from loram_hub.masks import Pattern, parse_pattern
from loram_hub.plan import ParameterCounts, PruningSettings, parameter_counts, planned_sizes
from loram_hub.release import (
    ADAPTER_CONFIG,
    Release,
    base_config_of,
    check_repository,
    compare_weights,
    is_release,
    open_metadata,
    refuse_incomparable,
)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@overload
def count_parameters(
    model: str | os.PathLike[str],
    *,
    pruning_ratio: float = 0.85,
    keep_first: int = 4,
    keep_last: int = 2,
    round_to: int | None = None,
    sparsity: None = None,
    pattern: None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ParameterCounts: ...


@overload
def count_parameters(
    model: str | os.PathLike[str],
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> SparseCounts: ...


def count_parameters(
    model: str | os.PathLike[str],
    *,
    pruning_ratio: float | None = None,
    keep_first: int | None = None,
    keep_last: int | None = None,
    round_to: int | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ParameterCounts | SparseCounts:
    """Count what pruning would leave of a model, from its `config.json` alone: channel groups, or single weights.

    Args:
        model: folder, config file or Hub id of the base model; no weights are read.
        pruning_ratio: share removed of each prunable dimension of each pruned layer, in [0, 1); 0.85 if nothing is
            said.
        keep_first: layers at the start that stay whole; 4 if nothing is said.
        keep_last: layers at the end that stay whole; 2 if nothing is said.
        round_to: round kept MLP channels up to a multiple; None keeps the paper's counts.
        sparsity: remove single weights instead, this share of every projection, in (0, 1); Wanda, which rounds it in
            every row, keeps a few more than is counted.
        pattern: remove single weights in groups: `n:m` keeps n of every m inputs, as in `4:8`.
        revision: of a Hub id.
        token: of the Hub.

    Returns:
        Parameters, bytes and kept groups per layer; with `sparsity` or `pattern` parameters, bytes and masks.

    Raises:
        UnsupportedModelError: an unknown family.
        InvalidRequestError: a ratio or sparsity out of range, a ratio that empties a layer, a pattern that does not
            divide the inputs of a projection, or both ways of pruning at once.
        AccessError: the Hub refused or could not be reached.

    Example:
        >>> from loram_hub import count_parameters  # doctest: +SKIP
        >>> count_parameters("meta-llama/Llama-3.1-70B", pruning_ratio=0.85).pruned_parameters  # doctest: +SKIP
        17849982976
        >>> count_parameters("meta-llama/Llama-2-13b-hf", pattern="4:8").pruned_parameters  # doctest: +SKIP
        6671979520
    """
    asked = {"pruning_ratio": pruning_ratio, "keep_first": keep_first, "keep_last": keep_last, "round_to": round_to}
    structure: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    is_sparse = sparsity is not None or pattern is not None
    if is_sparse and structure:
        raise InvalidRequestError(
            f"{', '.join(structure)} says which channel groups go; sparsity and pattern remove single weights, in "
            "every layer. Leave out one or the other."
        )
    settings = None if is_sparse else PruningSettings(**{"pruning_ratio": 0.85, **structure})
    architecture = architecture_of(read_json(resolve_config(model, revision=revision, token=token)))
    if settings is not None:
        return parameter_counts(architecture, planned_sizes(architecture, settings))
    return planned_sparse_counts(architecture, Pattern() if pattern is None else parse_pattern(pattern), sparsity)


def info(
    release: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> dict[str, Any]:
    """Describe a release from its manifest, mask indexes and config; of a Hub id nothing else is fetched.

    Returns:
        JSON values: base, pruning, alignment, quantization, parameter counts, bytes of weights, and kept groups per
        layer or, of a sparse release, kept weights and bytes of masks.

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
        **_counts(opened).to_dict(),
        "file_bytes": sum(entry.size for entry in manifest.files.values()),
        "tools": dict(manifest.tools),
    }


def _counts(release: Release) -> ParameterCounts | SparseCounts:
    pruning = release.manifest.pruning
    if isinstance(pruning, Sparsification):
        pattern = parse_pattern(pruning.pattern)
        return sparse_counts(release.architecture, pattern, kept_weights=pruning.kept_weights)
    return parameter_counts(release.architecture, release.plan.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """A release or adapter in which nothing wrong was found."""

    kind: Literal["release", "recovered adapter", "PEFT adapter"]
    """What it is."""
    id: str
    """Hub id; for a local folder the folder's name."""
    commit: str | None
    """Commit on the Hub; None for a local folder."""
    files: int
    """Number of files that were checked."""
    nbytes: int
    """Their size in bytes."""
    checked: tuple[str, ...]
    """What was checked, a phrase each."""
    not_checked: tuple[str, ...]
    """What was not, a phrase each with the reason."""
    release: Release | None = None
    """The release, if it is one."""


def verify(
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    full: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> Verified:
    """Check every byte and every claim of a release or an adapter, in a folder or on the Hub.

    A release is checked against its manifest, its plan and its config; an adapter against its config, its record and,
    if its config is at hand, its base model. A local folder is checked without the network, unless `base` or `full`
    ask for it.

    Args:
        target: folder or Hub id of a release or adapter.
        revision: of a Hub id.
        token: of the Hub.
        full: also compare the kept weights of a release with the base's, bit by bit. The base is read whole, and
            downloaded if it is not here.
        base: folder or Hub id of the base model; None for the one that the target names, where that is needed.

    Returns:
        What was checked, and what could not be.

    Raises:
        VerificationError: names the first file that differs, is missing or was added, or what it must not hold.
        IncompatibleError: the format is newer; weights, plan and config do not fit; or the base is another.
        InvalidRequestError: `full` of something whose weights are not the base's own.
        AccessError: the Hub refused or could not be reached.
    """
    source = resolve(target, revision=revision, token=token, compare=False)  # the checks bring hashes of their own
    if (source.folder / ADAPTER_CONFIG).is_file() and not is_release(source.folder):
        if full:
            raise InvalidRequestError(f"{target} is an adapter: it has no weights of a base model to compare.")
        return _verify_adapter(resolve(target, revision=source.commit, token=token), base, token)
    source, opened = fetch_release(target, revision=source.commit, token=token, remember=False)
    checked, not_checked = _checked(opened), list(_NEVER_CHECKED)
    if source.commit is not None and not Path(target).expanduser().is_dir():
        why_not = _check_repository(opened, source, token)
        checked += ["names of all files of the repository, as the Hub lists them"] if why_not is None else []
        not_checked += [] if why_not is None else [why_not]
    if opened.was_saved:
        not_checked.append("a tokenizer that was saved beside the model, beyond code: the manifest does not list it")
    if full:
        refuse_incomparable(opened)
    if base is not None or full:
        checked.append(_check_base(opened, base, token, full=full))
    if not full:
        not_checked.append(f"kept weights against the base's: --full does that, where nothing was {_changed(opened)}")
    if base is None and not full:
        commit = "" if opened.manifest.base.commit is None else " and commit"
        not_checked.append(f"the base's config{commit}: --base does that")
    entries = opened.manifest.files
    return Verified(
        kind="release",
        id=source.id,
        commit=source.commit,
        files=len(entries) + 1,
        nbytes=sum(entry.size for entry in entries.values()) + (source.folder / MANIFEST).stat().st_size,
        checked=tuple(checked),
        not_checked=tuple(not_checked),
        release=opened,
    )


_CHECKED = (
    "names, kinds and links of all files",
    "size and SHA-256 of every file that the manifest lists, and the manifest's own",
    "configs: no code, no other files, quantization as the manifest says, known settings in their bounds",
)
_CHECKED_STRUCTURED = (
    "mask indexes: type, order, range, and the plan that the manifest names",
    "weights: every tensor of the plan and no other, type and shape of each, no NaN or infinity",
    "the manifest's parameter counts and ratio against the plan",
)
_CHECKED_SPARSE = (
    "masks: shape and pattern of each, and the hash that the plan is",
    "weights: every tensor of the base and no other, type and shape of each, no NaN or infinity",
    "zeros: every weight that its mask removes",
    "the manifest's parameter counts and sparsity against the masks",
)
_CHECKED_NF4 = "NF4: lengths, block sizes, code tables, scales"
_NEVER_CHECKED = ("whether the weights are good: loram eval measures that",)


def _checked(release: Release) -> list[str]:
    kind = _CHECKED_SPARSE if release.is_sparse else _CHECKED_STRUCTURED
    return [*_CHECKED, *kind, *([_CHECKED_NF4] if release.is_quantized else [])]


def _changed(release: Release) -> str:
    """Say what keeps the kept weights of a release from being the base's."""
    pruning = release.manifest.pruning
    if isinstance(pruning, Sparsification) and pruning.method == "sparsegpt":
        return "trained or quantized, nor updated, as SparseGPT does"
    return "trained or quantized"


def _check_repository(release: Release, source: Source, token: str | bool | None) -> str | None:
    """Check the names of the files that were not fetched as well; returns why that could not be done."""
    try:
        names = list_files(source.id, revision=source.commit, token=token)
    except AccessError as err:
        return f"files of the repository that were not fetched: {err}"
    check_repository(names, release.manifest.files, source=f"{source.id} at {source.commit}")
    return None


def _check_base(release: Release, base: str | os.PathLike[str] | None, token: str | bool | None, *, full: bool) -> str:
    """Compare a release with its base; returns what was compared."""
    named = release.manifest.base
    found = find_base(release, base, token=token)
    compared = "the base's config: its SHA-256, and every setting of the release"
    if named.commit is not None and named.commit == found.commit:
        compared += "; the base's commit"
    if not full:
        return compared
    nbytes = compare_weights(release, resolve(found.name, revision=found.revision, token=token).folder)
    kept = "weights, zeros where the masks remove one" if release.is_sparse else "kept weights"
    return f"{compared}; {nbytes:,} bytes of {kept}, bit by bit"


def _verify_adapter(source: Source, base: str | os.PathLike[str] | None, token: str | bool | None) -> Verified:
    folder, why_not = _base_of(source, base, token)
    architecture = None
    if folder is not None:
        check_base(source.folder, folder, commit=source_of(folder).commit)
        architecture = architecture_of(read_config(folder), find_culprit=False)
    found = check_adapter(source.folder, architecture=architecture)
    checked = [
        "names, kinds and links of all files",
        "settings: plain LoRA, no code",
        "factors: none missing, no other tensors, ranks, no NaN or infinity",
    ]
    checked += ["size and SHA-256 of weights and config, as recorded"] if found.record is not None else []
    checked += [] if architecture is None else ["modules and shapes against the base model's config"]
    return Verified(
        kind=found.kind,
        id=source.id,
        commit=source.commit,
        files=len(found.files),
        nbytes=found.nbytes,
        checked=tuple(checked),
        not_checked=(*found.not_checked, *([] if why_not is None else [why_not])),
    )


def _base_of(
    source: Source, base: str | os.PathLike[str] | None, token: str | bool | None
) -> tuple[Path | None, str | None]:
    """Find the config of an adapter's base: the folder it lies in, or why it is not looked at.

    A folder is checked without the network unless the base was named. An adapter from the Hub may name its base by its
    Hub id; whatever else it names could be a path of this machine, which is none of its business.
    """
    if base is not None:
        revision = pinned_revision(source.folder, base)
        return resolve_config(base, revision=revision, token=token).parent, None
    named = read_json(source.folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if source.commit is None:
        return None, "the base model was not looked up for a local folder: --base does that"
    if not isinstance(named, str) or _HUB_ID.fullmatch(named) is None or Path(named).exists():
        return None, f"the base model is named {named!r:.100}, which is no Hub id"
    try:
        config = resolve_config(named, revision=pinned_revision(source.folder, named), token=token)
        architecture_of(read_config(config.parent), find_culprit=False)
    except (AccessError, UnsupportedModelError) as err:
        return None, f"the base model {named} could not be looked at: {err}"
    return config.parent, None
