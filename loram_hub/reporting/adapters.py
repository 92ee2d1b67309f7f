"""What a report says of adapters: pruned, recovered, or plain LoRA of the same base."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

from loram_hub.adapter import (
    CONFIG,
    FACTOR_NAME,
    RECORD,
    RECOVERED,
    WEIGHTS,
    AdapterConfig,
    AdapterRecord,
    adapted_shapes,
    looks_pruned,
    marked_plan,
    parse_config,
    read_record,
)
from loram_hub.checkpoint import CONFIG as MODEL_CONFIG
from loram_hub.errors import AccessError, CheckpointError, InvalidRequestError, PlanMismatchError
from loram_hub.files import read_json, sha256_of
from loram_hub.hub import ask_once, cached_config
from loram_hub.reporting.facts import AdapterFacts, AdapterKind, ReleaseFacts
from loram_hub.tensors import TensorInfo, read_headers
from loram_hub.updates import UpdateNorms, update_norms


def adapter_facts(
    folder: Path,
    *,
    name: str,
    commit: str | None,
    releases: Sequence[ReleaseFacts],
    trained_on: Path | None,
    base: str | os.PathLike[str] | None,
    is_compared: bool,
    token: str | bool | None,
) -> AdapterFacts:
    """Read an adapter and measure its update.

    Args:
        folder: of the adapter, untrusted.
        name: to show.
        commit: on the Hub.
        releases: at hand; one that the adapter belongs to tells the sizes of its model.
        trained_on: the release that it was trained on, if its run tells.
        base: the model that the caller names.
        is_compared: whether others are compared with it.
        token: of the Hub, which is asked, once, for the config of the adapter's base if nothing at hand tells it.

    Raises:
        CheckpointError: a file is missing.
        VerificationError: a file is torn or altered, or holds NaN.
        UnsupportedAdapterError: it is more than plain LoRA.
    """
    pruned = looks_pruned(folder)
    config = parse_config(read_json(folder / CONFIG), source=str(folder / CONFIG))
    tensors = read_headers(folder / WEIGHTS)
    record = _record_of(folder)
    kind: AdapterKind = "plain LoRA adapter" if pruned is None else "pruned adapter"
    plan = marked_plan(tensors, source=str(folder)) if record is None else record.plan_sha256
    candidates = _bases(releases, config, plan, [path for path in (trained_on, base) if path is not None])
    norms, why_not = _norms(folder, candidates, token)
    if norms is None:
        norms, not_on_hub = _norms_by_hub(folder, config, token)
        why_not = why_not if base is not None else not_on_hub
    factors = {tensor: info for tensor, info in tensors.items() if FACTOR_NAME.fullmatch(tensor)}
    return AdapterFacts(
        name=name,
        commit=commit,
        kind=kind if record is None else "recovered adapter",
        base=config.base,
        release=None if record is None else record.release_id,
        plan_sha256=plan,
        rank=_largest_rank(factors, otherwise=config.r),
        alpha=config.lora_alpha,
        modules=len(adapted_shapes({tensor: info.shape for tensor, info in factors.items()})),
        parameters=sum(prod(info.shape) for info in factors.values()),
        nbytes=(folder / WEIGHTS).stat().st_size,
        files={file: sha256_of(folder / file) for file in (CONFIG, WEIGHTS)},
        is_compared=is_compared,
        norms=norms,
        why_no_norms=why_not,
    )


def _record_of(folder: Path) -> AdapterRecord | None:
    """Return the record of a recovered adapter; None for others."""
    is_recovered = (folder / RECORD).is_file() and read_json(folder / RECORD).get("kind") == RECOVERED
    return read_record(folder) if is_recovered else None


def _largest_rank(factors: dict[str, TensorInfo], *, otherwise: int) -> int:
    return max((info.shape[0] for name, info in factors.items() if ".lora_A." in name), default=otherwise)


def _bases(
    releases: Sequence[ReleaseFacts],
    config: AdapterConfig,
    plan: str | None,
    named: Sequence[str | os.PathLike[str]],
) -> Iterator[str | os.PathLike[str]]:
    """Yield what may tell the sizes of an adapter's model and is at hand: its release first, others last."""
    own = [
        facts
        for facts in releases
        if facts.release.plan.digest == plan
        or (config.base is not None and config.base == facts.release.manifest.base.id)
    ]
    yield from (facts.release.folder for facts in own)
    yield from named
    if config.base is not None:
        cached = cached_config(config.base, revision=config.revision)
        yield from ([] if cached is None else [cached])
    yield from (facts.release.folder for facts in releases if facts not in own)


def _norms(
    folder: Path, bases: Iterator[str | os.PathLike[str]], token: str | bool | None
) -> tuple[UpdateNorms | None, str | None]:
    """Return the norms of an update by the first candidate whose sizes fit, or why there are none."""
    why_not: str | None = None
    for base in bases:
        try:
            return update_norms(folder, base=base, token=token), None
        except (AccessError, CheckpointError, InvalidRequestError, PlanMismatchError) as err:
            why_not = str(err) if why_not is None else why_not
    return None, why_not


def _norms_by_hub(
    folder: Path, config: AdapterConfig, token: str | bool | None
) -> tuple[UpdateNorms | None, str | None]:
    """Ask for the model that the adapter itself names.

    Whoever wrote the adapter decides what is asked for, and nobody asked for it by name: one request, no second one.
    """
    try:
        if config.base is not None and not Path(config.base).expanduser().exists():
            ask_once(config.base, MODEL_CONFIG, revision=config.revision, token=token)
        return update_norms(folder, token=token), None
    except (AccessError, CheckpointError, InvalidRequestError, PlanMismatchError) as err:
        return None, str(err)
