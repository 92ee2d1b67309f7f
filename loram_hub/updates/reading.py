"""An adapter whose factors are read one module at a time, and the model whose shapes they have."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loram_hub.adapter import (
    CODES,
    CONFIG,
    RECORD,
    WEIGHTS,
    AdapterConfig,
    Factor,
    factor_name,
    linear_modules,
    marked_plan,
    module_shape,
    pair_factors,
    parse_config,
)
from loram_hub.adapter.reading import PairSizes, check_axes, check_targets, require_files
from loram_hub.adapter.tensors import factor_names, is_finite
from loram_hub.architecture import architecture_of
from loram_hub.errors import (
    AccessError,
    CheckpointError,
    InvalidRequestError,
    PlanMismatchError,
    VerificationError,
)
from loram_hub.files import read_json
from loram_hub.hub import METADATA_FILES, resolve, resolve_config
from loram_hub.plan import Plan
from loram_hub.release import open_metadata
from loram_hub.tensors import TensorInfo, read_array, read_headers

_REMEDY = "Give base: the release that a pruned adapter was trained on, or the base model of any other."


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class StoredAdapter:
    """An adapter folder of which config and headers were read and checked, and no factor yet."""

    source: str
    """Names it in errors."""
    config: AdapterConfig
    pairs: Mapping[str, PairSizes]
    """Rank, scale and adapted shape by module path, sorted; never empty."""
    tensors: Mapping[str, TensorInfo]
    """Where each tensor lies, by name."""
    plan_sha256: str | None
    """Digest of the plan that a pruned adapter was trained on, if it knows."""

    def factors(self, module: str) -> tuple[Factor, Factor]:
        """Read lora_A (r, in_features) and lora_B (out_features, r) of a module.

        Raises:
            VerificationError: a factor holds NaN or infinity, or the file became shorter.
        """
        found = []
        for factor in ("A", "B"):
            name = factor_name(module, factor)
            values = read_array(self.tensors[name])
            if not is_finite(values):
                raise VerificationError(
                    f"Tensor {name!r} of {self.source} holds NaN or infinity. Use an earlier checkpoint."
                )
            found.append(values)
        return found[0], found[1]


def open_adapter(folder: Path) -> StoredAdapter:
    """Open an adapter from an untrusted folder by its config and the header of its weights.

    Raises:
        CheckpointError: a file is missing, or the weights are a pickle.
        VerificationError: a file is torn, or config and tensors disagree.
        UnsupportedAdapterError: it is more than plain LoRA.
    """
    require_files(folder)
    config = parse_config(read_json(folder / CONFIG), source=str(folder / CONFIG))
    tensors = read_headers(folder / WEIGHTS)
    names = factor_names(tensors.keys(), source=str(folder))
    for name in names:
        if tensors[name].dtype not in CODES.values():
            raise VerificationError(
                f"Tensor {name!r} of {folder} has dtype {tensors[name].dtype}; F32, F16 or BF16 is needed."
            )
        check_axes(name, tensors[name].shape, source=str(folder))
    return StoredAdapter(
        source=str(folder),
        config=config,
        pairs=pair_factors(config, {name: tensors[name].shape for name in names}, source=str(folder)),
        tensors=tensors,
        plan_sha256=_recorded_plan(folder) or marked_plan(tensors, source=str(folder)),
    )


def _recorded_plan(folder: Path) -> str | None:
    """Return the plan digest in the record of a pruned adapter; a recovered one has none at this place."""
    found = read_json(folder / RECORD).get("plan_sha256") if (folder / RECORD).is_file() else None
    return found if isinstance(found, str) else None


def find_plan(
    adapter: StoredAdapter, base: str | os.PathLike[str] | None, revision: str | None, token: str | bool | None
) -> Plan:
    """Find the model that the adapter's factors fit, by its config: a release's plan, or one that prunes nothing.

    Args:
        adapter: opened.
        base: what the caller names; None for what the adapter names.
        revision: of a Hub id; None for what the adapter names, if it is the same model.
        token: of the Hub.

    Returns:
        The plan whose sizes every factor has.

    Raises:
        InvalidRequestError: the adapter names no model.
        CheckpointError: what is named is no model or release.
        AccessError: the Hub refused or could not be reached.
        PlanMismatchError: the adapter has other shapes, or was trained on another release.
        UnsupportedAdapterError: it declares modules that it has no factors for, or has some that it does not declare.
    """
    named = adapter.config.base
    name = named if base is None else os.fspath(base)
    if name is None:
        raise InvalidRequestError(
            f"{adapter.source} does not say which model it is for. Give base: that model, or the release that it was "
            "trained on."
        )
    if name == named:
        revision = revision or adapter.config.revision
    try:
        plan = _open_plan(name, revision, token)
    except (CheckpointError, AccessError) as err:
        if base is not None:
            raise
        raise type(err)(
            f"{adapter.source} is for {name}, whose config is not to be had here: {err} Give base: a folder with "
            "config.json, or a Hub id."
        ) from err
    check_targets(adapter.config, adapter.pairs.keys(), linear_modules(plan.architecture), source=adapter.source)
    return _fitting(adapter, plan, name)


def _open_plan(name: str, revision: str | None, token: str | bool | None) -> Plan:
    path = resolve_config(name, revision=revision, token=token)
    config = read_json(path)
    if "loram" not in config:
        return Plan(architecture_of(config), {})
    if Path(name).expanduser().exists():
        return open_metadata(path.parent).plan
    return open_metadata(resolve(name, revision=revision, token=token, files=METADATA_FILES).folder).plan


def _fitting(adapter: StoredAdapter, plan: Plan, name: str) -> Plan:
    """Return the given plan for factors of pruned sizes, one that prunes nothing for factors of full size."""
    whole, architecture = Plan(plan.architecture, {}), plan.architecture
    if all(pair.shape == module_shape(architecture, module) for module, pair in adapter.pairs.items()):
        return whole
    for module, pair in adapter.pairs.items():
        full, expected = module_shape(architecture, module), module_shape(architecture, module, plan.layers)
        if full is None or expected is None:
            raise PlanMismatchError(
                f"Module {module!r} of {adapter.source} is no linear layer of {name:.200}. {_REMEDY}"
            )
        if pair.shape != expected:
            raise PlanMismatchError(
                f"Module {module!r} of {adapter.source} has shape {pair.shape}, that of {name:.200} has {expected}. "
                f"{_REMEDY}"
            )
    if adapter.plan_sha256 not in (None, plan.digest):
        raise PlanMismatchError(
            f"{adapter.source} was trained on plan {str(adapter.plan_sha256)[:12]}, {name:.200} has plan "
            f"{plan.digest[:12]}, which keeps other channel groups. {_REMEDY}"
        )
    return plan
