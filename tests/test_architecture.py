"""The table of families against the models themselves, as transformers builds them from the same config.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loram_hub.architecture import (
    FAMILIES,
    SPACE_OF_UNIT,
    Architecture,
    LayerSizes,
    Space,
    architecture_of,
    is_ignored_tensor,
    layer_tensor,
)
from loram_hub.errors import InvalidRequestError, PlanMismatchError, UnsupportedModelError

# Sizes that all differ, so that a swapped axis shows.
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "pad_token_id": 0,
}


def config(model_type: str, **changes: Any) -> dict[str, Any]:
    """A tiny config.json; a change to None drops the key."""
    merged = {"model_type": model_type, **SIZES, **changes}
    return {key: value for key, value in merged.items() if value is not None}


CONFIGS = {
    **{family: config(family) for family in FAMILIES if family != "gemma3_text"},
    "gemma3_text": config("gemma3_text", sliding_window=16),
    "llama MHA": config("llama", num_key_value_heads=None),
    "llama MQA": config("llama", num_key_value_heads=1),
    "llama with head_dim": config("llama", head_dim=10),
    "llama with biases": config("llama", attention_bias=True, mlp_bias=True),
    "llama tied": config("llama", tie_word_embeddings=True),
    "mistral with head_dim": config("mistral", head_dim=10),
    "qwen2 tied": config("qwen2", tie_word_embeddings=True),
    "qwen3 with head_dim": config("qwen3", head_dim=10),
    "qwen3 with biases": config("qwen3", attention_bias=True),
    "phi3 MHA": config("phi3", num_key_value_heads=None),
    "gemma2 with head_dim": config("gemma2", head_dim=10),
    "gemma2 with biases": config("gemma2", attention_bias=True),
    "gemma3_text with biases": config("gemma3_text", attention_bias=True),
    "gemma2 untied": config("gemma2", tie_word_embeddings=False),
    "smollm3 untied": config("smollm3", tie_word_embeddings=False),
    "smollm3 with biases": config("smollm3", attention_bias=True, mlp_bias=True),
    "olmo2 with biases": config("olmo2", attention_bias=True),
    "olmo2 MHA": config("olmo2", num_key_value_heads=None),
}


def shapes_in_transformers(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_tensor_shapes_are_those_of_the_real_model(name: str) -> None:
    shapes = architecture_of(CONFIGS[name]).tensor_shapes()

    assert shapes == shapes_in_transformers(CONFIGS[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_as_transformers_saves_it_is_read_alike(tmp_path: Path, family: str) -> None:
    AutoConfig.for_model(**CONFIGS[family]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())

    assert architecture_of(saved) == architecture_of(CONFIGS[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_of_a_family_are_those_of_transformers(family: str) -> None:
    default = CONFIG_MAPPING[family]()

    assert FAMILIES[family].ties_embeddings == default.tie_word_embeddings
    kv_heads = FAMILIES[family].default_num_key_value_heads or default.num_attention_heads
    assert kv_heads == default.num_key_value_heads
    head_dim = getattr(default, "head_dim", None) or default.hidden_size // default.num_attention_heads
    assert (FAMILIES[family].default_head_dim or default.hidden_size // default.num_attention_heads) == head_dim


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_with_a_prunable_axis_shrinks_with_its_layer_and_no_other_does(name: str) -> None:
    architecture = architecture_of(CONFIGS[name])
    whole = architecture.whole_layer
    small = LayerSizes(kv_heads=1, channels=5)

    shapes = architecture.tensor_shapes([whole, small, whole])

    base = architecture.tensor_shapes()
    prunable = {
        layer_tensor(1, weight.name)
        for weight in architecture.layer_weights
        if any(unit in SPACE_OF_UNIT for axis in weight.axes for unit in axis)
    }
    if whole.kv_heads == 1:  # MQA: only channels can go
        prunable = {name for name in prunable if ".mlp." in name}
    assert {n for n in base if shapes[n] != base[n]} == prunable
    assert len(prunable) >= 3


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    kv_heads = draw(st.integers(1, 6))
    return architecture_of(
        config(
            draw(st.sampled_from(sorted(FAMILIES))),
            num_key_value_heads=kv_heads,
            num_attention_heads=kv_heads * draw(st.integers(1, 4)),
            head_dim=draw(st.integers(1, 9)),
            intermediate_size=draw(st.integers(1, 30)),
        )
    )


def kept_by_plain_loops(architecture: Architecture, axis: tuple[str, ...], kept: dict[Space, Any]) -> list[int]:
    """Walk the axis position by position and ask of each whether its group is kept."""
    heads_per_group = architecture.num_attention_heads // architecture.num_key_value_heads
    position, found = 0, []
    for unit in axis:
        if unit == "channel":
            owners = list(range(architecture.intermediate_size))
            alive = set(kept["channels"].tolist())
        else:
            heads = architecture.num_attention_heads if unit == "query" else architecture.num_key_value_heads
            per_group = heads_per_group if unit == "query" else 1
            owners = [head // per_group for head in range(heads) for _ in range(architecture.head_dim)]
            alive = set(kept["kv_heads"].tolist())
        for owner in owners:
            if owner in alive:
                found.append(position)
            position += 1
    return found


@given(architecture=architectures(), data=st.data())
def test_kept_positions_equal_those_of_plain_loops(architecture: Architecture, data: st.DataObject) -> None:
    def some_of(count: int) -> Any:
        return np.array(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))), dtype=np.int32)

    kept: dict[Space, Any] = {
        "kv_heads": some_of(architecture.num_key_value_heads),
        "channels": some_of(architecture.intermediate_size),
    }
    sizes = LayerSizes(kv_heads=kept["kv_heads"].size, channels=kept["channels"].size)

    for weight in architecture.layer_weights:
        for axis, length in zip(weight.axes, architecture.shape(weight, sizes), strict=True):
            positions = architecture.kept_on_axis(axis, kept)
            if axis in (("hidden",), ("head_dim",)):
                assert positions is None
                continue
            assert positions is not None
            assert positions.dtype == np.int64
            assert positions.tolist() == kept_by_plain_loops(architecture, axis, kept)
            assert len(positions) == length


def test_head_counts_and_biases_are_read_from_the_config() -> None:
    architecture = architecture_of(CONFIGS["llama with biases"])

    assert architecture.group_rows == {"query": 12, "key_value": 6, "channel": 1}
    assert sum(math.prod(s) for n, s in architecture.tensor_shapes().items() if n.endswith("bias")) == 3 * (
        24 + 12 + 12 + 24 + 37 + 37 + 24
    )


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "module"),
    [("gpt2", "transformer.wte"), ("mixtral", "model.layers.0.mlp.gate"), ("qwen3_moe", "model.layers.0.mlp.experts")],
)
def test_an_unsupported_model_names_the_module_that_breaks_the_pattern(model_type: str, module: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        architecture_of({"model_type": model_type})

    assert f"model_type '{model_type}' is not supported. Module '{module}'" in str(caught.value)
    assert "llama" in str(caught.value)


def test_a_multimodal_model_is_told_from_its_language_model() -> None:
    wrapped = {"model_type": "gemma3", "text_config": config("gemma3_text"), "vision_config": {}}

    with pytest.raises(UnsupportedModelError, match="wraps a language model in 'text_config'"):
        architecture_of(wrapped)


@pytest.mark.parametrize("model_type", ["no-such-model", None, ["llama"], "t5", "bert"])
def test_an_unknown_model_type_is_refused_with_the_list_of_known_ones(model_type: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="Supported: gemma2, gemma3_text, llama, mistral, olmo2"):
        architecture_of({"model_type": model_type})


def test_sizes_of_an_unknown_model_are_never_built() -> None:
    """A release is untrusted: a billion layers of an unknown type must not keep anybody busy."""
    with pytest.raises(UnsupportedModelError, match=r"transformer\.wte"):
        architecture_of({"model_type": "gpt2", "n_layer": 10**9, "n_embd": "wide"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", 0),
        ("hidden_size", -24),
        ("hidden_size", 24.0),
        ("hidden_size", "24"),
        ("hidden_size", True),
        ("hidden_size", 131_073),
        ("num_hidden_layers", 1_025),
        ("intermediate_size", [37]),
        ("vocab_size", 10**12),
        ("head_dim", 0),
    ],
)
def test_sizes_outside_their_range_are_refused(key: str, value: Any) -> None:
    values = config("llama") | {key: value}

    with pytest.raises(InvalidRequestError, match=f"{key} = "):
        architecture_of(values)


def test_head_counts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="4 attention heads, which 3 KV heads do not divide"):
        architecture_of(config("llama", num_key_value_heads=3))


def test_a_checkpoint_with_all_its_tensors_passes_and_leftover_buffers_do_not_matter() -> None:
    architecture = architecture_of(CONFIGS["llama tied"])
    leftovers = {"model.layers.0.self_attn.rotary_emb.inv_freq": (3,), "lm_head.weight": (101, 24)}

    architecture.check_tensors(architecture.tensor_shapes() | leftovers, source="here")

    assert [is_ignored_tensor(name) for name in leftovers] == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layers.1.mlp.gate.weight": (8, 24)},
            "Module 'model.layers.1.mlp.gate' of here breaks the llama",
        ),
        ({"model.layers.3.mlp.up_proj.weight": (37, 24)}, "Module 'model.layers.3.mlp.up_proj' of here breaks"),
        ({"score.weight": (2, 24)}, "Module 'score' of here breaks"),
        ({"model.layers.0.mlp.up_proj.weight": (24, 37)}, r"shape \(24, 37\), its config asks for \(37, 24\)"),
        (
            {"model.layers.2.mlp.up_proj.weight": None},
            "Module 'model.layers.2.mlp.up_proj' of the llama pattern is",
        ),
        ({"lm_head.weight": None}, "Module 'lm_head' of the llama pattern is absent"),
    ],
)
def test_a_checkpoint_that_breaks_the_pattern_is_refused(change: dict[str, Any], message: str) -> None:
    architecture = architecture_of(CONFIGS["llama"])
    found = {name: shape for name, shape in (architecture.tensor_shapes() | change).items() if shape is not None}

    with pytest.raises(UnsupportedModelError, match=message):
        architecture.check_tensors(found, source="here")


def test_tensor_names_lead_back_to_layer_and_weight() -> None:
    architecture = architecture_of(CONFIGS["phi3"])

    found = architecture.weight_of("model.layers.2.self_attn.qkv_proj.weight")

    assert found is not None
    assert found[0] == 2
    assert found[1].axes == (("query", "key_value", "key_value"), ("hidden",))
    assert found[1].module == "self_attn.qkv_proj"
    assert architecture.weight_of("model.embed_tokens.weight") is None
    for foreign in ("model.layers.3.self_attn.qkv_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        with pytest.raises(PlanMismatchError, match="is no tensor of this phi3 model with 3 layers"):
            architecture.weight_of(foreign)
