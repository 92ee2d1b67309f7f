"""A stock SFTTrainer on a tiny release, with the callbacks of `loram_hub.finetuning`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from builders import save_base, save_tokenizer, sparse_config, sparse_release, tiny_config
from datasets import Dataset, disable_progress_bars  # type: ignore[import-untyped]  # has no types
from peft import LoraConfig
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from loram_hub.auto import AutoLoramModel
from loram_hub.finetuning.callbacks import RecoverCallback, SealCallback
from loram_hub.pruning import prune

STEPS = 7
"""Of which each epoch has four, the last one with half a batch."""


def save_tiny_release(folder: Path, *, quantize: bool = True, seed: int = 0) -> Path:
    """Prune a tiny base, which is written beside the release."""
    base = save_base(folder.with_name(f"{folder.name}-base"), tiny_config(layers=3), dtype="bfloat16")
    save_tokenizer(base)
    prune(
        base, folder, pruning_ratio=0.5, keep_first=1, keep_last=1, importance="random", quantize=quantize, seed=seed
    )  # fmt: skip
    return folder


def save_sparse_release(folder: Path) -> Path:
    """Write an NF4 release without half of the weights of a tiny base, which is written beside it."""
    base = save_base(
        folder.with_name(f"{folder.name}-base"), sparse_config(tie_word_embeddings=False), dtype="bfloat16"
    )
    save_tokenizer(base)
    return sparse_release(folder, base, pattern="4:8", nf4=True)


def examples(count: int, *, first: int = 0) -> Dataset:
    """Return sequences of token ids, of unequal lengths."""
    return Dataset.from_list(
        [{"input_ids": [4 + (n * place) % 40 for place in range(1, 9 + n % 3)]} for n in range(first, first + count)]
    )


def tiny_trainer(
    release: Path,
    out: Path,
    callbacks: Sequence[TrainerCallback] | None = None,
    lora: LoraConfig | None = None,
    **changes: Any,
) -> SFTTrainer:
    """Make a trainer whose result depends on data order, dropout, Adam's state and the type of the factors.

    Args:
        release: to train on.
        out: `output_dir`.
        callbacks: None for one that recovers and one that seals.
        lora: None for all linear layers, with dropout.
        **changes: to the SFTConfig.
    """
    disable_progress_bars()
    settings: dict[str, Any] = {
        "max_steps": STEPS, "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_length": 16, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "dataloader_pin_memory": False, "report_to": "none", "disable_tqdm": True,
        "logging_steps": 3, **changes,
    }  # fmt: skip
    default = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames what PEFT and TRL still use
        trainer = SFTTrainer(
            model=AutoLoramModel.from_pretrained(release, dtype=torch.float32),
            args=SFTConfig(output_dir=str(out), **settings),
            train_dataset=examples(14),
            eval_dataset=examples(3, first=100),
            processing_class=AutoTokenizer.from_pretrained(release),
            peft_config=default if lora is None else lora,
            callbacks=[RecoverCallback(), SealCallback()] if callbacks is None else list(callbacks),
        )
    trainer.remove_callback(PrinterCallback)
    return trainer
