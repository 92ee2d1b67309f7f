"""Fine-tune a release by a recipe: TRL's SFTTrainer and PEFT as they are, then recovery to full size.

    recipe, presets       what is asked for
    materials             the release and its tokenizer, opened;  processes: who trains together, and where
    sizing, schedule      micro-batch by the estimate;  steps and intervals
    shapes                what the estimate needs to know of a recipe, or of the record of a run
    preparing             everything that can go wrong, looked at before the weights are loaded
    runs                  the folder of a run
    loading, arguments    model and settings in the words of transformers, PEFT and TRL
    training, guarding    the training, and what watches it
    callbacks             sealed checkpoints and their recovered adapters, for any Trainer
    checkpoints, resuming, origins   what a killed run goes on from;  which release an adapter is of
    results               what a run leaves
    publishing            what may stop a push, looked at before training
    running               `finetune` and `check_finetune`, which put all this together

The recipe is free of torch; the rest loads on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from loram_hub.finetuning.recipe import FinetuneRecipe as FinetuneRecipe

if TYPE_CHECKING:
    from loram_hub.finetuning.callbacks import RecoverCallback as RecoverCallback
    from loram_hub.finetuning.callbacks import SealCallback as SealCallback
    from loram_hub.finetuning.checkpoints import latest_checkpoint as latest_checkpoint
    from loram_hub.finetuning.results import FinetuneResult as FinetuneResult
    from loram_hub.finetuning.running import FinetunePreview as FinetunePreview
    from loram_hub.finetuning.running import check_finetune as check_finetune
    from loram_hub.finetuning.running import finetune as finetune

_HOME = {
    "FinetunePreview": "running",
    "FinetuneResult": "results",
    "RecoverCallback": "callbacks",
    "SealCallback": "callbacks",
    "check_finetune": "running",
    "finetune": "running",
    "latest_checkpoint": "checkpoints",
}

__all__ = [
    "FinetunePreview",
    "FinetuneRecipe",
    "FinetuneResult",
    "RecoverCallback",
    "SealCallback",
    "check_finetune",
    "finetune",
    "latest_checkpoint",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
