"""Fine-tuning on a release as anyone would do it: PEFT and TRL as they are."""

from __future__ import annotations

import gc
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars  # type: ignore[import-untyped]  # has no types
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, TrainerCallback, TrainerState, set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from loram_hub.auto import AutoLoramModel
from loram_hub.demo.report import DemoSettings
from loram_hub.files import atomic_folder
from loram_hub.texts import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loram_hub.release import Release

logger = logging.getLogger(__name__)

LONGEST_TASK = 256
"""Tokens; the longest signature with its summary has about 120."""
DROPOUT = 0.0
"""Not the usual 0.05: every task is seen once, and on a CPU drawing the masks costs a quarter of a step."""


def fine_tune(
    release: Release,
    out_dir: Path,
    tasks: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: DemoSettings,
    device: str,
    dtype: torch.dtype,
) -> None:
    """Train LoRA on the release and save the adapter; the order of the tasks and LoRA's start follow from the seed."""
    model = AutoLoramModel.from_pretrained(release.folder, device_map={"": device}, dtype=dtype)
    targets = sorted({weight.module.rpartition(".")[2] for weight in release.architecture.projections})
    set_seed(settings.seed)
    with tempfile.TemporaryDirectory() as scratch, _quiet_libraries():
        adapted = get_peft_model(
            model, LoraConfig(r=8, lora_alpha=16, lora_dropout=DROPOUT, target_modules=targets, task_type="CAUSAL_LM")
        )
        trainer = SFTTrainer(
            model=adapted,
            args=_arguments(Path(scratch), settings, device=device, dtype=dtype),
            train_dataset=Dataset.from_list([asdict(task) for task in tasks]),
            processing_class=tokenizer,
            callbacks=[_LossLogger()],
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, where the report goes
        trainer.train()
    with atomic_folder(out_dir, overwrite=True) as folder:
        adapted.save_pretrained(str(folder))
    del trainer, adapted, model
    gc.collect()  # a trainer and its model refer to each other; evaluation loads models of its own


def _arguments(scratch: Path, settings: DemoSettings, *, device: str, dtype: torch.dtype) -> SFTConfig:
    return SFTConfig(
        output_dir=str(scratch),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 20),
        max_length=LONGEST_TASK,
        train_sampling_strategy="group_by_length",  # at random, a third of a batch would be padding
        gradient_checkpointing=False,  # memory is no concern at this size, and it costs a quarter of the speed
        use_cpu=device == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        dataloader_pin_memory=device != "cpu",
        seed=settings.seed,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Leave the talking to our own logger."""
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # transformers 5.23 renames gradient_checkpointing; PEFT 0.21 and TRL 1.16 still use the old name.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        enable_progress_bars()


class _LossLogger(TrainerCallback):
    """Log the training loss."""

    def on_log(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:  # noqa: ANN401
        """Called by the trainer every `logging_steps`."""
        if "loss" in (logs := kwargs.get("logs") or {}):
            logger.info("step %d of %d: training loss %.3f", state.global_step, state.max_steps, float(logs["loss"]))
