"""Merging: equal to PEFT's own merge, written tensor by tensor, refused where it would be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    MODEL_TYPES,
    SEVEN,
    half_plan,
    projections,
    random_factors,
    save_adapter,
    save_base,
    save_metadata_release,
    tiny_config,
)
from safetensors.torch import load_file, save_file

from loram_hub import checkpoint, merging
from loram_hub.architecture import architecture_of, layer_tensor
from loram_hub.errors import (
    CheckpointError,
    IncompatibleError,
    InvalidRequestError,
    LoramError,
    PlanMismatchError,
    UnsupportedAdapterError,
    VerificationError,
)
from loram_hub.files import sha256_of
from loram_hub.merging import merge
from loram_hub.recovery import recover

# PEFT 0.21 asks transformers 5.23 for an attribute that it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def full_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every projection of the base, and of the lm_head."""
    architecture = architecture_of(config)
    shapes: dict[str, tuple[int, int]] = {"lm_head": (architecture.vocab_size, architecture.hidden_size)}
    for layer in range(architecture.num_hidden_layers):
        for weight in architecture.projections:
            rows, columns = architecture.shape(weight, architecture.whole_layer)
            shapes[layer_tensor(layer, weight.module)] = (rows, columns)
    return shapes


def save_full_adapter(folder: Path, config: dict[str, Any], *, head: bool = False, **settings: Any) -> Path:
    shapes = {module: shape for module, shape in full_shapes(config).items() if head or module != "lm_head"}
    tensors = {name: value * np.float32(0.1) for name, value in random_factors(shapes, seed=3).items()}
    return save_adapter(folder, tensors, **settings)


def merged_by_peft(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, adapter, torch_device="cpu").merge_and_unload()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_merging_gives_what_peft_merges(tmp_path: Path, model_type: str) -> None:
    config = tiny_config(model_type)
    base = save_base(tmp_path / "base", config)
    plan = half_plan(architecture_of(config))
    tensors = {name: value * np.float32(0.1) for name, value in random_factors(projections(plan)).items()}
    release = save_metadata_release(
        tmp_path / "release", config, plan, commit=None, config_sha256=sha256_of(base / "config.json")
    )
    recover(save_adapter(tmp_path / "pruned", tensors, base=release), tmp_path / "adapter", dtype="float32")

    result = merge(base, tmp_path / "adapter", tmp_path / "merged")

    expected = merged_by_peft(base, tmp_path / "adapter").state_dict()
    found, before = load_file(tmp_path / "merged" / "model.safetensors"), load_file(base / "model.safetensors")
    assert set(found) == set(before)
    assert (result.tensors, result.merged) == (len(before), len(tensors) // 2)
    assert result.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in found.values())
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, before[name])}
    assert {f"{name.removeprefix('base_model.model.').split('.lora_')[0]}.weight" for name in tensors} == changed
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)  # fp32, sums in another order


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"lora_alpha": 3, "alpha_pattern": {"q_proj": 20}},
        {"targets": [*SEVEN]},
        {"targets": r"model\.layers.*_proj"},
    ],
)
def test_any_full_size_adapter_can_be_merged(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    adapter = save_full_adapter(tmp_path / "adapter", config, **settings)

    merge(base, adapter, tmp_path / "merged")

    expected = merged_by_peft(base, adapter).state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT, of the case tested here
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_lm_head_is_merged_and_untied(tmp_path: Path, tied: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = tiny_config(tie_word_embeddings=tied)
    base = save_base(tmp_path / "base", config)
    adapter = save_full_adapter(tmp_path / "adapter", config, head=True)
    tokens = torch.arange(3, 40).reshape(1, -1)

    result = merge(base, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(result.folder)
    with torch.no_grad():
        found = merged(tokens).logits
        applied = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, torch_device="cpu")
        expected = applied(tokens).logits

    assert merged.config.tie_word_embeddings is False
    assert "lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_weights_are_rounded_once_to_the_stored_type(tmp_path: Path) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config, dtype="bfloat16")
    adapter = save_full_adapter(tmp_path / "adapter", config)
    merge(base, adapter, tmp_path / "merged")
    name = "model.layers.1.mlp.down_proj"
    factors = load_file(adapter / "adapter_model.safetensors")
    delta = 2.0 * (
        factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]
    )
    expected = (load_file(base / "model.safetensors")[f"{name}.weight"].float() + delta).bfloat16()

    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"], expected)


def test_another_type_can_be_asked_for(tmp_path: Path) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    result = merge(base, save_full_adapter(tmp_path / "adapter", config), tmp_path / "merged", dtype="bfloat16")
    found = load_file(tmp_path / "merged" / "model.safetensors")

    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert result.nbytes == sum(2 * tensor.numel() for tensor in found.values())


def test_rows_are_computed_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    adapter = save_full_adapter(tmp_path / "adapter", config)
    merge(base, adapter, tmp_path / "whole")

    monkeypatch.setattr(merging, "_BLOCK_ELEMENTS", 24 * 5)
    merge(base, adapter, tmp_path / "blocks")

    whole, blocks = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "blocks"))
    for name, tensor in whole.items():
        torch.testing.assert_close(blocks[name], tensor, atol=1e-6, rtol=1e-6)  # matrix products of other sizes


def test_small_files_come_along_and_code_and_card_do_not(tmp_path: Path) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"auto_map": {"AutoModel": "evil.Model"}}))
    for name in ("tokenizer.json", "LICENSE", "chat_template.jinja", "README.md", "evil.py", "pytorch_model.bin"):
        (base / name).write_text("{}")
    merge(base, save_full_adapter(tmp_path / "adapter", config), tmp_path / "merged")

    found = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"tokenizer.json", "LICENSE", "chat_template.jinja", "generation_config.json"} <= found
    assert not {"README.md", "evil.py", "pytorch_model.bin", "adapter_config.json"} & found
    assert "auto_map" not in (tmp_path / "merged" / "config.json").read_text()


