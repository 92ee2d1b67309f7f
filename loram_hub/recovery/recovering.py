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
from dataclasses import dataclass
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
    InvalidRequestError,
    LoramError,
    PlanMismatchError,
    UnsupportedAdapterError,
    VerificationError,
)
from loram_hub.files import atomic_folder, refuse_existing, resource_errors
from loram_hub.hub import ADAPTER_FILES, resolve
from loram_hub.recovery.origins import Origin, check_plan, find_origin, known_digest
from loram_hub.release import Release

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
    """Whether nothing said which revision was trained on, so that one was taken. If channel groups were pruned and
    another was trained on, the adapter is worthless; of sparse releases recovery is the same whichever it was."""
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
    known = known_digest(trained, trained_on)
    origin = find_origin(trained, trained_on, known, release, revision, token)
    check_plan(trained, known, origin, token)
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


def _full_shapes(adapter: Adapter, origin: Origin) -> dict[str, tuple[int, ...]]:
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
    module: str, found: tuple[int, ...], pruned: tuple[int, ...], whole: tuple[int, ...], origin: Origin
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


def _record(adapter: Adapter, origin: Origin, folder: Path) -> AdapterRecord:
    """Return the provenance that goes beside the adapter: a function of adapter and release, without paths or times."""
    base = origin.release.manifest.base
    return AdapterRecord(
        base_id=base.id,
        base_commit=base.commit,
        base_config_sha256=base.config_sha256,
        release_id=origin.id,
        # Of a sparse release any commit will do; one that was not trained on must not pass for where this comes from.
        release_commit=None if origin.assumed and origin.release.is_sparse else origin.commit,
        plan_sha256=origin.release.plan.digest,
        trained=training_of(adapter.config, masked=adapter.was_masked),
        files=hash_files(folder),
    )
