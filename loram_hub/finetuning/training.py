"""The training itself: TRL's SFTTrainer with PEFT's LoRA and our callbacks, and what can go wrong in it."""

from __future__ import annotations

import errno
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_trainer import SFTTrainer

from loram_hub.errors import LoramError, ResourceError
from loram_hub.files import DISK_FULL, errno_of
from loram_hub.finetuning.arguments import lora_config, trainer_arguments
from loram_hub.finetuning.callbacks import RecoverCallback, SealCallback
from loram_hub.finetuning.checkpoints import SealedCheckpoint
from loram_hub.finetuning.guarding import FiniteGuard, Patience, Progress
from loram_hub.finetuning.materials import Materials
from loram_hub.finetuning.processes import Processes, peer_errors
from loram_hub.finetuning.recipe import FinetuneRecipe
from loram_hub.finetuning.schedule import Schedule
from loram_hub.instructions import Instructions
from loram_hub.masked_lora import mask_lora_

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# How torch.save says that a file cannot be written: by the place in its own source, without the system's number.
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container")
_DISK_FAILS = DISK_FULL | {errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
# How CPUs and libraries say that memory ran out; torch's own class is for GPUs.
_OUT_OF_MEMORY = ("allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")


def train(
    model: PreTrainedModel,
    data: Instructions,
    *,
    recipe: FinetuneRecipe,
    materials: Materials,
    schedule: Schedule,
    processes: Processes,
    folder: Path,
    resume_from: SealedCheckpoint | None,
) -> None:
    """Train an adapter; what it gives are sealed checkpoints in `folder`.

    Args:
        model: from `open_model`.
        data: to train and evaluate on.
        recipe: what is asked for.
        materials: the release.
        schedule: steps, batches and intervals.
        processes: of the run.
        folder: for checkpoints.
        resume_from: checkpoint to go on from; None to begin.

    Raises:
        TrainingError: loss or gradients are not finite, or another process ended.
        ResourceError: the disk is full.
    """
    with _library_talk():
        trainer = SFTTrainer(
            model,
            args=trainer_arguments(recipe, schedule, processes, model=model, folder=folder),
            train_dataset=data.train,
            eval_dataset=dict(data.evaluations) or None,
            processing_class=materials.tokenizer,
            peft_config=lora_config(recipe, materials),
            callbacks=_callbacks(recipe),
        )
        if materials.is_masked:
            mask_lora_(cast("PeftModel", trainer.model))
        trainer.remove_callback(PrinterCallback)
        if trainer.args.fp16:
            _lift_factors_(cast("torch.nn.Module", trainer.model))
        with disk_errors(folder), peer_errors():
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from.folder))


def _callbacks(recipe: FinetuneRecipe) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [FiniteGuard(), Progress()]
    if recipe.evaluation.patience is not None:
        callbacks.append(Patience(early_stopping_patience=recipe.evaluation.patience))
    if recipe.checkpoints.recover:
        callbacks.append(RecoverCallback())
    return [*callbacks, SealCallback(keep=recipe.checkpoints.keep)]


def _lift_factors_(model: torch.nn.Module) -> None:
    """Train the factors in fp32 where fp16 is computed in: TRL makes them bf16, whose gradients no scaler takes."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a disk that is full or cannot be written to into a `ResourceError`, in the words of any library.

    Args:
        folder: that is written to.
    """
    try:
        yield
    except LoramError:
        raise
    except (OSError, SafetensorError) as err:
        if errno_of(err) not in _DISK_FAILS:
            raise
        raise _disk_error(folder, err) from err
    except RuntimeError as err:
        if not any(phrase in str(err) for phrase in _TORCH_CANNOT_WRITE):
            raise
        raise _disk_error(folder, err) from err


def _disk_error(folder: Path, err: Exception) -> ResourceError:
    return ResourceError(
        f"Writing a checkpoint to {folder} failed: {err!s:.300} Free some space, or lower checkpoints.keep; the same "
        "run then goes on from its last checkpoint."
    )


@contextmanager
def memory_errors(explain: Callable[[], str]) -> Iterator[None]:
    """Turn memory that ran out into a `ResourceError` that says what takes how much, and what to lower.

    Args:
        explain: gives breakdown and advice; called when memory has run out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as err:
        raise _out_of_memory(err, explain) from err
    except RuntimeError as err:
        if not any(phrase in str(err) for phrase in _OUT_OF_MEMORY):
            raise
        raise _out_of_memory(err, explain) from err


def _out_of_memory(err: Exception, explain: Callable[[], str]) -> ResourceError:
    where = "the GPU" if isinstance(err, torch.OutOfMemoryError) or "CU" in str(err)[:40] else "the CPU"
    return ResourceError(
        f"Memory ran out on {where}: {str(err) or type(err).__name__:.200} {explain()} After a change of "
        "training.micro_batch alone, the run goes on from its last checkpoint; with lora.dropout above 0 its result is "
        "then not that of an undisturbed run."
    )


@contextmanager
def _library_talk() -> Iterator[None]:
    """Keep what the libraries print from stdout, where results go, and their bars from whoever wants none."""
    import datasets  # type: ignore[import-untyped]  # ships no types

    quiet = are_progress_bars_disabled() and not datasets.utils.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            # transformers 5.23 renames gradient_checkpointing; PEFT 0.21 and TRL 1.16 still use the old name.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
            yield
    finally:
        if quiet:
            datasets.enable_progress_bars()
