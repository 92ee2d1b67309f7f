"""Recovery: exact against a second implementation, equivalent to a merge by hand, closed to what does not fit."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from builders import (
    HEADS,
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
    tiny_config,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from loram_hub.adapter import read_adapter
from loram_hub.architecture import architecture_of
from loram_hub.errors import (
    AccessError,
    CheckpointError,
    InvalidRequestError,
    LoramError,
    PlanMismatchError,
    UnsupportedAdapterError,
    VerificationError,
)
from loram_hub.plan import Plan
from loram_hub.recovery import recover
from loram_hub.seals import seal

RANK, ALPHA = 4, 8
# PEFT 0.21 asks transformers 5.23 for an attribute that it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BITS: Mapping[str, Any] = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
PREFIX = "base_model.model."


def kept_positions(config: Mapping[str, Any], module: str, plan: Plan) -> tuple[list[int], list[int]]:
    """Rows and columns of a weight that pruning keeps, looped over heads and channels: not by the library's code."""
    kv_heads, head_dim, channels = (config[key] for key in ("num_key_value_heads", "head_dim", "intermediate_size"))
    per_group = config["num_attention_heads"] // kv_heads
    hidden = list(range(config["hidden_size"]))
    if module == "lm_head":
        return list(range(config["vocab_size"])), hidden
    layer = int(module.split(".")[2])
    kept = plan.kept.get(layer, {"kv_heads": range(kv_heads), "channels": range(channels)})
    queries, keys = [], []
    for head in kept["kv_heads"]:
        for query_head in range(head * per_group, (head + 1) * per_group):
            queries += [query_head * head_dim + i for i in range(head_dim)]
        keys += [head * head_dim + i for i in range(head_dim)]
    mlp = [int(channel) for channel in kept["channels"]]
    all_queries, all_keys = kv_heads * per_group * head_dim, kv_heads * head_dim
    rows = {
        "q_proj": queries,
        "k_proj": keys,
        "v_proj": keys,
        "qkv_proj": queries + [all_queries + i for i in keys] + [all_queries + all_keys + i for i in keys],
        "gate_proj": mlp,
        "up_proj": mlp,
        "gate_up_proj": mlp + [channels + i for i in mlp],
    }
    name = module.rpartition(".")[2]
    return rows.get(name, hidden), {"o_proj": queries, "down_proj": mlp}.get(name, hidden)