def test_a_sharded_base_is_merged_shard_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    half = len(weights) // 2
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    parts = dict(zip(names, (list(weights)[:half], list(weights)[half:]), strict=True))
    for name, tensors in parts.items():
        save_file({tensor: weights[tensor] for tensor in tensors}, base / name)
    index = {"weight_map": {tensor: name for name, tensors in parts.items() for tensor in tensors}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    merge(base, save_full_adapter(tmp_path / "adapter", config), tmp_path / "merged")

    with checkpoint.Checkpoint(tmp_path / "merged") as merged:
        assert merged.shapes == {name: tuple(tensor.shape) for name, tensor in weights.items()}


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    adapter = save_full_adapter(tmp_path / "adapter", config)

    dry = merge(base, adapter, tmp_path / "merged", dry_run=True)

    assert not (tmp_path / "merged").exists()
    assert dry == merge(base, adapter, tmp_path / "merged")


def refused(folder: Path, kind: type[LoramError], match: str, base: Path, adapter: Path, **options: Any) -> None:
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    with pytest.raises(kind, match=match):
        merge(base, adapter, folder / "merged", **options)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


def test_an_adapter_that_was_not_recovered_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    tensors = random_factors(projections(half_plan(architecture_of(config))))
    adapter = save_adapter(tmp_path / "adapter", tensors)

    refused(tmp_path, PlanMismatchError, "run `loram recover` on it first", base, adapter)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_config())
    deeper = save_full_adapter(tmp_path / "deeper", tiny_config(layers=5))
    fused = save_full_adapter(tmp_path / "fused", tiny_config("phi3"))

    refused(tmp_path, PlanMismatchError, r"'model.layers.4.*does not have", base, deeper)
    refused(tmp_path, PlanMismatchError, "gate_up_proj.*does not have", base, fused)


def test_an_incomplete_or_damaged_adapter_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    shapes = full_shapes(config)
    del shapes["lm_head"], shapes["model.layers.2.mlp.up_proj"]
    tensors = random_factors(shapes)
    partial = save_adapter(tmp_path / "partial", tensors, targets=list(SEVEN))
    refused(tmp_path, UnsupportedAdapterError, r"model.layers.2.mlp.up_proj'.*missing", base, partial)

    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"][0, 0] = np.nan
    refused(tmp_path, VerificationError, "NaN", base, save_adapter(tmp_path / "nan", tensors))
    refused(tmp_path, UnsupportedAdapterError, "DoRA", base, save_adapter(tmp_path / "dora", tensors, use_dora=True))


def test_a_base_that_cannot_be_merged_into_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    adapter = save_full_adapter(tmp_path / "adapter", config)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    refused(tmp_path, IncompatibleError, "quantized", base, adapter)

    (base / "config.json").write_text(json.dumps(values | {"model_type": "loram_llama"}))
    refused(tmp_path, IncompatibleError, "LoRAM release", base, adapter)
    refused(tmp_path, CheckpointError, "looks like a PEFT adapter", adapter, adapter)


def test_a_torn_base_leaves_nothing_behind(tmp_path: Path) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    adapter = save_full_adapter(tmp_path / "adapter", config)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])

    refused(tmp_path, VerificationError, "not a sound safetensors file", base, adapter)


def test_overflow_and_bad_arguments_are_refused(tmp_path: Path) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    adapter = save_full_adapter(tmp_path / "adapter", config, lora_alpha=100_000_000)
    refused(tmp_path, VerificationError, r"overflows torch\.float16", base, adapter, dtype="float16")
    refused(tmp_path, InvalidRequestError, "dtype is 'int8'", base, adapter, dtype="int8")

    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").write_text("x")
    refused(tmp_path, InvalidRequestError, "already exists", base, adapter)


def test_a_weight_that_no_adapter_touches_may_not_overflow_the_asked_type_either(tmp_path: Path) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_full_adapter(tmp_path / "adapter", config)

    with pytest.raises(VerificationError, match=r"model\.norm\.weight.*overflows"):
        merge(base, adapter, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_merging_over_an_input_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    adapter = save_full_adapter(tmp_path / "adapter", config)

    for out in (base, adapter):
        with pytest.raises(InvalidRequestError, match="overlap"):
            merge(base, adapter, out, overwrite=True)
    assert (adapter / "adapter_model.safetensors").exists()


def test_another_state_of_the_base_is_refused_unless_allowed(tmp_path: Path) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "base", config)
    plan = half_plan(architecture_of(config))
    release = save_metadata_release(tmp_path / "release", config, plan, config_sha256="1" * 64)
    recover(save_adapter(tmp_path / "pruned", random_factors(projections(plan)), base=release), tmp_path / "adapter")

    with pytest.raises(IncompatibleError, match=r"config\.json has the SHA-256 111111111111"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert merge(base, tmp_path / "adapter", tmp_path / "merged", allow_base_mismatch=True).merged > 0


def test_a_snapshot_at_another_commit_than_the_adapters_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    base = save_base(tmp_path / "models--org--base" / "snapshots" / ("a" * 40), config)
    plan = half_plan(architecture_of(config))
    release = save_metadata_release(tmp_path / "release", config, plan, commit="b" * 40)
    recover(save_adapter(tmp_path / "pruned", random_factors(projections(plan)), base=release), tmp_path / "adapter")

    with pytest.raises(IncompatibleError, match=r"commit bbbbbbbbbbbb of its base; .* is at aaaaaaaaaaaa"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")
