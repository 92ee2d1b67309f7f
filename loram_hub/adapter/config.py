"""`adapter_config.json`: which adapters are plain LoRA, and what rank, alpha and modules they declare."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from loram_hub.architecture import LM_HEAD
from loram_hub.errors import UnsupportedAdapterError, VerificationError

CONFIG = "adapter_config.json"

# Bounds on what an untrusted file may claim.
_MAX_PATTERNS = 4_096
_MAX_PATTERN_LENGTH = 2_000
_MAX_TEXT = 4_096
_MAX_NUMBER = 10**9
_MAX_REPEATS = 5  # Unsloth writes four in a row, and PEFT puts one before each key of a rank_pattern
_MAX_OPTIONS = 8
_MAX_STEPS = 3 * 10**8
"""Steps of the regular expression engine, estimated for the worst case, that the patterns of one file may take."""

ALL_LINEAR = "all-linear"
"""Value of `target_modules` that stands for every linear layer but the lm_head."""

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
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base weights alone."""


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
        if self.target_modules is None:
            return False
        if is_all_linear(self.target_modules):
            return module != LM_HEAD.removesuffix(".weight")
        if not _is_named(module, self.target_modules):
            return False
        by_suffix = not isinstance(self.target_modules, str) and module not in self.target_modules
        return not by_suffix or not self.layers_to_transform or self._layer_of(module) in self.layers_to_transform

    def _layer_of(self, module: str) -> int | None:
        for pattern in self.layers_pattern or (r"[^.]*",):
            found = compile_pattern(_layer_pattern(pattern)).match(module)
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
            f"peft_type of {source} is {kind!r:.100}; only LORA factors can be put back to full size. "
            "Train again with peft.LoraConfig."
        )
    for key, value in sorted(values.items()):
        if value and key in _REFUSED:
            raise UnsupportedAdapterError(
                f"{key} is set in {source}: {_REFUSED[key]}. Recovery needs plain LoRA, without {key}."
            )
        if value and key not in _HARMLESS and (key.startswith("use_") or key.endswith("_config")):
            raise UnsupportedAdapterError(
                f"{key:.100} is set in {source}, a LoRA variant that this loram-hub does not know. "
                f"Train without {key:.100}, or upgrade loram-hub."
            )
    if values.get("bias", "none") != "none":
        raise UnsupportedAdapterError(
            f"bias is {values['bias']!r:.100} in {source}: trained biases are no low-rank update. "
            "Train again with bias='none'."
        )
    init = values.get("init_lora_weights", True)
    if not isinstance(init, bool) and str(init).lower() not in PLAIN_INITS:
        raise UnsupportedAdapterError(
            f"init_lora_weights is {init!r:.100} in {source}: it changes the weights that the factors are added to, "
            "and the original model was not changed. Train again with init_lora_weights=True or one of "
            f"{', '.join(PLAIN_INITS)}."
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
        return {name: self._checked(value, f"{key}[{name!r:.100}]", whole=whole) for name, value in found.items()}

    def names(self, key: str) -> tuple[str, ...]:
        names = [item for item in self._list(key) if isinstance(item, str)]
        if len(names) > _MAX_PATTERNS:
            raise VerificationError(
                f"{key} in {self.source} has {len(names):,} names; at most {_MAX_PATTERNS:,} are read."
            )
        return tuple(names) if len(names) == len(self._list(key)) else self._refuse(key, "names are")

    def layers(self, key: str) -> tuple[int, ...]:
        layers = [item for item in self._list(key) if isinstance(item, int) and not isinstance(item, bool)]
        return tuple(layers) if len(layers) == len(self._list(key)) else self._refuse(key, "layer numbers are")

    def target(self, key: str) -> str | tuple[str, ...] | None:
        found = self.values.get(key)
        return found if found is None or isinstance(found, str) else tuple(sorted(self.names(key)))

    def text(self, key: str) -> str | None:
        found = self.values.get(key)
        if found is None:
            return None
        if not isinstance(found, str) or len(found) > _MAX_TEXT or "\0" in found:
            self._refuse(key, f"text of at most {_MAX_TEXT:,} letters is")
        return found or None

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


def is_all_linear(targets: object) -> bool:
    """Whether `target_modules` is the word for every linear layer; PEFT takes it in any letter case."""
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _is_named(module: str, names: str | tuple[str, ...]) -> bool:
    if isinstance(names, str):
        return compile_pattern(names).fullmatch(module) is not None
    known, suffix = _as_set(names), module
    while suffix not in known and "." in suffix:
        suffix = suffix.partition(".")[2]
    return suffix in known


@lru_cache(maxsize=8)
def _as_set(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names)


def key_pattern(key: str) -> re.Pattern[str]:
    """Compile a key of `rank_pattern` or `alpha_pattern`, to be matched as PEFT's `get_pattern_key` does."""
    return compile_pattern(_around(key))


def _around(key: str) -> str:
    return rf"(.*\.)?({key})$"


@lru_cache(maxsize=_MAX_PATTERNS)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile an untrusted regular expression; raises `VerificationError` if it is none, or could run for ever."""
    _repeats(pattern)
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as err:
        raise VerificationError(f"The pattern {pattern!r:.100} is no regular expression: {err}.") from err


def check_work(config: AdapterConfig, modules: Collection[str], *, source: str) -> None:
    """Check that all patterns of a config can be held against the modules in reasonable time.

    Raises:
        VerificationError: they could take too long, or one of them is no regular expression.
    """
    patterns = [_around(key) for key in (*config.rank_pattern, *config.alpha_pattern)]
    patterns += [text for text in (config.target_modules, config.exclude_modules) if isinstance(text, str)]
    patterns += [_layer_pattern(name) for name in config.layers_pattern]
    lengths = Counter(len(module) for module in modules)
    shapes = Counter(_repeats(pattern) for pattern in patterns)
    if sum(count * _steps(*shape, lengths) for shape, count in shapes.items()) > _MAX_STEPS:
        raise VerificationError(
            f"The patterns in {source} could take too long over its {len(modules):,} modules. Name the modules."
        )
    for pattern in patterns:
        compile_pattern(pattern)


def _steps(repeats: int, options: int, lengths: Mapping[int, int]) -> int:
    """Estimate the work in the worst case: every way to divide a path among the repetitions."""
    return sum(count * math.comb(length + repeats, repeats) for length, count in lengths.items()) << options


@lru_cache(maxsize=_MAX_PATTERNS)
def _repeats(pattern: str) -> tuple[int, int]:
    """Count the repetitions that one match can pass through, and the `?`.

    Raises:
        VerificationError: there are too many, or a group that repeats or branches is itself repeated, as in `(a+)+`,
            which can take exponential time.
    """
    if len(pattern) > _MAX_PATTERN_LENGTH:
        raise _endless(pattern, f"is longer than {_MAX_PATTERN_LENGTH:,} letters")
    # Only structure is left: groups, branches, W for a repetition of any width, O for an option, x for the rest.
    text = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\w(?![^{}]*\})", "x", pattern, flags=re.DOTALL)
    text = re.sub(r"\(\?(P?<\w*>|<?[=!]|:)", "(", text)
    text = re.sub(r"([*+]|\{[\d,]*\})[?+]?", "W", text)
    text = re.sub(r"\?[?+]?", "O", text)
    while (group := re.search(r"\(([^()]*)\)(W?)", text)) is not None:
        repeats, options = _widest(group[1])
        branches = "|" in group[1] or "B" in group[1]
        if group[2] and (repeats or options or branches):
            raise _endless(pattern, "repeats a repetition")
        inside = "W" * repeats + "O" * options + "B" * branches
        text = f"{text[: group.start()]}x{inside}{group[2]}{text[group.end() :]}"
    repeats, options = _widest(text)
    if repeats > _MAX_REPEATS or options > _MAX_OPTIONS:
        raise _endless(pattern, f"has more than {_MAX_REPEATS} repetitions or {_MAX_OPTIONS} options in a row")
    return repeats, options


def _widest(text: str) -> tuple[int, int]:
    branches = text.split("|")
    return max(branch.count("W") for branch in branches), max(branch.count("O") for branch in branches)


def _endless(pattern: str, why: str) -> VerificationError:
    return VerificationError(f"The pattern {pattern!r:.100} {why}, which could take for ever. Name the modules.")


def _layer_pattern(name: str) -> str:
    return rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\."
