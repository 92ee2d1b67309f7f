"""A release opened with AutoLoramModel is a stock transformers model to everyone who takes one."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from builders import MODEL_TYPES, save_base, save_tokenizer, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from loram_hub.auto import AutoLoramModel, supported_dtype
from loram_hub.errors import CheckpointError, IncompatibleError, InvalidRequestError, VerificationError
from loram_hub.pruning import prune
from loram_hub.release import verify
from loram_hub.seals import SEAL, seal

IDS = torch.randint(3, 53, (2, 12), generator=torch.Generator().manual_seed(1))
STRUCTURE = {"pruning_ratio": 0.6, "keep_first": 1, "keep_last": 1, "importance": "random"}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an NF4 and an unquantized release of every family, `{family}-nf4` and `{family}-bf16`."""
    folder = tmp_path_factory.mktemp("releases")
    for family in MODEL_TYPES:
        base = save_base(folder / family, tiny_config(family, layers=3), dtype="bfloat16")
        save_tokenizer(base)
        prune(base, folder / f"{family}-nf4", quantize=True, **STRUCTURE)
        prune(base, folder / f"{family}-bf16", **STRUCTURE)
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_it_trains_with_peft_generates_and_survives_saving(
    releases: Path, tmp_path: Path, family: str, kind: str
) -> None:
    model = AutoLoramModel.from_pretrained(releases / f"{family}-{kind}", dtype=torch.float32)
    before = logits(model)
    assert torch.isfinite(before).all()
    assert model.generate(IDS[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 7)

    model.save_pretrained(tmp_path / "saved")
    verify(tmp_path / "saved")
    assert torch.equal(logits(AutoLoramModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)), before)

    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    tuned.train()
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for n, p in tuned.named_parameters() if "lora_B" in n]
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == {
        n for n, _ in tuned.named_parameters() if "lora_" in n
    }


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_stock_transformers_refuses_a_release_loudly(releases: Path, family: str, kind: str) -> None:
    with pytest.raises(ValueError, match=f"loram_{family}"):
        AutoModelForCausalLM.from_pretrained(releases / f"{family}-{kind}")


def test_the_tokenizer_of_a_release_opens_with_stock_transformers(releases: Path) -> None:
    assert AutoTokenizer.from_pretrained(releases / "llama-nf4")("w7 w9")["input_ids"] == [7, 9]


def test_it_is_the_bases_model_type_to_peft_and_a_release_on_disk(releases: Path, tmp_path: Path) -> None:
    model = AutoLoramModel.from_pretrained(releases / "llama-nf4")

    tuned = get_peft_model(model, LoraConfig(r=2))  # looks its default targets up by model_type
    model.config.save_pretrained(tmp_path)

    assert tuned.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    assert model.config.model_type == "llama"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "loram_llama"
    assert model.is_loaded_in_4bit


def test_the_release_hangs_on_the_model(releases: Path) -> None:
    model = AutoLoramModel.from_pretrained(releases / "llama-nf4")

    assert model.loram.manifest.base.id == "llama"
    assert get_peft_model(model, LoraConfig(r=2)).get_base_model().loram is model.loram
    sizes = model.loram.plan.layers[1]
    assert model.model.layers[1].mlp.up_proj.out_features == sizes.channels < 37
    assert model.model.layers[1].self_attn.k_proj.out_features == sizes.kv_heads * 10 < 30
    assert model.model.layers[0].mlp.up_proj.out_features == 37


