"""Recover an adapter that was trained on a pruned model to the full size of the original one.

LoRAM (arXiv 2502.13533) trains W^P + s B^P A^P, where W^P has those rows and columns of W_0 whose mask M is 1. Its
recovery function R (eqs. 5-6) needs the factors and the mask alone, and gives what is added to W_0 for inference:

    B^R[i] = B^P[k]        if row i of W_0 is the k-th that was kept, else 0        (q, k, v, gate, up)
    A^R[:, j] = A^P[:, l]  if column j of W_0 is the l-th that was kept, else 0     (o, down)

so (B^R A^R)[i, j] = (B^P A^P)[k, l] at kept positions and 0 at all others. The paper contradicts itself: kept is M = 1
in its eq. 3 and M = 0 in eqs. 5-6. Here **M = 1 is kept** throughout. The hidden axes, layers that were left whole, and
the lm_head pass through. Numbers are copied, not computed: without a change of type the factors hold the trained bits.

On a sparse release (LoRAM-Semi, LoRAM-Unst) every shape is whole, and R is the identity: the factors go to the original
model as they are, also those that were trained masked, since (B A) o M has no factors of low rank. What is written is
canonical all the same, and names the original model.

Which axes of a weight were pruned, and where its parts lie in a fused projection (Phi-3's qkv_proj and gate_up_proj),
is read off the plan; no layer's weight is named here and no head counted. No weights are needed, and no torch.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loram_hub.adapter import (
    DTYPES,
    MODEL_ID,
    RECORD,
    RECOVERED,
    Adapter,
    AdapterRecord,
    CanonicalAdapter,
    DtypeName,
    Factor,
    canonical_factors,
    common_scale,
    hash_files,
    linear_modules,
    max_lora_rank,
    module_shape,
    read_adapter,
    read_model,
    shortest_targets,
    training_of,
    write_adapter,
)
from loram_hub.errors import (
    AccessError,
    CheckpointError,
    IncompatibleError,
    InvalidRequestError,
    LoramError,
    PlanMismatchError,
    UnsupportedAdapterError,
    VerificationError,
)
from loram_hub.files import atomic_folder, refuse_existing, resource_errors
from loram_hub.hub import ADAPTER_FILES, METADATA_FILES, cached_commits, resolve, source_of
from loram_hub.release import Release, open_metadata

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveredAdapter:
    """An adapter folder for the original model, as `recover` wrote it."""

    folder: Path
    """Where it is."""
    base_id: str
    """The original model: Hub id, or the folder's name if it was never on the Hub."""
    revision: str | None
    """Commit of the original model."""
    release_commit: str | None
    """Commit of the release that was taken; None if that was a folder outside of the Hub cache."""
    assumed: bool
    """Whether nothing said which revision was trained on, so that the latest was taken: if that is another one, the
    adapter is worthless."""
    rank: int
    """Rank of every module."""
    alpha: int
    """lora_alpha of every module."""
    modules: tuple[str, ...]
    """Paths of the adapted modules."""
    parameters: int
    """Numbers in all factors."""
    nbytes: int
    """Size of the weight file in bytes."""

    @property
    def max_lora_rank(self) -> int:
        """The smallest --max-lora-rank with which vLLM serves it; the rank itself if vLLM takes none so large."""
        return max_lora_rank(self.rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Origin:
    """The release an adapter was trained on."""

    release: Release
    id: str
    """Hub id, or the folder's name."""
    commit: str | None
    assumed: bool = False
    """See `RecoveredAdapter`."""


def recover(
    adapter: str | os.PathLike[str] | PeftModel,
    out_dir: str | os.PathLike[str],
    *,
    release: str | os.PathLike[str] | None = None,
    dtype: DtypeName = "bfloat16",
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> RecoveredAdapter:
    """Recover a pruned adapter to full size and write it in canonical form: ready for PEFT, vLLM and the Hub.

    Args:
        adapter: what training gave: a folder saved by PEFT, a Hub id, or the live `PeftModel`.
        out_dir: adapter folder to create; appears whole or not at all.
        release: the release it was trained on, folder or Hub id; None for the one the adapter names. Only its manifest,
            mask indexes and config are read.
        dtype: type of the written factors. Factors of another type are rounded once.
        overwrite: replace an existing folder.
        dry_run: check everything and say what would be written, without writing.
        revision: of the release on the Hub. None for the one the adapter names; if it names none, for the one whose
            weights are in the cache of this machine; if there is none, for the latest, with a warning.
        token: of the Hub.

    Returns:
        What was written, for which base model.

    Raises:
        UnsupportedAdapterError: the adapter has no full-size equivalent (DoRA, modules_to_save, ...), or has full size.
        PlanMismatchError: it was trained on another release.
        VerificationError: a file is torn, altered, or holds NaN.
        InvalidRequestError: `out_dir` exists, or no release is known, or several revisions of it come into question.
        AccessError: the Hub refused or could not be reached.

    Example:
        >>> from loram_hub import recover  # doctest: +SKIP
        >>> recover("outputs/checkpoint-400", "my-adapter").base_id  # doctest: +SKIP
        'meta-llama/Llama-3.1-70B'
    """
    target = Path(out_dir).expanduser()
    refuse_existing(target, overwrite=overwrite)
    if dtype not in DTYPES:
        raise InvalidRequestError(f"dtype is {dtype!r}; one of {', '.join(DTYPES)} is needed.")
    trained, trained_on = _open_adapter(adapter, token)
    _refuse_recovered(trained)
    known = _known_digest(trained, trained_on)
    origin = _find_origin(trained, trained_on, known, release, revision, token)
    _check_plan(trained, known, origin, token)
    shapes = _full_shapes(trained, origin)
    trained.check_targets(linear_modules(origin.release.architecture))
    canonical, scales = _canonical(trained, origin.release, shapes, dtype)

    def factors(module: str) -> tuple[Factor, Factor]:
        rows, columns = origin.release.plan.kept_on_axes(f"{module}.weight") or (None, None)
        pair, scale = trained.pairs[module], scales[module]
        return canonical_factors(module, pair, canonical, scale=scale, rows=rows, columns=columns)

    if dry_run:
        for module in canonical.modules:
            factors(module)
    else:
        with atomic_folder(target, overwrite=overwrite) as folder:
            write_adapter(folder, canonical, factors)
            with resource_errors(f"Writing {folder}"):
                (folder / RECORD).write_text(_record(trained, origin, folder).to_json(), encoding="utf-8")
    verb = "Would recover" if dry_run else "Recovered"
    logger.info("%s %d modules, %d parameters", verb, len(canonical.shapes), canonical.parameters)
    return RecoveredAdapter(
        folder=target,
        base_id=origin.release.manifest.base.id,
        revision=canonical.revision,
        release_commit=origin.commit,
        assumed=origin.assumed,
        rank=canonical.r,
        alpha=canonical.lora_alpha,
        modules=tuple(canonical.modules),
        parameters=canonical.parameters,
        nbytes=canonical.nbytes,
    )


def _open_adapter(
    adapter: str | os.PathLike[str] | PeftModel, token: str | bool | None
) -> tuple[Adapter, Release | None]:
    """Read the adapter; with it the release, if the adapter lives on an opened one."""
    if isinstance(adapter, str | os.PathLike):
        return read_adapter(resolve(adapter, token=token, files=ADAPTER_FILES).folder), None
    if "peft" in sys.modules:  # else it can be no PeftModel, and importing peft takes seconds
        from peft import PeftModel

        if isinstance(adapter, PeftModel):
            found = getattr(adapter.get_base_model(), "loram", None)
            return read_model(adapter), found if isinstance(found, Release) else None
    raise InvalidRequestError(f"adapter is a {type(adapter).__name__}; a folder, a Hub id or a PeftModel is needed.")


def _refuse_recovered(adapter: Adapter) -> None:
    if adapter.record.get("kind") == RECOVERED:
        raise UnsupportedAdapterError(
            f"{adapter.source} is already recovered: use it as it is on {adapter.config.base}. "
            "What can be recovered is the adapter that training gave."
        )


def _find_origin(
    adapter: Adapter,
    trained_on: Release | None,
    known: str | None,
    release: str | os.PathLike[str] | None,
    revision: str | None,
    token: str | bool | None,
) -> _Origin:
    if release is None and trained_on is not None:
        return _origin(trained_on)
    config = adapter.config
    name = config.base if release is None else os.fspath(release)
    if name is None:
        raise InvalidRequestError(
            f"{adapter.source} does not say which release it was trained on. Give the release, as a folder or Hub id."
        )
    if name == config.base:
        revision = revision or config.revision
    try:
        if revision or _is_folder(name):
            return _open_origin(name, revision, token)
        return _open_unpinned(adapter, name, known, token)
    except CheckpointError as err:
        if release is not None:
            raise
        raise CheckpointError(
            f"{adapter.source} says that it was trained on {name}, which is no release here: {err} "
            "Give the release, as a folder or Hub id."
        ) from err


def _open_unpinned(adapter: Adapter, name: str, known: str | None, token: str | bool | None) -> _Origin:
    """Open a Hub id of which nobody said the revision: at the commit that was loaded here, for the name may have moved.

    Raises:
        InvalidRequestError: commits with different plans were loaded here.
    """
    here = [origin for origin in _origins_here(name, token) if known in (None, origin.release.plan.digest)]
    if len({origin.release.plan.digest for origin in here}) > 1:
        commits = ", ".join(f"{origin.commit} (plan {origin.release.plan.digest[:12]})" for origin in here)
        raise InvalidRequestError(
            f"{adapter.source} does not say which revision of {name} it was trained on, and the weights of several "
            f"with different plans are on this machine: {commits}. Give the one it was trained on (--revision)."
        )
    if here:
        logger.info("Nothing says which revision of %s; taken is %s, whose weights are here", name, here[0].commit)
        return here[0]
    latest = _open_origin(name, None, token)
    if known is not None or latest.release.is_sparse:  # on a sparse release recovery is the same whatever was removed
        return latest
    logger.warning(
        "Nothing says which revision of %s %s was trained on, and no weights of it are on this machine; the latest is "
        "taken. If that keeps other channel groups, the recovered adapter is worthless",
        name,
        adapter.source,
    )
    return replace(latest, assumed=True)


def _origins_here(name: str, token: str | bool | None) -> list[_Origin]:
    """Open the commits of a Hub id whose weights are on this machine, those that arrived last first."""
    found = []
    for commit in cached_commits(name):
        try:
            found.append(_open_commit(name, commit, token))
        except (AccessError, IncompatibleError, VerificationError) as err:
            logger.warning("%s at %s opens as no release, and is passed over: %s", name, commit, err)
    return found


def _open_commit(name: str, commit: str, token: str | bool | None) -> _Origin:
    """Open a commit from the cache alone; if it is damaged there, with the help of the Hub."""
    try:
        return _open_origin(name, commit, token, local_files_only=True)
    except VerificationError:
        return _open_origin(name, commit, token)


def _open_origin(
    name: str, revision: str | None, token: str | bool | None, *, local_files_only: bool = False
) -> _Origin:
    source = resolve(name, revision=revision, token=token, local_files_only=local_files_only, files=METADATA_FILES)
    return _origin(open_metadata(source.folder))


def _origin(release: Release) -> _Origin:
    source = source_of(release.folder)
    return _Origin(release=release, id=source.id, commit=source.commit)


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


def _check_plan(adapter: Adapter, known: str | None, origin: _Origin, token: str | bool | None) -> None:
    """Compare the plan with the one the adapter was trained on, where that is at hand.

    Two releases of one ratio give equal shapes and different kept groups: the factors would land on the wrong channels.
    """
    digest = _named_digest(adapter, origin, token) if known is None else known
    if digest is not None and digest != origin.release.plan.digest:
        raise PlanMismatchError(
            f"{adapter.source} was trained on plan {digest[:12]} (release {adapter.config.base}); {origin.id} has plan "
            f"{origin.release.plan.digest[:12]}, which keeps other channel groups. Give the release it was trained on, "
            "or retrain on this one."
        )


def _known_digest(adapter: Adapter, trained_on: Release | None) -> str | None:
    """Return the digest that record or mark of the adapter give, or that of the model it lives on, if it names that."""
    recorded = adapter.record.get("plan_sha256")
    if isinstance(recorded, str):
        return recorded
    # A live adapter has the mark of the model it lives on, unless it was loaded with another.
    if trained_on is None or adapter.marked_plan not in (None, trained_on.plan.digest):
        return adapter.marked_plan
    base, revision = adapter.config.base, adapter.config.revision
    source = source_of(trained_on.folder)
    if source.commit is not None and base == source.id:
        is_named = revision in (None, "", source.commit)
    else:
        is_named = base is None or Path(base) == Path(os.path.abspath(trained_on.folder))
    return trained_on.plan.digest if is_named else None


def _named_digest(adapter: Adapter, origin: _Origin, token: str | bool | None) -> str | None:
    """Return the plan digest of the release that the adapter itself names; None, with a warning, if it is gone.

    A Hub id without a revision names no plan. What was opened is then held against the commits that were loaded here,
    but the caller's word stands: they need not be what it was trained on.
    """
    base, revision = adapter.config.base, adapter.config.revision
    try:
        if base is None:
            raise CheckpointError("it names none.")
        if revision or _is_folder(base):
            return _open_origin(base, revision, token, local_files_only=True).release.plan.digest
        if origin.commit is not None and origin.id == base:
            return None
        if origin.release.plan.digest in {here.release.plan.digest for here in _origins_here(base, token)}:
            return None
        raise CheckpointError(f"it names {base} without a revision.")
    except LoramError as err:
        logger.warning(
            "%s cannot be compared with the release it was trained on: %s Shapes fit %s; if that keeps other channel "
            "groups, the recovered adapter is worthless",
            adapter.source,
            err,
            origin.id,
        )
        return None


def _full_shapes(adapter: Adapter, origin: _Origin) -> dict[str, tuple[int, ...]]:
    """Check that every pair has the pruned shape of its weight; return the full shapes (out_features, in_features)."""
    architecture, sizes = origin.release.architecture, origin.release.plan.layers
    shapes: dict[str, tuple[int, ...]] = {}
    for module, pair in adapter.pairs.items():
        whole = module_shape(architecture, module)
        pruned = module_shape(architecture, module, sizes)
        if whole is None or pruned is None:
            raise PlanMismatchError(
                f"Module {module!r} of {adapter.source} is no linear layer of {origin.release.manifest.base.id}, the "
                f"base of the release {origin.id}. Give the release it was trained on."
            )
        if pair.shape != pruned:
            raise _shape_error(f"{module!r} in {adapter.source}", pair.shape, pruned, whole, origin)
        shapes[module] = whole
    return shapes


def _shape_error(
    module: str, found: tuple[int, ...], pruned: tuple[int, ...], whole: tuple[int, ...], origin: _Origin
) -> LoramError:
    if found == whole:
        return UnsupportedAdapterError(
            f"Module {module} has its full size {found}, where the release {origin.id} is pruned to {pruned}. The "
            f"adapter was recovered before, or trained on {origin.release.manifest.base.id} itself: use it as it is."
        )
    side, axis = ("lora_B", 0) if found[0] != pruned[0] else ("lora_A", 1)
    return PlanMismatchError(
        f"{side} of {module} has {found[axis]:,} {'columns' if axis else 'rows'}, the release {origin.id} keeps "
        f"{pruned[axis]:,} of {whole[axis]:,}. It was trained on another release: give that one, or retrain on this."
    )


def _canonical(
    adapter: Adapter, release: Release, shapes: Mapping[str, tuple[int, ...]], dtype: DtypeName
) -> tuple[CanonicalAdapter, Mapping[str, float]]:
    """Describe what is to be written; return with it the number that multiplies each module's B."""
    scale, base = common_scale(adapter.pairs), release.manifest.base
    if MODEL_ID.fullmatch(base.id) is None:
        raise VerificationError(
            f"The manifest of {release.folder} names its base {base.id!r}, which is neither a Hub id nor a name."
        )
    canonical = CanonicalAdapter(
        base_id=base.id,
        revision=base.commit,
        r=scale.r,
        lora_alpha=scale.lora_alpha,
        target_modules=shortest_targets(adapter.pairs.keys(), linear_modules(release.architecture)),
        dtype=dtype,
        shapes=shapes,
    )
    return canonical, scale.factors


def _record(adapter: Adapter, origin: _Origin, folder: Path) -> AdapterRecord:
    """Return the provenance that goes beside the adapter: a function of adapter and release, without paths or times."""
    base = origin.release.manifest.base
    return AdapterRecord(
        base_id=base.id,
        base_commit=base.commit,
        base_config_sha256=base.config_sha256,
        release_id=origin.id,
        release_commit=origin.commit,
        plan_sha256=origin.release.plan.digest,
        trained=training_of(adapter.config, masked=adapter.was_masked),
        files=hash_files(folder),
    )
