"""Which processes train together, and that they are the ones that were asked for.

They are started by `torchrun`, or by `accelerate launch`, which sets the same variables on GPUs; accelerate forms the
group. What would quietly become something else than was asked for stops the run: tasks that would each train alone, and
FSDP on a CPU, of which accelerate makes DDP without a word.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState  # type: ignore[import-untyped]  # has no types
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

from loram_hub.alignment.launch import read_launch
from loram_hub.errors import InvalidRequestError, LoramError, TrainingError
from loram_hub.finetuning.recipe import FinetuneRecipe

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """The processes of a run, and where they compute."""

    rank: int
    """Number of this process, from 0."""
    size: int
    """Processes in all."""
    local_rank: int
    """Number of this process on its machine."""
    device: str
    """Where this process computes: `cpu`, or `cuda` with a number."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def on_cuda(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device.startswith("cuda")

    def from_first(self, action: Callable[[], Result]) -> Result:
        """Let the first process act, and return to all what it returned, or raise its error on all."""
        if self.size == 1:
            return action()
        shared: list[Any] = [None, None]
        if self.is_first:
            try:
                shared = [action(), None]
            except LoramError as err:
                shared = [None, err]
        with peer_errors():
            broadcast_object_list(shared, from_process=0)
        if shared[1] is not None:
            raise shared[1]
        return cast("Result", shared[0])


def expected_processes(recipe: FinetuneRecipe, environment: Mapping[str, str] | None = None) -> Processes:
    """Say which processes the environment has for a run, without joining them.

    Args:
        recipe: what is asked for.
        environment: of this process; None for the one it has.

    Raises:
        InvalidRequestError: another number of processes is asked for, a launcher's variables are incomplete, there are
            fewer GPUs than processes, or FSDP is asked for without GPUs.
    """
    given = os.environ if environment is None else environment
    launch = read_launch(given, processes=recipe.distributed.processes, command="finetune")
    device = _device_type(recipe, launch.local_size)
    if device == "cuda" and "RANK" not in given and torch.cuda.device_count() > 1:
        raise InvalidRequestError(
            f"torch sees {torch.cuda.device_count()} GPUs and one process was started, which TRL does not train with. "
            "Name one of them, as in CUDA_VISIBLE_DEVICES=0, or start one process for each: "
            f"torchrun --nproc-per-node {torch.cuda.device_count()} -m loram_hub finetune ..."
        )
    if recipe.distributed.sharding == "fsdp":
        _check_fsdp(device, launch.size)
    elif given.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes"):
        raise InvalidRequestError(
            "accelerate was set up for FSDP, and the recipe says distributed.sharding: ddp. Say `sharding: fsdp` there."
        )
    where = f"cuda:{launch.local_rank}" if device == "cuda" else "cpu"
    return Processes(rank=launch.rank, size=launch.size, local_rank=launch.local_rank, device=where)


def _device_type(recipe: FinetuneRecipe, local_size: int) -> str:
    gpus = 0 if recipe.device == "cpu" else torch.cuda.device_count()
    if recipe.device == "cuda" and not gpus:
        raise InvalidRequestError(
            "device is cuda and torch sees no GPU here. Check the driver and that torch was built for CUDA "
            "(python -m torch.utils.collect_env), or say `device: cpu`."
        )
    if gpus and gpus < local_size:
        raise InvalidRequestError(
            f"{local_size} processes were started on this machine and torch sees {gpus} GPUs. Start one process per "
            "GPU, check CUDA_VISIBLE_DEVICES, or say `device: cpu`."
        )
    return "cuda" if gpus else "cpu"


def _check_fsdp(device: str, size: int) -> None:
    if device != "cuda":
        raise InvalidRequestError(
            "distributed.sharding is fsdp and there is no GPU to train on. On a CPU accelerate makes DDP of it without "
            "a word, and each process would hold the whole release. Say `sharding: ddp`, or run where the GPUs are."
        )
    if size < 2:
        raise InvalidRequestError(
            "distributed.sharding is fsdp and there is one process, with nobody to share the weights with. Start "
            "torchrun --nproc-per-node N -m loram_hub finetune ..., or say `sharding: ddp`."
        )


@contextmanager
def joined_processes(recipe: FinetuneRecipe) -> Iterator[Processes]:
    """Join the other processes of the run; a group that the caller has set up is used, and left as it is.

    Raises:
        InvalidRequestError: see `expected_processes`.
        TrainingError: the others cannot be reached, or accelerate formed another group.
    """
    expected = expected_processes(recipe)
    given = dist.is_available() and dist.is_initialized()
    try:
        state = PartialState(cpu=not expected.on_cuda)
    except RuntimeError as err:
        raise TrainingError(
            f"Process {expected.rank} of {expected.size} cannot reach the others: {err!s:.300}. Check MASTER_ADDR and "
            "MASTER_PORT, and that all were started."
        ) from err
    if (state.num_processes, state.process_index) != (expected.size, expected.rank):
        raise TrainingError(
            f"Process {expected.rank} of {expected.size} was started, and accelerate made it number "
            f"{state.process_index} of {state.num_processes}: a group of another size was formed in this process "
            "before. Start the run in fresh processes."
        )
    try:
        yield expected
    finally:
        if expected.size > 1 and not given:
            state.destroy_process_group()


@contextmanager
def peer_errors() -> Iterator[None]:
    """Turn the loss of another process of the run into a `TrainingError`."""
    try:
        yield
    except RuntimeError as err:
        if isinstance(err, dist.DistError) or "gloo" in str(err) or "NCCL" in str(err):
            raise TrainingError(
                "Another process of the run has ended, or cannot be reached; its own message says why. Start all of "
                f"them again: the run goes on from its last checkpoint. ({err!s:.200})"
            ) from err
        raise
