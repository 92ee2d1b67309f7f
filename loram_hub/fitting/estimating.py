"""Whether a training fits a GPU, told before anything is downloaded."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from loram_hub.errors import InvalidRequestError
from loram_hub.estimation import (
    GpuMemory,
    Largest,
    MemoryBreakdown,
    TrainingShape,
    gpu_memory,
    largest_settings,
    smallest_ratio,
    training_memory,
)
from loram_hub.fitting.advising import Advice, advise
from loram_hub.fitting.subjects import Subject, find_subject
from loram_hub.plan import PruningSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Whether a training fits a GPU, and what would."""

    subject: Subject
    """What is trained."""
    gpu: GpuMemory
    """What it must fit."""
    shape: TrainingShape
    """How it is trained."""
    breakdown: MemoryBreakdown
    """What the highest moment of a step holds."""
    largest: Largest
    """Sequence, micro-batch and rank up to which everything fits, each while the others stay."""
    smallest_ratio: float | None
    """Ratio of structured pruning of the base from which on every one fits, in thousandths, with plain LoRA; None for a
    structured release, and where even the largest does not fit."""
    advice: tuple[Advice, ...]
    """Changes that save memory, the largest saving first."""

    @property
    def fits(self) -> bool:
        """Whether the training fits."""
        return self.free_bytes >= 0

    @property
    def free_bytes(self) -> int:
        """Bytes that are left; negative: bytes that are missing."""
        return self.gpu.nbytes - self.breakdown.total

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        subject = self.subject
        return {
            "id": subject.id,
            "commit": subject.commit,
            "kind": subject.kind,
            "quantized": subject.quantized,
            "sparse": subject.is_sparse,
            "stored_bytes": subject.stored_bytes,
            "gpu": asdict(self.gpu),
            "shape": asdict(self.shape),
            "fits": self.fits,
            "free_bytes": self.free_bytes,
            "breakdown": self.breakdown.to_dict(),
            "largest": asdict(self.largest),
            "smallest_ratio": self.smallest_ratio,
            "advice": [asdict(advice) for advice in self.advice],
            "measured": False,
        }


def estimate_memory(
    target: str | os.PathLike[str],
    *,
    gpu: str = "20GB",
    shape: TrainingShape | None = None,
    pruning_ratio: float | None = None,
    keep_first: int | None = None,
    keep_last: int | None = None,
    round_to: int | None = None,
    quantized: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Fit:
    """Estimate the memory of a fine-tuning, from configs and headers alone; no weights are downloaded or read.

    Args:
        target: folder or Hub id of a release; config file, folder or Hub id of a base model. A sparse release takes
            what its base takes.
        gpu: its memory (`20GB`) or name (`rtx4090`).
        shape: how it is trained; None for the defaults of `TrainingShape`.
        pruning_ratio: of a base model, in [0, 1); None for the base model as it is.
        keep_first: layers at the start that stay whole, where a base model is pruned; None for 4.
        keep_last: layers at the end that stay whole; None for 2.
        round_to: round kept MLP channels up to a multiple; None for the paper's exact count.
        quantized: whether a base model is to be NF4; None for yes. A release says it itself.
        revision: of a Hub id.
        token: of the Hub.

    Returns:
        The breakdown, whether it fits, and up to which settings it does.

    Raises:
        InvalidRequestError: a setting is out of range, a target is no module of the model, or the memory options do
            not fit tied embeddings; a release is given what its plan decides, or masked LoRA and is not sparse.
        UnsupportedAdapterError: a target is the lm_head.
        VerificationError: the release was altered, or a weight file is not the one that its manifest lists.
        IncompatibleError: the family is unknown, or plan and weights do not fit.
        AccessError: the Hub refused or could not be reached.

    Example:
        >>> from loram_hub import estimate_memory  # doctest: +SKIP
        >>> estimate_memory("org/Llama-3.1-70B-LoRAM-0.85", gpu="20GB").fits  # doctest: +SKIP
        True
    """
    memory = gpu_memory(gpu)
    asked = {"keep_first": keep_first, "keep_last": keep_last, "round_to": round_to}
    structure = {name: value for name, value in asked.items() if value is not None}
    settings = None if pruning_ratio is None else PruningSettings(pruning_ratio=pruning_ratio, **structure)
    subject = find_subject(
        target, settings=settings, quantized=quantized, structure=structure, revision=revision, token=token
    )
    shape = shape or TrainingShape()
    if shape.masked_lora and subject.kind != "base model" and not subject.is_sparse:
        raise InvalidRequestError(
            f"{target} is or will be a structured release: what was pruned is not there, so that there is nothing to "
            "mask. Leave out masked LoRA."
        )
    fit = fit_of(subject, shape, memory)
    if subject.kind == "release" and not subject.is_sparse:
        return fit
    plain = replace(shape, masked_lora=False)
    ratio = smallest_ratio(subject.architecture, plain, memory.nbytes, quantized=subject.quantized, **structure)
    return replace(fit, smallest_ratio=ratio)


def fit_of(subject: Subject, shape: TrainingShape, gpu: GpuMemory) -> Fit:
    """Estimate what was found already.

    Args:
        subject: what is trained.
        shape: how.
        gpu: what it must fit.

    Raises:
        InvalidRequestError: see `estimate_memory`.
    """
    return Fit(
        subject=subject,
        gpu=gpu,
        shape=shape,
        breakdown=training_memory(subject.architecture, subject.layers, shape, quantized=subject.quantized),
        largest=largest_settings(subject.architecture, subject.layers, shape, gpu.nbytes, quantized=subject.quantized),
        smallest_ratio=None,
        advice=advise(subject, shape, gpu.nbytes),
    )
