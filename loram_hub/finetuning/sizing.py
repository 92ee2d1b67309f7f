"""Whether a run fits its GPU, and how many examples at a time do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from loram_hub.errors import ResourceError
from loram_hub.estimation import GpuMemory, gpu_memory
from loram_hub.finetuning.materials import Materials
from loram_hub.finetuning.processes import Processes
from loram_hub.finetuning.recipe import FinetuneRecipe
from loram_hub.finetuning.schedule import largest_micro_batch, share_of
from loram_hub.finetuning.shapes import training_shape
from loram_hub.fitting import Fit, Subject, fit_of

_MOST = 16
"""Examples at a time beyond which a GPU gains nothing."""
_MOST_ON_CPU = 4
_ADVICE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizing:
    """Memory that a run is estimated to take."""

    micro_batch: int
    """Examples that a process takes at a time."""
    fit: Fit | None
    """The estimate; None where the run is on a CPU and no GPU was named."""

    def explain(self) -> str:
        """Say in a sentence or two what takes the memory, and what would lower it."""
        if self.fit is None:
            return "Lower training.micro_batch or training.max_tokens, or train where there is more memory."
        breakdown = self.fit.breakdown
        parts = sorted(breakdown.components(), key=lambda part: -part[1])
        told = ", ".join(f"{name} {nbytes / 2**30:.2f}" for name, nbytes in parts if nbytes >= 2**20)
        lower = ", ".join(
            f"{each.change} ({-each.saved_bytes / 2**30:+.2f}{', enough' if each.fits else ''})"
            for each in self.fit.advice[:_ADVICE]
        )
        return (
            f"Estimated for {self.fit.gpu.name} of {self.fit.gpu.nbytes / 2**30:.2f} GiB, in GiB: "
            f"{told or 'less than 0.01'}; {breakdown.total / 2**30:.2f} in all. What would lower it: {lower}."
        )


def size_of(recipe: FinetuneRecipe, materials: Materials, processes: Processes) -> Sizing:
    """Estimate a run's memory, and choose its micro-batch.

    Under FSDP the estimate is that of a process that holds the whole release, more than it needs.

    Args:
        recipe: what is asked for.
        materials: the release.
        processes: of the run.

    Raises:
        InvalidRequestError: the GPU is unknown, the batch cannot be shared out, or memory options do not fit the model.
        ResourceError: the GPU that is there is too small.
    """
    share, gpu = share_of(recipe, processes.size), _gpu_of(recipe, processes)
    if gpu is None:
        asked = recipe.training.micro_batch or largest_micro_batch(share, _MOST_ON_CPU)
        return Sizing(micro_batch=asked, fit=None)
    fit = _fit(recipe, materials, processes, recipe.training.micro_batch or 1, gpu)
    if recipe.training.micro_batch is None and fit.fits:
        fitting = largest_micro_batch(share, min(fit.largest.micro_batch or 1, _MOST))
        fit = _fit(recipe, materials, processes, fitting, gpu)
    sizing = Sizing(micro_batch=fit.shape.micro_batch, fit=fit)
    if processes.on_cuda and not fit.fits and recipe.distributed.sharding == "ddp":
        raise ResourceError(
            f"The run does not fit: {fit.breakdown.total / 2**30:.2f} GiB with micro-batch {sizing.micro_batch}, and "
            f"{gpu.name} has {gpu.nbytes / 2**30:.2f}. {sizing.explain()}"
        )
    return sizing


def _gpu_of(recipe: FinetuneRecipe, processes: Processes) -> GpuMemory | None:
    """Return the GPU that the run must fit: the one that was named, and no larger than the one that is there."""
    named = None if recipe.gpu is None else gpu_memory(recipe.gpu)
    if not processes.on_cuda:
        return named
    found: Any = torch.cuda.get_device_properties(processes.local_rank)
    present = GpuMemory(name=found.name, nbytes=found.total_memory)
    return present if named is None or present.nbytes < named.nbytes else named


def _fit(recipe: FinetuneRecipe, materials: Materials, processes: Processes, micro_batch: int, gpu: GpuMemory) -> Fit:
    release = materials.release
    subject = Subject(
        id=materials.source.id,
        commit=materials.source.commit,
        kind="release",
        architecture=release.architecture,
        layers=release.plan.layers,
        quantized=release.is_quantized,
        stored_bytes=None,
        is_sparse=release.is_sparse,
    )
    shape = training_shape(
        recipe,
        micro_batch=micro_batch,
        processes=processes.size,
        is_masked=materials.is_masked,
        modules=materials.modules,
    )
    return fit_of(subject, shape, gpu)
