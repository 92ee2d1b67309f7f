"""What can be wrong with an adapter: each function says what it found in the evidence, or None."""

from __future__ import annotations

import os
from collections.abc import Callable

from loram_hub.adapter import (
    LM_HEAD_MODULE,
    MODEL_ID,
    PLAIN_INITS,
    PREFIX,
    VLLM_RANKS,
    factor_name,
    is_all_linear,
    module_shape,
    pair_factors,
)
from loram_hub.doctor.evidence import Evidence
from loram_hub.errors import LoramError, UnsupportedAdapterError, VerificationError

LORA_GA = "lora_ga"
VLLM_MAX_VOCABULARY = 258_048
"""vllm#34773."""


def missing_config(evidence: Evidence) -> str | None:
    """The config is missing, or no JSON to any parser."""
    return evidence.config_problem if not evidence.config_is_readable else None


def loose_config(evidence: Evidence) -> str | None:
    """A lenient parser reads the config and a strict one does not."""
    return evidence.config_problem if evidence.config_is_readable else None


def no_weights(evidence: Evidence) -> str | None:
    """The weights are missing or torn."""
    return None if evidence.pickles and "missing" in (evidence.weights_problem or "") else evidence.weights_problem


def pickled(evidence: Evidence) -> str | None:
    """The weights are stored as a pickle alone."""
    if not evidence.pickles or evidence.weights_problem is None:
        return None
    return f"the weights are a pickle ({evidence.pickles[0]}), which was not opened"


def no_factors(evidence: Evidence) -> str | None:
    """No tensor is a LoRA factor."""
    return "there are no LoRA factors in it" if evidence.weights_problem is None and not evidence.factors else None


def other_method(evidence: Evidence) -> str | None:
    """Another PEFT method than LoRA."""
    kind = evidence.setting("peft_type")
    return None if kind in (None, "LORA") else f"peft_type is {kind!r:.50}"


def no_rank(evidence: Evidence) -> str | None:
    """Settings that every server needs are missing, or the rank is none."""
    missing = [key for key in ("r", "lora_alpha", "target_modules") if evidence.setting(key) is None]
    if evidence.config and missing:
        return f"the config lacks {' and '.join(missing)}"
    if evidence.config and evidence.r is None:
        return f"r is {evidence.setting('r')!r:.50}"
    return None


def is_set(key: str) -> Callable[[Evidence], str | None]:
    """Find a setting that has a true value."""
    return lambda evidence: f"{key} is {evidence.setting(key)!r:.100}" if evidence.setting(key) else None


def any_set(*keys: str) -> Callable[[Evidence], str | None]:
    """Find any of several settings with a true value."""

    def find(evidence: Evidence) -> str | None:
        found = [key for key in keys if evidence.setting(key)]
        return f"{' and '.join(found)} {'is' if len(found) == 1 else 'are'} set" if found else None

    return find


def bias(evidence: Evidence) -> str | None:
    """Biases were trained."""
    if evidence.setting("bias") not in (None, "none"):
        return f"bias is {evidence.setting('bias')!r:.50}"
    return "lora_bias is set" if evidence.setting("lora_bias") else None


def changed_base(evidence: Evidence) -> str | None:
    """The initialization changed the base weights, so the factors are not meant for the original ones."""
    init = evidence.setting("init_lora_weights")
    plain = not isinstance(init, str) or init.lower() in (*PLAIN_INITS, LORA_GA)
    return None if plain else f"init_lora_weights is {init!r:.50}, which changes the base weights in training"


def gradient_init(evidence: Evidence) -> str | None:
    """LoRA-GA changed the base weights, and vLLM takes its name for one that does not."""
    init = evidence.setting("init_lora_weights")
    found = isinstance(init, str) and init.lower() == LORA_GA
    return f"init_lora_weights is {init!r}, which changes the base weights in training" if found else None


def unreadable(evidence: Evidence) -> str | None:
    """A setting has a value of the wrong type, or a pattern that is none or could run for ever."""
    return evidence.settings_problem


