"""AdamW on each process's own rows, cosine schedule with warm-up, clipping by the global norm.

AdamW treats every element by itself, so each process runs it on the rows that it holds, as plain tensors: nothing is
exchanged but the norm of the gradient. fp32 (or, with precision `bf16`, bf16) moments take twice the memory of the
weights; bitsandbytes' 8-bit ones (CUDA) about half.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from loram_hub.alignment.launch import Ranks
from loram_hub.alignment.model import local_of
from loram_hub.alignment.settings import AlignmentSettings
from loram_hub.errors import IncompatibleError, InvalidRequestError, MissingDependencyError

_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate_at(step: int, settings: AlignmentSettings) -> float:
    """Return the learning rate of a step, counted from 0: transformers' `cosine` schedule, `cosine_with_min_lr`.

    The first step of a warm-up has a learning rate of zero there, and so here.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * share)


def check_optimizer(settings: AlignmentSettings, device: torch.device) -> None:
    """Check that the optimizer runs on a device.

    Raises:
        InvalidRequestError: 8-bit AdamW without CUDA.
        MissingDependencyError: bitsandbytes is not installed.
    """
    if settings.optimizer == "adamw":
        return
    if device.type != "cuda":
        raise InvalidRequestError(
            f"Optimizer 'adamw_8bit' runs on CUDA; this run computes on the {device.type.upper()}. Choose 'adamw'."
        )
    if find_spec("bitsandbytes") is None:
        raise MissingDependencyError("Optimizer 'adamw_8bit' needs bitsandbytes: pip install bitsandbytes")


class ShardedAdamW:
    """AdamW over the trained parameters of a sharded model."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], settings: AlignmentSettings) -> None:
        """Make the optimizer with its state, zeros.

        Args:
            parameters: trained ones, by name, sharded.
            settings: learning rate and the like.
        """
        self._settings = settings
        self.parameters = {name: cast("DTensor", parameter) for name, parameter in parameters}
        # A plain parameter over the same memory for each: what optimizers and their kernels take.
        self._locals = {name: nn.Parameter(local_of(tensor)) for name, tensor in self.parameters.items()}
        held = [(name, local) for name, local in self._locals.items() if local.numel()]  # few rows, many processes
        groups = [
            {"params": [local for _, local in held if local.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [local for _, local in held if local.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = _optimizer([group for group in groups if group["params"]], settings)
        self._make_state_()

    def clip_(self, ranks: Ranks) -> float:
        """Scale gradients down to the greatest norm that is allowed; return their norm as it was.

        The norm is that of all gradients of all processes as one vector. Each process's sum of squares is in fp32.
        """
        gradients = list(self._gradients())
        squares = torch.zeros((), dtype=torch.float32, device=ranks.device)
        if gradients:
            norms = torch._foreach_norm([gradient.float() for gradient in gradients])
            squares = torch.stack(list(norms)).square().sum()
        norm = ranks.sum(squares).sqrt()
        if self._settings.max_grad_norm > 0:
            scale = (self._settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(scale)
        return float(norm)

    def step(self, learning_rate: float) -> None:
        """Update the weights and forget the gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for name, tensor in self.parameters.items():
            self._locals[name].grad = None if tensor.grad is None else local_of(tensor.grad)
        self._optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Drop all gradients."""
        for name, tensor in self.parameters.items():
            tensor.grad = self._locals[name].grad = None

    def state(self, ranks: Ranks) -> dict[str, Any]:
        """Return weights and moments as one flat dict: the tensors themselves, to be saved, or loaded into in place.

        Moments are sharded as their weights are, so that another number of processes can load them; those of 8-bit
        AdamW come in blocks of each process's rows and are kept by rank.
        """
        state: dict[str, Any] = dict(self.parameters)
        for name, tensor in self.parameters.items():
            local = self._locals[name]
            if self._settings.optimizer == "adamw":
                moments = self._optimizer.state.get(local, {})  # none where this process holds no row
                for moment in _MOMENTS:
                    values = moments.get(moment, torch.empty_like(local))
                    state[f"{name}/{moment}"] = DTensor.from_local(
                        values, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
                    )
            elif local.numel():
                for key, value in self._optimizer.state[local].items():
                    if isinstance(value, torch.Tensor) and not key.startswith("qmap"):  # which are constants
                        state[f"{name}/{ranks.rank}-of-{ranks.size}/{key}"] = value
        return state

    def weights_not_finite(self, ranks: Ranks) -> int:
        """Count the elements of the trained weights, over all processes, that are infinite or no number."""
        count = torch.zeros((), dtype=torch.int64, device=ranks.device)
        for local in self._locals.values():
            count += (~torch.isfinite(local.detach())).sum()
        return int(ranks.sum(count))

    def set_steps(self, steps: int) -> None:
        """Say how many steps were done, after a state was loaded."""
        for state in self._optimizer.state.values():
            if isinstance(state["step"], torch.Tensor):
                state["step"].fill_(steps)
            else:
                state["step"] = steps

    def check_loadable(self, saved_by: int, ranks: Ranks) -> None:
        """Raise `IncompatibleError` if a state of so many processes cannot be loaded by this number."""
        if self._settings.optimizer != "adamw" and saved_by != ranks.size:
            raise IncompatibleError(
                f"The checkpoint was saved by {saved_by} processes with 8-bit AdamW, whose state cannot be divided "
                f"among {ranks.size}. Start {saved_by} processes, or train anew with 'adamw'."
            )

    def _gradients(self) -> Iterator[torch.Tensor]:
        for tensor in self.parameters.values():
            if tensor.grad is not None:
                local = local_of(tensor.grad)
                if local.numel():
                    yield local

    def _make_state_(self) -> None:
        """Make the state before the first step, so that a checkpoint can be loaded into it."""
        for number, group in enumerate(self._optimizer.param_groups):
            for position, local in enumerate(group["params"]):
                if self._settings.optimizer == "adamw":
                    zeros = {moment: torch.zeros_like(local) for moment in _MOMENTS}
                    self._optimizer.state[local] = {"step": torch.zeros((), device=local.device), **zeros}
                else:
                    cast("Any", self._optimizer).init_state(group, local, number, position)


def _optimizer(groups: list[dict[str, Any]], settings: AlignmentSettings) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
    }
    if settings.optimizer == "adamw_8bit":
        optim: Any = import_module("bitsandbytes.optim")
        return cast("torch.optim.Optimizer", optim.AdamW8bit(groups, **arguments))
    return torch.optim.AdamW(groups, fused=True, **arguments)
