"""What the processes of a run do in the tests; each function is called by all of them."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from loram_hub.alignment import AlignmentSettings, align
from loram_hub.alignment.launch import joined_ranks
from loram_hub.alignment.model import TrainedModel, sharded_model
from loram_hub.alignment.optimization import ShardedAdamW
from loram_hub.corpora import Corpus
from loram_hub.hub import fetch_release


def aligned(
    release: str,
    out: str,
    corpora: list[dict[str, Any]],
    settings: dict[str, Any],
    *,
    dies_before: int | None = None,
    dying: int | None = None,
    poisoned_step: int | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Align; return the manifest's facts. The first process prints its log.

    Args:
        release: Source.
        out: Folder to create.
        corpora: Fields of each.
        settings: Fields.
        dies_before: Optimizer step, from 0, before which processes kill themselves.
        dying: Which one; None for all.
        poisoned_step: Step whose loss is no number on the last process alone.
        **others: For `align`.
    """
    if dist.is_initialized() and dist.get_rank() == 0:
        logging.basicConfig(level=logging.INFO)
    if dies_before is not None and dying in (None, dist.get_rank()):
        _at_step(dies_before, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if poisoned_step is not None and dist.get_rank() == dist.get_world_size() - 1:
        _poison(poisoned_step)
    made = align(
        release,
        out,
        corpora=[Corpus(**values) for values in corpora],
        settings=AlignmentSettings(**settings),
        **others,
    )
    return dict(made.manifest.alignment or {})


def held_bytes(release: str, settings: dict[str, Any]) -> dict[str, int]:
    """Build a run's model and optimizer, take one step, and return the bytes that this process holds."""
    asked = AlignmentSettings(**settings)
    with joined_ranks(processes=None, device="cpu") as ranks:
        model = sharded_model(fetch_release(release)[1], asked, ranks, precision="fp32")
        trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        optimizer = ShardedAdamW(trained, asked)
        losses, _ = model(torch.ones(1, 8, dtype=torch.int64))
        losses.sum().backward()
        gradients = [cast("DTensor", each.grad) for _, each in trained]
        found = {
            "weights": sum(_bytes(cast("DTensor", each)) for each in model.parameters()),
            "gradients": sum(_bytes(each) for each in gradients),
            "optimizer": sum(
                _bytes(cast("DTensor", each)) for name, each in optimizer.state(ranks).items() if "/" in name
            ),
        }
        optimizer.step(1e-3)
        return found


def _bytes(tensor: DTensor) -> int:
    local = tensor.to_local()
    return local.numel() * local.element_size()


def _at_step(wanted: int, act: Callable[[], None]) -> None:
    step, done = ShardedAdamW.step, [0]

    def counted(self: ShardedAdamW, learning_rate: float) -> None:
        if done[0] == wanted:
            act()
        done[0] += 1
        step(self, learning_rate)

    type.__setattr__(ShardedAdamW, "step", counted)


def _poison(wanted: int) -> None:
    forward, done = TrainedModel.forward, [0]

    def poisoned(self: TrainedModel, ids: torch.Tensor, teacher: Any = None) -> Any:
        losses, divergences = forward(self, ids, teacher)
        done[0] += torch.is_grad_enabled()
        return (losses * float("nan") if done[0] == wanted else losses), divergences

    type.__setattr__(TrainedModel, "forward", poisoned)
