"""Which processes train together, and that they are the ones that were asked for.

Processes are started by `torchrun`, or by `accelerate launch`, which on GPUs sets the same variables; without either,
this process trains alone, by the same code, in a group of one. Weights are always sharded by torch FSDP2, whatever kind
of distribution accelerate was set up for; a launch that would quietly become something else than was wanted is an
error.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from loram_hub.errors import InvalidRequestError, LoramError, MissingDependencyError, ResourceError, TrainingError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# How long processes wait for one that is at work alone, while it downloads a release, say. One that dies is noticed at
# once, by its closed connection.
_PATIENCE = timedelta(hours=1)
LAUNCHED_BY = "LORAM_LAUNCHED_BY"
"""Variable with machine and number of the process that launched all others."""
_ELSEWHERE = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_TPU")
_Start = Callable[[object], str]  # a number of processes -> the command that starts them
_OTHER_LAUNCHERS = {"SLURM_NTASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What the environment says of the processes that were started."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Processes in all."""
    local_rank: int = 0
    """Number of this process on its machine."""
    local_size: int = 1
    """Processes on this machine."""

    @property
    def is_alone(self) -> bool:
        """Whether this process was started without a launcher."""
        return self.size == 1


def read_launch(environment: Mapping[str, str], *, processes: int | None = None, command: str = "align") -> Launch:
    """Read from the environment which processes were started.

    Args:
        environment: of this process.
        processes: how many are wanted; None for any number.
        command: of `loram` that is to be started, for messages.

    Raises:
        InvalidRequestError: a launcher's variables are incomplete, another launcher started several processes that
            would each train alone, accelerate was set up for another engine, or there is another number of processes
            than is wanted.
    """
    start = partial(_torchrun, command)
    _refuse_other_engines(environment, start)
    if "RANK" in environment:
        launch = _launched(environment, start)
    else:
        _refuse_lone_variables(environment, processes, start)
        _refuse_other_launchers(environment, start)
        launch = Launch()
    if processes is not None and launch.size != processes:
        raise InvalidRequestError(
            f"The run is meant for {processes} processes and was started with {launch.size}. "
            f"Start it with {start(processes)} (on one machine), or change `processes`."
        )
    if launch.is_alone and processes is None and _is_set(environment, "ACCELERATE_USE_FSDP"):
        raise InvalidRequestError(
            "accelerate was asked for FSDP and started one process. Give it --num_processes, or start "
            f"{start('N')}; with processes=1 this process trains alone."
        )
    return launch


def _torchrun(command: str, count: object) -> str:
    return f"torchrun --nproc-per-node {count} -m loram_hub {command} ..."


def _launched(environment: Mapping[str, str], start: _Start) -> Launch:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise InvalidRequestError(
            f"RANK is set but {', '.join(missing)} is not: half a launcher's environment. "
            f"Start with {start('N')}, or unset RANK to train in one process."
        )
    try:
        rank, size, local_rank = (int(environment[name]) for name in names[:3])
        local_size = int(environment.get("LOCAL_WORLD_SIZE", min(size, local_rank + 1)))
        port = int(environment["MASTER_PORT"])
    except ValueError as err:
        raise InvalidRequestError(
            f"RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_PORT must be whole numbers: {err}."
        ) from err
    if not 0 <= port < 2**16:
        raise InvalidRequestError(f"MASTER_PORT is {port}; ports are numbers from 0 to 65535.")
    if not 0 <= rank < size:
        raise InvalidRequestError(f"RANK is {rank} of WORLD_SIZE {size}; ranks count from 0.")
    return Launch(rank=rank, size=size, local_rank=local_rank, local_size=local_size)


def _refuse_lone_variables(environment: Mapping[str, str], processes: int | None, start: _Start) -> None:
    """Refuse what says that there are other processes while nothing says which one this is."""
    count = environment.get("WORLD_SIZE") or "1"
    if not count.isdecimal():
        raise InvalidRequestError(f"WORLD_SIZE is {count!r}, which is no number of processes, and RANK is not set.")
    if int(count) > 1:
        raise InvalidRequestError(
            f"WORLD_SIZE is {count} but RANK is not set: this process would train alone. Start all "
            f"of them with {start(count)}"
        )
    # `accelerate launch --cpu --num_processes N` sets these, and starts one process whatever N is.
    meeting = [name for name in ("MASTER_ADDR", "MASTER_PORT") if environment.get(name)]
    if meeting and processes != 1:
        raise InvalidRequestError(
            f"The environment has {' and '.join(meeting)}, as for several processes, but no RANK: this process would "
            "train alone. (On CPUs, accelerate launch starts one process whatever --num_processes says.) Start them "
            f"with {start('N')}. To train in this process alone, unset {' and '.join(meeting)}, or "
            "say processes=1 (--processes 1)."
        )


