"""Norms of updates: against B A formed whole, across families; unchanged by recovery; closed to what is damaged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from builders import (
    MODEL_TYPES,
    SEVEN,
    half_plan,
    projections,
    pruned_module_shapes,
    random_factors,
    random_plan,
    save_adapter,
    save_base,
    save_metadata_release,
    sparse_config,
    sparse_release,
    tiny_architecture,
    tiny_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from loram_hub.adapter import MARK
from loram_hub.architecture import architecture_of
from loram_hub.errors import (
    AccessError,
    CheckpointError,
    InvalidRequestError,
    PlanMismatchError,
    UnsupportedAdapterError,
    VerificationError,
)
from loram_hub.files import dump_json
from loram_hub.plan import Plan
from loram_hub.recovery import recover
from loram_hub.updates import CHANNEL_PARTS, HEAD_PARTS, UpdateNorms, update_norms

PREFIX = "base_model.model."
ROOT = Path(__file__).resolve().parents[1]
Matrix = npt.NDArray[np.float64]
# PEFT 0.21 asks transformers 5.23 for an attribute that it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def save_config(folder: Path, config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(dump_json(dict(config)))
    return folder


def whole(config: Mapping[str, Any]) -> Plan:
    return Plan(architecture_of(config), {})


def dense_updates(tensors: Mapping[str, npt.NDArray[Any]], scale: float) -> dict[str, Matrix]:
    """Return s B A by module, whole, in fp64."""
    modules = {name.split(".lora_")[0] for name in tensors}
    return {
        module.removeprefix(PREFIX): scale
        * (
            tensors[f"{module}.lora_B.weight"].astype(np.float64)
            @ tensors[f"{module}.lora_A.weight"].astype(np.float64)
        )
        for module in sorted(modules)
    }


def parts_of(config: Mapping[str, Any], updates: Mapping[str, Matrix], layer: int) -> dict[str, Matrix]:
    """Cut a layer's updates into the seven parts, one head or channel after the other along the first axis."""
    here = {name.rpartition(".")[2]: update for name, update in updates.items() if f".{layer}." in name}
    queries, keys = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    if "qkv_proj" in here:
        here["q_proj"], here["k_proj"], here["v_proj"] = np.split(here["qkv_proj"], [queries, queries + keys])
    if "gate_up_proj" in here:
        here["gate_proj"], here["up_proj"] = np.split(here["gate_up_proj"], 2)
    for name in ("o_proj", "down_proj"):
        here[name] = here[name].T
    return {part: here[f"{part}_proj"] for part in (*HEAD_PARTS, *CHANNEL_PARTS)}


def check_against_dense(found: UpdateNorms, config: Mapping[str, Any], updates: Mapping[str, Matrix]) -> None:
    assert found.channels is not None
    for layer in range(config["num_hidden_layers"]):
        parts = parts_of(config, updates, layer)
        for part in HEAD_PARTS:
            heads = parts[part].reshape(-1, config["head_dim"], parts[part].shape[1])
            expected = [np.linalg.norm(head) for head in heads]
            np.testing.assert_allclose(found.heads[part][layer], expected, rtol=1e-9)
        for part in CHANNEL_PARTS:
            lines = np.linalg.norm(parts[part], axis=1)
            np.testing.assert_allclose(found.channels[part][layer], lines, rtol=1e-9)
            np.testing.assert_allclose(found.channel_means[part][layer], lines[lines > 0].mean(), rtol=1e-9)
            assert found.active_channels[part][layer] == (lines > 0).sum()


