"""Algorithm 1 with every switch on and off: pruned or not, aligned or not, quantized or not, recovered or not.

All combinations go through the same public functions. With nothing pruned the toolkit is standard LoRA, and QLoRA with
quantization on; there stock transformers and PEFT on the plain base decide what is right.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import save_base, save_tokenizer, tiny_config
from datasets import Dataset, disable_progress_bars  # type: ignore[import-untyped]  # has no types
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from pipeline_materials import some_texts
from safetensors.numpy import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PrinterCallback, set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from loram_hub import AutoLoramModel, evaluate, prune, quantize, recover, verify
from loram_hub.alignment import AlignmentSettings, align
from loram_hub.corpora import Corpus
from loram_hub.finetuning import FinetuneRecipe, FinetuneResult, finetune
from loram_hub.manifest import read_manifest
from loram_hub.pipeline import publish, recipe_from
from loram_hub.recipes import section_from
from loram_hub.release import Release
from loram_hub.sparsification import SparsitySettings, sparsify

LICENSE = Path(__file__).parents[1] / "LICENSE"
TASKS = [{"prompt": f"w{n % 40 + 4} w{n % 31 + 9}", "completion": f" w{n % 20 + 5}"} for n in range(16)]
SWITCHES = list(itertools.product((False, True), repeat=3))
STEPS = 2
SIZES = {"hidden_size": 192, "head_dim": 32, "intermediate_size": 128}
"""Sizes that stock bitsandbytes takes on every CPU, so that it can be the reference."""
SPARSE: Mapping[str, SparsitySettings] = {
    "semi": SparsitySettings(pattern="2:4"),
    "unst": SparsitySettings(sparsity=0.55),
}


class Laboratory:
    """Makes each release and each adapter once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = save_tokenizer(save_base(folder / "base", tiny_config(layers=3, **SIZES), dtype="bfloat16"))
        self.corpus = self.written("texts.jsonl", [{"text": text} for text in some_texts(60)])
        self.tasks = self.written("tasks.jsonl", TASKS)
        self.held_out = self.written("held-out.jsonl", [{**task, "prompt": "w4"} for task in TASKS[:4]])
        self.calibration = torch.randint(4, 53, (4, 16), generator=torch.Generator().manual_seed(0))
        self.release, self.adapter = cache(self._release), cache(self._adapter)

    def written(self, name: str, records: list[dict[str, str]]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def _release(self, pruning: str, aligned: bool, quantized: bool) -> Release:
        out = self.folder / f"{pruning}-{aligned:d}-{quantized:d}"
        if quantized:
            return quantize(self.release(pruning, aligned, False).folder, out)
        if aligned:
            settings = AlignmentSettings(
                steps=STEPS, batch_size=2, sequence_length=16, warmup_steps=0, held_out=2, precision="fp32",
                learning_rate=1e-3, save_every=STEPS,
            )  # fmt: skip
            corpora = [Corpus(source=str(self.corpus))]
            return align(self.release(pruning, False, False).folder, out, corpora=corpora, settings=settings)
        if pruning in SPARSE:
            return sparsify(self.base, out, settings=SPARSE[pruning], calibration=self.calibration)
        ratio = {"whole": 0.0, "structured": 0.5}[pruning]
        return prune(self.base, out, pruning_ratio=ratio, importance="magnitude", keep_first=1, keep_last=1)

    def _adapter(self, pruning: str, aligned: bool, quantized: bool, masked: bool | None = None) -> FinetuneResult:
        """Fine-tune by a recipe."""
        release = self.release(pruning, aligned, quantized).folder
        values: dict[str, Any] = {
            "release": str(release),
            "dtype": "float32",  # on all machines alike
            "seed": 3,
            "data": {"train": [{"source": str(self.tasks)}]},
            "lora": {"r": 4, "dropout": 0.0} | ({} if masked is None else {"masked": masked}),
            "training": {"steps": STEPS, "batch_size": 4, "micro_batch": 4, "max_tokens": 16},
            "checkpoints": {"every": STEPS, "recover": False},
        }
        return finetune(section_from(FinetuneRecipe, values), self.folder / f"run-{release.name}-{masked}")

    def losses(self, pruning: str, aligned: bool, quantized: bool, masked: bool | None = None) -> dict[str, float]:
        """Return the held-out losses of all four models."""
        run = self.adapter(pruning, aligned, quantized, masked)
        table = evaluate(
            self.held_out, base=self.base, release=self.release(pruning, aligned, quantized).folder,
            adapter=run.adapter, recovered=run.recovered, dtype=torch.float32,
        )  # fmt: skip
        return {row.model: row.loss for row in table.rows}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("switches"))


