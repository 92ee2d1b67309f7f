"""What a report says of releases and of the importance scores that they were pruned by, read from their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loram_hub.architecture import Space
from loram_hub.errors import InvalidRequestError, PlanMismatchError
from loram_hub.estimation import SparseCounts, sparse_counts
from loram_hub.files import sha256_of
from loram_hub.licences import licence_documents, licence_of
from loram_hub.manifest import MANIFEST, Sparsification
from loram_hub.masks import parse_pattern
from loram_hub.plan import ParameterCounts, Plan, parameter_counts
from loram_hub.release import Release, open_metadata
from loram_hub.reporting.facts import ImportanceFacts, Numbers, ReleaseFacts, ScoreBands

Scores = Mapping[int, Mapping[Space, npt.NDArray[np.float32]]]

_PERCENTILES = (5, 50, 95)
_SPACES: tuple[Space, ...] = ("kv_heads", "channels")


def release_facts(folder: Path, *, name: str, commit: str | None) -> ReleaseFacts:
    """Read a release's manifest, config and mask indexes.

    Raises:
        VerificationError: one of them was altered.
        IncompatibleError: the format is newer, or plan and config do not fit.
    """
    release = open_metadata(folder)
    return ReleaseFacts(
        name=name,
        commit=commit,
        release=release,
        counts=_counts(release),
        licence=_licence(release),
        manifest_sha256=sha256_of(folder / MANIFEST),
    )


def _counts(release: Release) -> ParameterCounts | SparseCounts:
    pruning = release.manifest.pruning
    if isinstance(pruning, Sparsification):
        pattern = parse_pattern(pruning.pattern)
        return sparse_counts(release.architecture, pattern, kept_weights=pruning.kept_weights)
    return parameter_counts(release.architecture, release.plan.layers)


def _licence(release: Release) -> str | None:
    try:
        return licence_of(release.manifest.base.id, documents=licence_documents(release.folder)).title
    except InvalidRequestError:  # nothing is published here: a report may say that it does not know
        return None


def importance_facts(
    scores: Scores, *, name: str, method: str | None, releases: Sequence[ReleaseFacts]
) -> ImportanceFacts:
    """Summarize importance scores, those of kept groups apart from those of pruned ones.

    Args:
        scores: per pruned layer and space one score per group.
        name: of their file.
        method: how they were computed.
        releases: of the base that was scored; the first one that lost channel groups says what was kept.

    Raises:
        PlanMismatchError: the release keeps a group of a lower score than one that it does not keep: it was pruned by
            other scores.
    """
    fitting = [facts for facts in releases if _fits(scores, facts.release.plan)]
    plan = fitting[0].release.plan if fitting else None
    if plan is not None:
        _check_order(scores, plan, name, fitting[0].name)
    layers = (max(scores) + 1) if plan is None else plan.architecture.num_hidden_layers
    return ImportanceFacts(
        name=name,
        method=method,
        has_plan=plan is not None,
        bands={space: _bands(scores, plan, space, layers) for space in _SPACES},
    )


def _fits(scores: Scores, plan: Plan) -> bool:
    whole = plan.architecture.whole_layer
    sizes = {"kv_heads": whole.kv_heads, "channels": whole.channels}
    return bool(plan.kept) and all(
        layer in scores and all(scores[layer][space].size == sizes[space] for space in _SPACES) for layer in plan.kept
    )


def _check_order(scores: Scores, plan: Plan, name: str, release: str) -> None:
    for layer, spaces in plan.kept.items():
        for space in _SPACES:
            kept, pruned = _split(scores[layer][space], spaces[space])
            if pruned.size and kept.min() < pruned.max():
                raise PlanMismatchError(
                    f"{release} was not pruned by the scores in {name}: in layer {layer} it keeps one of the {space} "
                    f"with score {kept.min():.4g} and removes one with {pruned.max():.4g}. Give the scores that were "
                    "written when it was pruned."
                )


def _split(
    values: npt.NDArray[np.float32], kept: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    is_kept = np.zeros(values.size, dtype=np.bool_)
    is_kept[kept] = True
    return values[is_kept], values[~is_kept]


def _bands(scores: Scores, plan: Plan | None, space: Space, layers: int) -> ScoreBands:
    kept, pruned = np.full((layers, 3), np.nan), np.full((layers, 3), np.nan)
    for layer, spaces in scores.items():
        values = spaces[space]
        if plan is None or layer not in plan.kept:
            kept[layer] = _percentiles(values)
            continue
        ours, others = _split(values, plan.kept[layer][space])
        kept[layer], pruned[layer] = _percentiles(ours), _percentiles(others)
    groups = max((spaces[space].size for spaces in scores.values()), default=0)
    return ScoreBands(groups=groups, kept=kept, pruned=pruned)


def _percentiles(values: npt.NDArray[np.float32]) -> Numbers:
    if not values.size:
        return np.full(3, np.nan)
    found: Numbers = np.percentile(values.astype(np.float64), _PERCENTILES)
    return found