def bits(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.view(BITS[values.dtype.name])


def digest_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


class Case:
    """A release without weights and an adapter of the right shapes for it, in one folder."""

    def __init__(self, folder: Path, model_type: str = "llama", **changes: Any) -> None:
        self.folder = folder
        self.config = tiny_config(model_type, **changes)
        self.plan = half_plan(architecture_of(self.config))
        self.release = save_metadata_release(folder / "release", self.config, self.plan)
        self.tensors = random_factors(projections(self.plan), rank=RANK)
        self.out = folder / "recovered"

    def adapter(self, **changes: Any) -> Path:
        settings = {"base": self.release, "targets": list(SEVEN), "r": RANK, "lora_alpha": ALPHA}
        return save_adapter(self.folder / "adapter", self.tensors, **(settings | changes))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@given(
    model_type=st.sampled_from(MODEL_TYPES),
    attention=st.sampled_from(sorted(HEADS)),
    seed=st.integers(0, 2**32 - 1),
    layers=st.sets(st.integers(0, 3)),
    rank=st.integers(1, 5),
    dtype=st.sampled_from(sorted(BITS)),
    with_head=st.booleans(),
)
def test_recovery_is_an_exact_scatter_for_every_family_and_plan(
    model_type: str, attention: str, seed: int, layers: set[int], rank: int, dtype: Any, with_head: bool
) -> None:
    config = tiny_config(model_type, attention=attention)
    plan = random_plan(architecture_of(config), seed=seed, layers=sorted(layers))
    shapes = pruned_module_shapes(plan) if with_head else projections(plan)
    stored = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    trained = random_factors(shapes, rank=rank, seed=seed, dtype=stored)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        release = save_metadata_release(folder / "release", config, plan)
        adapter = save_adapter(folder / "adapter", trained, base=release, r=rank)
        result = recover(adapter, folder / "out", dtype=dtype)
        recovered = load_file(folder / "out" / "adapter_model.safetensors")

    assert set(recovered) == set(trained)
    assert result.modules == tuple(sorted(shapes))
    assert result.alpha == 8
    for module in shapes:
        rows, columns = kept_positions(config, module, plan)
        a_p, b_p = (trained[f"{PREFIX}{module}.lora_{factor}.weight"] for factor in "AB")
        a_r, b_r = (recovered[f"{PREFIX}{module}.lora_{factor}.weight"] for factor in "AB")
        expected_a, expected_b = np.zeros_like(bits(a_r)), np.zeros_like(bits(b_r))
        for k, row in enumerate(rows):
            expected_b[row] = bits(b_p)[k]
        for k, column in enumerate(columns):
            expected_a[:, column] = bits(a_p)[:, k]
        assert (bits(a_r) == expected_a).all()
        assert (bits(b_r) == expected_b).all()

        a_p, b_p, a_r, b_r = (factor.astype(np.float32) for factor in (a_p, b_p, a_r, b_r))
        product = b_r @ a_r
        outside = np.ones(product.shape, bool)
        outside[np.ix_(rows, columns)] = False
        assert (product[outside] == 0).all()
        assert (np.ascontiguousarray(b_r[rows]) @ np.ascontiguousarray(a_r[:, columns]) == b_p @ a_p).all()


def test_recovered_shapes_are_the_base_models(case: Case) -> None:
    recover(case.adapter(), case.out)
    whole = architecture_of(case.config).tensor_shapes()
    recovered = load_file(case.out / "adapter_model.safetensors")

    assert len(recovered) == 2 * 7 * 4
    for name, factor in recovered.items():
        module, _, side = name.removeprefix(PREFIX).partition(".lora_")
        rows, columns = whole[f"{module}.weight"]
        assert factor.shape == ((RANK, columns) if side.startswith("A") else (rows, RANK))


def test_the_result_and_the_config_say_what_was_written(case: Case) -> None:
    result = recover(case.adapter(), case.out)
    config = json.loads((case.out / "adapter_config.json").read_text())
    recovered = load_file(case.out / "adapter_model.safetensors")

    assert config == {
        "base_model_name_or_path": "org/base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "revision": COMMIT,
        "target_modules": sorted(SEVEN),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    assert (result.folder, result.base_id, result.revision) == (case.out, "org/base", COMMIT)
    assert (result.rank, result.alpha, result.max_lora_rank, len(result.modules)) == (RANK, ALPHA, 8, 28)
    assert result.parameters == sum(factor.size for factor in recovered.values())
    assert result.nbytes == (case.out / "adapter_model.safetensors").stat().st_size
    with safe_open(case.out / "adapter_model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in case.out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "loram.json",
    ]


def test_the_record_says_where_the_adapter_comes_from_without_a_path(case: Case) -> None:
    recover(case.adapter(use_rslora=True, r=RANK), case.out)
    text = (case.out / "loram.json").read_text()
    record = json.loads(text)

    assert record["kind"] == "recovered adapter"
    assert record["base"] == {"id": "org/base", "commit": COMMIT, "config_sha256": "0" * 64}
    assert record["release"] == {"id": "release", "commit": None, "plan_sha256": case.plan.digest}
    assert record["trained"]["use_rslora"] is True
    assert str(case.folder) not in text + (case.out / "adapter_config.json").read_text()


def test_equal_input_gives_equal_bytes(case: Case, tmp_path: Path) -> None:
    recover(case.adapter(), case.out)
    recover(case.adapter(targets=list(reversed(SEVEN))), tmp_path / "again")

    assert digest_of(case.out) == digest_of(tmp_path / "again")


def test_a_dry_run_checks_everything_and_writes_nothing(case: Case) -> None:
    dry = recover(case.adapter(), case.out, dry_run=True)
    assert not case.out.exists()
    assert dry == recover(case.adapter(), case.out)

    case.tensors[f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = 1e20
    with pytest.raises(VerificationError, match="does not fit into float16"):
        recover(case.adapter(), case.folder / "other", dtype="float16", dry_run=True)


def test_the_original_may_be_named_by_its_release_folder_or_argument(case: Case) -> None:
    recover(case.adapter(base=None), case.out, release=case.release)
    recover(case.adapter(), case.folder / "other")

    assert digest_of(case.out) == digest_of(case.folder / "other")


def test_neither_weights_nor_torch_are_needed(case: Case) -> None:
    import subprocess
    import sys

    adapter = case.adapter()
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; sys.modules['peft'] = None\n"
        "from loram_hub import recover\n"
        f"recover({str(adapter)!r}, {str(case.out)!r})\n"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)

    assert not list(case.release.glob("model*.safetensors"))
    assert (case.out / "adapter_model.safetensors").is_file()


# Canonical form: one rank, one alpha.


def test_one_scale_for_all_keeps_b_bit_for_bit(case: Case) -> None:
    for folder, changes, alpha in (
        ("plain", {}, 8),
        ("rslora", {"use_rslora": True}, 16),  # 8 / sqrt(4) = 16 / 4
        ("pattern", {"alpha_pattern": {".*": 12}}, 12),
    ):
        out = case.folder / folder
        assert recover(case.adapter(**changes), out, dtype="float32").alpha == alpha
        trained = case.tensors[f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"]
        assert load_file(out / "adapter_model.safetensors")[
            f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"
        ].tobytes() == (trained.tobytes())


def test_a_scale_that_no_whole_alpha_gives_is_folded_into_b(case: Case) -> None:
    result = recover(case.adapter(lora_alpha=0.5), case.out, dtype="float32")
    name = f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"

    assert (result.rank, result.alpha) == (RANK, RANK)
    expected = case.tensors[name] * np.float32(0.5 / RANK)
    assert (load_file(case.out / "adapter_model.safetensors")[name] == expected).all()


def test_mixed_ranks_and_alphas_become_one_of_each(case: Case) -> None:
    shapes = projections(case.plan)
    ranks = {module: 9 if module.endswith("q_proj") else RANK for module in shapes} | {"model.layers.2.mlp.up_proj": 3}
    case.tensors = random_factors(shapes, rank=ranks)
    patterns = {"rank_pattern": {"q_proj": 9, "layers.2.mlp.up_proj": 3}, "alpha_pattern": {"down_proj": 5}}
    adapter = case.adapter(**patterns)
    result = recover(adapter, case.out, dtype="float32")
    recovered = read_adapter(case.out)
    trained = read_adapter(adapter)

    assert (result.rank, result.alpha, result.max_lora_rank) == (9, 9, 16)
    assert len(recovered.pairs) == 28
    for module, pair in recovered.pairs.items():
        rows, columns = kept_positions(case.config, module, case.plan)
        before = trained.pairs[module]
        expected = before.scale * (before.lora_B.astype(np.float64) @ before.lora_A.astype(np.float64))
        found = pair.scale * (pair.lora_B.astype(np.float64) @ pair.lora_A.astype(np.float64))
        assert (pair.rank, pair.scale) == (9, 1.0)
        np.testing.assert_allclose(found[np.ix_(rows, columns)], expected, rtol=1e-5, atol=1e-6)


def test_a_part_of_the_layers_is_targeted_by_full_paths(case: Case) -> None:
    case.tensors = {name: value for name, value in case.tensors.items() if ".layers.2." in name}
    recover(case.adapter(layers_to_transform=[2]), case.out)
    targets = json.loads((case.out / "adapter_config.json").read_text())["target_modules"]

    assert len(targets) == 7
    assert targets == sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in case.tensors})


def test_rounding_to_another_type_happens_once(case: Case) -> None:
    import torch

    recover(case.adapter(), case.out)
    name = f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"
    expected = torch.from_numpy(case.tensors[name]).bfloat16().float().numpy()

    assert (load_file(case.out / "adapter_model.safetensors")[name].astype(np.float32) == expected).all()


# Equivalence with stock PEFT on the full model.

VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *[(model_type, "gqa", {}) for model_type in MODEL_TYPES],
    ("llama", "mha", {"use_rslora": True}),
    ("llama", "mqa", {"use_rslora": True, "lora_alpha": 5}),
    ("llama", "gqa", {"alpha_pattern": {"o_proj": 3, "layers.2.mlp.*": 20}}),
    ("llama", "gqa", {"target_modules": r".*layers\.\d+\.(self_attn\.[qv]_proj|mlp\.down_proj)"}),
    ("llama", "gqa", {"target_modules": "all-linear"}),
    ("phi3", "mqa", {"target_modules": "all-linear", "rank_pattern": {"qkv_proj": 6}}),
    ("llama", "gqa", {"target_modules": [*SEVEN, "lm_head"]}),
    ("llama", "gqa", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 3]}),
]


