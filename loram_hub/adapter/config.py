"""`adapter_config.json`: which adapters are plain LoRA, and what rank, alpha and modules they declare."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from loram_hub.errors import UnsupportedAdapterError, VerificationError

CONFIG = "adapter_config.json"

# Bounds on what an untrusted file may claim.
_MAX_PATTERNS = 4_096
_MAX_PATTERN_LENGTH = 2_000
_MAX_NUMBER = 10**9

VOCABULARY_REMEDY = (
    "TRL asks for it when the chat template adds tokens. Train again with a template that adds none, or publish a "
    "release of a base model that has these tokens"
)
_REFUSED: Mapping[str, str] = {
    "modules_to_save": f"it trains whole copies of modules, which are no low-rank update. {VOCABULARY_REMEDY}",
    "trainable_token_indices": f"it trains rows of the embedding, which are no low-rank update. {VOCABULARY_REMEDY}",
    "use_dora": "DoRA rescales each row by the norm of W + BA, and the pruned W has other norms than the full one",
    "use_qalora": "QA-LoRA pools the inputs of A, so A has no columns to put back",
    "use_bdlora": "BD-LoRA factors are block-diagonal",
    "kasa_config": "KaSA also changes the base weights",
    "arrow_config": "an Arrow router mixes several adapters per token",
    "monteclora_config": "its update is sampled, not a fixed BA",
    "alora_invocation_tokens": "an activated LoRA applies only after certain tokens",
    "layer_replication": "it adds layers that the base model does not have",
    "target_parameters": "it adapts parameters outside of linear layers",
    "lora_bias": "a bias is no low-rank update",
    "megatron_config": "it describes tensors that are sharded over several processes",
    "fan_in_fan_out": "it is for layers that store their weight transposed, which no supported family has",
}
# `use_...` and `..._config` settings with which the update is still s BA; any other is a variant unknown here.
_HARMLESS = frozenset(
    {"use_rslora", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config", "runtime_config"}
)
_KEEPS_BASE_WEIGHTS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """What `adapter_config.json` says about a plain LoRA adapter."""

    r: int
    """Rank of the modules that no `rank_pattern` names."""
    lora_alpha: float
    """Alpha of the modules that no `alpha_pattern` names."""
    use_rslora: bool
    """Whether scales are alpha / sqrt(r)."""
    rank_pattern: Mapping[str, float]
    """Ranks by regular expression over the end of a module path."""
    alpha_pattern: Mapping[str, float]
    """Alphas likewise."""
    target_modules: str | tuple[str, ...] | None
    """A regular expression over the whole path, or path suffixes; None if the file does not say."""
    exclude_modules: str | tuple[str, ...] | None
    """Modules left out, in the same notation."""
    layers_to_transform: tuple[int, ...]
    """Numbers of the adapted layers; empty for all."""
    layers_pattern: tuple[str, ...]
    """Names of the layer lists that `layers_to_transform` counts in; empty for any."""
    base: str | None
    """Model it was trained on: folder or Hub id."""
    revision: str | None
    """Revision of that model."""

    def targets(self, module: str) -> bool:
        """Whether PEFT adapts a module, by the rules of its `check_target_module_exists`."""
        if self.exclude_modules and _is_named(module, self.exclude_modules):
            return False
        if self.target_modules is None or not _is_named(module, self.target_modules):
            return False
        by_suffix = not isinstance(self.target_modules, str) and module not in self.target_modules
        return not by_suffix or not self.layers_to_transform or self._layer_of(module) in self.layers_to_transform

    def _layer_of(self, module: str) -> int | None:
        for pattern in self.layers_pattern or (r"[^.]*",):
            found = compile_pattern(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.").match(module)
            if found is not None:
                return int(found["idx"])
        return None


def parse_config(values: Mapping[str, object], *, source: str) -> AdapterConfig:
    """Read an untrusted `adapter_config.json`; `source` names it in errors.

    Raises:
        UnsupportedAdapterError: a setting has no full-size equivalent; the message says why and what to do.
        VerificationError: a field is missing or of the wrong type.
    """
    _refuse_variants(values, source)
    fields = _Fields(values, source)
    return AdapterConfig(
        r=int(fields.number("r", whole=True)),
        lora_alpha=fields.number("lora_alpha"),
        use_rslora=bool(values.get("use_rslora")),
        rank_pattern=fields.pattern("rank_pattern", whole=True),
        alpha_pattern=fields.pattern("alpha_pattern"),
        target_modules=fields.target("target_modules"),
        exclude_modules=fields.target("exclude_modules"),
        layers_to_transform=fields.layers("layers_to_transform"),
        layers_pattern=fields.names("layers_pattern"),
        base=fields.text("base_model_name_or_path"),
        revision=fields.text("revision"),
    )


def _refuse_variants(values: Mapping[str, object], source: str) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapterError(
            f"peft_type of {source} is {kind!r}; only LORA factors can be put back to full size. "
            "Train again with peft.LoraConfig."
        )
    for key, value in sorted(values.items()):
        if value and key in _REFUSED:
            raise UnsupportedAdapterError(
                f"{key} is set in {source}: {_REFUSED[key]}. Recovery needs plain LoRA, without {key}."
            )
        if value and key not in _HARMLESS and (key.startswith("use_") or key.endswith("_config")):
            raise UnsupportedAdapterError(
                f"{key} is set in {source}, a LoRA variant that this loram-hub does not know. "
                f"Train without {key}, or upgrade loram-hub."
            )
    if values.get("bias", "none") != "none":
        raise UnsupportedAdapterError(
            f"bias is {values['bias']!r} in {source}: trained biases are no low-rank update. "
            "Train again with bias='none'."
        )
    init = values.get("init_lora_weights", True)
    if not isinstance(init, bool) and init not in _KEEPS_BASE_WEIGHTS:
        raise UnsupportedAdapterError(
            f"init_lora_weights is {init!r} in {source}: it changes the weights that the factors are added to, and the "
            "original model was not changed. Train again with init_lora_weights=True or one of "
            f"{', '.join(_KEEPS_BASE_WEIGHTS)}."
        )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to an untrusted JSON object."""

    values: Mapping[str, object]
    source: str

    def number(self, key: str, *, whole: bool = False) -> float:
        return self._checked(self.values.get(key), key, whole=whole)

    def pattern(self, key: str, *, whole: bool = False) -> dict[str, float]:
        found = self.values.get(key) or {}
        if not isinstance(found, dict) or len(found) > _MAX_PATTERNS:
            raise VerificationError(f"{key} in {self.source} must be an object of at most {_MAX_PATTERNS:,} entries.")
        return {name: self._checked(value, f"{key}[{name!r}]", whole=whole) for name, value in found.items()}

    def names(self, key: str) -> tuple[str, ...]:
        names = [item for item in self._list(key) if isinstance(item, str)]
        return tuple(names) if len(names) == len(self._list(key)) else self._refuse(key, "names are")

    def layers(self, key: str) -> tuple[int, ...]:
        layers = [item for item in self._list(key) if isinstance(item, int) and not isinstance(item, bool)]
        return tuple(layers) if len(layers) == len(self._list(key)) else self._refuse(key, "layer numbers are")

    def target(self, key: str) -> str | tuple[str, ...] | None:
        found = self.values.get(key)
        return found if found is None or isinstance(found, str) else tuple(sorted(self.names(key)))

    def text(self, key: str) -> str | None:
        found = self.values.get(key)
        if found is None or isinstance(found, str):
            return found or None
        self._refuse(key, "text is")

    def _list(self, key: str) -> list[object]:
        found = self.values.get(key)
        return found if isinstance(found, list) else [] if found is None else [found]

    def _refuse(self, key: str, needed: str) -> NoReturn:
        raise VerificationError(f"{key} in {self.source} is {self.values.get(key)!r:.100}; {needed} needed.")

    def _checked(self, value: object, name: str, *, whole: bool) -> float:
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < _MAX_NUMBER:
            needed = "a positive whole number" if whole else "a positive number"
            raise VerificationError(f"{name} in {self.source} is {value!r:.100}; {needed} is needed.")
        return value


def _is_named(module: str, names: str | tuple[str, ...]) -> bool:
    if isinstance(names, str):
        return compile_pattern(names).fullmatch(module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile an untrusted regular expression; raises `VerificationError` if it is none, or could run for ever."""
    if len(pattern) > _MAX_PATTERN_LENGTH or _repeats_a_repetition(pattern):
        raise VerificationError(f"The pattern {pattern!r:.100} is too long, or repeats a repetition. Name the modules.")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as err:
        raise VerificationError(f"The pattern {pattern!r:.100} is no regular expression: {err}.") from err


def _repeats_a_repetition(pattern: str) -> bool:
    """Whether a group that repeats or branches is itself repeated, as in `(a+)+`, which can take exponential time."""
    text = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)
    while (group := re.search(r"\(([^()]*)\)([*+{]?)", text)) is not None:
        repeats = re.search(r"[*+{|]", group[1]) is not None
        if repeats and group[2]:
            return True
        text = text[: group.start()] + ("*" if repeats else "x") + text[group.start(2) :]
    return False
