"""Embedding and lm_head in less memory: the same model to whoever uses it, up to the rounding that was asked for."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import save_base, save_tokenizer, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback, set_seed

from loram_hub.auto import AutoLoramModel
from loram_hub.errors import IncompatibleError, InvalidRequestError
from loram_hub.estimation import options as estimated
from loram_hub.evaluation import memory_bytes
from loram_hub.lowmemory import MemoryOptions, MemorySavings, reduce_memory_
from loram_hub.lowmemory.host import HostEmbedding
from loram_hub.lowmemory.rows import Int8Rows, Nf4Rows
from loram_hub.lowmemory.weight import CompressedWeight
from loram_hub.pruning import prune
from loram_hub.release.nf4 import dynamic_table, nf4_table

IDS = torch.randint(3, 53, (2, 12), generator=torch.Generator().manual_seed(1))
UNTIED = ("llama", "qwen2", "gemma2", "gemma3_text")
"""Plain, with biases, with soft-capped logits, with a scaled embedding."""
TIED = ("llama", "gemma3_text")
OPTIONS = {
    "cpu": MemoryOptions(embedding="cpu"),
    "int8": MemoryOptions(embedding="int8"),
    "head-int8": MemoryOptions(lm_head="int8"),
    "head-nf4": MemoryOptions(lm_head="nf4"),
    "cpu+nf4": MemoryOptions(embedding="cpu", lm_head="nf4"),
    "int8+int8": MemoryOptions(embedding="int8", lm_head="int8"),
    "int8+nf4": MemoryOptions(embedding="int8", lm_head="nf4"),
}
TOGETHER = ("cpu+nf4", "int8+int8", "int8+nf4")
LARGEST_LOSS_CHANGE = {"int8": 0.005, "nf4": 0.05}
"""Relative, of the loss of a model with random weights; its logits are not small."""
LARGEST_GRADIENT_CHANGE = {"int8": 0.05, "nf4": 0.35}
"""Relative, in the 2-norm over all of LoRA's gradients."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, `{family}` and `{family}-tied`, and their NF4 releases, `...-nf4`."""
    folder = tmp_path_factory.mktemp("models")
    for name in (*UNTIED, *(f"{family}-tied" for family in TIED)):
        family, _, tied = name.partition("-")
        config = tiny_config(family, layers=3, tie_word_embeddings=bool(tied))
        if family == "gemma2":
            config |= {"final_logit_softcapping": 3.0}  # low enough to bend the logits of these models
        save_tokenizer(save_base(folder / name, config))
        prune(
            folder / name, folder / f"{name}-nf4", pruning_ratio=0.6, keep_first=1, keep_last=1, importance="random",
            quantize=True,
        )  # fmt: skip
    return folder


def release(models: Path, name: str) -> PreTrainedModel:
    return AutoLoramModel.from_pretrained(models / f"{name}-nf4", dtype=torch.float32)


def base(models: Path, name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(models / name)


LOADERS: dict[str, Callable[[Path, str], PreTrainedModel]] = {"release": release, "base": base}


def int8_by_hand(weight: torch.Tensor) -> torch.Tensor:
    """Round each row to 255 even steps between plus and minus its largest magnitude."""
    values = weight.detach().numpy()
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    return torch.from_numpy(np.round(values / scale) * scale)


def nf4_by_hand(rows: Nf4Rows) -> torch.Tensor:
    """Decompress codes of NF4 with double quantization, by the tables of the format."""
    count = rows.shape[0] * rows.shape[1]
    packed = rows.codes.numpy().reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]
    nested = rows.nested_absmax.numpy().repeat(256)[: len(rows.absmax)]
    scales = dynamic_table()[rows.absmax.numpy()] * nested + rows.offset.numpy()
    return torch.from_numpy((nf4_table()[codes] * scales.repeat(64)[:count]).reshape(rows.shape))