def _refuse_other_engines(environment: Mapping[str, str], start: _Start) -> None:
    for name in _ELSEWHERE:
        if _is_set(environment, name):
            raise InvalidRequestError(
                f"{name} is set: accelerate was set up for another engine. loram-hub trains with torch's own "
                f"DDP and FSDP2; start it with {start('N')}, or accelerate launch --multi_gpu."
            )


def _refuse_other_launchers(environment: Mapping[str, str], start: _Start) -> None:
    for name, launcher in _OTHER_LAUNCHERS.items():
        count = environment.get(name, "1")
        if count.isdigit() and int(count) > 1:
            raise InvalidRequestError(
                f"{name} is {count} but RANK is not set: each of the {count} tasks of {launcher} would train alone. "
                f"Have {launcher} start one task per machine that runs {start('GPUS')}; to train in "
                f"this process alone, unset {name}."
            )


def check_precision(environment: Mapping[str, str], precision: str) -> None:
    """Refuse a precision that accelerate was set up for and this run does not have; `precision` is the run's."""
    wanted = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted not in ("no", "bf16") or (wanted == "bf16" and precision == "fp32"):
        raise InvalidRequestError(
            f"accelerate was set up for mixed precision {wanted!r}; this run computes in {precision}. Choose precision "
            "'mixed' for bf16, or take the setting out of accelerate's configuration."
        )


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("1", "true", "yes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The processes of a run; all call these methods together."""

    rank: int
    """Number of this process."""
    size: int
    """Processes in all."""
    local_rank: int
    """Number of this process on its machine."""
    device: torch.device
    """Where this process computes."""
    mesh: DeviceMesh
    """All processes on one axis, for sharding."""
    control: dist.ProcessGroup
    """Group for objects, which travel over the CPU."""

    @property
    def is_first(self) -> bool:
        """Whether this process reads, logs and writes for all."""
        return self.rank == 0

    def first(self, action: Callable[[], Result]) -> Result:
        """Let the first process act; all get its result, or raise its error."""
        outcome = _outcome(action) if self.is_first else None
        shared = [outcome]
        with peers_needed():
            dist.broadcast_object_list(shared, src=0, group=self.control)
        if self.is_first:
            shared = [outcome]  # not a copy of it, and with its traceback
        return _result(cast("Result | LoramError", shared[0]))

    def everywhere(self, action: Callable[[], Result]) -> Result:
        """Let every process act; each gets its own result, or all raise the error of the lowest that failed."""
        outcome = _outcome(action)
        failed = outcome if isinstance(outcome, LoramError) else None
        failures: list[LoramError | None] = [None] * self.size
        with peers_needed():
            dist.all_gather_object(failures, failed, group=self.control)
        if failed is not None:
            raise failed
        for failure in failures:
            if failure is not None:
                raise failure
        return cast("Result", outcome)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over the processes, in place."""
        with peers_needed():
            dist.all_reduce(values)
        return values

    def rows(self, count: int) -> slice:
        """Return which of `count` rows, a multiple of the number of processes, are this one's."""
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


def _outcome(action: Callable[[], Result]) -> Result | LoramError:
    try:
        return action()
    except LoramError as err:
        return err


def _result(outcome: Result | LoramError) -> Result:
    if isinstance(outcome, LoramError):
        raise outcome
    return outcome


@contextmanager
def peers_needed() -> Iterator[None]:
    """Turn the loss of another process into a `TrainingError`, and memory that ran out into a `ResourceError`."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as err:
        raise _out_of_memory(err) from err
    except RuntimeError as err:
        if "allocate memory" in str(err) or "CUBLAS_STATUS_ALLOC_FAILED" in str(err):
            raise _out_of_memory(err) from err
        if isinstance(err, dist.DistError) or "gloo" in str(err) or "NCCL" in str(err):
            raise TrainingError(
                "Another process of the run has ended, or cannot be reached; its own message says why. "
                f"Start all of them again: the run goes on from its last checkpoint. ({err!s:.200})"
            ) from err
        raise


def _out_of_memory(err: Exception) -> ResourceError:
    return ResourceError(
        f"Memory ran out on {'a GPU' if isinstance(err, torch.OutOfMemoryError) else 'the CPU'}: {err!s:.200}. Lower "
        "micro_batch_size, sequence_length or loss_chunk, turn activation_checkpointing on, choose precision 'bf16' or "
        "the optimizer 'adamw_8bit', or start more processes; the run goes on from its last checkpoint."
    )


@contextmanager
def joined_ranks(*, processes: int | None, device: str | None) -> Iterator[Ranks]:
    """Join the other processes of the run for as long as the block lasts.

    A process group that the caller has set up is used as it is, and left as it is.

    Args:
        processes: how many are wanted; None for any number.
        device: `cuda` or `cpu`; None for CUDA where torch sees a GPU.

    Raises:
        InvalidRequestError: see `read_launch`; or there are fewer GPUs than processes.
        MissingDependencyError: torch was built without distributed training.
        TrainingError: the others cannot be reached.
    """
    if not dist.is_available():
        raise MissingDependencyError(
            "This build of torch has no torch.distributed, which alignment needs even in one process. "
            "Install an official build of torch."
        )
    given = dist.is_initialized()
    launch = _of_group(processes) if given else read_launch(os.environ, processes=processes)
    chosen = _device(launch, device)
    if not given:
        end_with_launcher()
        _initialize(launch, chosen)
    try:
        yield _ranks(launch, chosen)
    finally:
        if not given:
            dist.destroy_process_group()


def _of_group(processes: int | None) -> Launch:
    rank, size = dist.get_rank(), dist.get_world_size()
    if processes is not None and size != processes:
        raise InvalidRequestError(f"The run is meant for {processes} processes; the process group has {size}.")
    local = int(os.environ.get("LOCAL_RANK", rank))
    return Launch(rank=rank, size=size, local_rank=local, local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def _device(launch: Launch, wanted: str | None) -> torch.device:
    if wanted not in (None, "cuda", "cpu"):
        raise InvalidRequestError(
            f"device is {wanted!r}; choose 'cuda' or 'cpu' (each process takes a GPU of its own)."
        )
    if wanted == "cpu":
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    for_cuda = torch.version.cuda is not None or torch.version.hip is not None
    if (wanted == "cuda" or (for_cuda and (gpus or not launch.is_alone))) and gpus < launch.local_size:
        raise InvalidRequestError(
            f"{launch.local_size} processes were started on this machine and torch sees {gpus} GPUs. Start one process "
            "per GPU, check CUDA_VISIBLE_DEVICES and the driver, or say device 'cpu'."
        )
    return torch.device("cuda", launch.local_rank) if gpus else torch.device("cpu")


def _initialize(launch: Launch, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        if launch.is_alone and "RANK" not in os.environ:  # no port, and nothing that others could join
            store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in __all__
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=_PATIENCE)
        else:
            dist.init_process_group(backend, rank=launch.rank, world_size=launch.size, timeout=_PATIENCE)
    except RuntimeError as err:
        raise TrainingError(
            f"Process {launch.rank} of {launch.size} cannot reach the others: {err!s:.300}. Check MASTER_ADDR and "
            "MASTER_PORT, and that all were started."
        ) from err


def _ranks(launch: Launch, device: torch.device) -> Ranks:
    group = dist.group.WORLD
    assert group is not None
    control = (
        group if "gloo" in dist.get_backend_config(group) else cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
    )
    if launch.rank == 0:
        logger.info("Training in %d process(es) on %s, sharded by FSDP2", launch.size, device.type)
    return Ranks(
        rank=launch.rank,
        size=launch.size,
        local_rank=launch.local_rank,
        device=device,
        mesh=init_device_mesh(device.type, (launch.size,)),
        control=control,
    )


def launcher_mark() -> dict[str, str]:
    """Return the variable by which processes that this one launches know it."""
    return {LAUNCHED_BY: f"{socket.gethostname()}:{os.getpid()}"}


def end_with_launcher() -> None:
    """Have the kernel end this process when its launcher ends, also when that is killed and cannot tell anyone.

    Otherwise a rank would stay behind, hold its GPU and, if it is the first, the lock of the run.
    """
    if not sys.platform.startswith("linux") or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    set_parent_death_signal = 1
    prctl: Any = ctypes.CDLL(None, use_errno=True).prctl
    prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    # It may have ended before the kernel knew, or in the seconds that the imports took, which left no trace of it.
    if os.getppid() != launcher or _is_orphan():
        os.kill(os.getpid(), signal.SIGKILL)


def _is_orphan() -> bool:
    """Whether the process that began all this, if it is on this machine, is gone."""
    host, _, process = os.environ.get(LAUNCHED_BY, "").rpartition(":")
    return host == socket.gethostname() and process.isdecimal() and not Path("/proc", process).exists()
