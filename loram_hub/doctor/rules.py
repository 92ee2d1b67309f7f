"""What can be wrong with an adapter, and what each server does about it: a table.

A rule finds one kind of problem in the evidence and says what it is in this adapter. Its effects say, per target, what
happens then: the server refuses the adapter, or takes it and computes something else than was trained, or all is well
today and a warning is due. A target without an entry handles the case correctly. Every effect names its source: *run*
was measured with that version, *read* was read in its source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from loram_hub.adapter import VLLM_RANKS, WEIGHTS
from loram_hub.doctor import finders
from loram_hub.doctor.evidence import Evidence
from loram_hub.doctor.finders import VLLM_MAX_VOCABULARY

Target = Literal["vllm", "sglang", "llamacpp", "peft"]
TARGETS: tuple[Target, ...] = ("vllm", "sglang", "llamacpp", "peft")
Severity = Literal["refused", "wrong results", "warning"]

VLLM_RUN = "vLLM 0.32.0, run"
VLLM_READ = "vLLM 0.32.0, read"
VLLM_PATTERNS = "vLLM 0.30.0 as vllm#59799 reports, 0.32.0 run"
SGLANG_READ = "SGLang main of 2026-09, read"
LLAMACPP_READ = "llama.cpp convert_lora_to_gguf.py of 2026, read"
LLAMACPP_RUN = "llama.cpp convert_lora_to_gguf.py of 2026-10, run"
PEFT_RUN = "PEFT 0.21.2, run"
PEFT_READ = "PEFT 0.21.2, read"

_FIX = "Write the canonical form: loram doctor ADAPTER --fix OUT."
_RETRAIN = "Train again without it; there is no equal adapter that this server takes."
_RECOPY = "Save or copy the adapter again."


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """What one server does with a problem."""

    severity: Severity
    why: str
    """What it does."""
    source: str
    """Version, and how this is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One kind of problem."""

    name: str
    find: Callable[[Evidence], str | None]
    """Says what is wrong in this adapter; None if nothing is."""
    effects: Mapping[Target, Effect]
    remedy: str
    fixable: bool = False
    """Whether `fix` removes it without changing what the adapter computes."""


def _refused(why: str, source: str) -> Effect:
    return Effect(severity="refused", why=why, source=source)


def _wrong(why: str, source: str) -> Effect:
    return Effect(severity="wrong results", why=why, source=source)


def _warning(why: str, source: str) -> Effect:
    return Effect(severity="warning", why=why, source=source)


def _everywhere(effect: Effect) -> dict[Target, Effect]:
    return dict.fromkeys(TARGETS, effect)


_IGNORES_SETTING = "its LoRA configuration does not read this setting, so the adapter is applied without it"
RULES: tuple[Rule, ...] = (
    Rule(
        name="config-missing",
        find=finders.missing_config,
        effects=_everywhere(_refused("it needs adapter_config.json", "all, read")),
        remedy=_RECOPY,
    ),
    Rule(
        name="config-not-strict",
        find=finders.loose_config,
        effects=_everywhere(
            _wrong("readers differ: of two equal keys one counts, and NaN is a number to some", "all, read")
        ),
        remedy=_RECOPY,
    ),
    Rule(
        name="weights-missing",
        find=finders.no_weights,
        effects=_everywhere(_refused(f"it needs a sound {WEIGHTS}", "all, read")),
        remedy=_RECOPY,
    ),
    Rule(
        name="pickle",
        find=finders.pickled,
        effects=_everywhere(
            _warning("it opens pickles, which could run code before torch 2.6 (CVE-2025-32434)", "all, read")
        ),
        remedy="Load it with PEFT where you trust it, and save it again: PEFT writes safetensors.",
    ),
    Rule(
        name="no-factors",
        find=finders.no_factors,
        effects={
            **_everywhere(_wrong("there is nothing to apply: the base model answers", "all, read")),
            "vllm": _wrong("it serves the base model unchanged", VLLM_READ),
        },
        remedy=_RECOPY,
    ),
    Rule(
        name="not-lora",
        find=finders.other_method,
        effects={
            "vllm": _refused("it serves LoRA only, and does not know other tensors", VLLM_READ),
            "sglang": _refused("it serves LoRA only", SGLANG_READ),
            "llamacpp": _refused("it converts LoRA only: 'Not a lora_A or lora_B tensor'", LLAMACPP_READ),
        },
        remedy="Merge it into the base with PEFT and serve the merged model, or train again with LoraConfig.",
    ),
    Rule(
        name="rank-or-alpha-missing",
        find=finders.no_rank,
        effects={
            "vllm": _refused("'Missing required configuration fields', or no positive rank", VLLM_RUN),
            "sglang": _refused("it reads r, lora_alpha and target_modules without defaults", SGLANG_READ),
            "llamacpp": _refused("it reads lora_alpha without a default", LLAMACPP_READ),
            "peft": _wrong("it puts its own defaults in place: r = 8, lora_alpha = 8", PEFT_RUN),
        },
        remedy=_RECOPY,
    ),
    Rule(
        name="settings-unreadable",
        find=finders.unreadable,
        effects=_everywhere(_refused("its own reader fails on such a value, or computes something else", "all, read")),
        remedy="Correct the value in adapter_config.json. " + _RECOPY,
    ),
    Rule(
        name="dora",
        find=finders.is_set("use_dora"),
        effects={
            "vllm": _refused("'vLLM does not yet support DoRA'", VLLM_RUN),
            "sglang": _refused("'doesn't support DoRA adapters'", SGLANG_READ),
            "llamacpp": _refused("the magnitude vectors are 'Not a lora_A or lora_B tensor'", LLAMACPP_READ),
        },
        remedy="DoRA rescales each row of W + BA, which no low-rank update equals. Serve it with PEFT, or merge it.",
    ),
    Rule(
        name="modules-to-save",
        find=finders.is_set("modules_to_save"),
        effects={
            "vllm": _refused("'vLLM only supports modules_to_save being either None or ...'", VLLM_RUN),
            "sglang": _wrong(_IGNORES_SETTING, SGLANG_READ),
            "llamacpp": _refused("whole weights are 'Not a lora_A or lora_B tensor' (llama.cpp#11554)", LLAMACPP_READ),
        },
        remedy="The trained copies are no low-rank update. Serve it with PEFT, merge it, or train without them.",
    ),
    Rule(
        name="bias",
        find=finders.bias,
        effects={
            "vllm": _refused("'Adapter bias is not supported'", VLLM_RUN),
            "sglang": _wrong(_IGNORES_SETTING, SGLANG_READ),
            "llamacpp": _refused("biases are 'Not a lora_A or lora_B tensor'", LLAMACPP_READ),
        },
        remedy=_RETRAIN,
    ),
    Rule(
        name="changed-base",
        find=finders.changed_base,
        effects={
            "vllm": _refused("'vLLM does not support init_lora_weights=...'", VLLM_RUN),
            "sglang": _wrong("it applies the factors to the unchanged base", SGLANG_READ),
            "llamacpp": _wrong("it applies the factors to the unchanged base", LLAMACPP_READ),
            "peft": _warning("it changes the base weights again while it loads the adapter", PEFT_READ),
        },
        remedy="Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
    ),
    Rule(
        name="lora-ga",
        find=finders.gradient_init,
        effects={
            "vllm": _wrong("it applies the factors to the unchanged base", VLLM_READ),
            "sglang": _wrong("it applies the factors to the unchanged base", SGLANG_READ),
            "llamacpp": _wrong("it applies the factors to the unchanged base", LLAMACPP_READ),
            "peft": _wrong("it adds the factors to the unchanged base", PEFT_READ),
        },
        remedy="Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
    ),
    Rule(
        name="variant",
        find=finders.any_set("layer_replication", "use_bdlora", "use_qalora"),
        effects={
            "vllm": _refused("its configuration check names this setting", VLLM_READ),
            "sglang": _wrong(_IGNORES_SETTING, SGLANG_READ),
            "llamacpp": _wrong(_IGNORES_SETTING, LLAMACPP_READ),
        },
        remedy=_RETRAIN,
    ),
    Rule(
        name="activated-lora",
        find=finders.is_set("alora_invocation_tokens"),
        effects={
            "vllm": _refused("'vLLM does not support Activated LoRA'", VLLM_READ),
            "sglang": _wrong(_IGNORES_SETTING, SGLANG_READ),
        },
        remedy=_RETRAIN,
    ),
    Rule(
        name="unread-variant",
        find=finders.any_set(
            "target_parameters",
            "trainable_token_indices",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
            "fan_in_fan_out",
            "megatron_config",
        ),
        effects={
            "vllm": _wrong(_IGNORES_SETTING, VLLM_READ),
            "sglang": _wrong(_IGNORES_SETTING, SGLANG_READ),
            "llamacpp": _wrong(_IGNORES_SETTING, LLAMACPP_READ),
        },
        remedy=_RETRAIN,
    ),
    Rule(
        name="rank-pattern",
        find=finders.rank_pattern,
        effects={
            "vllm": _wrong(
                "up to 0.30 it drops the pattern without a word and scales every module by the one r "
                "(vllm#59799); 0.32 reads it",
                VLLM_PATTERNS,
            ),
            "sglang": _refused("it slices its buffers by the one r, which the shapes do not fit", SGLANG_READ),
        },
        remedy=_FIX,
        fixable=True,
    ),
    Rule(
        name="alpha-pattern",
        find=finders.alpha_pattern,
        effects={
            "vllm": _wrong(
                "up to 0.30 it drops the pattern without a word (vllm#59799); 0.32 reads it",
                VLLM_PATTERNS,
            ),
            "sglang": _wrong("it scales every module by the one lora_alpha / r", SGLANG_READ),
            "llamacpp": _wrong("it stores the one lora_alpha", LLAMACPP_READ),
        },
        remedy=_FIX,
        fixable=True,
    ),
    Rule(
        name="ambiguous-alpha",
        find=finders.ambiguous_alpha,
        effects=_everywhere(
            _wrong("PEFT took the first key that matched in training, and sorts the keys when it saves", PEFT_READ)
        ),
        remedy="Give each module one key in alpha_pattern, its full path.",
    ),
    Rule(
        name="rslora",
        find=finders.is_set("use_rslora"),
        effects={
            "sglang": _wrong("it scales by alpha / r: sqrt(r) times too weak (sglang#40835)", SGLANG_READ),
            "llamacpp": _wrong("it scales by alpha / r: sqrt(r) times too weak", LLAMACPP_READ),
        },
        remedy=_FIX,
        fixable=True,
    ),
    Rule(
        name="rank-too-large",
        find=finders.large_rank,
        effects={"vllm": _refused(f"--max-lora-rank takes at most {VLLM_RANKS[-1]}", VLLM_RUN)},
        remedy="Merge it (loram merge) and serve the merged model, or train with a smaller r.",
    ),
    Rule(
        name="foreign-tensor",
        find=finders.foreign,
        effects={
            "vllm": _refused("'... is unsupported LoRA weight'", VLLM_RUN),
            "sglang": _wrong("it picks lora_A and lora_B by name and drops what else there is", SGLANG_READ),
            "llamacpp": _refused("'Not a lora_A or lora_B tensor'", LLAMACPP_READ),
            "peft": _warning("it loads what its config declares and drops the rest", PEFT_RUN),
        },
        remedy="Save the adapter again with PEFT, from plain LoRA.",
    ),
    Rule(
        name="frozen-copy",
        find=finders.copies,
        effects={
            "vllm": _warning("it skips the copy, which makes the adapter large and is the base's", VLLM_RUN),
            "sglang": _warning("the copy makes the adapter large and is the base's", SGLANG_READ),
            "llamacpp": _warning("it skips the copy now; earlier versions stopped at it", LLAMACPP_READ),
            "peft": _warning("it loads the copy over the base's own weight: wrong if either was changed", PEFT_RUN),
        },
        remedy=_FIX,
        fixable=True,
    ),
    Rule(
        name="no-prefix",
        find=finders.no_prefix,
        effects={"peft": _wrong("it passes over tensors that its prefix does not begin", PEFT_RUN)},
        remedy=_RECOPY,
    ),
    Rule(
        name="half-pair",
        find=finders.half_pair,
        effects={
            "vllm": _refused("it fails with a TypeError on the missing factor", VLLM_RUN),
            "sglang": _wrong("it fills the missing factor with zeros", SGLANG_READ),
            "llamacpp": _refused("an assertion: both factors must be there", LLAMACPP_READ),
            "peft": _wrong("it warns, and leaves the missing factor as it was initialized", PEFT_RUN),
        },
        remedy=_RECOPY,
    ),
    Rule(
        name="rank-mismatch",
        find=finders.rank_mismatch,
        effects={
            "vllm": _wrong("it takes the adapter and scales by the wrong alpha / r", VLLM_RUN),
            "sglang": _refused("'LoRA buffer shape ... does not match weight shape'", SGLANG_READ),
            "llamacpp": _warning("it divides alpha by the tensors' rank; was that meant?", LLAMACPP_READ),
            "peft": _refused("'size mismatch'", PEFT_RUN),
        },
        remedy="Config and tensors do not belong together. " + _RECOPY,
    ),
    Rule(
        name="not-finite",
        find=finders.not_finite,
        effects={
            "vllm": _wrong("it does not look; every answer is NaN", VLLM_READ),
            "sglang": _wrong("it does not look; every answer is NaN", SGLANG_READ),
            "llamacpp": _wrong("it does not look; every answer is NaN", LLAMACPP_READ),
            "peft": _wrong("it does not look; every answer is NaN", PEFT_RUN),
        },
        remedy="Use an earlier checkpoint.",
    ),
    Rule(
        name="pruned",
        find=finders.pruned,
        effects={
            "vllm": _wrong("it copies the small factors into the corner of its buffers, without an error", VLLM_RUN),
            "sglang": _refused("'LoRA buffer shape ... does not match weight shape'", SGLANG_READ),
            "llamacpp": _refused(
                "the converter cannot reshape it, or the server says 'incorrect shape'", LLAMACPP_READ
            ),
            "peft": _refused("'size mismatch'", PEFT_RUN),
        },
        remedy="Recover it to full size: loram recover ADAPTER OUT.",
    ),
    Rule(
        name="pruned-marked",
        find=finders.marked,
        effects={
            "vllm": _refused("'... run_loram_recover_first is unsupported LoRA weight'", VLLM_RUN),
            "sglang": _refused("'LoRA buffer shape ... does not match weight shape'", SGLANG_READ),
            "llamacpp": _refused(
                "'Unexpected name ...run_loram_recover_first: Not a lora_A or lora_B tensor'", LLAMACPP_RUN
            ),
            "peft": _refused("'size mismatch'", PEFT_RUN),
        },
        remedy="Recover it to full size: loram recover ADAPTER OUT.",
    ),
    Rule(
        name="other-base",
        find=finders.other_shape,
        effects={
            "vllm": _refused("'The size of tensor a must match the size of tensor b'", VLLM_RUN),
            "sglang": _refused("'LoRA buffer shape ... does not match weight shape'", SGLANG_READ),
            "llamacpp": _refused("'incorrect shape (hint: maybe wrong base model?)'", LLAMACPP_READ),
            "peft": _refused("'size mismatch'", PEFT_RUN),
        },
        remedy="Give the base model that it was trained on.",
    ),
    Rule(
        name="unknown-module",
        find=finders.unknown_name,
        effects={
            "vllm": _refused("'expected target modules in ... but received ...'", VLLM_RUN),
            "sglang": _refused("it has no LoRA layer for such a module", SGLANG_READ),
            "llamacpp": _refused("it cannot map the tensor to one of the base", LLAMACPP_READ),
            "peft": _wrong("it passes over the tensors", PEFT_RUN),
        },
        remedy="Give the base model that it was trained on.",
    ),
    Rule(
        name="unknown-path",
        find=finders.unknown_path,
        effects={
            "vllm": _wrong("it ignores factors of modules that the model does not have (vllm#34186)", VLLM_RUN),
            "sglang": _refused("it counts layers by their number in the path", SGLANG_READ),
            "llamacpp": _refused("it cannot map the tensor to one of the base", LLAMACPP_READ),
            "peft": _wrong("it passes over the tensors", PEFT_RUN),
        },
        remedy="Give the base model that it was trained on.",
    ),
    Rule(
        name="missing-factors",
        find=finders.missing_targets,
        effects={
            "vllm": _wrong("it serves these modules unchanged, without a word", VLLM_RUN),
            "sglang": _wrong("it fills their buffers with zeros", SGLANG_READ),
            "llamacpp": _wrong("it converts what is there", LLAMACPP_READ),
            "peft": _wrong("it warns, and leaves these modules unchanged", PEFT_RUN),
        },
        remedy=_RECOPY,
    ),
    Rule(
        name="undeclared-factors",
        find=finders.undeclared,
        effects={
            "vllm": _wrong("it applies them, and PEFT, which trained the adapter, does not", VLLM_READ),
            "sglang": _wrong("whether they apply depends on --lora-target-modules", SGLANG_READ),
            "llamacpp": _wrong("it applies them, and PEFT, which trained the adapter, does not", LLAMACPP_READ),
            "peft": _wrong("it passes over them", PEFT_RUN),
        },
        remedy="Correct target_modules, or remove the factors.",
    ),
    Rule(
        name="target-pattern",
        find=finders.no_list,
        effects={"sglang": _refused("it needs target_modules as a list", SGLANG_READ)},
        remedy=_FIX,
        fixable=True,
    ),
    Rule(
        name="large-vocabulary",
        find=finders.large_vocabulary,
        effects={"vllm": _refused(f"LoRA takes at most {VLLM_MAX_VOCABULARY:,} tokens (vllm#34773)", VLLM_READ)},
        remedy="Merge it (loram merge) and serve the merged model, or train without the lm_head.",
    ),
    Rule(
        name="tied-head",
        find=finders.tied_head,
        effects={"llamacpp": _refused("'lm_head is present in adapter, but is ignored in base model'", LLAMACPP_READ)},
        remedy="Merge it (loram merge) and convert the merged model, or train without the lm_head.",
    ),
    Rule(
        name="new-tokens",
        find=finders.new_tokens,
        effects={"sglang": _refused("'doesn't support adapters that add tokens to the vocabulary'", SGLANG_READ)},
        remedy="If the base has these tokens, remove added_tokens.json; with --base this can be told.",
    ),
    Rule(
        name="no-base",
        find=finders.no_base,
        effects=_everywhere(_warning("nothing tells which base the adapter is for, and no server checks", "all, read")),
        remedy="Write it with its base: loram doctor ADAPTER --base ID --fix OUT.",
    ),
    Rule(
        name="local-base",
        find=finders.local_base,
        effects=_everywhere(_warning("nobody else can open that path, and it shows on the Hub", "all, read")),
        remedy="Write it with the base's Hub id: loram doctor ADAPTER --base ID --fix OUT.",
        fixable=True,
    ),
    Rule(
        name="unpinned-base",
        find=finders.unpinned,
        effects=_everywhere(_warning("the base may change under the adapter, and no server checks", "all, read")),
        remedy="Name the commit: loram doctor ADAPTER --revision COMMIT --fix OUT.",
    ),
)