def rank_pattern(evidence: Evidence) -> str | None:
    """Some modules have a rank of their own."""
    return _overrides(evidence, "rank_pattern", "r")


def alpha_pattern(evidence: Evidence) -> str | None:
    """Some modules have an alpha of their own."""
    return _overrides(evidence, "alpha_pattern", "lora_alpha")


def _overrides(evidence: Evidence, pattern: str, default: str) -> str | None:
    found = evidence.setting(pattern)
    values = list(found.values()) if isinstance(found, dict) else []
    others = [value for value in values if value != evidence.setting(default)]
    if not others:
        return None
    return f"{pattern} gives {len(others)} entries another value than {default} = {evidence.setting(default)!r:.20}"


def large_rank(evidence: Evidence) -> str | None:
    """The rank is above what vLLM takes."""
    return f"its rank is {evidence.rank:,}" if evidence.rank > VLLM_RANKS[-1] else None


def foreign(evidence: Evidence) -> str | None:
    """Tensors that are neither factors nor copies of frozen weights."""
    if not evidence.foreign:
        return None
    return f"tensor {evidence.foreign[0]!r:.200} is no lora_A or lora_B ({len(evidence.foreign)} such tensors)"


def copies(evidence: Evidence) -> str | None:
    """PEFT saved frozen weights of the base along."""
    if not evidence.copies:
        return None
    name = evidence.copies[0]
    return f"{name!r} is a copy of a frozen weight of the base ({evidence.tensors[name].nbytes:,} bytes)"


def no_prefix(evidence: Evidence) -> str | None:
    """Factors whose names lack PEFT's prefix."""
    bare = [name for name in evidence.tensors if name not in evidence.foreign and not name.startswith(PREFIX)]
    return f"tensor {min(bare)!r:.200} lacks PEFT's prefix {PREFIX!r}" if bare else None


def half_pair(evidence: Evidence) -> str | None:
    """One factor of a module is missing."""
    halves = [(module, pair) for module, pair in evidence.factors.items() if len(pair) == 1]
    if not halves:
        return None
    module, pair = halves[0]
    return f"module {module!r:.200} has lora_{next(iter(pair))} and not the other factor"


def rank_mismatch(evidence: Evidence) -> str | None:
    """Config and tensors disagree on a rank."""
    return _first_problem(evidence, VerificationError)


def ambiguous_alpha(evidence: Evidence) -> str | None:
    """A module matches keys of alpha_pattern with different values."""
    return _first_problem(evidence, UnsupportedAdapterError)


def _first_problem(evidence: Evidence, kind: type[LoramError]) -> str | None:
    """What the strict reader says of the first complete pair that it refuses with an error of this kind."""
    if evidence.scaling is None:
        return None
    for module, pair in evidence.factors.items():
        if len(pair) == 2 and all(len(shape) == 2 for shape in pair.values()):
            shapes = {factor_name(module, "A"): pair["A"], factor_name(module, "B"): pair["B"]}
            try:
                pair_factors(evidence.scaling, shapes, source="it")
            except kind as err:
                return str(err).partition(". ")[0]
            except LoramError:
                continue  # the other kind of error, which has its own rule
    return None


def not_finite(evidence: Evidence) -> str | None:
    """NaN or infinity in a tensor."""
    if not evidence.not_finite:
        return None
    return f"tensor {evidence.not_finite[0]!r:.200} holds NaN or infinity ({len(evidence.not_finite)} such tensors)"


def pruned(evidence: Evidence) -> str | None:
    """It was trained on a release and not recovered, and nothing but its content says so."""
    return None if evidence.pruned is None or evidence.marks else f"it is a pruned adapter: {evidence.pruned}"


def marked(evidence: Evidence) -> str | None:
    """It was trained on a release and not recovered, and is marked so."""
    return f"it is a pruned adapter: {evidence.pruned}" if evidence.marks else None


