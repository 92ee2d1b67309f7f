"""Adapter folders: what is read, what is refused, and the bytes that are written."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from builders import SEVEN, half_plan, projections, random_factors, save_adapter, tiny_architecture
from safetensors.numpy import load_file, save_file

from loram_hub.adapter import CanonicalAdapter, convert, linear_modules, read_adapter, shortest_targets, write_adapter
from loram_hub.adapter.config import check_work, compile_pattern, parse_config
from loram_hub.errors import CheckpointError, LoramError, UnsupportedAdapterError, VerificationError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHAPES = {"model.layers.0.mlp.up_proj": (11, 7), "model.layers.1.self_attn.q_proj": (5, 7), "lm_head": (13, 7)}
MINIMAL: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reading_gives_the_stored_factors_by_module(tmp_path: Path, dtype: type) -> None:
    tensors = random_factors(SHAPES, dtype=dtype)
    adapter = read_adapter(save_adapter(tmp_path / "adapter", tensors, base="org/release"))

    assert list(adapter.pairs) == sorted(SHAPES)
    for module, pair in adapter.pairs.items():
        assert (pair.rank, pair.shape, pair.scale) == (4, SHAPES[module], 2.0)
        assert pair.lora_A.tobytes() == tensors[f"base_model.model.{module}.lora_A.weight"].tobytes()
        assert pair.lora_B.tobytes() == tensors[f"base_model.model.{module}.lora_B.weight"].tobytes()
        assert pair.lora_A.dtype == dtype
    assert adapter.config.base == "org/release"


def test_scales_follow_rank_pattern_alpha_pattern_and_rslora(tmp_path: Path) -> None:
    ranks = {"model.layers.0.mlp.up_proj": 4, "model.layers.1.self_attn.q_proj": 9, "lm_head": 2}
    folder = save_adapter(
        tmp_path / "adapter",
        random_factors(SHAPES, rank=ranks),
        rank_pattern={"q_proj": 9, "^lm_head": 2},
        alpha_pattern={r"layers\.1\..*": 6},
        use_rslora=True,
    )
    scales = {module: pair.scale for module, pair in read_adapter(folder).pairs.items()}

    assert scales == {
        "model.layers.0.mlp.up_proj": 8 / math.sqrt(4),
        "model.layers.1.self_attn.q_proj": 6 / math.sqrt(9),
        "lm_head": 8 / math.sqrt(2),
    }


@pytest.mark.parametrize(
    "key", ["q_proj", "self_attn.q_proj", "layers.1.self_attn.q_proj", "^q_proj", "^model.*q_proj", "proj", ".*", "1.*"]
)
def test_patterns_match_what_peft_matches(tmp_path: Path, key: str) -> None:
    from peft.utils.other import get_pattern_key

    adapter = read_adapter(save_adapter(tmp_path / "a", random_factors(SHAPES), alpha_pattern={key: 40}))

    assert {module for module, pair in adapter.pairs.items() if pair.scale == 10} == {
        module for module in SHAPES if get_pattern_key([key], module) == key and key != module
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["model.layers.2.mlp.up_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": r".*\.(q|k|v)_proj"},
        {"target_modules": r"(?:.*?(?:self_attn|attn).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.u.*)"},
        {"target_modules": list(SEVEN), "exclude_modules": ["layers.1.self_attn.q_proj", "down_proj"]},
        {"target_modules": list(SEVEN), "exclude_modules": r".*mlp.*"},
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1, 3]},
        {"target_modules": ["q_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks"]},
    ],
)
def test_targets_are_what_peft_adapts(settings: dict[str, Any]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    modules = linear_modules(tiny_architecture())
    ours = parse_config(MINIMAL | settings, source="test")
    theirs = LoraConfig(**settings)
    found = {module: check_target_module_exists(theirs, module) for module in modules}
    expected = {module for module, hit in found.items() if hit and not isinstance(hit, _ExcludedModule)}

    assert {module for module in modules if ours.targets(module)} == expected


def test_copies_of_frozen_weights_that_peft_adds_are_left_out(tmp_path: Path) -> None:
    tensors = random_factors({"lm_head": (13, 7)})
    tensors["base_model.model.lm_head.base_layer.weight"] = np.full((13, 7), np.nan, np.float32)

    assert list(read_adapter(save_adapter(tmp_path / "adapter", tensors, targets=["lm_head"])).pairs) == ["lm_head"]


VARIANTS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type"),
    ({"peft_type": None}, "peft_type"),
    ({"use_dora": True}, "DoRA"),
    ({"modules_to_save": ["lm_head"]}, "chat template adds tokens"),
    ({"bias": "lora_only"}, "bias"),
    ({"lora_bias": True}, "bias"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"alora_invocation_tokens": [1, 2]}, "activated"),
    ({"trainable_token_indices": [5]}, "embedding"),
    ({"target_parameters": ["mlp.experts.down"]}, "target_parameters"),
    ({"use_qalora": True}, "QA-LoRA"),
    ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
    ({"arrow_config": {"top_k": 3}}, "Arrow"),
    ({"kasa_config": {"beta": 1}}, "KaSA"),
    ({"monteclora_config": {"n": 1}}, "sampled"),
    ({"megatron_config": {"tp": 2}}, "sharded"),
    ({"fan_in_fan_out": True}, "transposed"),
    ({"use_newlora": True}, "upgrade"),
    ({"newlora_config": {"x": 1}}, "upgrade"),
    *[({"init_lora_weights": name}, name) for name in ("pissa", "pissa_niter_16", "olora", "corda", "loftq")],
    ({"init_lora_weights": "lora_ga"}, "changes the weights"),
    ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
]


@pytest.mark.parametrize(("changes", "reason"), VARIANTS)
def test_variants_without_a_full_size_equivalent_are_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    folder = save_adapter(tmp_path / "adapter", random_factors(SHAPES), **changes)

    with pytest.raises(UnsupportedAdapterError, match=reason):
        read_adapter(folder)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initializations_that_leave_the_base_alone_are_read(tmp_path: Path, init: bool | str) -> None:
    assert read_adapter(save_adapter(tmp_path / "a", random_factors(SHAPES), init_lora_weights=init)).pairs


def test_every_default_lora_config_of_peft_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig

    folder = save_adapter(tmp_path / "adapter", random_factors(SHAPES))
    LoraConfig(r=4, lora_alpha=8, target_modules=list(SHAPES), task_type="CAUSAL_LM").save_pretrained(folder)

    assert read_adapter(folder).config.target_modules == tuple(sorted(SHAPES))


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 5},
        {"r": "4"},
        {"r": True},
        {"r": 0},
        {"r": 4.0},
        {"r": None},
        {"lora_alpha": -1},
        {"lora_alpha": None},
        {"lora_alpha": 10**400},
        {"rank_pattern": [4]},
        {"rank_pattern": {"up_proj": 3}},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"(a+)+": 4}},
        {"rank_pattern": {f"m{i}": 4 for i in range(5_000)}},
        {"alpha_pattern": {"x" * 3_000: 4}},
        {"target_modules": [["q_proj"]]},
        {"target_modules": 7},
        {"layers_to_transform": ["1"]},
        {"base_model_name_or_path": {"a": 1}},
        {"revision": 3},
    ],
)
def test_configs_that_are_not_what_they_should_be_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(VerificationError):
        read_adapter(save_adapter(tmp_path / "adapter", random_factors(SHAPES), **changes))


def test_alpha_patterns_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", random_factors(SHAPES), alpha_pattern={"q_proj": 4, "layers.1.*": 16})

    with pytest.raises(UnsupportedAdapterError, match=r"several keys of alpha_pattern.*4, 16"):
        read_adapter(folder)


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)*", "((x+)y)*", "(?:.*){5}", "([^.]*)*", r"(\w+\.?)+"])
def test_patterns_that_could_run_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(VerificationError, match="repeats a repetition"):
        compile_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        ".*" * 12 + "z",
        "[^x]*" * 12 + "x",
        "(.*)" * 12 + "z",
        "a?" * 20 + "a" * 20,
        r"\w{0,99}" * 12 + "z",
        ".+?" * 9 + "z",
        "(a?b?)*",
        "[])(*+]*" * 9 + "z",
        "(?:" * 9 + ".*)" * 9 + "z",
    ],
)
def test_patterns_with_many_repetitions_in_a_row_are_refused(pattern: str) -> None:
    with pytest.raises(VerificationError, match=r"in a row|repeats a repetition"):
        compile_pattern(pattern)


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|"
    r"o_proj|gate_proj|up_proj|down_proj|proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|"
    r"feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|proj)))"
)


@pytest.mark.parametrize(
    "pattern",
    [
        UNSLOTH,
        r"model\.layers\.([0-9]+)\.(self_attn|mlp)\.(.*_proj)$",
        r"^(?!.*lm_head).*(?:q_proj|down_proj).*$",
        r".*\.layers\.(0|1)\..*\.(?:q|k|v)_proj",
        r"model\.layers\.\d{1,2}\.mlp\.(?P<side>up|gate|down)_proj",
    ],
)
def test_patterns_that_trainers_write_are_read_and_quick_over_a_large_model(pattern: str) -> None:
    config = parse_config(MINIMAL | {"target_modules": pattern}, source="test")
    modules = linear_modules(tiny_architecture(num_hidden_layers=126))

    check_work(config, modules, source="test")
    assert {module for module in modules if config.targets(module)} == {
        module for module in modules if re.fullmatch(pattern, module)
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {f"q{i}x.*y": 4 for i in range(4_096)}},
        {"target_modules": ".*.*.*.*.*z"},
        {"alpha_pattern": {".*.*.*.*z": 4}},
    ],
)
def test_patterns_that_take_too_long_over_all_modules_are_refused_at_once(changes: dict[str, Any]) -> None:
    config = parse_config(MINIMAL | changes, source="test")
    modules = [f"model.layers.{i}.block_sparse_moe.experts.{i}.w1" for i in range(25_000)]
    start = time.perf_counter()

    with pytest.raises(VerificationError, match="could take too long over its 25,000 modules"):
        check_work(config, modules, source="test")
    assert time.perf_counter() - start < 5


def test_many_names_over_many_modules_take_no_time() -> None:
    config = parse_config(MINIMAL | {"target_modules": [f"z{i}" for i in range(4_000)]}, source="test")
    start = time.perf_counter()

    assert not any(config.targets(f"model.layers.{i}.mlp.up_proj") for i in range(25_000))
    assert time.perf_counter() - start < 10


def test_all_linear_as_text_is_every_layer_but_the_head(tmp_path: Path) -> None:
    modules = linear_modules(tiny_architecture())
    config = parse_config(MINIMAL | {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}, source="test")

    assert [module for module in modules if not config.targets(module)] == [
        module for module in modules if module == "lm_head" or module.endswith("k_proj")
    ]


def test_absurd_texts_are_refused_in_a_short_message(tmp_path: Path) -> None:
    for changes in ({"base_model_name_or_path": "x" * 5_000}, {"revision": "a\0b"}, {"target_modules": ["x"] * 5_000}):
        with pytest.raises(VerificationError) as refusal:
            parse_config(MINIMAL | changes, source="test")
        assert len(str(refusal.value)) < 300
    for changes in ({"peft_type": "y" * 5_000}, {"bias": "y" * 5_000}, {"init_lora_weights": "y" * 5_000}):
        with pytest.raises(UnsupportedAdapterError) as unsupported:
            parse_config(MINIMAL | changes, source="test")
        assert len(str(unsupported.value)) < 500
    name = f"model.{'y' * 600}"
    with pytest.raises(VerificationError, match=r"a name of 6\d\d letters"):
        read_adapter(save_adapter(tmp_path / "a", random_factors({name: (3, 5)})))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: type) -> None:
    tensors = random_factors(SHAPES, dtype=dtype)
    tensors["base_model.model.lm_head.lora_B.weight"][3, 1] = value

    with pytest.raises(VerificationError, match=r"'base_model.model.lm_head.lora_B.weight'.*NaN or infinity"):
        read_adapter(save_adapter(tmp_path / "adapter", tensors))


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_without_its_partner_is_refused(tmp_path: Path, factor: str) -> None:
    tensors = random_factors(SHAPES)
    del tensors[f"base_model.model.lm_head.lora_{factor}.weight"]

    with pytest.raises(UnsupportedAdapterError, match=f"'lm_head'.*no lora_{factor}"):
        read_adapter(save_adapter(tmp_path / "adapter", tensors))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding was a target"),
        ("base_model.model.lm_head.weight", "vocabulary was resized"),
        ("base_model.model.model.embed_tokens.weight", "vocabulary was resized"),
        ("base_model.model.lm_head.lora_magnitude_vector", "no full-size equivalent"),
        ("base_model.model.lm_head.lora_A.default.weight", "no full-size equivalent"),
        ("base_model.model.model.norm.weight", "no full-size equivalent"),
        ("lm_head.lora_A.weight", "no full-size equivalent"),
    ],
)
def test_tensors_that_are_no_factors_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    tensors = random_factors(SHAPES) | {name: np.zeros((3, 3), np.float32)}

    with pytest.raises(UnsupportedAdapterError, match=reason):
        read_adapter(save_adapter(tmp_path / "adapter", tensors, targets=sorted(SHAPES)))


@pytest.mark.parametrize("shape", [(4,), (0, 7), (4, 7, 1)])
def test_factors_that_are_shards_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = random_factors(SHAPES) | {"base_model.model.lm_head.lora_A.weight": np.zeros(shape, np.float32)}

    with pytest.raises(VerificationError, match="gather the parameters"):
        read_adapter(save_adapter(tmp_path / "adapter", tensors))


def test_an_integer_factor_is_refused(tmp_path: Path) -> None:
    tensors = random_factors(SHAPES) | {"base_model.model.lm_head.lora_A.weight": np.zeros((4, 7), np.int32)}

    with pytest.raises(VerificationError, match="I32"):
        read_adapter(save_adapter(tmp_path / "adapter", tensors))


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match="no LoRA factors"):
        read_adapter(save_adapter(tmp_path / "adapter", {}, targets=["q_proj"]))


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_truncated_weight_file_is_refused(tmp_path: Path, kept: float) -> None:
    folder = save_adapter(tmp_path / "adapter", random_factors(SHAPES))
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(kept * len(data))])

    with pytest.raises(VerificationError, match="not a sound safetensors file"):
        read_adapter(folder)


def test_pickled_weights_are_refused_unopened(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", random_factors(SHAPES))
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")

    with pytest.raises(CheckpointError, match="pickle"):
        read_adapter(folder)


def test_a_folder_that_is_no_adapter_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="whole model"):
        read_adapter(tmp_path)

    save_adapter(tmp_path / "checkpoint-40", random_factors(SHAPES))
    with pytest.raises(CheckpointError, match="checkpoint-40"):
        read_adapter(tmp_path)

    (tmp_path / "checkpoint-40" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        read_adapter(tmp_path / "checkpoint-40")


@pytest.mark.parametrize("text", ["", "[]", '{"r": 1, "r": 2}', '{"r": NaN}', "[" * 100_000])
def test_damaged_json_is_refused(tmp_path: Path, text: str) -> None:
    folder = save_adapter(tmp_path / "adapter", random_factors(SHAPES))
    (folder / CONFIG).write_text(text)

    with pytest.raises(LoramError) as caught:
        read_adapter(folder)
    assert caught.value.exit_code == 3


def test_missing_and_undeclared_targets_are_named(tmp_path: Path) -> None:
    plan = half_plan(tiny_architecture())
    candidates = linear_modules(plan.architecture)
    tensors = random_factors(projections(plan))
    read_adapter(save_adapter(tmp_path / "sound", tensors, targets=list(SEVEN))).check_targets(candidates)

    undeclared = read_adapter(save_adapter(tmp_path / "undeclared", tensors, targets=list(SEVEN[:6])))
    with pytest.raises(UnsupportedAdapterError, match=r"down_proj' has factors.*target_modules does not name it"):
        undeclared.check_targets(candidates)

    for factor in "AB":
        del tensors[f"base_model.model.model.layers.2.mlp.up_proj.lora_{factor}.weight"]
    missing = read_adapter(save_adapter(tmp_path / "missing", tensors, targets=list(SEVEN)))
    with pytest.raises(UnsupportedAdapterError, match=r"'model.layers.2.mlp.up_proj'.*missing \(1 of 28"):
        missing.check_targets(candidates)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_written_weights_are_the_bytes_that_safetensors_writes(tmp_path: Path, dtype: Any) -> None:
    tensors = {name: convert(value, dtype, name=name) for name, value in random_factors(SHAPES).items()}
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    canonical = _canonical(dtype)

    write_adapter(tmp_path, canonical, lambda module: (_of(tensors, module, "A"), _of(tensors, module, "B")))

    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert (tmp_path / WEIGHTS).stat().st_size == canonical.nbytes
    assert canonical.parameters == sum(value.size for value in load_file(tmp_path / WEIGHTS).values())


def test_a_written_config_is_minimal_and_sorted(tmp_path: Path) -> None:
    tensors = random_factors(SHAPES)
    canonical = _canonical("float32")
    write_adapter(tmp_path, canonical, lambda module: (_of(tensors, module, "A"), _of(tensors, module, "B")))
    config = json.loads((tmp_path / CONFIG).read_text())

    assert list(config) == sorted(config)
    assert len(config) == 15
    assert config["revision"] == "c0ffee"
    assert read_adapter(tmp_path).config.base == "org/base"


def test_targets_are_named_by_suffix_only_where_that_hits_no_other_module() -> None:
    candidates = linear_modules(tiny_architecture())
    every_q = [module for module in candidates if module.endswith("q_proj")]

    assert shortest_targets([*every_q, "lm_head"], candidates) == ("lm_head", "q_proj")
    assert shortest_targets(every_q[1:], candidates) == tuple(every_q[1:])


def test_conversion_rounds_once_like_torch_and_refuses_overflow() -> None:
    import torch

    values = np.random.default_rng(0).standard_normal((64, 33)).astype(np.float32)
    rounded = convert(values, "bfloat16", scale=1.7, name="x")
    expected = (torch.from_numpy(values) * np.float32(1.7)).bfloat16()

    assert torch.equal(torch.from_numpy(rounded.astype(np.float32)), expected.float())
    assert convert(values, "float32", name="x") is values
    with pytest.raises(VerificationError, match="x does not fit into float16"):
        convert(values * np.float32(1e6), "float16", name="x")
    with pytest.raises(VerificationError, match="does not fit into float32"):
        convert(values * np.float32(1e37), "float32", scale=1e5, name="x")


def _canonical(dtype: Any) -> CanonicalAdapter:
    targets = tuple(sorted(SHAPES))
    return CanonicalAdapter(
        base_id="org/base", revision="c0ffee", r=4, lora_alpha=8, target_modules=targets, dtype=dtype, shapes=SHAPES
    )


def _of(tensors: dict[str, Any], module: str, factor: str) -> Any:
    return tensors[f"base_model.model.{module}.lora_{factor}.weight"]