@pytest.mark.parametrize(("model_type", "attention", "settings"), VARIANTS)
def test_base_with_recovered_adapter_equals_base_merged_by_hand(
    tmp_path: Path, model_type: str, attention: str, settings: dict[str, Any]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, attention=attention)
    base = save_base(tmp_path / "base", config)
    plan = half_plan(architecture_of(config))
    release = save_metadata_release(tmp_path / "release", config, plan)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = _train_nothing(tmp_path / "adapter", model, plan, release, settings)
    trained = read_adapter(adapter)
    recover(adapter, tmp_path / "out", dtype="float32")
    tokens = torch.randint(3, 53, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(tokens).logits
        with_adapter = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), tmp_path / "out", torch_device="cpu"
        )
        found = with_adapter(tokens).logits
        for module, pair in trained.pairs.items():
            rows, columns = kept_positions(config, module, plan)
            delta = torch.from_numpy(pair.scale * (pair.lora_B @ pair.lora_A))
            model.get_submodule(module).weight[np.ix_(rows, columns)] += delta
        expected = model(tokens).logits

    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)  # fp32: the same sums in another order


def _train_nothing(folder: Path, model: Any, plan: Plan, release: Path, settings: dict[str, Any]) -> Path:
    """Let PEFT resolve targets, ranks and alphas on the full model, then save random factors of the pruned shapes."""
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    peft_model = get_peft_model(deepcopy(model), LoraConfig(**options))
    peft_model.peft_config["default"].base_model_name_or_path = str(release)
    ranks = {
        name.removeprefix(PREFIX): module.r["default"]
        for name, module in peft_model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert ranks
    peft_model.peft_config["default"].save_pretrained(folder)
    pruned = pruned_module_shapes(plan)
    tensors = random_factors({module: pruned[module] for module in ranks}, rank=ranks, seed=7)
    scaled = {name: value * np.float32(0.1) for name, value in tensors.items()}
    saved = json.loads((folder / "adapter_config.json").read_text())
    save_adapter(folder, scaled, **{"targets": saved["target_modules"], **saved})
    return folder


# Closed to what does not fit.


def refused(case: Case, kind: type[LoramError], match: str, adapter: Path, **options: Any) -> None:
    """Assert that recovery fails with one class and message, and leaves nothing behind."""
    before = sorted(path.relative_to(case.folder) for path in case.folder.rglob("*"))
    with pytest.raises(kind, match=match):
        recover(adapter, case.out, **options)
    assert sorted(path.relative_to(case.folder) for path in case.folder.rglob("*")) == before


def test_an_adapter_of_other_shapes_is_refused_with_both_numbers(case: Case) -> None:
    other = random_plan(case.plan.architecture, seed=5)
    release = save_metadata_release(case.folder / "other", case.config, other)
    kept, found = other.kept[1]["channels"].size, case.plan.kept[1]["channels"].size
    assert kept != found

    match = rf"lora_A of 'model.layers.1.mlp.down_proj'.*has {found} columns, the release other keeps {kept} of 37"
    refused(case, PlanMismatchError, match, case.adapter(base=None), release=release)


def test_an_adapter_of_another_plan_of_equal_shapes_is_refused(case: Case) -> None:
    other = half_plan(case.plan.architecture, seed=1)
    release = save_metadata_release(case.folder / "other", case.config, other)
    assert other.layers == case.plan.layers

    refused(case, PlanMismatchError, other.digest[:12], case.adapter(), release=release)


def test_a_recorded_plan_digest_is_held_against_the_release(case: Case) -> None:
    adapter = case.adapter()
    (adapter / "loram.json").write_text(json.dumps({"plan_sha256": "f" * 64}))
    refused(case, PlanMismatchError, "ffffffffffff", adapter)

    (adapter / "loram.json").write_text(json.dumps({"plan_sha256": case.plan.digest}))
    assert recover(adapter, case.out).base_id == "org/base"


def test_a_release_that_the_adapter_names_but_is_gone_is_warned_of(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = case.adapter(base="org/gone")
    refused(case, AccessError, "org/gone", adapter)

    assert recover(adapter, case.out, release=case.release).base_id == "org/base"
    assert "cannot be compared" in caplog.text
    assert "org/gone" in caplog.text


def test_a_release_folder_that_was_moved_is_told_so_and_not_looked_for_on_the_hub(case: Case) -> None:
    adapter = case.adapter(base=case.folder / "moved")

    refused(case, CheckpointError, "moved", adapter)


def test_an_adapter_put_on_another_release_of_equal_shapes_is_refused_live(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    from loram_hub.auto import AutoLoramModel
    from loram_hub.pruning import prune

    base = save_base(tmp_path / "base", tiny_config())
    for name, seed in (("first", 0), ("other", 1)):
        prune(base, tmp_path / name, pruning_ratio=0.5, importance="random", keep_first=1, keep_last=1, seed=seed)
    trained = get_peft_model(
        AutoLoramModel.from_pretrained(tmp_path / "first"), LoraConfig(r=2, target_modules=list(SEVEN))
    )
    trained.save_pretrained(str(tmp_path / "adapter"))

    mixed = PeftModel.from_pretrained(AutoLoramModel.from_pretrained(tmp_path / "other"), str(tmp_path / "adapter"))

    with pytest.raises(PlanMismatchError, match="other channel groups"):
        recover(mixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_live_model_with_a_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from loram_hub.auto import AutoLoramModel

    model = AutoLoramModel.from_pretrained(small_release(tmp_path), dtype="float32")
    model.resize_token_embeddings(60, mean_resizing=False)
    live = get_peft_model(model, LoraConfig(r=2, target_modules=list(SEVEN)))

    with pytest.raises(UnsupportedAdapterError, match="60 rows"):
        recover(live, tmp_path / "out")


def test_a_recovered_adapter_is_not_recovered_again(case: Case) -> None:
    recover(case.adapter(), case.folder / "done")
    refused(case, UnsupportedAdapterError, "already recovered", case.folder / "done", release=case.release)

    (case.folder / "done" / "loram.json").unlink()
    refused(case, UnsupportedAdapterError, "has its full size", case.folder / "done", release=case.release)


def test_a_module_outside_the_model_is_refused(case: Case) -> None:
    for module in ("model.layers.9.mlp.up_proj", "model.layers.0.mlp.experts", "foo.q_proj", "model.norm"):
        case.tensors = random_factors({module: (24, 24)})
        refused(case, PlanMismatchError, module, case.adapter(targets=None))


def test_a_missing_target_is_refused(case: Case) -> None:
    for factor in "AB":
        del case.tensors[f"{PREFIX}model.layers.3.self_attn.v_proj.lora_{factor}.weight"]

    refused(case, UnsupportedAdapterError, r"layers.3.self_attn.v_proj'.*missing", case.adapter())


def test_a_half_pair_is_refused(case: Case) -> None:
    del case.tensors[f"{PREFIX}model.layers.3.self_attn.v_proj.lora_B.weight"]

    refused(case, UnsupportedAdapterError, "no lora_B", case.adapter())


def test_nan_is_refused(case: Case) -> None:
    case.tensors[f"{PREFIX}model.layers.3.self_attn.v_proj.lora_B.weight"][1, 1] = np.nan

    refused(case, VerificationError, "NaN", case.adapter())


def test_overflow_is_refused_halfway_and_nothing_stays(case: Case) -> None:
    case.tensors[f"{PREFIX}model.layers.3.self_attn.v_proj.lora_B.weight"][1, 1] = 1e20

    match = r"lora_B of 'model\.layers\.3\.self_attn\.v_proj' does not fit"
    refused(case, VerificationError, match, case.adapter(), dtype="float16")


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}]
)
def test_other_variants_are_refused(case: Case, changes: dict[str, Any]) -> None:
    refused(case, UnsupportedAdapterError, next(iter(changes)), case.adapter(**changes))


def test_foreign_tensors_are_refused(case: Case) -> None:
    case.tensors[f"{PREFIX}lm_head.weight"] = np.zeros((53, 24), np.float32)

    refused(case, UnsupportedAdapterError, "vocabulary was resized", case.adapter())


def test_truncated_and_pickled_files_are_refused(case: Case) -> None:
    adapter = case.adapter()
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(case, VerificationError, "not a sound", adapter)

    weights.rename(adapter / "adapter_model.bin")
    refused(case, CheckpointError, "pickle", adapter)


def test_an_existing_folder_is_replaced_only_on_request(case: Case) -> None:
    case.out.mkdir()
    (case.out / "precious").write_text("x")
    refused(case, InvalidRequestError, "already exists", case.adapter())

    recover(case.adapter(), case.out, overwrite=True)
    assert not (case.out / "precious").exists()


def test_a_damaged_release_is_refused(case: Case) -> None:
    adapter = case.adapter()
    mask = case.release / "mask_index.safetensors"
    sound = mask.read_bytes()
    mask.write_bytes(sound[:-4] + b"\x00\x00\x00\x00")
    refused(case, VerificationError, "changed", adapter)

    mask.unlink()
    refused(case, CheckpointError, "no release here", adapter)


@pytest.mark.parametrize("base_id", ["/home/me/model", "../model", "a/b/c", "C:\\model", "", "./model"])
def test_a_base_that_is_a_path_never_reaches_the_adapter(case: Case, base_id: str) -> None:
    manifest = case.release / "loram.json"
    values = json.loads(manifest.read_text())
    del values["sha256"]
    values["base"]["id"] = base_id
    manifest.write_text(seal(values))

    refused(case, VerificationError, r"names its base|has base\.id", case.adapter())


def test_bad_arguments_are_refused(case: Case) -> None:
    refused(case, InvalidRequestError, "does not say which release", case.adapter(base=None))
    refused(case, InvalidRequestError, "dtype is 'int8'", case.adapter(), dtype="int8")
    refused(case, CheckpointError, "neither an existing folder nor a Hub id", case.folder / "not" / "there")
    with pytest.raises(InvalidRequestError, match="a PeftModel is needed"):
        recover(7, case.out)  # type: ignore[arg-type]  # what a caller without a type checker does


# The lm_head, tied and not.


@pytest.mark.parametrize("tied", [False, True])
def test_factors_of_the_lm_head_pass_through(tmp_path: Path, tied: bool) -> None:
    case = Case(tmp_path, tie_word_embeddings=tied)
    case.tensors = random_factors(pruned_module_shapes(case.plan), rank=RANK)
    recover(case.adapter(targets=[*SEVEN, "lm_head"]), case.out, dtype="float32")
    recovered = load_file(case.out / "adapter_model.safetensors")

    assert json.loads((case.out / "adapter_config.json").read_text())["target_modules"] == sorted([*SEVEN, "lm_head"])
    for factor in "AB":
        name = f"{PREFIX}lm_head.lora_{factor}.weight"
        assert recovered[name].tobytes() == case.tensors[name].tobytes()


def test_an_lm_head_of_another_vocabulary_is_refused(case: Case) -> None:
    case.tensors = random_factors(pruned_module_shapes(case.plan) | {"lm_head": (57, 24)}, rank=RANK)

    refused(case, PlanMismatchError, r"lm_head'.*57 rows.*53 of 53", case.adapter(targets=[*SEVEN, "lm_head"]))


# Live models and the Hub cache.


def cached(case: Case, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Move the case's release to where huggingface_hub would have downloaded it."""
    from huggingface_hub import constants

    cache = case.folder / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--org--release"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    return case.release.rename(repository / "snapshots" / ("a" * 40))


def test_a_release_in_the_hub_cache_is_named_by_id_and_commit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(case, monkeypatch)
    for number, name in enumerate(("org/release", snapshot)):
        recover(case.adapter(base=name), case.folder / str(number))
        record = json.loads((case.folder / str(number) / "loram.json").read_text())
        assert record["release"] == {"id": "org/release", "commit": "a" * 40, "plan_sha256": case.plan.digest}
    assert digest_of(case.folder / "0") == digest_of(case.folder / "1")


def test_the_revision_that_the_adapter_records_is_held_against_a_given_release(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(case, monkeypatch)
    other = half_plan(case.plan.architecture, seed=1)
    release = save_metadata_release(case.folder / "other", case.config, other)
    adapter = case.adapter(base="org/release", revision="a" * 40)

    refused(case, PlanMismatchError, other.digest[:12], adapter, release=release)


def small_release(folder: Path) -> Path:
    from loram_hub.pruning import prune

    base = save_base(folder / "base", tiny_config())
    prune(base, folder / "release", pruning_ratio=0.5, importance="random", keep_first=1, keep_last=1)
    return folder / "release"


@pytest.mark.parametrize("targets", [list(SEVEN), [*SEVEN[:5], "lm_head"], "all-linear"])
def test_a_live_model_and_its_saved_adapter_recover_to_the_same_bytes(tmp_path: Path, targets: list[str] | str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from loram_hub.auto import AutoLoramModel

    model = AutoLoramModel.from_pretrained(small_release(tmp_path), dtype="float32")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=True, rank_pattern={"q_proj": 6})
    live = get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in live.parameters() if p.requires_grad], lr=10.0)
    tokens = torch.arange(3, 35).reshape(2, 16)
    for _ in range(2):  # in the first step A has no gradient, for B is zero
        live(tokens, labels=tokens).loss.backward()
        optimizer.step()
    live.save_pretrained(tmp_path / "saved", save_embedding_layers=False)

    first = recover(live, tmp_path / "live")
    second = recover(tmp_path / "saved", tmp_path / "from-folder")

    assert digest_of(tmp_path / "live") == digest_of(tmp_path / "from-folder")
    assert (first.base_id, first.modules, first.rank) == ("base", second.modules, 6)
    trained = read_adapter(tmp_path / "live")
    assert all(np.any(pair.lora_B) for pair in trained.pairs.values())


def test_a_live_model_is_refused_for_another_release(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from loram_hub.auto import AutoLoramModel

    model = AutoLoramModel.from_pretrained(small_release(tmp_path), dtype="float32")
    live = get_peft_model(model, LoraConfig(r=2, target_modules=list(SEVEN)))
    other = save_metadata_release(tmp_path / "other", tiny_config(), half_plan(architecture_of(tiny_config()), seed=3))

    with pytest.raises(PlanMismatchError, match="other channel groups"):
        recover(live, tmp_path / "out", release=other)
    live.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    live.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedAdapterError, match="active"):
        recover(live, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_dora_on_a_live_model_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from loram_hub.auto import AutoLoramModel

    model = AutoLoramModel.from_pretrained(small_release(tmp_path), dtype="float32")
    live = get_peft_model(model, LoraConfig(r=2, target_modules=list(SEVEN), use_dora=True))

    with pytest.raises(UnsupportedAdapterError, match="DoRA"):
        recover(live, tmp_path / "out")
