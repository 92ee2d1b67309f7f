"""An adapter in memory, from an untrusted folder or from tensors at hand."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from loram_hub.adapter.config import CONFIG, AdapterConfig, check_work, key_pattern, parse_config
from loram_hub.adapter.mark import marked_plan
from loram_hub.adapter.record import MASKED_FIELD, RECORD
from loram_hub.adapter.tensors import CODES, FACTOR_NAME, WEIGHTS, Factor, factor_name, factor_names, is_finite
from loram_hub.errors import CheckpointError, LoramError, UnsupportedAdapterError, VerificationError
from loram_hub.files import read_json
from loram_hub.tensors import read_headers

_MAX_WEIGHT_BYTES = 64 * 2**30  # rank 256 in fp32 on a 70B model makes 13 GB


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class LoraPair:
    """The factors of one module: its weight becomes W + scale * lora_B @ lora_A."""

    lora_A: Factor
    """(r, in_features), finite; float32, float16 or bfloat16."""
    lora_B: Factor
    """(out_features, r), likewise."""
    scale: float
    """alpha / r, or alpha / sqrt(r) under rsLoRA."""

    @property
    def rank(self) -> int:
        """Rows of lora_A, columns of lora_B."""
        return int(self.lora_A.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight it adapts, (out_features, in_features)."""
        return self.lora_B.shape[0], self.lora_A.shape[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSizes:
    """A `LoraPair` without its numbers."""

    rank: int
    """Rows of lora_A, columns of lora_B."""
    shape: tuple[int, int]
    """Shape of the weight it adapts, (out_features, in_features)."""
    scale: float
    """alpha / r, or alpha / sqrt(r) under rsLoRA."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Adapter:
    """A LoRA adapter in memory."""

    source: str
    """Names it in errors."""
    config: AdapterConfig
    pairs: Mapping[str, LoraPair]
    """By full module path (`model.layers.3.mlp.down_proj`, `lm_head`), sorted; never empty."""
    record: Mapping[str, object]
    """Content of its `loram.json`; empty if it has none."""
    marked_plan: str | None = None
    """Digest of the plan it was trained on, from its mark; None if it has none."""
    was_masked: bool = False
    """Whether it was trained on a sparse release with the mask on its update (`masked_lora`)."""

    def check_targets(self, candidates: Iterable[str]) -> None:
        """Check that the adapter has factors for the modules that its config declares, and for no others.

        PEFT and vLLM pass over missing factors in silence; the adapter then does less than it was trained to do.

        Args:
            candidates: every module of the model that can be adapted.

        Raises:
            UnsupportedAdapterError: names the first module that is missing or undeclared.
        """
        check_targets(self.config, self.pairs.keys(), candidates, source=self.source)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder from an untrusted source.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The adapter, every factor in memory.

    Raises:
        CheckpointError: a file is missing, or the weights are a pickle.
        VerificationError: a file is torn, holds NaN or infinity, or config and tensors disagree.
        UnsupportedAdapterError: it uses a feature that has no full-size equivalent.
    """
    require_files(folder)
    config = parse_config(read_json(folder / CONFIG), source=str(folder / CONFIG))
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    adapter = build_adapter(config, _read_factors(folder), source=str(folder), record=record)
    return replace(adapter, marked_plan=marked_plan(read_headers(folder / WEIGHTS), source=str(folder)))


def require_files(folder: Path) -> None:
    """Raise `CheckpointError`, with the likely reason, unless a folder has config and safetensors weights."""
    if not (folder / CONFIG).is_file():
        checkpoints = sorted(path.parent.name for path in folder.glob(f"checkpoint-*/{CONFIG}"))
        hint = " It looks like a whole model." if (folder / "config.json").is_file() else ""
        hint = f" It holds training checkpoints; give one of them: {', '.join(checkpoints)}." if checkpoints else hint
        raise CheckpointError(f"{folder} is no adapter: it has no {CONFIG}.{hint}")
    if not (folder / WEIGHTS).is_file():
        pickled = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()), None)
        if pickled is not None:
            raise CheckpointError(
                f"{folder} holds its weights as a pickle ({pickled}), which can run code when opened. "
                "Save it again with PEFT, which writes safetensors."
            )
        raise CheckpointError(f"{folder} has an {CONFIG} but no {WEIGHTS}. Save or copy the adapter again.")


def _read_factors(folder: Path) -> Iterator[tuple[str, Factor]]:
    path = folder / WEIGHTS
    if path.stat().st_size > _MAX_WEIGHT_BYTES:
        raise VerificationError(f"{path} is larger than {_MAX_WEIGHT_BYTES:,} bytes; no adapter is.")
    try:
        with safe_open(path, framework="np") as file:
            for name in factor_names(list(file.keys()), source=str(folder)):
                code = file.get_slice(name).get_dtype()
                if code not in CODES.values():
                    raise VerificationError(f"Tensor {name!r} of {path} has dtype {code}; F32, F16 or BF16 is needed.")
                yield name, file.get_tensor(name)
    except LoramError:
        raise
    except (SafetensorError, OSError, ValueError) as err:
        raise VerificationError(f"{path} is not a sound safetensors file: {err}. Save or copy it again.") from err