@pytest.mark.parametrize("attention", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_norms_are_those_of_the_update_formed_whole(tmp_path: Path, model_type: str, attention: str) -> None:
    config = tiny_config(model_type, attention=attention, layers=2)
    tensors = random_factors(projections(whole(config)))
    adapter = save_adapter(tmp_path / "adapter", tensors, lora_alpha=6)

    found = update_norms(adapter, base=save_config(tmp_path / "base", config), per_channel=True)

    assert found.heads["q"].shape == found.heads["o"].shape == (2, config["num_attention_heads"])
    assert found.heads["k"].shape == found.heads["v"].shape == (2, config["num_key_value_heads"])
    check_against_dense(found, config, dense_updates(tensors, 6 / 4))


@settings(max_examples=25)
@given(
    attention=st.sampled_from(["mha", "gqa", "mqa"]),
    rank=st.integers(1, 30),
    alpha=st.floats(1e-3, 1e3),
    size=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 2**32 - 1),
)
def test_norms_hold_for_any_rank_scale_and_plan(
    attention: str, rank: int, alpha: float, size: float, seed: int
) -> None:
    config = tiny_config(attention=attention, layers=3)
    plan = random_plan(architecture_of(config), seed=seed)
    tensors = random_factors(projections(plan), rank=rank, seed=seed)
    tensors = {name: values * np.float32(size if "lora_B" in name else 1) for name, values in tensors.items()}

    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        release = save_metadata_release(work / "release", config, plan)
        pruned = save_adapter(work / "pruned", tensors, r=rank, lora_alpha=alpha, base=release)
        found = update_norms(pruned, per_channel=True)
        recover(pruned, work / "recovered", dtype="float32")
        again = update_norms(work / "recovered", base=save_config(work / "base", config), per_channel=True)
        values = json.loads((work / "recovered" / "adapter_config.json").read_text())
        full = load_file(work / "recovered" / "adapter_model.safetensors")

    check_against_dense(again, config, dense_updates(full, values["lora_alpha"] / values["r"]))
    for part in HEAD_PARTS:  # a scale that no whole alpha gives was multiplied into B, and rounded
        np.testing.assert_allclose(found.heads[part], again.heads[part], rtol=1e-6)
    for part in CHANNEL_PARTS:
        np.testing.assert_allclose(found.channel_means[part], again.channel_means[part], rtol=1e-6)
        np.testing.assert_array_equal(found.active_channels[part], again.active_channels[part])


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_a_pruned_adapter_is_measured_as_what_recovery_makes_of_it(tmp_path: Path, model_type: str) -> None:
    config = tiny_config(model_type, attention="gqa")
    plan = half_plan(architecture_of(config))
    release = save_metadata_release(tmp_path / "release", config, plan)
    pruned = save_adapter(tmp_path / "pruned", random_factors(projections(plan)), base=release)
    recover(pruned, tmp_path / "recovered", dtype="float32")

    found = update_norms(pruned, per_channel=True)
    recovered = update_norms(tmp_path / "recovered", base=release, per_channel=True)

    queries_per_group = config["num_attention_heads"] // config["num_key_value_heads"]
    assert found.channels is not None
    assert recovered.channels is not None
    for part in HEAD_PARTS:
        np.testing.assert_allclose(found.heads[part], recovered.heads[part], rtol=1e-12)
    for part in CHANNEL_PARTS:
        np.testing.assert_allclose(found.channels[part], recovered.channels[part], rtol=1e-12)
    for layer, kept in plan.kept.items():
        kv_heads, channels = kept["kv_heads"].tolist(), kept["channels"].tolist()
        queries = [head * queries_per_group + i for head in kv_heads for i in range(queries_per_group)]
        for part, heads in (("q", queries), ("o", queries), ("k", kv_heads), ("v", kv_heads)):
            assert np.flatnonzero(found.heads[part][layer]).tolist() == heads
        for part in CHANNEL_PARTS:
            assert np.flatnonzero(found.channels[part][layer]).tolist() == channels
            assert found.active_channels[part][layer] == len(channels)


def test_norms_are_of_what_peft_adds_to_the_weights(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    config = tiny_config(layers=2)
    base = save_base(tmp_path / "base", config)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            r=4, lora_alpha=7, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM",
            rank_pattern={"k_proj": 6}, alpha_pattern={"layers.1.mlp.up_proj": 3}, init_lora_weights=False,
        ),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), tmp_path / "adapter"
    ).merge_and_unload()

    found = update_norms(tmp_path / "adapter", per_channel=True)

    old = dict(before.named_parameters())
    updates = {
        name.removesuffix(".weight"): (weight - old[name]).detach().numpy()
        for name, weight in merged.named_parameters()
        if name.endswith("_proj.weight")
    }
    check_against_dense(found, config, updates)


def test_twice_the_alpha_gives_twice_the_norms(tmp_path: Path) -> None:
    config = tiny_config()
    base, tensors = save_config(tmp_path / "base", config), random_factors(pruned_module_shapes(whole(config)))
    once = update_norms(save_adapter(tmp_path / "once", tensors, lora_alpha=8), base=base)
    twice = update_norms(save_adapter(tmp_path / "twice", tensors, lora_alpha=16), base=base)

    for part in HEAD_PARTS:
        np.testing.assert_allclose(twice.heads[part], 2 * once.heads[part], rtol=1e-12)
    for part in CHANNEL_PARTS:
        np.testing.assert_allclose(twice.channel_means[part], 2 * once.channel_means[part], rtol=1e-12)
    assert twice.lm_head == pytest.approx(2 * once.lm_head, rel=1e-12)


