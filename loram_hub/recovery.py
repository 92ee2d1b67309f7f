"""Recover an adapter that was trained on a pruned model to the full size of the original one.

LoRAM (arXiv 2502.13533, section 2 and eqs. 5-6) trains W_P + s B_P A_P, where W_P keeps the rows and columns of W whose mask
M is one. Recovery is a function R of the factors and the mask alone, with W_R = R(s B_P A_P) added to W:

    B_R[i] = B_P[k]  if row i of W is the k-th kept one,     else 0        q, k, v, gate, up
    A_R[:, j] = A_P[:, k]  if column j of W is the k-th kept one,  else 0        o, down

so that (B_R A_R)[i, j] = (B_P A_P)[k, l] at kept positions, and 0 at all others: `recovered * M = trained`. The paper writes
M = 0 for kept in its eqs. 5-6 and M = 1 in eq. 3; here **M = 1 is kept** throughout. Axes that pruning does not touch (the
hidden size), the lm_head and whole layers pass through. Every number is copied, not computed, so nothing is lost in fp32.

Which axis of which weight was pruned, and where its units lie in a fused projection (Phi-3's qkv_proj and gate_up_proj), is read
off the plan; no weight's name and no head count appears here. Neither base nor release weights are needed, nor torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from loram_hub.adapter import (
    DTYPES,
    RECORD,
    WEIGHTS,
    Adapter,
    CanonicalAdapter,
    DtypeName,
    Factor,
    LoraPair,
    build_adapter,
    convert,
    factor_names,
    linear_modules,
    parse_config,
    read_adapter,
    shortest_targets,
    write_adapter,
)
from loram_hub.adapter import CONFIG as ADAPTER_CONFIG
from loram_hub.architecture import LM_HEAD
from loram_hub.errors import (
    CheckpointError,
    InvalidRequestError,
    LoramError,
    PlanMismatchError,
    UnsupportedAdapterError,
    VerificationError,
)
from loram_hub.files import atomic_folder, dump_json, refuse_existing
from loram_hub.hub import METADATA_FILES, resolve
from loram_hub.release import Release, open_metadata

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

logger = logging.getLogger(__name__)

ADAPTER_FILES = (ADAPTER_CONFIG, WEIGHTS, RECORD)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank (0.32, config/lora.py)."""

