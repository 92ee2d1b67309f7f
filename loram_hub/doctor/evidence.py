"""What an adapter folder holds, read without trust and without refusal: what cannot be read is noted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from loram_hub.adapter import (
    CODES,
    FACTOR_NAME,
    FROZEN_COPIES,
    PREFIX,
    RECORD,
    WEIGHTS,
    AdapterConfig,
    adapted_shapes,
    check_work,
    known_architecture,
    linear_modules,
    mark_names,
    parse_config,
    why_pruned,
)
from loram_hub.adapter import CONFIG as ADAPTER_CONFIG
from loram_hub.architecture import Architecture
from loram_hub.errors import CheckpointError, UnsupportedAdapterError, VerificationError
from loram_hub.files import MAX_JSON_BYTES, read_json
from loram_hub.tensors import TensorInfo, is_finite, read_array, read_headers, read_rows

ADDED_TOKENS = "added_tokens.json"
PICKLES = ("adapter_model.bin", "adapter_model.pt")
_PIECE = 16 * 1024 * 1024

_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True, eq=False, kw_only=True)
class Evidence:
    """What was found in an adapter folder, and what is known of its base."""

    folder: Path
    config: Mapping[str, Any]
    """`adapter_config.json`; empty if it cannot be read."""
    config_problem: str | None
    """Why it is not sound JSON, or missing."""
    config_is_readable: bool
    """Whether a lenient parser, as the servers use one, reads it all the same."""
    tensors: Mapping[str, TensorInfo]
    """By name; empty if the weights cannot be read."""
    weights_problem: str | None
    """Why the weights are not a sound safetensors file, or missing."""
    pickles: tuple[str, ...]
    """Weights stored as pickles; never opened."""
    not_finite: tuple[str, ...]
    """Tensors with NaN or infinity."""
    record: Mapping[str, Any]
    """`loram.json`; empty if there is none, or it cannot be read."""
    added_tokens: Mapping[str, int]
    """Ids of the tokens that `added_tokens.json` lists."""
    base: str | None
    """The base model, as the user or the adapter names it."""
    base_config: Mapping[str, Any] | None
    """Its `config.json`; None if it is not at hand."""

    @cached_property
    def architecture(self) -> Architecture | None:
        """Of the base model; None if its config is not at hand, is a release's, or is of an unknown family."""
        return known_architecture(self.base_config)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Modules that the base model has for LoRA; empty if it is not known."""
        return () if self.architecture is None else tuple(linear_modules(self.architecture))

    @cached_property
    def factors(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of lora_A and lora_B, under `A` and `B`, by module; PEFT's prefix may be missing."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, entry in sorted(self.tensors.items()):
            match = FACTOR_NAME.fullmatch(name) or FACTOR_NAME.fullmatch(PREFIX + name)
            if match is not None:
                found.setdefault(match["module"], {})[match["factor"]] = entry.shape
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of each adapted weight by module, where both factors are matrices."""
        return adapted_shapes({name: entry.shape for name, entry in self.tensors.items()})

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Rows of each lora_A that is a matrix, by module."""
        return {module: pair["A"][0] for module, pair in self.factors.items() if len(pair.get("A", ())) == 2}

    @cached_property
    def copies(self) -> tuple[str, ...]:
        """Copies of frozen weights of the base, sorted."""
        return tuple(sorted(FROZEN_COPIES & set(self.tensors)))

    @cached_property
    def foreign(self) -> tuple[str, ...]:
        """Tensors that are neither factors nor copies, sorted."""
        names = set(self.tensors) - set(self.copies) - set(self.marks)
        return tuple(sorted(n for n in names if not (FACTOR_NAME.fullmatch(n) or FACTOR_NAME.fullmatch(PREFIX + n))))

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """Tensors that mark a pruned adapter, sorted."""
        return tuple(mark_names(self.tensors))

    @cached_property
    def pruned(self) -> str | None:
        """Why the adapter looks pruned; None if it does not."""
        shapes = {name: entry.shape for name, entry in self.tensors.items()}
        return why_pruned(shapes, record=self.record, base=self.base, base_config=self.base_config)

    @cached_property
    def parsed(self) -> AdapterConfig | None:
        """What of the config says which modules are adapted; None if that cannot be told."""
        if self.setting("target_modules") is None:
            return None
        found = self._parse(_TARGETING)
        return found if isinstance(found, AdapterConfig) else None

    @cached_property
    def scaling(self) -> AdapterConfig | None:
        """What of the config says which ranks and scales modules have; None if that cannot be told."""
        found = self._parse(_SCALING) if self.r is not None and self.setting("lora_alpha") is not None else None
        return found if isinstance(found, AdapterConfig) else None

    @cached_property
    def settings_problem(self) -> str | None:
        """Why the values of the settings that every reader uses are not what they must be; None if they are."""
        keys = {*_SCALING, *_TARGETING, "base_model_name_or_path", "revision"} - {"r"}
        found = self._parse(tuple(keys))
        return found if isinstance(found, str) else None

    def _parse(self, keys: tuple[str, ...]) -> AdapterConfig | str:
        """Read some settings strictly, others as if they were absent; returns what is wrong, if anything is."""
        values = {key: self.config[key] for key in keys if self.config.get(key) is not None}
        try:
            config = parse_config({"r": 1, "lora_alpha": 1, **values, "peft_type": "LORA"}, source=ADAPTER_CONFIG)
            check_work(config, [*self.factors, *self.modules], source=ADAPTER_CONFIG)
        except (UnsupportedAdapterError, VerificationError) as err:
            return str(err).rstrip(".")
        return config

    def setting(self, key: str) -> Any:  # noqa: ANN401 (an untrusted value: the caller checks it)
        """Return a value of the config; None if it is not there."""
        return self.config.get(key)

    @property
    def r(self) -> int | None:
        """Rank in the config; None if it is no positive whole number."""
        return found if type(found := self.config.get("r")) is int and found > 0 else None

    @property
    def rank(self) -> int:
        """Largest rank that config or tensors name; at least 1."""
        return max([1, self.r or 1, *self.ranks.values()])


def gather(folder: Path) -> Evidence:
    """Read an adapter folder as far as it can be read; nothing is known of the base yet."""
    config, config_problem, readable = _read_config(folder)
    tensors, weights_problem, not_finite = _read_weights(folder)
    named = config.get("base_model_name_or_path")
    return Evidence(
        folder=folder,
        config=config,
        config_problem=config_problem,
        config_is_readable=readable,
        tensors=tensors,
        weights_problem=weights_problem,
        pickles=tuple(name for name in PICKLES if (folder / name).is_file()),
        not_finite=not_finite,
        record=_read_optional(folder / RECORD),
        added_tokens={k: v for k, v in _read_optional(folder / ADDED_TOKENS).items() if isinstance(v, int)},
        base=named if isinstance(named, str) and named else None,
        base_config=None,
    )


def _read_config(folder: Path) -> tuple[dict[str, Any], str | None, bool]:
    path = folder / ADAPTER_CONFIG
    if path.exists() and not path.is_file():
        return {}, f"{ADAPTER_CONFIG} is no regular file", False
    try:
        return read_json(path), None, True
    except CheckpointError:
        return {}, f"{ADAPTER_CONFIG} is missing", False
    except VerificationError as err:
        values = _read_leniently(path)
        return values or {}, str(err).rstrip("."), values is not None


def _read_leniently(path: Path) -> dict[str, Any] | None:
    """Parse as servers do: of two equal keys the last one counts, and NaN is a number."""
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:  # a pipe would be waited for
        return None
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _read_weights(folder: Path) -> tuple[Mapping[str, TensorInfo], str | None, tuple[str, ...]]:
    path = folder / WEIGHTS
    if not path.is_file():
        return {}, f"{WEIGHTS} is missing", ()
    try:
        tensors = read_headers(path)
        floats = [(name, info) for name, info in sorted(tensors.items()) if info.dtype in CODES.values()]
        return tensors, None, tuple(name for name, info in floats if not _is_finite(info))
    except VerificationError as err:
        return {}, str(err).rstrip("."), ()


def _is_finite(info: TensorInfo) -> bool:
    """Look at a tensor's numbers in pieces of whole rows."""
    if 0 in info.shape:
        return True
    if not info.shape:
        return is_finite(read_array(info).tobytes(), info.dtype)
    step = max(1, _PIECE * info.shape[0] // info.nbytes)
    rows = (read_rows(info, i, min(i + step, info.shape[0])) for i in range(0, info.shape[0], step))
    return all(is_finite(piece.reshape(-1).view(np.uint8).data, info.dtype) for piece in rows)


def _read_optional(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except VerificationError:
        return {}
