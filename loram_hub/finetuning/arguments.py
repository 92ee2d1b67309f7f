"""A recipe in the words of TRL and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from trl.trainer.sft_config import SFTConfig

from loram_hub.finetuning.materials import Materials
from loram_hub.finetuning.processes import Processes
from loram_hub.finetuning.recipe import FinetuneRecipe
from loram_hub.finetuning.schedule import Schedule
from loram_hub.finetuning.shapes import optimizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lora_config(recipe: FinetuneRecipe, materials: Materials) -> LoraConfig:
    """Return PEFT's configuration of the adapter."""
    lora = recipe.lora
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(materials.targets),
        task_type="CAUSAL_LM",
    )


def trainer_arguments(
    recipe: FinetuneRecipe, schedule: Schedule, processes: Processes, *, model: PreTrainedModel, folder: Path
) -> SFTConfig:
    """Return TRL's configuration of the run.

    Args:
        recipe: what is asked for.
        schedule: steps, batches and intervals.
        processes: of the run.
        model: loaded; its type is what is computed in.
        folder: for checkpoints.
    """
    training, is_fsdp = recipe.training, recipe.distributed.sharding == "fsdp"
    evaluation: dict[str, Any] = {"eval_strategy": "no"}
    if schedule.evaluate_every is not None:
        evaluation = {
            "eval_strategy": "steps",
            "eval_steps": schedule.evaluate_every,
            "per_device_eval_batch_size": schedule.evaluation_batch,
        }
    if recipe.watched is not None:
        evaluation |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{recipe.watched}_loss",
            "greater_is_better": False,
            "restore_callback_states_from_checkpoint": True,  # how long it has waited
        }
    return SFTConfig(
        output_dir=str(folder),
        run_name=folder.parent.name,
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.micro_batch,
        gradient_accumulation_steps=schedule.accumulation,
        max_length=training.max_tokens,
        completion_only_loss=True,  # of what has no prompt, everything is learnt all the same
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=schedule.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=optimizer_of(recipe, on_cuda=processes.on_cuda),
        seed=recipe.seed,
        use_cpu=not processes.on_cuda,
        bf16=model.dtype == torch.bfloat16,
        fp16=model.dtype == torch.float16,
        gradient_checkpointing=recipe.gradient_checkpointing and not is_fsdp,
        activation_offloading=recipe.memory_options.activation_offloading,
        dataloader_pin_memory=processes.on_cuda,
        ddp_find_unused_parameters=False if processes.size > 1 else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=schedule.save_every,
        report_to=list(recipe.report_to) or "none",
        disable_tqdm=True,
        fsdp=True if is_fsdp else None,  # type: ignore[arg-type]  # what it documents; a text is deprecated
        fsdp_config=fsdp_settings(model, checkpointing=recipe.gradient_checkpointing) if is_fsdp else None,
        **evaluation,
    )


def fsdp_settings(model: PreTrainedModel, *, checkpointing: bool) -> dict[str, Any]:
    """Return what accelerate needs for FSDP2: units of one decoder layer, and whole adapters in checkpoints.

    Checkpointing is FSDP's own, around each unit; the Trainer's would gather its weights once more. Each process has
    read the release itself, in NF4, so that none has to wait for the first one's weights.
    """
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": list(model._no_split_modules or ()),
        "reshard_after_forward": True,
        "activation_checkpointing": checkpointing,
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "FULL_STATE_DICT",
    }