def test_heads_in_another_order_have_their_norms_in_that_order(tmp_path: Path) -> None:
    config = tiny_config(attention="gqa")
    base, tensors = save_config(tmp_path / "base", config), random_factors(projections(whole(config)))
    order = np.random.default_rng(1).permutation(6)
    name = f"{PREFIX}model.layers.1.self_attn.o_proj.lora_A.weight"
    moved = {**tensors, name: np.ascontiguousarray(tensors[name].reshape(4, 6, 10)[:, order].reshape(4, 60))}

    first = update_norms(save_adapter(tmp_path / "first", tensors), base=base)
    second = update_norms(save_adapter(tmp_path / "second", moved), base=base)

    np.testing.assert_allclose(second.heads["o"][1], first.heads["o"][1][order], rtol=1e-12)
    np.testing.assert_array_equal(second.heads["o"][0], first.heads["o"][0])
    assert not np.allclose(second.heads["o"][1], first.heads["o"][1])


def test_what_has_no_lora_has_nan_and_no_active_channels(tmp_path: Path) -> None:
    config = tiny_config()
    shapes = {
        module: shape
        for module, shape in projections(whole(config)).items()
        if module.endswith(("q_proj", "down_proj")) and ".2." in module
    }
    adapter = save_adapter(
        tmp_path / "adapter", random_factors(shapes), targets=["q_proj", "down_proj"], layers_to_transform=[2]
    )

    found = update_norms(adapter, base=save_config(tmp_path / "base", config), per_channel=True)

    assert found.channels is not None
    for part, norms in {**found.heads, **found.channels}.items():
        adapted = [2] if part in ("q", "down") else []
        assert np.flatnonzero(np.isfinite(norms).all(axis=1)).tolist() == adapted
        assert np.flatnonzero(np.isnan(norms).all(axis=1)).tolist() == [i for i in range(4) if i not in adapted]
    assert found.active_channels["down"].tolist() == [0, 0, 37, 0]
    assert found.active_channels["up"].tolist() == [0, 0, 0, 0]
    assert math.isnan(found.lm_head)


