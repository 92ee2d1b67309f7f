"""Write an adapter in the one form that all servers read alike, without changing what it computes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loram_hub.adapter import CONFIG as ADAPTER_CONFIG
from loram_hub.adapter import (
    DTYPES,
    FROZEN_COPIES,
    MODEL_ID,
    RECORD,
    RECOVERED,
    WEIGHTS,
    Adapter,
    CanonicalAdapter,
    DtypeName,
    Factor,
    canonical_factors,
    common_scale,
    exact_dtype,
    hash_files,
    linear_modules,
    local_config,
    module_shape,
    read_adapter,
    read_record,
    refuse_pruned,
    shortest_targets,
    write_adapter,
)
from loram_hub.architecture import Architecture, architecture_of
from loram_hub.errors import InvalidRequestError, PlanMismatchError, VerificationError
from loram_hub.files import atomic_folder, read_json, refuse_existing, refuse_overlap, resource_errors
from loram_hub.hub import resolve, resolve_config, source_of
from loram_hub.tensors import read_headers

_FILES = (ADAPTER_CONFIG, WEIGHTS, RECORD)


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedAdapter:
    """An adapter folder in canonical form, as `fix` wrote it."""

    folder: Path
    """Where it is."""
    changes: tuple[str, ...]
    """What differs from the adapter that was given, a phrase each; empty if it was canonical."""
    base_id: str | None
    """The base model that it names."""
    revision: str | None
    """Revision of the base."""
    rank: int
    """Rank of every module."""
    alpha: int
    """lora_alpha of every module."""
    dtype: DtypeName
    """Type of every factor."""
    modules: tuple[str, ...]
    """Paths of the adapted modules."""
    nbytes: int
    """Size of the weight file in bytes."""


def fix(
    adapter: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    dtype: DtypeName | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
) -> FixedAdapter:
    """Write the canonical form of an adapter: one rank, one alpha, no patterns, only lora_A and lora_B, no local path.

    It computes what the given adapter computes, to the rounding of one multiplication in fp32. Tokenizer, licence and
    card are not copied.

    Args:
        adapter: folder or Hub id of a full-size adapter.
        out_dir: adapter folder to create; appears whole or not at all.
        base: folder or Hub id of the base model; None for the one the adapter names. With its config at hand, shapes
            and targets are checked too.
        revision: of the base, to be written; None for the one the adapter names.
        dtype: type of the written factors; None for the stored one, or float32 where that would round.
        overwrite: replace an existing folder.
        token: of the Hub.

    Returns:
        What was written, and what that changed.

    Raises:
        UnsupportedAdapterError: it has no equal in that form (DoRA, modules_to_save, ...), or was not recovered yet.
        PlanMismatchError: it does not fit the base.
        VerificationError: a file is torn, or holds NaN.
        InvalidRequestError: `out_dir` exists or is the adapter, or `dtype` is unknown.
        AccessError: the Hub refused or could not be reached.

    Example:
        >>> from loram_hub.doctor import fix  # doctest: +SKIP
        >>> fix("my-adapter", "my-adapter-canonical").changes  # doctest: +SKIP
        ('rank_pattern: all ranks padded to 16',)
    """
    target = Path(out_dir).expanduser()
    refuse_existing(target, overwrite=overwrite)
    if dtype is not None and dtype not in DTYPES:
        raise InvalidRequestError(f"dtype is {dtype!r}; one of {', '.join(DTYPES)} is needed.")
    folder = resolve(adapter, token=token, files=_FILES).folder
    refuse_overlap(target, folder)
    lora = read_adapter(folder)
    named, pinned = _name_base(lora, base, revision)
    config = (
        local_config(lora.config.base)
        if base is None
        else read_json(resolve_config(base, revision=revision or pinned, token=token))
    )
    refuse_pruned(folder, base_config=config)
    architecture = _architecture(config, lora)
    _check_fit(lora, architecture)
    scale = common_scale(lora.pairs)
    canonical = CanonicalAdapter(
        base_id=named,
        revision=pinned,
        r=scale.r,
        lora_alpha=scale.lora_alpha,
        target_modules=_targets(lora, architecture),
        dtype=dtype or exact_dtype(lora.pairs, scale),
        shapes={module: pair.shape for module, pair in lora.pairs.items()},
    )

    def factors(module: str) -> tuple[Factor, Factor]:
        return canonical_factors(module, lora.pairs[module], canonical, scale=scale.factors[module])

    with atomic_folder(target, overwrite=overwrite) as out:
        write_adapter(out, canonical, factors)
        _carry_record(folder, out, canonical)
    return FixedAdapter(
        folder=target,
        changes=tuple(_changes(lora, folder, canonical)),
        base_id=named,
        revision=pinned,
        rank=canonical.r,
        alpha=canonical.lora_alpha,
        dtype=canonical.dtype,
        modules=tuple(canonical.modules),
        nbytes=canonical.nbytes,
    )


def _architecture(config: Mapping[str, Any] | None, lora: Adapter) -> Architecture | None:
    if config is None:
        return None
    try:
        return architecture_of(config)
    except InvalidRequestError as err:
        raise VerificationError(f"The config of the base that {lora.source} is for is unsound: {err}") from err


def _name_base(
    lora: Adapter, base: str | os.PathLike[str] | None, revision: str | None
) -> tuple[str | None, str | None]:
    """Return the id and revision to be written; of a folder its name, so that no path leaves this machine."""
    given = os.fspath(base) if base is not None else lora.config.base
    if given is None:
        return None, revision
    is_same = base is None or given == lora.config.base
    pinned = revision or (lora.config.revision if is_same else None)
    if MODEL_ID.fullmatch(given) is not None and not os.path.isdir(os.path.expanduser(given)):
        return given, pinned
    source = source_of(Path(os.path.expanduser(given)))
    name = re.sub(r"[^\w.-]+", "-", source.id) if MODEL_ID.fullmatch(source.id) is None else source.id
    return name.strip("-.") or None, pinned or source.commit


def _check_fit(lora: Adapter, architecture: Architecture | None) -> None:
    if architecture is None:
        lora.check_targets(())  # for undeclared factors, which is all that can be told without the model
        return
    lora.check_targets(linear_modules(architecture))
    for module, pair in lora.pairs.items():
        expected = module_shape(architecture, module)
        if pair.shape != expected:
            found = "no such layer" if expected is None else f"shape {expected}"
            raise PlanMismatchError(
                f"Module {module!r} of {lora.source} has shape {pair.shape}, the base model has {found}. Give the base "
                "that it was trained on."
            )


def _targets(lora: Adapter, architecture: Architecture | None) -> tuple[str, ...]:
    """Name the adapted modules as shortly as is safe; without the model, as the adapter does, or by full paths."""
    if architecture is not None:
        return shortest_targets(lora.pairs.keys(), linear_modules(architecture))
    config = lora.config
    narrowed = config.exclude_modules or config.layers_to_transform
    if isinstance(config.target_modules, tuple) and not narrowed:
        return config.target_modules
    return tuple(sorted(lora.pairs))


def _carry_record(source: Path, out: Path, canonical: CanonicalAdapter) -> None:
    """Keep the provenance of a recovered adapter, with the hashes of the new files."""
    if not (source / RECORD).is_file() or read_json(source / RECORD).get("kind") != RECOVERED:
        return
    record = read_record(source)
    if (record.base_id, record.base_commit) == (canonical.base_id, canonical.revision):
        with resource_errors(f"Writing {out}"):
            (out / RECORD).write_text(replace(record, files=hash_files(out)).to_json(), encoding="utf-8")


def _changes(lora: Adapter, folder: Path, canonical: CanonicalAdapter) -> Iterator[str]:
    config = lora.config
    if {pair.rank for pair in lora.pairs.values()} != {canonical.r}:
        yield f"ranks: all padded to {canonical.r} with zeros"
    if {pair.scale for pair in lora.pairs.values()} != {canonical.lora_alpha / canonical.r}:
        yield "scales: each module's folded into its lora_B"
    if config.use_rslora:
        yield "use_rslora: resolved into lora_alpha, or into lora_B"
    if config.rank_pattern or config.alpha_pattern:
        yield "rank_pattern, alpha_pattern: emptied"
    copies = sorted(FROZEN_COPIES & set(read_headers(folder / WEIGHTS)))
    if copies:
        yield f"{', '.join(copies)}: copies of frozen weights left out"
    if config.target_modules != canonical.target_modules:
        yield f"target_modules: {len(canonical.target_modules)} names, sorted"
    if (config.base, config.revision) != (canonical.base_id, canonical.revision):
        yield f"base: {canonical.base_id} at {canonical.revision}"
    stored = {factor.dtype.name for pair in lora.pairs.values() for factor in (pair.lora_A, pair.lora_B)}
    if stored != {canonical.dtype}:
        yield f"type of the factors: {canonical.dtype}"