_KIND = "recovered adapter"
# Hub ids and bare folder names: nothing that a consumer of the adapter could open as a path of its machine.
_MODEL_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SNAPSHOT = re.compile(r"models--(?P<org>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveredAdapter:
    """An adapter folder for the original model, as `recover` wrote it."""

    folder: Path
    """Where it is."""
    base_id: str
    """The original model: Hub id, or the folder's name if it was never on the Hub."""
    revision: str | None
    """Commit of the original model."""
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
        return next((rank for rank in VLLM_RANKS if rank >= self.rank), self.rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Origin:
    """The release an adapter was trained on."""

    release: Release
    id: str
    commit: str | None


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
        release: the release it was trained on, folder or Hub id; None for the one the adapter names. Only its manifest, mask
            indexes and config are read.
        dtype: type of the written factors. Factors of another type are rounded once.
        overwrite: replace an existing folder.
        dry_run: check everything and say what would be written, without writing.
        revision: of the release on the Hub; None for the one the adapter names.
        token: of the Hub.

    Returns:
        What was written, for which base model.

    Raises:
        UnsupportedAdapterError: the adapter has no full-size equivalent (DoRA, modules_to_save, ...), or is recovered already.
        PlanMismatchError: it was trained on another release.
        VerificationError: a file is torn, altered, or holds NaN.
        InvalidRequestError: `out_dir` exists, or no release is known.
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
    origin = _find_origin(trained, trained_on, release, revision, token)
    _check_plan(trained, trained_on, origin)
    _check_shapes(trained, origin)
    trained.check_targets(linear_modules(origin.release.architecture))
    canonical, scales = _canonical(trained, origin.release, dtype)

    def factors(module: str) -> tuple[Factor, Factor]:
        return _widen(module, trained.pairs[module], origin.release, canonical, scale=scales[module])

    if dry_run:
        for module in canonical.modules:
            factors(module)
    else:
        with atomic_folder(target, overwrite=overwrite) as folder:
            write_adapter(folder, canonical, factors)
            (folder / RECORD).write_text(dump_json(_record(trained, origin)), encoding="utf-8")
    logger.info("Recovered %d modules, %d parameters", len(canonical.shapes), canonical.parameters)
    return RecoveredAdapter(
        folder=target,
        base_id=canonical.base_id,
        revision=canonical.revision,
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
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        PeftModel = None  # type: ignore[assignment,misc]  # without peft the object can be no PeftModel
    if PeftModel is None or not isinstance(adapter, PeftModel):
        raise InvalidRequestError(f"adapter is a {type(adapter).__name__}; a folder, a Hub id or a PeftModel is needed.")
    names = adapter.active_adapters
    if len(names) != 1:
        raise UnsupportedAdapterError(f"The model has the adapters {names} active; activate one with set_adapter.")
    source = f"the adapter {names[0]!r}"
    # What PEFT would save: sets become lists, and the names of its enums are texts already.
    values = json.loads(json.dumps(adapter.peft_config[names[0]].to_dict(), default=sorted))
    config = parse_config(values, source=source)
    state = get_peft_model_state_dict(adapter, adapter_name=names[0], save_embedding_layers=False)
    tensors = {name: _to_numpy(state[name]) for name in factor_names(list(state), source=source)}
    found = getattr(adapter.get_base_model(), "loram", None)
    trained_on = found if isinstance(found, Release) else None
    return build_adapter(config, tensors, source=source, record={}), trained_on


def _to_numpy(tensor: torch.Tensor) -> Factor:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no bf16 of its own
        return tensor.view(torch.int16).numpy().view(DTYPES["bfloat16"])
    if tensor.dtype not in (torch.float16, torch.float32):
        raise UnsupportedAdapterError(f"A factor is {tensor.dtype}; float32, float16 or bfloat16 is needed.")
    return tensor.numpy()


def _refuse_recovered(adapter: Adapter) -> None:
    if adapter.record.get("kind") == _KIND:
        base = adapter.config.base
        raise UnsupportedAdapterError(
            f"{adapter.source} is already recovered. Use it as it is on {base}, or recover the adapter that training gave."
        )


def _find_origin(
    adapter: Adapter,
    trained_on: Release | None,
    release: str | os.PathLike[str] | None,
    revision: str | None,
    token: str | bool | None,
) -> _Origin:
    if release is not None:
        return _open_origin(release, revision, token)
    if trained_on is not None:
        return _origin(trained_on)
    config = adapter.config
    if config.base is None:
        raise InvalidRequestError(f"{adapter.source} does not say which release it was trained on. Give it with release=....")
    revision = revision or config.revision
    if revision is None and not Path(config.base).expanduser().is_dir():
        logger.warning("The adapter names %s without a revision; if it was trained on an older one, give revision=", config.base)
    try:
        return _open_origin(config.base, revision, token)
    except CheckpointError as err:
        raise CheckpointError(
            f"{adapter.source} says that it was trained on {config.base}, which is no release here: {err} "
            "Give the release with release=...."
        ) from err


def _open_origin(name: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> _Origin:
    source = resolve(name, revision=revision, token=token, files=METADATA_FILES)
    opened = open_metadata(source.folder)
    return _origin(opened) if source.commit is None else _Origin(release=opened, id=source.id, commit=source.commit)


def _origin(release: Release) -> _Origin:
    """Name an opened release by where it lies: a snapshot in the Hub cache by id and commit, else by its folder's name."""
    folder = Path(os.path.abspath(release.folder))
    snapshot = _SNAPSHOT.search(folder.as_posix())
    if snapshot is None:
        return _Origin(release=release, id=folder.name, commit=None)
    return _Origin(release=release, id=f"{snapshot['org']}/{snapshot['name']}", commit=snapshot["commit"])


def _check_plan(adapter: Adapter, trained_on: Release | None, origin: _Origin) -> None:
    """Compare the plan with the one the adapter was trained on, where that is at hand.

    Two releases of one ratio give equal shapes and different kept groups: the factors would land on the wrong channels.
    """
    digest = _trained_digest(adapter, trained_on, origin)
    if digest is not None and digest != origin.release.plan.digest:
        raise PlanMismatchError(
            f"{adapter.source} was trained on the plan {digest[:12]} ({adapter.config.base}), the release {origin.id} has the plan "
            f"{origin.release.plan.digest[:12]}: other channel groups are kept. Give the release it was trained on, or retrain."
        )


def _trained_digest(adapter: Adapter, trained_on: Release | None, origin: _Origin) -> str | None:
    if trained_on is not None:
        return trained_on.plan.digest
    recorded = adapter.record.get("plan_sha256")
    if isinstance(recorded, str):
        return recorded
    base, revision = adapter.config.base, adapter.config.revision
    if base is None or (base == origin.id and revision is None):  # it does not say which state of the repository
        return None
    try:
        source = resolve(base, revision=revision, local_files_only=True, files=METADATA_FILES)
        return open_metadata(source.folder).plan.digest
    except LoramError as err:
        logger.debug("The release that the adapter names is not at hand: %s", err)
        return None


def _check_shapes(adapter: Adapter, origin: _Origin) -> None:
    release = origin.release
    sizes = release.plan.layers
    architecture = release.architecture
    for module, pair in adapter.pairs.items():
        found = architecture.weight_of(f"{module}.weight")
        if found is not None and found[1].is_projection:
            pruned = architecture.shape(found[1], sizes[found[0]])
            whole = architecture.shape(found[1], architecture.whole_layer)
        elif f"{module}.weight" == LM_HEAD:
            pruned = whole = (architecture.vocab_size, architecture.hidden_size)
        else:
            raise PlanMismatchError(
                f"Module {module!r} of {adapter.source} is no linear layer of {release.manifest.base.id}, the base of the "
                f"release {origin.id}. Give the release it was trained on."
            )
        if pair.shape != pruned:
            _refuse_shape(adapter, module, pair.shape, pruned, whole, origin)


def _refuse_shape(
    adapter: Adapter, module: str, found: tuple[int, ...], pruned: tuple[int, ...], whole: tuple[int, ...], origin: _Origin
) -> None:
    base = origin.release.manifest.base.id
    if found == whole:
        raise UnsupportedAdapterError(
            f"Module {module!r} of {adapter.source} has the full size {found} already, where the release {origin.id} is pruned "
            f"to {pruned}. The adapter was recovered before, or trained on {base} itself: use it as it is."
        )
    side, axis = ("lora_B", 0) if found[0] != pruned[0] else ("lora_A", 1)
    raise PlanMismatchError(
        f"{side} of {module!r} in {adapter.source} has {found[axis]:,} {'columns' if axis else 'rows'}, the release "
        f"{origin.id} keeps {pruned[axis]:,} of {whole[axis]:,}. It was trained on another release: give that one with "
        "release=..., or retrain on this one."
    )


def _canonical(adapter: Adapter, release: Release, dtype: DtypeName) -> tuple[CanonicalAdapter, dict[str, float]]:
    """Choose the one rank and alpha, and the factor that goes into each module's B.

    If one alpha can express every module's scale exactly, B stays as it is. Otherwise alpha is r and each B takes its scale.
    """
    rank = max(pair.rank for pair in adapter.pairs.values())
    scales = {module: pair.scale for module, pair in adapter.pairs.items()}
    alpha = round(next(iter(scales.values())) * rank)
    if alpha >= 1 and set(scales.values()) == {alpha / rank}:
        scales = dict.fromkeys(scales, 1.0)
    else:
        alpha = rank
    base = release.manifest.base
    if _MODEL_ID.fullmatch(base.id) is None:
        raise VerificationError(
            f"The manifest of {release.folder} names its base {base.id!r}, which is neither a Hub id nor a folder's name."
        )
    architecture = release.architecture
    shapes = {}
    for module in adapter.pairs:
        found = architecture.weight_of(f"{module}.weight")
        whole = None if found is None else architecture.shape(found[1], architecture.whole_layer)
        rows, columns = whole or (architecture.vocab_size, architecture.hidden_size)
        shapes[module] = (rows, columns)
    canonical = CanonicalAdapter(
        base_id=base.id,
        revision=base.commit,
        r=rank,
        lora_alpha=alpha,
        target_modules=shortest_targets(adapter.pairs.keys(), linear_modules(architecture)),
        dtype=dtype,
        shapes=shapes,
    )
    return canonical, scales


def _widen(
    module: str, pair: LoraPair, release: Release, canonical: CanonicalAdapter, *, scale: float
) -> tuple[Factor, Factor]:
    """Scatter a pair of factors to the kept positions of zeros and pad its rank.

    Returns:
        lora_A (r, in_features) and lora_B (out_features, r) of the base model, in the canonical type.
    """
    rows, columns = release.plan.kept_on_axes(f"{module}.weight") or (None, None)
    out_features, in_features = canonical.shapes[module]
    lora_A = convert(pair.lora_A, canonical.dtype, name=f"lora_A of {module!r}")
    lora_B = convert(pair.lora_B, canonical.dtype, scale=scale, name=f"lora_B of {module!r}")
    rank = None if pair.rank == canonical.r else np.arange(pair.rank)
    return (
        _scatter(lora_A, (canonical.r, in_features), rank, columns),
        _scatter(lora_B, (out_features, canonical.r), rows, rank),
    )


def _scatter(
    values: Factor,
    shape: tuple[int, int],
    rows: npt.NDArray[np.int64] | None,
    columns: npt.NDArray[np.int64] | None,
) -> Factor:
    """Place values at the given rows and columns of zeros; None stands for all."""
    if rows is None and columns is None:
        return values
    full: Factor = np.zeros(shape, dtype=values.dtype)
    if columns is None:
        full[rows] = values
    elif rows is None:
        full[:, columns] = values
    else:
        full[np.ix_(rows, columns)] = values
    return full


def _record(adapter: Adapter, origin: _Origin) -> dict[str, object]:
    """Return the provenance that goes beside the adapter: a function of adapter and release, without paths or times."""
    base, config = origin.release.manifest.base, adapter.config
    return {
        "format": 1,
        "kind": _KIND,
        "base": {"id": base.id, "commit": base.commit, "config_sha256": base.config_sha256},
        "release": {"id": origin.id, "commit": origin.commit, "plan_sha256": origin.release.plan.digest},
        "trained": {
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
            "rank_pattern": dict(config.rank_pattern),
            "alpha_pattern": dict(config.alpha_pattern),
        },
    }
