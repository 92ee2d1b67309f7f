"""Where a run with sealed checkpoints begins, and which of them it keeps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from loram_hub.errors import InvalidRequestError, PlanMismatchError, VerificationError
from loram_hub.files import resource_errors
from loram_hub.finetuning.checkpoints import (
    SEAL_FILE,
    SealedCheckpoint,
    checkpoint_folder,
    clear_removed,
    open_checkpoint,
    remove_checkpoint,
    steps_in,
)
from loram_hub.release import Release

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_MARK = ".sealed-checkpoints"


def check_arguments(args: TrainingArguments) -> None:
    """Refuse settings with which a run could not resume exactly; raises `InvalidRequestError`."""
    if args.save_total_limit is not None:
        raise InvalidRequestError(
            f"save_total_limit is {args.save_total_limit}: the Trainer would delete old checkpoints before the new one "
            "is sealed. Leave it out and give SealCallback(keep=...)."
        )
    if args.save_only_model:
        raise InvalidRequestError(
            "save_only_model is set: nothing could resume exactly without the optimizer's state. Leave it out."
        )


def check_start(run: Path, state: TrainerState, processes: int, release: Release | None) -> None:
    """Check where a run begins, and delete torn checkpoints behind that, which it would write into.

    Args:
        run: `output_dir`.
        state: as it was resumed; step 0 for a new run.
        processes: how many train together.
        release: that is trained on, if one is known.

    Raises:
        VerificationError: what was resumed from is torn.
        InvalidRequestError: that is where the run ended, or there are whole checkpoints of later steps, or unsealed
            ones of another run.
        PlanMismatchError: it is of another release.
        ResourceError: the folder cannot be written to.
    """
    clear_removed(run)
    step, steps = state.global_step, steps_in(run)
    _claim(run, [checkpoint_folder(run, each) for each in steps])
    if step in steps:
        _check_resumed(checkpoint_folder(run, step), state, processes, release)
    for later in (checkpoint_folder(run, each) for each in steps if each > step):
        try:
            open_checkpoint(later)
        except VerificationError as err:
            logger.warning("Deleting %s, which nothing can resume from: %s", later, err)
            remove_checkpoint(later)
        else:
            raise InvalidRequestError(
                f"{later} is whole and of a later step than {step}, where this run begins. Resume from "
                "latest_checkpoint(output_dir), give another output_dir, or remove it."
            )


def _claim(run: Path, checkpoints: list[Path]) -> None:
    """Mark the folder of a run whose checkpoints are sealed: without one, unsealed ones are somebody's, not torn."""
    mark = run / _MARK
    unsealed = [each for each in checkpoints if not (each / SEAL_FILE).exists()]
    if unsealed and not mark.exists():
        raise InvalidRequestError(
            f"{unsealed[0]} was written by a run without SealCallback, which cannot tell whether it is whole. Give "
            "another output_dir, or move it away."
        )
    with resource_errors(f"Writing {run}"):
        run.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _check_resumed(folder: Path, state: TrainerState, processes: int, release: Release | None) -> None:
    found = _open_resumed(folder)
    plan = None if release is None else release.plan.digest
    if found.plan_sha256 not in (None, plan):
        raise PlanMismatchError(
            f"{folder} was trained on a release with plan {found.plan_sha256[:12]}; the model has "
            f"{'none' if plan is None else plan[:12]}. Open the release that the run began with."
        )
    if state.global_step >= state.max_steps or (found.has_stopped and found.step < found.max_steps):
        raise InvalidRequestError(
            f"{folder} is where the run ended; a Trainer that resumes there would train on. Its adapter is in that "
            "folder. To train longer, raise max_steps; after an early stop, begin a new run with it."
        )
    if found.processes != processes:
        logger.warning(
            "%s was written by %d processes, now there are %d: the run goes on, but not as it would have",
            folder, found.processes, processes,
        )  # fmt: skip


def _open_resumed(folder: Path) -> SealedCheckpoint:
    try:
        return open_checkpoint(folder)
    except VerificationError as err:
        raise VerificationError(
            f"The run resumes from {folder}, and that is not whole: {err} Resume from latest_checkpoint(output_dir)."
        ) from err


def has_damaged_best(run: Path, state: TrainerState) -> bool:
    """Whether the checkpoint that was the best so far cannot be loaded any more at the end."""
    if not state.global_step or not state.best_global_step:
        return False
    best = checkpoint_folder(run, state.best_global_step)
    try:
        open_checkpoint(best)
    except VerificationError as err:
        logger.warning("%s was the best checkpoint and is lost: %s The best of the later ones will count", best, err)
        return True
    return False


def delete_old(run: Path, *, newest: int, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the newest sealed ones and the best; raises `ResourceError`."""
    steps = steps_in(run)
    sealed = [step for step in steps if (checkpoint_folder(run, step) / SEAL_FILE).exists()]
    for step in steps:
        if step not in {newest, best, *sealed[-keep:]}:
            remove_checkpoint(checkpoint_folder(run, step))
