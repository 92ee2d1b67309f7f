"""Processes that save and load checkpoints together, or log: what `test_checkpoints` runs on one or two gloo ranks.

They are forked from one server that has imported torch, so that each starts in some hundredths of a second.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from loram_hub.alignment.checkpoints import CheckpointStore
from loram_hub.alignment.curves import RunLog
from loram_hub.errors import LoramError, ResourceError

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["checkpoint_ranks", "pytest", "torch._dynamo"])  # the last is what DTensor imports late
PATIENCE = 60.0
CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
"""What Python reports before it changes files, or opens one."""

Task = Callable[..., Any]


def start(task: Task, world_size: int, *arguments: Any) -> tuple[list[BaseProcess], Path]:
    """Start a task on so many ranks, and return them with the folder that their results go to."""
    results = Path(tempfile.mkdtemp(dir=_all_results()))
    ranks = [
        FORKS.Process(target=_be_rank, args=(task, rank, world_size, results, *arguments)) for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    return list(ranks), results


@functools.cache
def _all_results() -> str:
    folder = tempfile.mkdtemp(prefix="loram-ranks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def run(task: Task, world_size: int, *arguments: Any) -> list[Any]:
    """Run a task on so many ranks, and return what each returned; a `LoramError` is returned too."""
    ranks, results = start(task, world_size, *arguments)
    for rank in ranks:
        rank.join(PATIENCE)
        if rank.exitcode is None:
            rank.kill()
            raise AssertionError("a rank waits for ever")
    return [pickle.loads((results / str(rank)).read_bytes()) for rank in range(world_size)]


def _be_rank(task: Task, rank: int, world_size: int, results: Path, *arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(results / "store"), world_size), rank=rank, world_size=world_size
    )
    try:
        result = task(*arguments)
    except LoramError as err:
        result = err
    except BaseException:
        result = traceback.format_exc()
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (results / str(rank)).write_bytes(pickle.dumps(result))
    os._exit(0)


def whole_state(step: int) -> dict[str, Any]:
    """Return the state after a step, whole: the numbers that every checkpoint in these tests must give back."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {
            "weight": torch.randn(7, 3, generator=generator),  # 7 rows are not the same on both of two ranks
            "norm": torch.randn(1, generator=generator).bfloat16(),  # of which one rank has nothing
        },
        "optimizer": {"moments": {"weight": torch.randn(7, 3, generator=generator)}, "step": torch.tensor(float(step))},
        "rng": torch.randint(0, 256, (40,), dtype=torch.uint8, generator=generator),
        "scheduler": {"last_step": step, "rates": [step / 3, 0.5], "name": "cosine"},
    }


def sharded(state: dict[str, Any]) -> dict[str, Any]:
    """Shard the matrices and the norm by rows over all ranks; the rest is the same on each."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = {
        name: distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None) for name, value in state["model"].items()
    }
    moments = {
        name: distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
        for name, value in state["optimizer"]["moments"].items()
    }
    return {**state, "model": model, "optimizer": {**state["optimizer"], "moments": moments}}


def whole(state: Any) -> Any:
    """Gather what is sharded; tensors become pairs of dtype and bytes, which pickle as values."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, DTensor):
        state = state.full_tensor()
    if isinstance(state, torch.Tensor):
        return (str(state.dtype), tuple(state.shape), state.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state


def save(folder: Path, *steps: int, keep: int = 2) -> str:
    store = CheckpointStore(folder, keep=keep)
    for step in steps:
        path = store.save(step, sharded(whole_state(step)), {"step": step})
    return path.name


def load(folder: Path) -> tuple[int, Any, Any]:
    store = CheckpointStore(folder, keep=2)
    found = store.newest()
    assert found is not None
    state = sharded(whole_state(0))
    store.load(found, state)
    return found.step, dict(found.extra), whole(state)


def newest_step(folder: Path) -> int | None:
    found = CheckpointStore(folder, keep=2).newest()
    return None if found is None else found.step


def clear(folder: Path) -> None:
    CheckpointStore(folder, keep=2).clear()


def save_with_limit(folder: Path, step: int, limited_rank: int, largest_file: int) -> None:
    """Save where one rank can write no file over a size; all others can."""
    if dist.get_rank() == limited_rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    save(folder, step)


def save_without_json(folder: Path) -> None:
    CheckpointStore(folder, keep=2).save(1, {"x": torch.ones(2)}, {"x": object()})


def load_other_shape(folder: Path) -> None:
    store = CheckpointStore(folder, keep=2)
    found = store.newest()
    assert found is not None
    state = whole_state(0)
    state["model"]["weight"] = torch.zeros(8, 3)
    store.load(found, sharded(state))


def save_until_killed(folder: Path, reports: Path) -> None:
    """Save step after step, and report each that is done."""
    for step in range(1, 10_000):
        save(folder, step)
        if dist.get_rank() == 0:
            with reports.open("ab") as file:  # its length is the step: no kill leaves a part of that
                file.write(b".")


def log_until_killed(path: Path, reports: Path) -> None:
    """Log step after step, and report each that is done."""
    log = RunLog(path)
    for step in range(10**6):
        log.append({"step": step, "text": "x" * 5_000})
        with reports.open("ab") as file:
            file.write(b".")


def log_on_full_disk(path: Path) -> str:
    """Log three steps, of which the second finds room for half its line; return its error."""
    log, message = RunLog(path), ""
    log.append({"step": 0})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, resource.RLIM_INFINITY))
    try:
        log.append({"step": 1, "text": "x" * 500})
    except ResourceError as err:
        message = str(err)
    log.append({"step": 2})
    return message


def save_and_die(folder: Path, step: int, change: int) -> None:
    """Save, and kill this process at the n-th change of a file in the folder."""
    count = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in CHANGES and str(folder) in str(arguments[0]):
            count += 1
            if count == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    save(folder, step)


class _Training:
    """A small model under FSDP2 with AdamW, as the engine has it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        for layer in self.model:
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def step(self, number: int) -> None:
        """Do one step, on the same batch on every rank."""
        batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        self.model(batch).pow(2).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=options),
        }

    def set(self, state: dict[str, Any]) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)


def train(folder: Path, until: int) -> Any:
    """Train up to a step, from the newest checkpoint if there is one, and save there."""
    store, training, done = CheckpointStore(folder, keep=2), _Training(), 0
    if (found := store.newest()) is not None:
        state = training.state()
        store.load(found, state)
        training.set(state)
        done = found.step
    for number in range(done, until):
        training.step(number)
    store.save(until, training.state(), {})
    return whole(training.state())