@pytest.mark.parametrize(("pruned", "aligned", "quantized"), SWITCHES)
def test_every_combination_runs_with_and_without_recovery(
    laboratory: Laboratory, pruned: bool, aligned: bool, quantized: bool
) -> None:
    pruning = "structured" if pruned else "whole"

    release = laboratory.release(pruning, aligned, quantized)
    run = laboratory.adapter(pruning, aligned, quantized)
    losses = laboratory.losses(pruning, aligned, quantized)

    assert (release.manifest.parameters < release.manifest.base.parameters) == pruned
    assert (release.manifest.quantization is not None) == quantized
    assert verify(release.folder).kind == "release"
    assert verify(run.recovered).kind == "recovered adapter"
    assert (losses["pruned"] == losses["base"]) == (not pruned and not aligned and not quantized)
    assert losses["pruned + adapter"] != losses["pruned"]
    assert losses["base + recovered adapter"] != losses["base"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("pruning", "aligned", "quantized"),
    [("semi", False, False), ("unst", True, False), ("unst", False, True), ("semi", True, True)],
)
def test_sparse_variants_go_the_same_way(
    laboratory: Laboratory, pruning: str, aligned: bool, quantized: bool, masked: bool
) -> None:
    release = laboratory.release(pruning, aligned, quantized)
    run = laboratory.adapter(pruning, aligned, quantized, masked)
    losses = laboratory.losses(pruning, aligned, quantized, masked)

    assert release.is_sparse
    assert verify(release.folder).kind == "release"
    assert len(set(losses.values())) == 4
    trained, recovered = factors_in(run.adapter), factors_in(run.recovered)
    assert trained.keys() == recovered.keys()
    for name, factor in trained.items():  # recovery is the identity, but for the type that is published
        np.testing.assert_allclose(recovered[name].astype(np.float32), factor, rtol=2**-8)


def test_with_nothing_pruned_it_is_standard_lora(laboratory: Laboratory) -> None:
    stock = AutoModelForCausalLM.from_pretrained(laboratory.base, dtype=torch.float32)
    release = AutoLoramModel.from_pretrained(laboratory.release("whole", False, False).folder, dtype=torch.float32)

    assert_trained_alike(stock, release)


def test_with_nothing_pruned_and_quantization_it_is_qlora(laboratory: Laboratory) -> None:
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    stock = AutoModelForCausalLM.from_pretrained(
        laboratory.base, quantization_config=four_bits, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    release = AutoLoramModel.from_pretrained(laboratory.release("whole", False, True).folder, dtype=torch.bfloat16)

    prepared = [prepare_model_for_kbit_training(each, use_gradient_checkpointing=False) for each in (stock, release)]

    assert_trained_alike(*prepared)


@pytest.mark.parametrize("quantized", [False, True])
def test_with_nothing_pruned_recovery_changes_no_factor(
    laboratory: Laboratory, quantized: bool, tmp_path: Path
) -> None:
    run = laboratory.adapter("whole", False, quantized)

    recovered = recover(run.adapter, tmp_path / "out", release=laboratory.release("whole", False, quantized).folder)

    trained = factors_in(run.adapter)
    assert recovered.parameters == sum(factor.size for factor in trained.values())
    for name, factor in factors_in(tmp_path / "out").items():
        np.testing.assert_allclose(factor.astype(np.float32), trained[name], rtol=2**-8)  # bf16 is what is published


def test_a_recipe_with_nothing_pruned_publishes_what_the_functions_make(laboratory: Laboratory, tmp_path: Path) -> None:
    """The value that docs/variants.md gives for it; layers to keep are named because this model has but three."""
    recipe = {
        "base": str(laboratory.base), "repo_id": "org/Tiny-LoRAM-0", "license": "mit", "license_file": str(LICENSE),
        "prune": {"pruning_ratio": 0, "importance": "magnitude", "keep_first": 1, "keep_last": 1}, "quantize": {},
    }  # fmt: skip

    published = publish(recipe_from(recipe), work_dir=tmp_path)

    assert [stage.name for stage in published.stages if stage.made] == ["prune", "quantize", "card"]
    expected = laboratory.release("whole", False, True)
    for name in ("model.safetensors", "mask_index.safetensors"):
        assert (published.release / name).read_bytes() == (expected.folder / name).read_bytes()
    assert read_manifest(published.release).parameters == expected.manifest.base.parameters


def test_the_recipe_of_the_corner_trains_what_a_stock_trainer_does(laboratory: Laboratory, tmp_path: Path) -> None:
    """TRL's SFTTrainer on the stock base, without anything of ours: the same factors, but for rounding."""
    run = laboratory.adapter("whole", False, False)
    arguments = SFTConfig(
        output_dir=str(tmp_path), seed=3, max_length=16, max_steps=STEPS, per_device_train_batch_size=4,
        learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=0.05, use_cpu=True, bf16=False,
        dataloader_pin_memory=False, disable_tqdm=True, save_strategy="no", report_to="none",
    )  # fmt: skip
    disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames what PEFT and TRL still use
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(laboratory.base, dtype=torch.float32),
            args=arguments,
            train_dataset=Dataset.from_list(TASKS),
            processing_class=AutoTokenizer.from_pretrained(laboratory.base),
            peft_config=LoraConfig(
                r=4, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(tmp_path / "stock"))

    expected, found = factors_in(tmp_path / "stock"), factors_in(run.adapter)

    assert expected.keys() == found.keys()
    for name, factor in expected.items():
        np.testing.assert_allclose(found[name], factor, rtol=1e-4, atol=1e-6, err_msg=name)
    assert any(factor.any() for name, factor in found.items() if "lora_B" in name)


def assert_trained_alike(stock: nn.Module, release: nn.Module) -> None:
    """Compare logits, and the factors after the same few steps of stock PEFT."""
    ids = torch.randint(4, 53, (2, 12), generator=torch.Generator().manual_seed(1))
    stock.train()  # in evaluation mode bitsandbytes multiplies in bf16 on some CPUs
    release.train()
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, release(ids).logits)

    expected, found = trained_factors(stock, ids), trained_factors(release, ids)

    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(bool(factor.any()) for name, factor in found.items() if "lora_B" in name)


def trained_factors(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Train LoRA with PEFT and nothing else."""
    set_seed(0)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: each.detach() for name, each in adapted.named_parameters() if each.requires_grad}


def factors_in(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return A and B of every module."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "lora_A" in name or "lora_B" in name}