def build_adapter(
    config: AdapterConfig, tensors: Iterable[tuple[str, Factor]], *, source: str, record: Mapping[str, object]
) -> Adapter:
    """Pair factors by module and check them against the config: for folders, and for adapters that live in memory.

    Args:
        config: from `parse_config`.
        tensors: full names, as `factor_names` lists them, and factors; each is checked as it comes, still in the cache.
        source: names the adapter in errors.
        record: content of its `loram.json`; empty if it has none.

    Raises:
        UnsupportedAdapterError: a factor lacks its partner, or there is none at all.
        VerificationError: a factor is not finite, or ranks disagree.
    """
    factors: dict[str, Factor] = {}
    for name, tensor in tensors:
        _check_factor(name, tensor, source)
        factors[name] = tensor
    declared = pair_factors(config, {name: tensor.shape for name, tensor in factors.items()}, source=source)
    pairs = {
        module: LoraPair(
            lora_A=factors[factor_name(module, "A")], lora_B=factors[factor_name(module, "B")], scale=pair.scale
        )
        for module, pair in declared.items()
    }
    return Adapter(
        source=source, config=config, pairs=pairs, record=record, was_masked=record.get(MASKED_FIELD) is True
    )


def pair_factors(config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]], *, source: str) -> dict[str, PairSizes]:
    """Pair factors by module and check their ranks against the config, from their shapes alone.

    Args:
        config: from `parse_config`.
        shapes: of every factor, two axes each, by full name.
        source: names the adapter in errors.

    Returns:
        Rank, scale and adapted shape by module path, sorted.

    Raises:
        UnsupportedAdapterError: a factor lacks its partner, there is none at all, or alphas contradict each other.
        VerificationError: ranks disagree.
    """
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        found = FACTOR_NAME.fullmatch(name)
        assert found is not None  # factor_names lists no other
        factors.setdefault(found["module"], {})[found["factor"]] = shape
    if not factors:
        raise UnsupportedAdapterError(f"{source} holds no LoRA factors at all. Was it saved by PEFT, after training?")
    check_work(config, factors, source=source)
    ranks, alphas = _matchers(config.rank_pattern), _matchers(config.alpha_pattern)
    pairs: dict[str, PairSizes] = {}
    for module, pair in sorted(factors.items()):
        if len(pair) != 2:
            present, absent = ("lora_A", "lora_B") if "A" in pair else ("lora_B", "lora_A")
            raise UnsupportedAdapterError(
                f"Module {module!r} of {source} has {present} but no {absent}. Save or copy the adapter again."
            )
        rank = _rank_of(module, pair, _matches(ranks, module) or {config.r}, source)
        alpha = _alpha_of(module, _matches(alphas, module) or {config.lora_alpha}, source)
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        pairs[module] = PairSizes(rank=rank, shape=(pair["B"][0], pair["A"][1]), scale=scale)
    return pairs


def check_targets(config: AdapterConfig, modules: Collection[str], candidates: Iterable[str], *, source: str) -> None:
    """Check adapted modules against the declared targets; see `Adapter.check_targets`.

    Args:
        config: from `parse_config`.
        modules: paths of the modules that have factors.
        candidates: every module of the model that can be adapted; empty if the model is not known, which leaves only
            the search for undeclared factors.
        source: names the adapter in errors.

    Raises:
        UnsupportedAdapterError: names the first module that is missing or undeclared.
    """
    if config.target_modules is None:
        return
    candidates = list(candidates)
    check_work(config, candidates, source=source)
    declared = {module for module in candidates if config.targets(module)}
    missing = sorted(declared - set(modules))
    if missing:
        raise UnsupportedAdapterError(
            f"Module {missing[0]!r} is a target of {source}, but its factors are missing ({len(missing)} of "
            f"{len(declared)} modules lack them). Save or copy the adapter again."
        )
    undeclared = sorted(module for module in modules if not config.targets(module))
    if undeclared:
        raise UnsupportedAdapterError(
            f"Module {undeclared[0]!r} has factors in {source}, but target_modules does not name it; PEFT "
            f"would ignore them and vLLM would not. Correct {CONFIG}, or remove the factors."
        )


def _check_factor(name: str, tensor: Factor, source: str) -> None:
    check_axes(name, tensor.shape, source=source)
    if not is_finite(tensor):
        raise VerificationError(f"Tensor {name!r} of {source} holds NaN or infinity. Use an earlier checkpoint.")


def check_axes(name: str, shape: tuple[int, ...], *, source: str) -> None:
    """Raise `VerificationError` unless a factor has two axes, none of them empty."""
    if len(shape) != 2 or 0 in shape:
        raise VerificationError(
            f"Tensor {name!r} of {source} has shape {shape}; two axes, none empty, are needed. "
            "If it was trained with ZeRO-3 or FSDP, gather the parameters before saving."
        )


def _rank_of(module: str, pair: Mapping[str, tuple[int, ...]], declared: set[float], source: str) -> int:
    rows, columns = pair["A"][0], pair["B"][1]
    if rows != columns or rows not in declared:
        ranks = " or ".join(f"{value:g}" for value in sorted(declared))
        raise VerificationError(
            f"Module {module!r} of {source} has lora_A with {rows} rows and lora_B with {columns} columns; {CONFIG} "
            f"gives it rank {ranks}. The two files do not belong together."
        )
    return rows


def _alpha_of(module: str, declared: set[float], source: str) -> float:
    if len(declared) > 1:
        # PEFT takes the first key that matches, but sorts the keys when it saves: the order in training cannot be told.
        raise UnsupportedAdapterError(
            f"Module {module!r} of {source} matches several keys of alpha_pattern with different values "
            f"({', '.join(f'{value:g}' for value in sorted(declared))}). Give each module one key, its full path."
        )
    return next(iter(declared))


def _matchers(patterns: Mapping[str, float]) -> list[tuple[re.Pattern[str], float]]:
    return [(key_pattern(key), value) for key, value in patterns.items()]


def _matches(matchers: list[tuple[re.Pattern[str], float]], module: str) -> set[float]:
    return {value for pattern, value in matchers if pattern.match(module)}