def written_out(model: PreTrainedModel, options: MemoryOptions) -> PreTrainedModel:
    """Return the model that the options amount to, with plain weights in full precision."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    by_hand = {"int8": int8_by_hand, "nf4": lambda weight: nf4_by_hand(Nf4Rows.compress(weight))}
    changed = [
        by_hand.get(how, torch.clone)(layer.weight.detach())
        for layer, how in ((embedding, options.embedding), (head, options.lm_head))
    ]
    for layer, weight in zip((embedding, head), changed, strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


def adapted(model: PreTrainedModel, *, checkpointing: bool = False, **changes: Any) -> PeftModel:
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    set_seed(0)
    # Factors that are not zero, in a share that leaves the model's own weights in charge.
    settings = {"r": 2, "lora_alpha": 0.1, "init_lora_weights": False, "target_modules": "all-linear"}
    settings["task_type"] = "CAUSAL_LM"
    tuned = get_peft_model(model, LoraConfig(**(settings | changes)))
    assert isinstance(tuned, PeftModel)
    return tuned.train()


def step(tuned: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and all gradients of LoRA."""
    loss = tuned(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = [weight.grad for name, weight in tuned.named_parameters() if "lora_" in name]
    assert gradients
    assert all(gradient is not None for gradient in gradients)
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert torch.isfinite(found).all()
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("family", UNTIED)
def test_loss_and_gradients_are_those_of_the_decompressed_weights(models: Path, family: str, kind: str) -> None:
    options, load = OPTIONS[kind], base if family == "qwen2" else release
    model = load(models, family)
    reduce_memory_(model, options)

    loss, gradients = step(adapted(model))

    expected_loss, expected_gradients = step(adapted(written_out(load(models, family), options)))
    torch.testing.assert_close(loss, expected_loss, rtol=2e-6, atol=0)
    assert relative(gradients, expected_gradients) < 2e-6
    plain_loss, plain_gradients = step(adapted(load(models, family)))
    if kind == "cpu":
        assert torch.equal(loss, plain_loss)
        assert torch.equal(gradients, plain_gradients)
    else:
        coarsest = "nf4" if options.lm_head == "nf4" else "int8"
        assert relative(loss, plain_loss) < LARGEST_LOSS_CHANGE[coarsest]
        assert 0 < relative(gradients, plain_gradients) < LARGEST_GRADIENT_CHANGE[coarsest]


@pytest.mark.parametrize("kind", TOGETHER)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gradient_checkpointing_changes_nothing(models: Path, family: str, kind: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = release(models, family)
        reduce_memory_(model, OPTIONS[kind])
        found.append(step(adapted(model, checkpointing=checkpointing)))

    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", TOGETHER)
@pytest.mark.parametrize("family", TIED)
def test_a_tied_model_is_taken_apart_where_the_options_say_so(models: Path, family: str, kind: str) -> None:
    model = release(models, f"{family}-tied")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    before = memory_bytes(model)

    savings = reduce_memory_(model, OPTIONS[kind])
    model.tie_weights()  # what libraries call at any time

    assert memory_bytes(model) == before - savings.total
    is_shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert is_shared == (kind == "int8+int8")
    loss, gradients = step(adapted(model))
    expected_loss, expected_gradients = step(adapted(written_out(release(models, f"{family}-tied"), OPTIONS[kind])))
    torch.testing.assert_close(loss, expected_loss, rtol=2e-6, atol=0)
    assert relative(gradients, expected_gradients) < 2e-6


@pytest.mark.parametrize("kind", ["cpu", "int8", "head-int8", "head-nf4"])
def test_what_saves_nothing_in_a_tied_model_is_refused_and_changes_nothing(models: Path, kind: str) -> None:
    model = release(models, "llama-tied")

    with pytest.raises(InvalidRequestError, match="saves nothing: this model's lm_head is its embedding"):
        reduce_memory_(model, OPTIONS[kind])

    assert torch.equal(logits(model), logits(release(models, "llama-tied")))


@pytest.mark.parametrize("kind", OPTIONS)
def test_memory_falls_by_the_savings_and_to_the_estimate(models: Path, kind: str) -> None:
    model, options = release(models, "llama"), OPTIONS[kind]
    before = memory_bytes(model)

    savings = reduce_memory_(model, options)

    assert memory_bytes(model) == before - savings.total
    whole = 4 * 53 * 24
    left = options.device_bytes(vocab_size=53, hidden_size=24, tied=False, weight_bytes=4)
    assert savings == MemorySavings(embedding=whole - left[0], lm_head=whole - left[1])
    assert savings.total > 0


def test_the_estimate_of_a_70b_model_is_what_the_formats_take() -> None:
    sizes = {"vocab_size": 128_256, "hidden_size": 8_192, "tied": False}
    weights = 128_256 * 8_192

    assert MemoryOptions().device_bytes(**sizes) == (2 * weights, 2 * weights)
    assert OPTIONS["int8+int8"].device_bytes(**sizes) == (weights + 4 * 128_256,) * 2
    embedding, head = OPTIONS["cpu+nf4"].device_bytes(**sizes)
    assert embedding == 0
    assert head == weights // 2 + weights // 64 + 4 * weights // 64 // 256 + 4 * (16 + 256 + 1)
    assert OPTIONS["int8+int8"].device_bytes(**(sizes | {"tied": True})) == (weights + 4 * 128_256, 0)
    with pytest.raises(InvalidRequestError, match="saves nothing"):
        OPTIONS["cpu"].device_bytes(**(sizes | {"tied": True}))


@pytest.mark.parametrize(("rows", "columns"), [(53, 24), (40, 64), (700, 96)])
def test_any_rows_can_be_decompressed_alone(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    for compressed in (Int8Rows.compress(weight), Nf4Rows.compress(weight)):
        whole = compressed.read(0, rows, torch.float32)
        part = compressed.cut(2, rows - 1)
        for start, stop in ((0, 1), (0, rows - 3), (1, 4), (rows - 4, rows - 3), (2, 2)):
            assert torch.equal(part.read(start, stop, torch.float32), whole[2:][start:stop])


def test_int8_is_off_by_half_a_step_at_most_and_knows_rows_of_zeros() -> None:
    weight = torch.randn(53, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 3, 53)[:, None]
    weight[7] = 0

    found = Int8Rows.compress(weight).read(0, 53, torch.float32)

    assert ((found - weight).abs() <= weight.abs().amax(dim=1, keepdim=True) / 254 * 1.00001).all()
    assert torch.equal(found[7], weight[7])


@pytest.mark.parametrize("piece", [1, 100, 10**9])
def test_products_do_not_depend_on_the_size_of_their_pieces(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr("loram_hub.lowmemory.weight.HEAD_PIECE", piece)
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(53, 24, generator=generator)
    for rows in (Int8Rows.compress(whole), Nf4Rows.compress(whole)):
        weight, plain = CompressedWeight(rows, torch.float32), rows.read(0, 53, torch.float32)
        left, right = torch.randn(5, 24, generator=generator), torch.randn(5, 53, generator=generator)
        into, total = torch.empty(5, 60)[:, :53], torch.randn(5, 24, generator=generator)
        with_out, added = total.clone(), total.clone()

        torch.mm(left, weight.t(), out=into)
        torch.addmm(with_out, right, weight, out=with_out)
        added.addmm_(right, weight)

        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(left @ weight.t(), left @ plain.t(), **close)
        torch.testing.assert_close(into, left @ plain.t(), **close)
        torch.testing.assert_close(right @ weight, right @ plain, **close)
        torch.testing.assert_close(with_out, total + right @ plain, **close)
        torch.testing.assert_close(added, total + right @ plain, **close)
        torch.testing.assert_close(torch.addmm(total, right, weight, beta=2), 2 * total + right @ plain, **close)
        torch.testing.assert_close(weight[3:9, 2:4], plain[3:9, 2:4], rtol=0, atol=0)
        torch.testing.assert_close(weight.t()[:, 3:9].t(), plain[3:9], rtol=0, atol=0)
        torch.testing.assert_close(weight.bfloat16() * 2, plain.bfloat16() * 2, rtol=0, atol=0)
        with torch.inference_mode():
            torch.testing.assert_close(nn.functional.linear(left[None], weight), (left @ plain.t())[None], **close)


@pytest.mark.parametrize("kind", ["cpu", *TOGETHER])
def test_it_generates_as_the_decompressed_model_does(models: Path, kind: str) -> None:
    model = release(models, "gemma2")
    reduce_memory_(model, OPTIONS[kind])
    wanted = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    found = model.generate(IDS[:1, :4], **wanted)

    expected = written_out(release(models, "gemma2"), OPTIONS[kind]).generate(IDS[:1, :4], **wanted)
    assert found.shape == (1, 10)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["cpu", *TOGETHER])
def test_autocast_computes_with_the_same_weights(models: Path, kind: str) -> None:
    model = release(models, "llama")
    reduce_memory_(model, OPTIONS[kind])
    expected = written_out(release(models, "llama"), OPTIONS[kind])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=0.02, atol=0.05)


def sft(model: PreTrainedModel, tokenizer: Path, out_dir: Path, **changes: Any) -> Any:
    """Train a few steps with TRL as it is; return the trainer."""
    from datasets import Dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's deprecations
        from trl import SFTConfig, SFTTrainer

        settings = {
            "output_dir": str(out_dir),
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        trainer = SFTTrainer(
            model,
            args=SFTConfig(**(settings | changes)),
            train_dataset=Dataset.from_dict({"prompt": ["w5 w6 w7"] * 4, "completion": [" w8 w9 w10"] * 4}),
            processing_class=AutoTokenizer.from_pretrained(tokenizer),
            peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 3
    return found


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "cpu"), ("gemma2", "cpu+nf4"), ("gemma3_text-tied", "int8+int8")],
)
def test_trl_trains_the_adapter_of_the_decompressed_model(models: Path, tmp_path: Path, family: str, kind: str) -> None:
    model = release(models, family)
    reduce_memory_(model, OPTIONS[kind])
    after = memory_bytes(model)

    trainer = sft(model, models / family, tmp_path / "out")
    trainer.save_model(str(tmp_path / "adapter"))

    plain = sft(written_out(release(models, family), OPTIONS[kind]), models / family, tmp_path / "plain")
    plain.save_model(str(tmp_path / "plain"))
    assert losses(trainer)[-1] < losses(trainer)[0]
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "plain"))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if kind == "cpu":
            assert torch.equal(value, expected[name])
        else:
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    trained = trainer.model
    lora = sum(weight.nbytes for name, weight in trained.named_parameters() if "lora_" in name)
    assert memory_bytes(trained) == after + lora
    assert isinstance(trained.get_input_embeddings(), HostEmbedding) == (OPTIONS[kind].embedding == "cpu")


