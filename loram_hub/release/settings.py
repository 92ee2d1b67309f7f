"""Which settings a release's `config.json` and `generation_config.json` may hold, and within which bounds.

transformers makes an attribute of every key that it reads, whatever its name and type: a number of labels in the
millions takes all memory, a key named like a method takes its place. So there is one list of the settings that the
families here have, as transformers 4 and 5 write them; what is not on it is left out when a release is made, and
refused when one is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from loram_hub.errors import VerificationError

Rule = Callable[[object], bool]

_LONGEST = 256
_MOST_ITEMS = 10_000
_LARGEST = 2**31
_FLOATS = ("float16", "bfloat16", "float32", "float64")
# What transformers' activations are called, less those that gated models cannot be built with.
_ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6",
    "sigmoid", "silu", "swish", "tanh",
)  # fmt: skip
_CACHES = (
    None, "dynamic", "hybrid", "hybrid_chunked", "offloaded", "offloaded_hybrid", "offloaded_hybrid_chunked",
    "offloaded_static", "quantized", "sliding_window", "static",
)  # fmt: skip
_LAYERS = ("full_attention", "sliding_attention")
_ROPES = ("default", "dynamic", "linear", "llama3", "longrope", "proportional", "su", "yarn")


def _is_bool(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_text(value: object) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= _LONGEST and value.isprintable())


def _one_of(values: Collection[object]) -> Rule:
    return lambda value: isinstance(value, str | None) and value in values


def _whole(least: int, most: int) -> Rule:
    return lambda value: (
        value is None or (isinstance(value, int) and not isinstance(value, bool) and least <= value <= most)
    )


def _number(least: float, most: float) -> Rule:
    def rule(value: object) -> bool:
        return value is None or (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and least <= value <= most
        )

    return rule


def _many(rule: Rule) -> Rule:
    return lambda value: (
        value is None
        or (
            isinstance(value, list)
            and len(value) <= _MOST_ITEMS
            and all(item is not None and rule(item) for item in value)
        )
    )


def _one_or_many(rule: Rule) -> Rule:
    return lambda value: rule(value) or _many(rule)(value)


_SCALE = _number(1e-6, 1e12)
_ROPE: Mapping[str, Rule] = {
    "rope_type": _one_of(_ROPES),
    "type": _one_of(_ROPES),
    **dict.fromkeys(
        (
            "rope_theta", "factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor",
            "high_freq_factor", "mscale", "mscale_all_dim", "short_mscale", "long_mscale",
        ),
        _SCALE,
    ),
    "partial_rotary_factor": _number(0.01, 1),
    "original_max_position_embeddings": _whole(1, _LARGEST),
    "max_position_embeddings": _whole(1, _LARGEST),
    "short_factor": _many(_SCALE),
    "long_factor": _many(_SCALE),
    "truncate": _is_bool,
}  # fmt: skip


def _is_rope(value: object) -> bool:
    """Rotary embeddings: one description, or one for each kind of layer."""
    if value is None:
        return True
    if isinstance(value, dict) and value and set(value) <= set(_LAYERS):
        return all(_is_one_rope(each) for each in value.values())
    return _is_one_rope(value)


def _is_one_rope(value: object) -> bool:
    return value is None or (
        isinstance(value, dict) and all(key in _ROPE and _ROPE[key](item) for key, item in value.items())
    )


_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
_MODEL: Mapping[str, Rule] = {
    "architectures": _many(_is_text),
    "transformers_version": _is_text,
    "dtype": _one_of((None, *_FLOATS)),
    "torch_dtype": _one_of((None, *_FLOATS)),
    **dict.fromkeys(_SIZES, _whole(1, _LARGEST)),
    **dict.fromkeys(
        (
            "attention_bias", "mlp_bias", "tie_word_embeddings", "use_bidirectional_attention", "use_cache",
            "use_sliding_window",
        ),
        _is_bool,
    ),
    "hidden_act": _one_of(_ACTIVATIONS),
    "hidden_activation": _one_of((None, *_ACTIVATIONS)),
    "rms_norm_eps": _number(1e-12, 1),
    "initializer_range": _number(0, 10),
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop"), _number(0, 1)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"), _SCALE),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), _whole(1, _LARGEST)),
    **dict.fromkeys(("sliding_window", "max_window_layers"), _whole(0, _LARGEST)),
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern", "no_rope_layer_interval"), _whole(1, 4096)),
    "pretraining_tp": _whole(1, 4096),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), _SCALE),
    "partial_rotary_factor": _number(0.01, 1),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _is_rope),
    "cache_implementation": _one_of(_CACHES),
}  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PER_LAYER: Mapping[str, Rule] = {
    "layer_types": _one_of(_LAYERS),
    "no_rope_layers": _whole(0, 1),
}

_COUNT = _whole(0, 2**62)
_GENERATION: Mapping[str, Rule] = {
    "transformers_version": _is_text,
    "cache_implementation": _one_of(_CACHES),
    "early_stopping": lambda value: _is_bool(value) or value == "never",
    "stop_strings": _one_or_many(_is_text),
    **dict.fromkeys(
        (
            "_from_model_config", "do_sample", "use_cache", "renormalize_logits", "remove_invalid_values",
            "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
            "low_memory", "token_healing", "disable_compile",
        ),
        _is_bool,
    ),
    **dict.fromkeys(
        (
            "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_cache_len", "top_k",
            "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "prompt_lookup_num_tokens",
            "max_matching_ngram_size", "prefill_chunk_size",
        ),
        _COUNT,
    ),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), _whole(1, 4096)),
    **dict.fromkeys(
        (
            "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
            "repetition_penalty", "encoder_repetition_penalty", "length_penalty", "diversity_penalty",
            "penalty_alpha", "guidance_scale", "max_time",
        ),
        _number(-1e9, 1e9),
    ),
}  # fmt: skip
_GENERATION_TOKENS = (
    *_TOKENS, "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens",
)  # fmt: skip

MODEL_KEYS = frozenset({*_MODEL, *_TOKENS, *_PER_LAYER, "model_type"})
"""Keys of `config.json` that a release keeps of its base's."""


