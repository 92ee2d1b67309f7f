"""What a report says of adapters: pruned, recovered, or plain LoRA of the same base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

from loram_hub.adapter import (
    CONFIG,
    FACTOR_NAME,
    RECORD,
    RECOVERED,
    WEIGHTS,
    AdapterRecord,
    adapted_shapes,
    looks_pruned,
    marked_plan,
    parse_config,
    read_record,
)
from loram_hub.errors import AccessError, CheckpointError, InvalidRequestError, PlanMismatchError
from loram_hub.files import read_json, sha256_of
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
    token: str | bool | None,
) -> AdapterFacts:
    """Read an adapter and measure its update.

    Args:
        folder: of the adapter, untrusted.
        name: to show.
        commit: on the Hub.
        releases: at hand; one that the adapter belongs to tells the sizes of its model.
        trained_on: the release that it was trained on, if its run tells.
        token: of the Hub, which is asked for the config of the adapter's base if no release tells it.

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
    norms, why_not = _norms(folder, _bases(releases, config.base, plan, trained_on), token)
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
        sha256=sha256_of(folder / WEIGHTS),
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
    releases: Sequence[ReleaseFacts], base: str | None, plan: str | None, trained_on: Path | None
) -> Iterator[Path | None]:
    """Yield what may tell the sizes of an adapter's model: its release, what it names itself (None), other releases."""
    own = [
        facts
        for facts in releases
        if facts.release.plan.digest == plan or (base is not None and base == facts.release.manifest.base.id)
    ]
    yield from (facts.release.folder for facts in own)
    yield from (() if trained_on is None else (trained_on,))
    yield None
    yield from (facts.release.folder for facts in releases if facts not in own)


def _norms(
    folder: Path, bases: Iterator[Path | None], token: str | bool | None
) -> tuple[UpdateNorms | None, str | None]:
    """Return the norms of an update, or why there are none; the first candidate whose sizes fit is taken."""
    why_not: str | None = None
    for base in bases:
        try:
            return update_norms(folder, base=base, token=token), None
        except (AccessError, CheckpointError, InvalidRequestError, PlanMismatchError) as err:
            why_not = str(err) if base is None or why_not is None else why_not
    return None, why_not