class LargestTensor(TorchDispatchMode):
    """Elements of the largest floating-point tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.is_floating_point() and not isinstance(made, CompressedWeight):
                self.elements = max(self.elements, made.numel())
        return result


@pytest.mark.parametrize("kind", ["plain", "int8+nf4"])
def test_logits_are_never_whole_in_trl(models: Path, tmp_path: Path, kind: str) -> None:
    vocabulary, hidden, sequences, tokens = 90_000, 24, 4, 30
    config = tiny_config("llama", layers=2, vocab_size=vocabulary)
    model = base(save_base(tmp_path, config).parent, tmp_path.name)
    if kind != "plain":
        reduce_memory_(model, OPTIONS[kind])
    trainer = sft(model, models / "llama", tmp_path / "out", max_steps=1)
    trainer.model.train()
    ids = torch.randint(3, vocabulary, (sequences, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    with LargestTensor() as seen:
        trainer.compute_loss(trainer.model, batch).backward()
    with LargestTensor() as whole, torch.no_grad():
        trainer.model(input_ids=ids)

    assert whole.elements >= sequences * tokens * vocabulary
    tile = sequences * tokens * 32_768
    assert max(vocabulary * hidden, tile) >= seen.elements > 0
    assert tile < whole.elements / 2


def test_the_embedding_stays_in_main_memory_and_follows_types_only(models: Path) -> None:
    model = base(models, "gemma3_text")
    reduce_memory_(model, OPTIONS["cpu"])
    embedding = model.get_input_embeddings()

    assert not list(embedding.parameters())
    assert not list(embedding.buffers())
    assert (embedding.weight.shape, embedding.weight.dtype) == ((53, 24), torch.float32)
    model.to("meta")
    assert model.device.type == "meta"
    assert embedding.weight.device.type == "cpu"
    model.to(torch.bfloat16)
    assert embedding.weight.dtype == torch.bfloat16
    assert embedding(IDS).dtype == torch.bfloat16


def test_compressed_weights_move_and_copy_as_weights_do(models: Path) -> None:
    model = base(models, "llama-tied")
    reduce_memory_(model, OPTIONS["int8+int8"])
    expected = logits(model)
    head = model.get_output_embeddings()

    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    model.to(torch.float64).to(torch.float32)
    assert torch.equal(logits(model), expected)
    model.to("meta")
    assert {head.weight.device.type, head.weight.codes.device.type, head.weight.scales.device.type} == {"meta"}
    assert head.weight is model.get_input_embeddings().weight
    assert torch.equal(logits(twin), expected)
    assert "shape=(53, 24)" in repr(twin.get_output_embeddings().weight)


@pytest.mark.parametrize("kind", ["cpu", *TOGETHER])
def test_adapters_are_saved_and_opened_as_without_the_options(models: Path, tmp_path: Path, kind: str) -> None:
    model = release(models, "llama")
    reduce_memory_(model, OPTIONS[kind])
    tuned = adapted(model).eval()
    tuned.save_pretrained(tmp_path / "reduced")
    adapted(release(models, "llama")).save_pretrained(tmp_path / "plain")

    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("reduced", "plain"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    again = release(models, "llama")
    reduce_memory_(again, OPTIONS[kind])
    opened = PeftModel.from_pretrained(again, str(tmp_path / "reduced"))
    assert torch.equal(logits(opened), logits(tuned))


def test_a_model_with_its_embedding_in_main_memory_can_be_saved(models: Path, tmp_path: Path) -> None:
    model = base(models, "gemma3_text")
    reduce_memory_(model, OPTIONS["cpu"])

    model.save_pretrained(tmp_path)

    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(base(models, "gemma3_text")))
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    assert not model.get_input_embeddings().weight.any()


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("kind", ["int8", "head-nf4"])
def test_a_compressed_model_is_not_saved_as_if_it_were_the_release(
    models: Path, tmp_path: Path, kind: str, load: str
) -> None:
    model = LOADERS[load](models, "llama")
    reduce_memory_(model, OPTIONS[kind])

    with pytest.raises(InvalidRequestError, match="Save the adapter"):
        model.save_pretrained(tmp_path / "saved")

    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("kind", OPTIONS)
def test_frozen_means_frozen(models: Path, kind: str) -> None:
    model = release(models, "llama")
    reduce_memory_(model, OPTIONS[kind])

    compressed = ["embed_tokens"] * (OPTIONS[kind].embedding == "int8")
    compressed += ["lm_head"] * (OPTIONS[kind].lm_head != "device")
    for name in compressed:
        with pytest.raises(InvalidRequestError, match="cannot be trained"):
            adapted(copy.deepcopy(model), modules_to_save=[name])
    if OPTIONS[kind].lm_head != "device":
        with pytest.raises(InvalidRequestError, match="would change a compressed"):
            model.get_output_embeddings().weight.mul_(2)
    if OPTIONS[kind].embedding == "cpu":
        with pytest.raises(TypeError, match="HostEmbedding"):
            model.resize_token_embeddings(60)


@pytest.mark.parametrize("kind", ["head-int8", "head-nf4"])
def test_lora_on_a_compressed_head_trains_but_is_not_merged(models: Path, kind: str) -> None:
    model = release(models, "llama")
    reduce_memory_(model, OPTIONS[kind])
    tuned = adapted(model, target_modules=["q_proj", "lm_head"])

    loss, gradients = step(tuned)

    expected = adapted(written_out(release(models, "llama"), OPTIONS[kind]), target_modules=["q_proj", "lm_head"])
    expected_loss, expected_gradients = step(expected)
    torch.testing.assert_close(loss, expected_loss, rtol=2e-6, atol=0)
    assert relative(gradients, expected_gradients) < 2e-6
    with pytest.raises(InvalidRequestError, match="would change a compressed"):
        tuned.base_model.model.lm_head.merge()


@pytest.mark.parametrize("kind", TOGETHER)
def test_pefts_preparation_casts_no_compressed_weight_up(models: Path, kind: str) -> None:
    model = AutoLoramModel.from_pretrained(models / "llama-nf4", dtype=torch.bfloat16)
    reduce_memory_(model, OPTIONS[kind])
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    before = [layer.weight.nbytes for layer in layers]

    tuned = adapted(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))

    assert [layer.weight.nbytes for layer in layers] == before
    assert {weight.dtype for name, weight in tuned.named_parameters() if "norm" in name} == {torch.float32}
    assert torch.isfinite(step(tuned)[1]).all()


def test_options_are_applied_once_to_a_plain_model(models: Path) -> None:
    model = release(models, "llama")
    with pytest.raises(IncompatibleError, match="before get_peft_model wraps it"):
        reduce_memory_(adapted(release(models, "llama")), OPTIONS["cpu"])  # type: ignore[arg-type]
    for kind in ("cpu", "head-nf4"):
        twice = copy.deepcopy(model)
        reduce_memory_(twice, OPTIONS[kind])
        with pytest.raises(IncompatibleError, match=r"Apply memory options\s+once"):
            reduce_memory_(twice, OPTIONS[kind])
    with pytest.raises(IncompatibleError, match="offloaded or split"):
        reduce_memory_(base(models, "llama").to("meta"), OPTIONS["cpu"])
    with pytest.raises(InvalidRequestError, match="from a GPU to main memory"):
        reduce_memory_(model, MemoryOptions(activation_offloading=True))


@pytest.mark.parametrize(
    "values", [{"embedding": "nf4"}, {"lm_head": "cpu"}, {"embedding": None}, {"activation_offloading": "yes"}]
)
def test_unknown_options_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(values))):
        MemoryOptions(**values)


def test_the_default_changes_nothing(models: Path) -> None:
    model = release(models, "llama")

    savings = reduce_memory_(model, MemoryOptions())

    assert savings == MemorySavings(embedding=0, lm_head=0)
    assert torch.equal(logits(model), logits(release(models, "llama")))
    model.resize_token_embeddings(60)


@pytest.mark.parametrize("kind", ["head-int8", "head-nf4"])
def test_trls_offloading_of_activations_leaves_a_compressed_head_alone(
    models: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    model = release(models, "llama")
    reduce_memory_(model, OPTIONS[kind])
    tuned = adapted(model)
    expected = step(tuned)
    tuned.zero_grad()
    # TRL offloads from the accelerator that torch finds; here main memory plays it.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    offloading = get_act_offloading_ctx_manager(tuned, use_pin_memory=False, use_streams=False, min_offload_size=1)
    moved: list[torch.Tensor] = []
    plain_copy = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda like, **given: moved.append(like) or plain_copy(like, **given))

    with offloading:
        found = step(tuned)

    assert moved
    head = tuned.get_output_embeddings().weight.decompressed()
    for each in moved:
        assert not isinstance(each, CompressedWeight)
        assert not any(torch.equal(each, weight) for weight in (head, head.t()))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_two_processes_train_one_adapter_under_the_options(models: Path, tmp_path: Path) -> None:
    together = {name: asdict(OPTIONS[name]) for name in TOGETHER}
    order = {"release": str(models / "llama-nf4"), "options": together}
    script = Path(__file__).with_name("lowmemory_ranks.py")

    done = subprocess.run(
        [sys.executable, str(script), json.dumps(order), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert list(ranks[0]) == list(TOGETHER)
    assert ranks[0] == ranks[1]
    for name in TOGETHER:
        tuned = adapted(written_out(release(models, "llama"), OPTIONS[name]))
        halves = [tuned(input_ids=IDS[half], labels=IDS[half]).loss for half in (slice(0, 1), slice(1, 2))]
        (sum(halves) / 2).backward()
        expected = sum(weight.grad.norm().item() for part, weight in tuned.named_parameters() if "lora_" in part)
        assert ranks[0][name] == pytest.approx(expected, rel=1e-4)


def test_the_sizes_of_formats_are_exact_for_odd_matrices() -> None:
    for rows, columns in ((53, 24), (7, 4), (700, 96), (1, 2)):
        weight = torch.ones(rows, columns)
        for compressed, nbytes in ((Int8Rows, estimated.int8_bytes), (Nf4Rows, estimated.nf4_bytes)):
            parts = compressed.compress(weight).tensors
            assert sum(part.nbytes for part in parts.values()) == nbytes(rows, columns)
