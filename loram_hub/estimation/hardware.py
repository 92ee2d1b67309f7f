"""A machine as far as estimates need to know it, and what a stage needs of one.

Streaming steps are bound by the disk or by arithmetic, whichever is slower. Where nothing is computed while the disk
works (checkpoints, loading a model as a whole), the times add up.

Times are for the machine that `Hardware` describes. It is paid as a whole, also while one of its GPUs works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loram_hub.errors import InvalidRequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A machine, as far as estimates need to know it."""

    gpu: str
    """Name of the GPU, for people."""
    count: int = 1
    """GPUs, over all nodes."""
    gpus_per_node: int | None = None
    """GPUs of one node; None if all are in one."""
    memory_gib: float
    """Memory of one, in GiB."""
    tflops: float
    """Peak of one in dense bf16 arithmetic, in 10^12 operations per second, as its maker states it."""
    fp32_tflops: float | None = None
    """Peak of one in fp32 without tensor cores, in 10^12 operations per second; None: `tflops`, as on CPUs."""
    utilization: float = 0.4
    """Share of the peak that training reaches, in (0, 1]. 0.4 is usual for sharded training."""
    disk_gb_per_second: float = 1.0
    """What the disk reads and writes, in 10^9 bytes per second."""
    network_mb_per_second: float = 100.0
    """What comes from and goes to the Hub, in 10^6 bytes per second."""
    price_per_gpu_hour: float | None = None
    """Rent of one GPU for an hour, in US dollars."""

    def __post_init__(self) -> None:
        """Check ranges; raises `InvalidRequestError`."""
        for name in ("count", "memory_gib", "tflops", "disk_gb_per_second", "network_mb_per_second"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; a number above 0 is needed.")
        if self.fp32_tflops is not None and not 0 < self.fp32_tflops < math.inf:
            raise InvalidRequestError(f"fp32_tflops is {self.fp32_tflops}; a number above 0 is needed.")
        if self.gpus_per_node is not None and not 0 < self.gpus_per_node <= self.count:
            raise InvalidRequestError(f"gpus_per_node is {self.gpus_per_node}; 1 to count ({self.count}) is needed.")
        if not 0 < self.utilization <= 1:
            raise InvalidRequestError(f"utilization is {self.utilization}; a share in (0, 1] is needed.")
        if self.price_per_gpu_hour is not None and not 0 <= self.price_per_gpu_hour < math.inf:
            raise InvalidRequestError(f"price_per_gpu_hour is {self.price_per_gpu_hour}; a number from 0 is needed.")

    @property
    def on_one_node(self) -> int:
        """GPUs that one process can spread a model over."""
        return self.gpus_per_node or self.count

    def seconds(self, *, flops: float = 0.0, fp32_flops: float = 0.0, disk_bytes: float = 0.0, gpus: int = 1) -> float:
        """Return max(operations / (GPUs * peak * utilization), bytes / disk speed); each type has a peak of its own."""
        at_full_speed = flops / self.tflops + fp32_flops / (self.fp32_tflops or self.tflops)
        arithmetic = at_full_speed / (gpus * 1e12 * self.utilization)
        return max(arithmetic, disk_bytes / (self.disk_gb_per_second * 1e9))

    def transfer_seconds(self, nbytes: float) -> float:
        """Return bytes / network speed."""
        return nbytes / (self.network_mb_per_second * 1e6)

    def price(self, seconds: float) -> float | None:
        """Return what the whole machine costs for a time, in US dollars."""
        return None if self.price_per_gpu_hour is None else seconds / 3600 * self.count * self.price_per_gpu_hour


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one stage needs."""

    output_bytes: int = 0
    """What it leaves on the disk."""
    scratch_bytes: int = 0
    """What it needs on the disk besides, while it runs."""
    memory_bytes: int = 0
    """Peak of what it computes with: of one GPU, or of main memory without one. Libraries are not counted."""
    flops: float = 0.0
    """Floating-point operations, in bf16 where the machine has it."""
    fp32_flops: float = 0.0
    """Those that are in fp32 on every machine."""
    disk_bytes: int = 0
    """What it reads and writes while it computes."""
    waited_bytes: int = 0
    """What it reads and writes while it computes nothing."""
    network_bytes: int = 0
    """What it downloads or uploads."""
    gpus: int = 1
    """GPUs that work at the same time."""

    def seconds(self, hardware: Hardware) -> float:
        """Return the time on a machine."""
        working = hardware.seconds(
            flops=self.flops, fp32_flops=self.fp32_flops, disk_bytes=self.disk_bytes, gpus=self.gpus
        )
        waiting = hardware.seconds(disk_bytes=self.waited_bytes)
        return working + waiting + hardware.transfer_seconds(self.network_bytes)