def unknown_name(evidence: Evidence) -> str | None:
    """A module of a kind that the base does not have."""
    known = {module.rpartition(".")[2] for module in evidence.modules}
    found = [module for module in evidence.factors if known and module.rpartition(".")[2] not in known]
    return f"{found[0]!r:.200} is no linear layer of the base model" if found else None


def unknown_path(evidence: Evidence) -> str | None:
    """A module of a kind that the base has, in a place where it has none."""
    known = {module.rpartition(".")[2] for module in evidence.modules}
    at = [m for m in evidence.factors if m not in evidence.modules and m.rpartition(".")[2] in known]
    return f"the base model has no module {at[0]!r:.200} ({len(at)} such modules)" if at else None


def other_shape(evidence: Evidence) -> str | None:
    """A shape that neither the base nor a pruned model of it has."""
    if evidence.architecture is None or evidence.pruned is not None:
        return None
    for module, shape in evidence.shapes.items():
        whole = module_shape(evidence.architecture, module)
        if whole is not None and shape != whole:
            return f"{module!r:.200} has shape {shape}, the base model's has {whole}"
    return None


def missing_targets(evidence: Evidence) -> str | None:
    """Declared targets without factors."""
    declared = [module for module in evidence.modules if _is_target(evidence, module)]
    missing = [module for module in declared if module not in evidence.factors]
    if not missing or evidence.weights_problem is not None:
        return None
    return f"{missing[0]!r:.200} is a target and has no factors ({len(missing)} of {len(declared)} targets)"


def undeclared(evidence: Evidence) -> str | None:
    """Factors that the config does not declare."""
    if evidence.parsed is None:
        return None
    found = [module for module in evidence.factors if not _is_target(evidence, module)]
    return f"{found[0]!r:.200} has factors, and target_modules does not name it" if found else None


def _is_target(evidence: Evidence, module: str) -> bool:
    return evidence.parsed is not None and evidence.parsed.targets(module)


def no_list(evidence: Evidence) -> str | None:
    """The targets are a regular expression."""
    found = evidence.setting("target_modules")
    known = found == "all" or is_all_linear(found)
    return f"target_modules is the pattern {found!r:.100}" if isinstance(found, str) and not known else None


def large_vocabulary(evidence: Evidence) -> str | None:
    """The lm_head is adapted and larger than vLLM takes."""
    size = evidence.architecture.vocab_size if evidence.architecture is not None else 0
    if LM_HEAD_MODULE not in evidence.factors or size <= VLLM_MAX_VOCABULARY:
        return None
    return f"it adapts the lm_head, and the vocabulary has {size:,} tokens"


def tied_head(evidence: Evidence) -> str | None:
    """The lm_head is adapted and tied to the embedding."""
    tied = evidence.architecture is not None and evidence.architecture.tie_word_embeddings
    is_adapted = LM_HEAD_MODULE in evidence.factors
    return "it adapts the lm_head, which the base ties to the embedding" if tied and is_adapted else None


def new_tokens(evidence: Evidence) -> str | None:
    """A list of tokens that the base may not have."""
    size = evidence.architecture.vocab_size if evidence.architecture is not None else 0
    new = [token for token, number in evidence.added_tokens.items() if number >= size]
    return f"added_tokens.json lists {len(new)} tokens that the base may not have" if new else None


def no_base(evidence: Evidence) -> str | None:
    """The config names no base."""
    unnamed = evidence.config and not evidence.setting("base_model_name_or_path")
    return "the config names no base model" if unnamed else None


def local_base(evidence: Evidence) -> str | None:
    """The config names the base by a path."""
    named = evidence.setting("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    is_path = MODEL_ID.fullmatch(named) is None or os.path.isdir(named)
    return f"the config names the base by a path of one machine, {named!r:.200}" if is_path else None


def unpinned(evidence: Evidence) -> str | None:
    """The config names a Hub id and no revision."""
    named = evidence.setting("base_model_name_or_path")
    if not isinstance(named, str) or "/" not in named or MODEL_ID.fullmatch(named) is None:
        return None
    return None if evidence.setting("revision") else f"the config names {named} without a revision"
