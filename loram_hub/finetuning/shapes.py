"""What a recipe says of the memory that a run takes; no torch, so that a record of a run can be asked, too."""

from __future__ import annotations

from collections.abc import Sequence

from loram_hub.estimation import Optimizer, TrainingShape
from loram_hub.finetuning.recipe import ALL_PROJECTIONS, FinetuneRecipe


def training_shape(
    recipe: FinetuneRecipe,
    *,
    micro_batch: int,
    processes: int,
    is_masked: bool,
    modules: Sequence[str] | None = None,
) -> TrainingShape:
    """Return what the estimate of a run on GPUs needs to know.

    Args:
        recipe: what is asked for.
        micro_batch: examples that a process takes at a time.
        processes: that train together.
        is_masked: whether the adapter's update is masked.
        modules: that are adapted; None for what the recipe says of them.

    Raises:
        InvalidRequestError: a value is out of range.
    """
    named = recipe.lora.targets if modules is None else modules
    targets = tuple(sorted({module.rpartition(".")[2] for module in named}))
    return TrainingShape(
        sequence_length=recipe.training.max_tokens,
        micro_batch=micro_batch,
        rank=recipe.lora.r,
        targets=None if ALL_PROJECTIONS in targets else targets,
        dropout=recipe.lora.dropout,
        optimizer=optimizer_of(recipe, on_cuda=True),  # what it will be on the GPU
        checkpointing=recipe.gradient_checkpointing,
        options=recipe.memory_options,
        processes=processes,
        masked_lora=is_masked,
    )


def optimizer_of(recipe: FinetuneRecipe, *, on_cuda: bool) -> Optimizer:
    """Return the optimizer's name in transformers."""
    if recipe.optimizer != "auto":
        return recipe.optimizer
    return "paged_adamw_8bit" if on_cuda else "adamw_torch"
