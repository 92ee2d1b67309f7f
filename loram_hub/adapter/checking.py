"""Is an adapter folder what it claims to be? Every check that needs no more than the base's config; no torch.

`check_adapter` is stricter than `read_adapter`: reading leaves out what recovery can do without (copies of frozen
weights, files of a trainer), and a folder that others will load must not hold it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loram_hub.adapter.canonical import is_canonical_config
from loram_hub.adapter.config import CONFIG, AdapterConfig, parse_config
from loram_hub.adapter.folder import check_files
from loram_hub.adapter.modules import linear_modules, module_shape, uneven_module
from loram_hub.adapter.reading import PairSizes, check_axes, check_targets, pair_factors, require_files
from loram_hub.adapter.record import MASKED_FIELD, RECORD, RECOVERED, AdapterRecord, read_record
from loram_hub.adapter.tensors import CODES, FACTOR_NAME, FROZEN_COPIES, WEIGHTS, factor_names, mark_names
from loram_hub.architecture import FAMILIES, Architecture, architecture_of
from loram_hub.errors import (
    IncompatibleError,
    InvalidRequestError,
    PlanMismatchError,
    UnsupportedAdapterError,
    VerificationError,
)
from loram_hub.files import read_json, sha256_of
from loram_hub.tensors import TensorInfo, read_headers, sha256_of_finite

AdapterKind = Literal["recovered adapter", "PEFT adapter"]

_BOOLEANS = (
    "use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "inference_mode", "ensure_weight_tying",
)  # fmt: skip
# Settings that say nothing about what the factors mean once training is over, with any value.
_IDLE = frozenset(
    {
        "corda_config", "ensure_weight_tying", "eva_config", "inference_mode", "loftq_config", "lora_dropout",
        "lora_ga_config", "megatron_core", "merge_weights", "peft_version", "qalora_group_size", "runtime_config",
        "velora_config",
    }
)  # fmt: skip
# Settings that `parse_config` reads or refuses by their value.
_READ = frozenset(
    {
        "alpha_pattern", "alora_invocation_tokens", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias",
        "exclude_modules", "fan_in_fan_out", "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_bias", "megatron_config", "modules_to_save", "monteclora_config",
        "peft_type", "r", "rank_pattern", "revision", "target_modules", "target_parameters", "task_type",
        "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedAdapter:
    """An adapter folder that passed `check_adapter`."""

    folder: Path
    """Where it is."""
    kind: AdapterKind
    """Whether `recover` wrote it."""
    files: tuple[str, ...]
    """Paths of all its files inside the folder, sorted."""
    nbytes: int
    """Size of all files in bytes."""
    base_id: str | None
    """Model it applies to; None if it does not say."""
    revision: str | None
    """Commit or branch of that model; None if it does not say."""
    rank: int
    """Largest rank of a module."""
    modules: tuple[str, ...]
    """Paths of the adapted modules, sorted."""
    record: AdapterRecord | None
    """Where a recovered adapter comes from."""
    not_checked: tuple[str, ...]
    """What could not be checked, and why; a phrase each."""


def check_adapter(folder: Path, *, architecture: Architecture | None = None) -> CheckedAdapter:
    """Check every byte and every claim of an adapter folder, recovered here or saved by stock PEFT.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        architecture: of the base model; None if its config is not at hand. Without it, shapes and missing targets are
            not checked, and the result says so.

    Returns:
        What was checked.

    Raises:
        CheckpointError: a file is missing, or the weights are a pickle.
        VerificationError: a file is torn, altered, not allowed here, or leads out of the folder; NaN; config and
            tensors disagree.
        UnsupportedAdapterError: a feature without a full-size equivalent, foreign tensors, or missing factors.
        PlanMismatchError: a module is not in the base model, or has another shape there.
        IncompatibleError: the record's format is newer, or it names another base than the config.
    """
    files = check_files(folder)
    require_files(folder)
    _check_tokenizer(folder)
    values = read_json(folder / CONFIG)
    config = parse_config(values, source=str(folder / CONFIG))
    _check_settings(values, str(folder / CONFIG))
    record = read_record(folder) if _is_recovered(folder) else None
    pairs = _check_tensors(read_headers(folder / WEIGHTS), config, str(folder))
    digest = sha256_of_finite(folder / WEIGHTS)
    if record is not None:
        _check_record(record, folder, config, values, digest)
    check_targets(config, pairs.keys(), linear_modules(architecture) if architecture else (), source=str(folder))
    if architecture is not None:
        _check_shapes(pairs, architecture, str(folder))
    return CheckedAdapter(
        folder=folder,
        kind="PEFT adapter" if record is None else "recovered adapter",
        files=tuple(sorted(files)),
        nbytes=sum(files.values()),
        base_id=config.base,
        revision=config.revision,
        rank=max(pair.rank for pair in pairs.values()),
        modules=tuple(pairs),
        record=record,
        not_checked=tuple(_gaps(record, architecture)),
    )


def looks_pruned(folder: Path, *, base_config: Mapping[str, Any] | None = None) -> str | None:
    """Say why an adapter must be recovered before others can use it; None if nothing speaks for it.

    Reads headers and configs only.

    Args:
        folder: the adapter.
        base_config: `config.json` of the model that the adapter names; None if it is not at hand. Without it, a
            pruned adapter is still told from a full one if the release is a folder here, or if its layers differ in
            shape, as they do wherever some layers were pruned and others were not.

    Raises:
        CheckpointError: a file is missing.
        VerificationError: a file is torn.
        UnsupportedAdapterError: it is no plain LoRA adapter.
    """
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    config = parse_config(read_json(folder / CONFIG), source=str(folder / CONFIG))
    require_files(folder)
    tensors = read_headers(folder / WEIGHTS)
    factor_names(tensors.keys(), source=str(folder))
    return why_pruned(
        {name: info.shape for name, info in tensors.items()},
        record=record,
        base=config.base,
        base_config=base_config or local_config(config.base),
    )


def why_pruned(
    tensors: Mapping[str, tuple[int, ...]],
    *,
    record: Mapping[str, object],
    base: str | None,
    base_config: Mapping[str, Any] | None,
) -> str | None:
    """Decide `looks_pruned` from what was read.

    Args:
        tensors: shape of each of its tensors by name.
        record: content of `loram.json`; empty if there is none.
        base: what the adapter names as its base.
        base_config: config of that model; None if it is not at hand.
    """
    if mark_names(tensors):
        return "it carries the mark of one"
    if record.get("kind") == RECOVERED:
        return None
    if "plan_sha256" in record:
        return f"its {RECORD} names a pruning plan"
    if base_config is not None and ("loram" in base_config or str(base_config.get("model_type")).startswith("loram_")):
        return f"it was trained on {base}, which is a release"
    architecture, shapes = known_architecture(base_config), adapted_shapes(tensors)
    if architecture is not None:
        reasons = (_why_smaller(module, shape, architecture) for module, shape in shapes.items())
        return next((reason for reason in reasons if reason is not None), None)
    uneven = uneven_module(shapes)
    if uneven is None:
        return None
    first, second = uneven
    return f"{first!r} has shape {shapes[first]} and {second!r} {shapes[second]}, which no whole model has"


def adapted_shapes(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Shapes of the weights that the complete pairs of matrices among an adapter's tensors adapt, by module, sorted."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        match = FACTOR_NAME.fullmatch(name)
        if match is not None and len(shape) == 2:
            found.setdefault(match["module"], {})[match["factor"]] = shape
    return {module: (pair["B"][0], pair["A"][1]) for module, pair in sorted(found.items()) if len(pair) == 2}


def local_config(base: str | None) -> dict[str, Any] | None:
    """Read the config of a base that is a folder here; None if it is not. Never asks the network."""
    config = "" if base is None else os.path.join(os.path.expanduser(base), "config.json")
    return read_json(Path(config)) if os.path.isfile(config) else None  # unlike pathlib's, it takes any text


def known_architecture(base_config: Mapping[str, Any] | None) -> Architecture | None:
    """Return the architecture of a base model; None if its config is not at hand, unsound, or of an unknown family."""
    if base_config is None or base_config.get("model_type") not in tuple(FAMILIES):
        return None
    try:
        return architecture_of(base_config)
    except InvalidRequestError:
        return None


def refuse_pruned(folder: Path, *, base_config: Mapping[str, Any] | None = None) -> None:
    """Raise `UnsupportedAdapterError`, with what to run, if an adapter was trained on a release and not recovered.

    See `looks_pruned` for arguments and other errors.
    """
    reason = looks_pruned(folder, base_config=base_config)
    if reason is not None:
        raise UnsupportedAdapterError(
            f"{folder} is a pruned adapter: {reason}. The original model is not what it was trained on: there it "
            f"may fail, or answer wrongly. Recover it first: loram recover {folder} OUT"
        )


def _check_settings(values: Mapping[str, Any], source: str) -> None:
    """Refuse settings that could mean something to a loader and are not known here, judged by their values."""
    for key, value in sorted(values.items()):
        if key in _BOOLEANS and value is not None and not isinstance(value, bool):
            raise VerificationError(f"{key} in {source} is {value!r:.100}; true or false is needed.")
        if value and key not in _READ and key not in _IDLE:
            raise UnsupportedAdapterError(
                f"{key!r:.100} is set in {source}, which no plain LoRA adapter has; what it does to one cannot be "
                "told. Remove it, or upgrade loram-hub."
            )
    mapping = values.get("auto_mapping") or {}
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library is not None and not (isinstance(library, str) and re.fullmatch(r"transformers(\.\w+)*", library)):
        raise VerificationError(
            f"auto_mapping in {source} has PEFT import {library!r:.100}; only modules of transformers may be named. "
            "Remove auto_mapping."
        )
    if not isinstance(values.get("task_type"), str | None):
        raise VerificationError(f"task_type in {source} is {values['task_type']!r:.100}; text is needed.")


def _check_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    if path.is_file() and "auto_map" in read_json(path):
        raise VerificationError(f"{path} has an auto_map, which names code to run. Remove it from the file.")


def _is_recovered(folder: Path) -> bool:
    """Whether the folder has a record, which then must be one of a recovered adapter."""
    if not (folder / RECORD).is_file():
        return False
    if set(read_json(folder / RECORD)) - {MASKED_FIELD} == {"plan_sha256"}:
        raise UnsupportedAdapterError(
            f"{folder / RECORD} names the plan of a release: the adapter is not recovered. Run loram recover first."
        )
    return True


def _check_tensors(tensors: Mapping[str, TensorInfo], config: AdapterConfig, source: str) -> dict[str, PairSizes]:
    copies = sorted(FROZEN_COPIES & set(tensors))
    if copies:
        raise UnsupportedAdapterError(
            f"Tensor {copies[0]!r} of {source} is a copy of a frozen weight of the base model; PEFT would load it over "
            "the base's own. Write the adapter without it: loram doctor ADAPTER --fix OUT."
        )
    if mark_names(tensors):
        raise UnsupportedAdapterError(
            f"{source} carries the mark of a pruned adapter: it fits no original model. Recover it first: "
            f"loram recover {source} OUT"
        )
    factors = factor_names(tensors.keys(), source=source)
    for name in factors:
        entry = tensors[name]
        if entry.dtype not in CODES.values():
            raise VerificationError(
                f"Tensor {name!r} of {source} has dtype {entry.dtype!r:.50}; F32, F16 or BF16 is needed."
            )
        check_axes(name, entry.shape, source=source)
    return pair_factors(config, {name: tensors[name].shape for name in factors}, source=source)


def _check_record(
    record: AdapterRecord, folder: Path, config: AdapterConfig, values: Mapping[str, Any], weights_sha256: str
) -> None:
    if (record.base_id, record.base_commit) != (config.base, config.revision):
        raise IncompatibleError(
            f"{folder / RECORD} names the base {record.base_id} at {record.base_commit}, {CONFIG} names "
            f"{config.base} at {config.revision}. They belong to two adapters; copy or recover this one again."
        )
    for name, digest in ((CONFIG, sha256_of(folder / CONFIG)), (WEIGHTS, weights_sha256)):
        size, listed = (folder / name).stat().st_size, record.files[name]
        if (digest, size) != (listed.sha256, listed.size):
            raise VerificationError(
                f"{name} in {folder} has {size:,} bytes and SHA-256 {digest[:12]}..., its record says {listed.size:,} "
                f"and {listed.sha256[:12]}.... It was altered or torn; copy or recover the adapter again."
            )
    if not is_canonical_config(values):
        raise VerificationError(
            f"{folder / CONFIG} is not in the form that 'loram recover' writes, though {RECORD} says that it did. "
            "Recover the adapter again."
        )


def _check_shapes(pairs: Mapping[str, PairSizes], architecture: Architecture, source: str) -> None:
    for module, pair in pairs.items():
        expected = module_shape(architecture, module)
        if expected is None:
            raise PlanMismatchError(
                f"Module {module!r} of {source} is no linear layer of this {architecture.family.model_type} model with "
                f"{architecture.num_hidden_layers} layers. It was made for another base model."
            )
        smaller = _why_smaller(module, pair.shape, architecture)
        if smaller is not None:
            raise PlanMismatchError(
                f"{source} does not have the base model's size: {smaller}. It was trained on a pruned model; run "
                "loram recover first, or give the base it was made for."
            )
        if pair.shape != expected:
            raise PlanMismatchError(
                f"Module {module!r} of {source} has shape {pair.shape}, the base model's has {expected}. It was made "
                "for another base model."
            )


def _why_smaller(module: str, shape: tuple[int, int], architecture: Architecture) -> str | None:
    """Say that a module lacks rows or columns that the whole model has, and has no others more."""
    whole = module_shape(architecture, module)
    if whole is None or shape == whole or shape[0] > whole[0] or shape[1] > whole[1]:
        return None
    side, axis = ("rows", 0) if shape[0] < whole[0] else ("columns", 1)
    return f"{module!r} has {shape[axis]:,} {side}, the whole model has {whole[axis]:,}"


def _gaps(record: AdapterRecord | None, architecture: Architecture | None) -> Iterator[str]:
    if record is None:
        yield f"hashes: there is no {RECORD}, so nobody recorded any"
    if architecture is None:
        yield "shapes, and factors missing for declared targets: the base model's config is not at hand"