def test_an_adapter_saved_by_peft_opens_on_the_release_again(releases: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned = get_peft_model(
        AutoLoramModel.from_pretrained(releases / "qwen3-nf4", dtype=torch.float32),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.save_pretrained(tmp_path)

    again = PeftModel.from_pretrained(
        AutoLoramModel.from_pretrained(releases / "qwen3-nf4", dtype=torch.float32), tmp_path
    )

    with torch.no_grad():
        assert torch.equal(tuned.eval()(IDS).logits, again.eval()(IDS).logits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        releases / "qwen3-nf4"
    )


@pytest.mark.slow
def test_trl_trains_it_with_gradient_checkpointing(releases: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's deprecations
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_dict({"prompt": ["w5 w6 w7"] * 8, "completion": [" w8 w9"] * 8})
        trainer = SFTTrainer(
            AutoLoramModel.from_pretrained(releases / "llama-nf4", dtype=torch.float32),
            args=SFTConfig(
                output_dir=str(tmp_path / "out"),
                max_steps=12,
                per_device_train_batch_size=8,
                learning_rate=0.1,
                report_to=[],
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                logging_steps=1,
            ),
            train_dataset=data,
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.75 * losses[0]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].shape[0] < 37


def test_attention_implementation_can_be_changed_after_loading(releases: Path) -> None:
    model = AutoLoramModel.from_pretrained(releases / "phi3-bf16", dtype=torch.float32, attn_implementation="sdpa")
    expected = logits(model)

    model.set_attn_implementation("eager")

    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_sharded_releases_and_device_maps_load_alike(releases: Path, tmp_path: Path, kind: str) -> None:
    model = AutoLoramModel.from_pretrained(releases / f"llama-{kind}", dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2

    for device_map in (None, "cpu", {"": "cpu"}, {"": torch.device("cpu")}):
        sharded = AutoLoramModel.from_pretrained(tmp_path / "sharded", dtype=torch.float32, device_map=device_map)
        assert torch.equal(logits(sharded), logits(model))


def test_the_compute_type_follows_the_device(releases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

        model = AutoLoramModel.from_pretrained(releases / "llama-nf4")

        assert supported_dtype("cpu") == model.dtype == expected
        assert model.model.layers[1].mlp.up_proj.compute_dtype == expected
        assert torch.isfinite(logits(model)).all()


def test_dtype_can_be_chosen_by_name(releases: Path) -> None:
    assert AutoLoramModel.from_pretrained(releases / "llama-bf16", dtype="float32").dtype == torch.float32
    with pytest.raises(InvalidRequestError, match="flaot32"):
        AutoLoramModel.from_pretrained(releases / "llama-bf16", dtype="flaot32")


def test_a_base_model_an_adapter_and_an_empty_folder_are_no_releases(releases: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no LoRAM release"):
        AutoLoramModel.from_pretrained(releases / "llama")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        AutoLoramModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="Hub id"):
        AutoLoramModel.from_pretrained(tmp_path / "not" / "there" / "at all")


def test_a_release_that_was_altered_is_refused_before_a_tensor_is_built(releases: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(releases / "llama-nf4", changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}}))

    with pytest.raises(VerificationError, match=r"config\.json"):
        AutoLoramModel.from_pretrained(changed)


def test_weights_of_another_plan_are_refused(releases: Path, tmp_path: Path) -> None:
    other = prune(releases / "llama", tmp_path / "other", quantize=True, **(STRUCTURE | {"pruning_ratio": 0.3}))
    mixed = tmp_path / "mixed"
    shutil.copytree(releases / "llama-nf4", mixed)
    shutil.copyfile(other.folder / "model.safetensors", mixed / "model.safetensors")
    manifest = json.loads((mixed / "loram.json").read_text())
    manifest["files"]["model.safetensors"] = json.loads((other.folder / "loram.json").read_text())["files"][
        "model.safetensors"
    ]
    (mixed / "loram.json").write_text(seal({key: value for key, value in manifest.items() if key != SEAL}))

    with pytest.raises(IncompatibleError, match="planned"):
        AutoLoramModel.from_pretrained(mixed)


def test_pushing_from_save_pretrained_is_refused_and_the_class_is_not_instantiated(
    releases: Path, tmp_path: Path
) -> None:
    model = AutoLoramModel.from_pretrained(releases / "llama-bf16")

    with pytest.raises(InvalidRequestError, match="folder first"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    with pytest.raises(OSError, match="from_pretrained"):
        AutoLoramModel()

    assert not (tmp_path / "out").exists()


def test_a_release_with_an_adapter_on_it_is_not_saved_as_a_release(releases: Path, tmp_path: Path) -> None:
    tuned = get_peft_model(AutoLoramModel.from_pretrained(releases / "llama-bf16"), LoraConfig(r=2))

    with pytest.raises(InvalidRequestError, match=r"q_proj is wrapped by a PEFT adapter.*unload"):
        tuned.get_base_model().save_pretrained(tmp_path / "out")

    assert not (tmp_path / "out").exists()
    tuned.unload().save_pretrained(tmp_path / "out")
    assert verify(tmp_path / "out")


def test_an_adapter_in_the_release_folder_is_refused_instead_of_loaded_along(releases: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(releases / "llama-bf16", mixed)
    model = get_peft_model(AutoLoramModel.from_pretrained(mixed), LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(mixed)

    with pytest.raises(VerificationError, match=r"adapter_config\.json"):
        AutoLoramModel.from_pretrained(mixed)


def test_weights_that_the_manifest_does_not_list_are_refused(releases: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(releases / "llama-bf16", mixed)
    manifest = json.loads((mixed / "loram.json").read_text())
    del manifest["files"]["model.safetensors"]
    (mixed / "loram.json").write_text(seal({key: value for key, value in manifest.items() if key != SEAL}))

    with pytest.raises(VerificationError, match=r"holds model\.safetensors, which its manifest does not list"):
        AutoLoramModel.from_pretrained(mixed)


def test_a_saved_model_verifies_with_a_tokenizer_beside_it_and_lists_no_one_elses_files(
    releases: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_bytes(b"state")

    AutoLoramModel.from_pretrained(releases / "llama-nf4").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(releases / "llama-nf4").save_pretrained(tmp_path)

    shutil.rmtree(tmp_path / "checkpoint-1")
    verify(tmp_path)
    listed = json.loads((tmp_path / "loram.json").read_text())["files"]
    assert set(listed) == {"config.json", "generation_config.json", "mask_index.safetensors", "model.safetensors"}


def test_a_model_quantized_in_another_way_is_not_saved_as_a_release(releases: Path, tmp_path: Path) -> None:
    fp4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    model = AutoLoramModel.from_pretrained(releases / "llama-bf16", quantization_config=fp4)

    with pytest.raises(InvalidRequestError, match="NF4"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_survives_pickling_and_copying(releases: Path) -> None:
    model = AutoLoramModel.from_pretrained(releases / "phi3-bf16", dtype=torch.float32)

    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(again), logits(model))
        assert again.loram.plan.digest == model.loram.plan.digest
    assert pickle.loads(pickle.dumps(model.config)).to_json_string() == model.config.to_json_string()


def test_arguments_that_a_release_decides_are_refused_and_old_names_understood(releases: Path) -> None:
    old = AutoLoramModel.from_pretrained(releases / "llama-bf16", torch_dtype="torch.float16")

    assert old.dtype == torch.float16
    for name, value in (("config", old.config), ("output_loading_info", True), ("trust_remote_code", True)):
        with pytest.raises(InvalidRequestError, match=name):
            AutoLoramModel.from_pretrained(releases / "llama-bf16", **{name: value})
    with pytest.raises(InvalidRequestError, match="int8"):
        AutoLoramModel.from_pretrained(releases / "llama-bf16", dtype="int8")


def test_adapters_name_a_local_release_by_its_whole_path(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(releases)

    get_peft_model(AutoLoramModel.from_pretrained("llama-nf4"), LoraConfig(r=2)).save_pretrained(tmp_path)

    named = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(releases / "llama-nf4")


def test_every_file_of_a_release_has_the_usual_permissions(releases: Path) -> None:
    modes = {path.name: path.stat().st_mode for path in (releases / "llama-nf4").iterdir()}

    assert modes["mask_index.safetensors"] == modes["config.json"]