def test_an_untrained_adapter_adds_nothing(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = {
        name: np.zeros_like(values) if "lora_B" in name else values
        for name, values in random_factors(projections(whole(config))).items()
    }

    found = update_norms(save_adapter(tmp_path / "adapter", tensors), base=save_config(tmp_path / "base", config))

    assert all(not norms.any() for norms in {**found.heads, **found.channel_means}.values())
    assert found.active_channels["up"].tolist() == [0] * 4
    assert found.active_channels["down"].tolist() == [37] * 4  # lora_A begins at random


def test_the_lm_head_has_the_norm_of_its_whole_update(tmp_path: Path) -> None:
    config = tiny_config(layers=1)
    tensors = random_factors(pruned_module_shapes(whole(config)))

    found = update_norms(save_adapter(tmp_path / "adapter", tensors), base=save_config(tmp_path / "base", config))

    assert found.lm_head == pytest.approx(np.linalg.norm(dense_updates(tensors, 2.0)["lm_head"]), rel=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_factors_are_summed_in_sixty_four(tmp_path: Path, dtype: str) -> None:
    import ml_dtypes

    config = tiny_config(layers=1)
    stored = np.dtype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    tensors = {
        name: (200 * values).astype(stored) for name, values in random_factors(projections(whole(config))).items()
    }  # squares of which fp16 cannot hold

    found = update_norms(
        save_adapter(tmp_path / "adapter", tensors), base=save_config(tmp_path / "base", config), per_channel=True
    )

    check_against_dense(found, config, dense_updates(tensors, 2.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factors_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    config = tiny_config()
    tensors = random_factors(projections(whole(config)))
    tensors[f"{PREFIX}model.layers.3.mlp.up_proj.lora_B.weight"][5, 1] = value
    adapter = save_adapter(tmp_path / "adapter", tensors)

    with pytest.raises(VerificationError, match=r"layers\.3\.mlp\.up_proj\.lora_B\.weight.*NaN or infinity"):
        update_norms(adapter, base=save_config(tmp_path / "base", config))


def test_an_adapter_that_lacks_factors_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_factors(projections(whole(config)))
    for factor in "AB":
        del tensors[f"{PREFIX}model.layers.2.self_attn.k_proj.lora_{factor}.weight"]
    adapter = save_adapter(
        tmp_path / "adapter",
        tensors,
        targets=list(SEVEN),
    )

    with pytest.raises(UnsupportedAdapterError, match=r"layers\.2\.self_attn\.k_proj.*missing"):
        update_norms(adapter, base=save_config(tmp_path / "base", config))


def test_dora_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    adapter = save_adapter(tmp_path / "adapter", random_factors(projections(whole(config))), use_dora=True)

    with pytest.raises(UnsupportedAdapterError, match="use_dora"):
        update_norms(adapter, base=save_config(tmp_path / "base", config))


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    adapter = save_adapter(tmp_path / "adapter", random_factors(projections(whole(config))))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])

    with pytest.raises(VerificationError, match="not a sound safetensors file"):
        update_norms(adapter, base=save_config(tmp_path / "base", config))


def test_a_pruned_adapter_wants_its_release_and_not_the_base_model(tmp_path: Path) -> None:
    config = tiny_config()
    plan = half_plan(architecture_of(config))
    adapter = save_adapter(tmp_path / "adapter", random_factors(projections(plan)))

    with pytest.raises(PlanMismatchError, match="Give base: the release"):
        update_norms(adapter, base=save_config(tmp_path / "base", config))


def test_a_release_that_keeps_other_groups_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    plans = [half_plan(tiny_architecture(), seed=seed) for seed in (0, 1)]
    digest = np.frombuffer(bytes.fromhex(plans[0].digest), dtype=np.uint8)
    mark = f"{PREFIX}model.layers.0.self_attn.q_proj.loram_mark.{MARK}"
    adapter = save_adapter(
        tmp_path / "adapter",
        {**random_factors(projections(plans[0])), mark: digest},
        targets=list(SEVEN),
    )
    right, wrong = (
        save_metadata_release(tmp_path / name, config, plan) for name, plan in zip(("a", "b"), plans, strict=True)
    )

    assert update_norms(adapter, base=right).heads["q"].shape == (4, 6)
    with pytest.raises(PlanMismatchError, match="keeps other channel groups"):
        update_norms(adapter, base=wrong)


def test_an_adapter_of_a_sparse_release_is_measured_whole(tmp_path: Path) -> None:
    config = sparse_config()
    release = sparse_release(tmp_path / "release", save_base(tmp_path / "base", config))
    tensors = random_factors(projections(whole(config)))

    found = update_norms(save_adapter(tmp_path / "adapter", tensors, base=release), per_channel=True)

    check_against_dense(found, config, dense_updates(tensors, 2.0))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", random_factors(projections(whole(tiny_config()))))

    with pytest.raises(PlanMismatchError, match="no linear layer"):
        update_norms(adapter, base=save_config(tmp_path / "fewer", tiny_config(layers=2)))
    with pytest.raises(PlanMismatchError, match="has shape"):
        update_norms(adapter, base=save_config(tmp_path / "wider", tiny_config(hidden_size=30)))


def test_the_error_says_which_argument_gives_the_model(tmp_path: Path) -> None:
    tensors = random_factors(projections(whole(tiny_config())))

    with pytest.raises(InvalidRequestError, match="Give base: "):
        update_norms(save_adapter(tmp_path / "silent", tensors))
    with pytest.raises(CheckpointError, match="Give base: "):
        update_norms(save_adapter(tmp_path / "gone", tensors, base=tmp_path / "no such folder"))
    with pytest.raises(AccessError, match=r"is for org/base, .*Give base: "):
        update_norms(save_adapter(tmp_path / "elsewhere", tensors, base="org/base"))


def test_norms_become_strict_json_and_a_file(tmp_path: Path) -> None:
    config = tiny_config(layers=2)
    shapes = {module: shape for module, shape in projections(whole(config)).items() if "mlp" not in module}
    adapter = save_adapter(tmp_path / "adapter", random_factors(shapes))
    found = update_norms(adapter, base=save_config(tmp_path / "base", config), per_channel=True)

    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    found.save(tmp_path / "norms.safetensors")
    arrays = load_file(tmp_path / "norms.safetensors")

    assert values["heads"]["k"] == found.heads["k"].tolist()
    assert values["channel_means"]["up"] == [None, None]
    assert values["lm_head"] is None
    np.testing.assert_array_equal(arrays["heads.q"], found.heads["q"])
    assert arrays["channels.gate"].shape == (2, 37)
    assert [path.name for path in tmp_path.glob("*norms*")] == ["norms.safetensors"]


def test_norms_need_no_torch() -> None:
    code = "import sys, loram_hub.updates; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60).returncode == 0
