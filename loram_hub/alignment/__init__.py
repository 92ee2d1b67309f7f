"""Alignment: continual pre-training of the pruned weights on general text (LoRAM, arXiv 2502.13533, eq. 8).

    settings      how to train; requests: all that is asked for, checked and opened
    estimates     what that takes
    launch        which processes there are, and that they are the wanted ones
    model         the pruned model, sharded over them (torch FSDP2)
    objective     next-token loss and divergence from a teacher, a chunk of logits at a time
    masking       gradients of a sparse release, so that its zeros stay zeros
    optimization  AdamW on each process's own rows, schedule, clipping
    batches       the training stream, read by the first process and handed to all
    checkpoints   what a killed run resumes from; state_files: the files of one
    curves, trackers   what was measured
    training      the loop
    runs          the folder of a run: what it is, its lock, its log
    results       the aligned release
    aligning      `align` and `check_align`, which put all this together

The settings are free of torch; `align` and what else needs it load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from loram_hub.alignment.settings import AlignmentSettings as AlignmentSettings

if TYPE_CHECKING:
    from loram_hub.alignment.aligning import align as align
    from loram_hub.alignment.aligning import check_align as check_align
    from loram_hub.alignment.estimates import AlignmentEstimate as AlignmentEstimate

__all__ = ["AlignmentEstimate", "AlignmentSettings", "align", "check_align"]

_HOME = {"AlignmentEstimate": "estimates", "align": "aligning", "check_align": "aligning"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
