"""Steps, batches and intervals of a run: what the recipe leaves open, worked out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loram_hub.errors import InvalidRequestError
from loram_hub.finetuning.recipe import FinetuneRecipe

STEPS = 400
"""Of the paper, where a recipe says neither steps nor epochs."""
_WARMUP_SHARE = 20
_INTERVALS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How a run proceeds."""

    steps: int
    """Optimizer steps."""
    warmup_steps: int
    """Steps in which the learning rate rises."""
    micro_batch: int
    """Examples that a process takes at a time."""
    accumulation: int
    """Micro-batches of a step on each process."""
    processes: int
    """Processes in all."""
    steps_per_epoch: int
    """Steps in which all examples are taken once; the last of them has fewer where they do not come out even."""
    evaluate_every: int | None
    """Steps between evaluations; None without any."""
    save_every: int
    """Steps between checkpoints."""
    evaluation_batch: int
    """Examples per forward pass of an evaluation."""

    @property
    def batch_size(self) -> int:
        """Examples of a step, over all processes."""
        return self.micro_batch * self.accumulation * self.processes


def share_of(recipe: FinetuneRecipe, processes: int) -> int:
    """Return the examples of a step that are each process's.

    Raises:
        InvalidRequestError: they cannot be shared out evenly.
    """
    batch_size = recipe.training.batch_size
    if batch_size % processes:
        raise InvalidRequestError(
            f"training.batch_size is {batch_size}, which {processes} processes cannot share evenly. Take a multiple of "
            f"{processes}."
        )
    return batch_size // processes


def largest_micro_batch(share: int, limit: int) -> int:
    """Return the largest number up to `limit` that divides a process's share of a step."""
    return max(size for size in range(1, min(share, limit) + 1) if share % size == 0)


def schedule_of(recipe: FinetuneRecipe, *, examples: int, micro_batch: int, processes: int) -> Schedule:
    """Work out a run's steps and intervals.

    Args:
        recipe: what is asked for.
        examples: in the training set.
        micro_batch: examples that a process takes at a time.
        processes: in all.

    Raises:
        InvalidRequestError: the batch cannot be shared out, or checkpoints and evaluations do not meet where the best
            adapter is wanted.
    """
    training, share = recipe.training, share_of(recipe, processes)
    if share % micro_batch:
        raise InvalidRequestError(
            f"training.micro_batch is {micro_batch}, and each of {processes} processes has {share} examples of a step, "
            f"which is no multiple of it. Take {largest_micro_batch(share, micro_batch)}."
        )
    accumulation = share // micro_batch
    batches = math.ceil(math.ceil(examples / micro_batch) / processes)  # of a process, the last ones filled up
    steps_per_epoch = math.ceil(batches / accumulation)
    steps = training.steps or STEPS
    if training.epochs is not None:
        steps = math.ceil(training.epochs * steps_per_epoch)
    warmup = math.ceil(steps / _WARMUP_SHARE) if training.warmup_steps is None else training.warmup_steps
    if warmup >= steps > 1:
        raise InvalidRequestError(
            f"training.warmup_steps is {warmup} of {steps} steps: the learning rate would rise until the end. Lower it."
        )
    every = recipe.evaluation.every or math.ceil(steps / _INTERVALS)
    save = recipe.checkpoints.every or every
    if recipe.evaluation.patience is not None and save != every:
        raise InvalidRequestError(
            f"checkpoints.every is {save} and evaluation.every {every}; with evaluation.patience each measured adapter "
            "must be kept, so they must be equal. Leave checkpoints.every out."
        )
    return Schedule(
        steps=steps,
        warmup_steps=warmup if steps > 1 else 0,
        micro_batch=micro_batch,
        accumulation=accumulation,
        processes=processes,
        steps_per_epoch=steps_per_epoch,
        evaluate_every=every if recipe.evaluation_sets else None,
        save_every=save,
        evaluation_batch=recipe.evaluation.batch_size or micro_batch,
    )