def check_model_settings(config: Mapping[str, Any], *, vocab_size: int, layers: int, source: str) -> None:
    """Check the settings of a model's config.

    Args:
        config: the parsed file, less what is checked elsewhere (quantization, the mark of a release).
        vocab_size: which token ids there are.
        layers: how long lists with an entry per layer are.
        source: names the file in errors.

    Raises:
        VerificationError: a key that none of the families here has, or a value of another type or out of bounds.
    """
    rules = {**_MODEL, **dict.fromkeys(_TOKENS, _tokens(vocab_size)), "model_type": _is_text}
    for key, rule in _PER_LAYER.items():
        rules[key] = _per_layer(rule, layers)
    _check(config, rules, source)


def check_generation_settings(values: Mapping[str, Any], *, vocab_size: int, source: str) -> None:
    """Check a `generation_config.json`; as `check_model_settings`."""
    _check(values, _generation_rules(vocab_size), source)


def sound_generation_settings(values: Mapping[str, Any], *, vocab_size: int) -> dict[str, Any]:
    """Return the settings of a `generation_config.json` that a release may keep."""
    rules = _generation_rules(vocab_size)
    return {key: value for key, value in values.items() if key in rules and rules[key](value)}


def _generation_rules(vocab_size: int) -> Mapping[str, Rule]:
    return {**_GENERATION, **dict.fromkeys(_GENERATION_TOKENS, _tokens(vocab_size))}


def _tokens(vocab_size: int) -> Rule:
    return _one_or_many(_whole(-1, vocab_size - 1))  # -1 is how old configs say "none"


def _per_layer(rule: Rule, layers: int) -> Rule:
    return lambda value: value is None or (isinstance(value, list) and len(value) == layers and _many(rule)(value))


def _check(values: Mapping[str, Any], rules: Mapping[str, Rule], source: str) -> None:
    for key, value in values.items():
        if key not in rules:
            raise VerificationError(
                f"{source} has the key {key!r:.100}, which no model here has. Remove it and make a new release."
            )
        if not rules[key](value):
            raise VerificationError(
                f"{source} has {value!r:.100} for {key}, which is of another type or out of bounds. "
                "Correct it and make a new release."
            )
