"""Callbacks that watch a run: it stops before a step that is not finite, says how far it is, and stops early if asked.

The Trainer itself leaves a loss that is not finite out of its log (`logging_nan_inf_filter`) and trains on.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from huggingface_hub.utils import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loram_hub.errors import TrainingError

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

_LINES = 20
"""Lines of loss in the log of a run, about."""


class FiniteGuard(TrainerCallback):
    """Stop before an optimizer step whose gradients are not finite, and at a loss that is not.

    The weights are then those of the step before. Under fp16 single gradients overflow by design, and torch's scaler
    skips their steps; there the loss alone is watched.
    """

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Look at the gradients, after they were summed over all processes.

        Raises:
            TrainingError: one of them is NaN or infinite.
        """
        if not args.fp16 and not _all_finite(kwargs["model"]):
            _refuse("a gradient", state.global_step + 1, state.max_steps, kwargs["lr_scheduler"].get_last_lr()[0])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Look at the loss and, but for fp16, at the norm of the gradients.

        Raises:
            TrainingError: it is NaN or infinite.
        """
        for name in ("loss", *(() if args.fp16 else ("grad_norm",))):
            if logs is not None and not math.isfinite(logs.get(name, 0.0)):
                what = "the loss" if name == "loss" else "the norm of the gradients"
                _refuse(what, state.global_step, state.max_steps, logs["learning_rate"])


def _all_finite(model: nn.Module) -> bool:
    """Whether all gradients are finite; where each process has a part of them, on all processes."""
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    if not gradients:
        return True
    local = [getattr(each, "_local_tensor", each) for each in gradients]  # FSDP2 shards them
    bad = torch.stack([torch.isfinite(each).all().logical_not() for each in local]).any().to(torch.int32)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bool(bad.item())


def _refuse(what: str, step: int, steps: int, learning_rate: float) -> NoReturn:
    raise TrainingError(
        f"Step {step} of {steps}: {what} is not finite, at a learning rate of {learning_rate:.3g}. Lower "
        "training.learning_rate or training.max_grad_norm, raise training.warmup_steps, or look for examples of odd "
        "text; with dtype float16, take bfloat16 or float32. Checkpoints from before are whole, and are what the "
        "same run would resume from: after a change, start anew."
    )


class Progress(TrainerCallback):
    """A progress bar, and a line of loss from time to time."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Fine-tuning", unit="step")

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Move it."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Log losses: those of evaluations, and one in so many of training."""
        if logs is None or not state.is_world_process_zero:
            return
        measured = {name: value for name, value in logs.items() if name.endswith("_loss") and name.startswith("eval_")}
        for name, value in measured.items():
            logger.info("step %d of %d: %s loss %.4f", state.global_step, state.max_steps, _set_name(name), value)
        if "loss" in logs and state.global_step % math.ceil(state.max_steps / _LINES) == 0:
            logger.info("step %d of %d: training loss %.4f", state.global_step, state.max_steps, logs["loss"])

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _set_name(metric: str) -> str:
    return metric.removeprefix("eval_").removesuffix("_loss")


class Patience(EarlyStoppingCallback):
    """transformers' early stopping, which with several evaluation sets is also called for those it does not watch."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Count an evaluation of the set that is watched."""
        if metrics is not None and args.metric_for_best_model in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)  # type: ignore[no-untyped-call]  # it has no types
