"""Two callbacks for any Trainer of transformers or TRL that trains an adapter on a release; neither needs the other.

`RecoverCallback` writes the full-size adapter of every checkpoint beside it, ready to be served or evaluated on the
original model. `SealCallback` seals checkpoints, so that a run that was killed at any instant resumes from the newest
whole one (`latest_checkpoint`) and ends with the adapter of an undisturbed run. In this order in `callbacks=[...]`, a
sealed checkpoint always has its recovered adapter.

Every process of a run calls them; the first one writes, and what goes wrong there is raised on all.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loram_hub.adapter import RECORD, RECOVERED, DtypeName
from loram_hub.alignment.launch import peers_needed
from loram_hub.errors import InvalidRequestError, LoramError
from loram_hub.files import read_json, resource_errors
from loram_hub.finetuning.checkpoints import SEAL_FILE, checkpoint_folder, seal_checkpoint, steps_in
from loram_hub.finetuning.origins import adapter_in, pin_release_, release_of, was_masked, write_origin
from loram_hub.finetuning.resuming import check_arguments, check_start, delete_old, has_damaged_best
from loram_hub.hub import METADATA_FILES, resolve
from loram_hub.masked_lora import is_masked, refuse_sharded
from loram_hub.recovery import recover
from loram_hub.release import Release, open_metadata

if TYPE_CHECKING:
    from torch import nn

Result = TypeVar("Result")

_RECOVERED_NAME = re.compile(r"recovered-(\d+)")


class RecoverCallback(TrainerCallback):
    """Write the recovered adapter of every checkpoint that a Trainer saves, as `recovered-N` beside `checkpoint-N`.

    Not inside of it: the Trainer would load it as a second adapter when it resumes. It is what `recover` makes of the
    checkpoint, appears whole or not at all, and goes when its checkpoint has gone. The checkpoint itself gets a
    `loram.json` with the plan of the release, and on one from the Hub its commit, so that `recover` never has to guess.
    That the adapter can be recovered is checked before the first step.

    Args:
        release: that is trained on, folder or Hub id; None for the one that `AutoLoramModel` opened.
        out_dir: where the `recovered-N` go, a folder of this run alone; None for the Trainer's `output_dir`.
        dtype: type of the recovered factors.
        token: of the Hub.

    Example:
        >>> from loram_hub import RecoverCallback  # doctest: +SKIP
        >>> trainer = SFTTrainer(model, args, callbacks=[RecoverCallback()], ...)  # doctest: +SKIP
    """

    def __init__(
        self,
        release: str | os.PathLike[str] | None = None,
        out_dir: str | os.PathLike[str] | None = None,
        *,
        dtype: DtypeName = "bfloat16",
        token: str | bool | None = None,
    ) -> None:
        """Take the settings; nothing is opened before training begins."""
        self._named = release
        self._out_dir = None if out_dir is None else Path(out_dir).expanduser()
        self._dtype = dtype
        self._token = token
        self._release: Release | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Check that the adapter can be recovered, and recover what a kill has left out.

        Raises:
            InvalidRequestError: no release is known, or there is no adapter.
            UnsupportedAdapterError: the adapter has no full-size equivalent.
            PlanMismatchError: it does not fit the release.
            IncompatibleError: its update is masked, and FSDP has shared it out.
            AccessError: the Hub refused or could not be reached.
        """
        model = kwargs["model"]
        refuse_sharded(model)
        self._release = self._open_release(model)
        pin_release_(model, self._release)
        if not _is_sharded(model):
            recover(
                model, self._folder(args, state.global_step), release=self._release.folder, dtype=self._dtype,
                overwrite=True, dry_run=True,
            )  # fmt: skip
        checkpoint = checkpoint_folder(_run_of(args), state.global_step)
        if checkpoint.is_dir():
            _on_first_process(lambda: self._catch_up(args, state, model), f"Recovering {checkpoint}")

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Recover what was just saved.

        Raises:
            VerificationError: the saved adapter holds NaN.
            ResourceError: the disk is full or cannot be written to.
        """
        model = kwargs["model"]
        _on_first_process(lambda: self._recover(args, state, model), f"Recovering step {state.global_step}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Delete recovered adapters whose checkpoints have gone."""
        _on_first_process(lambda: self._delete_orphans(args), "Deleting recovered adapters")

    def _open_release(self, model: nn.Module) -> Release:
        if self._named is not None:
            return open_metadata(resolve(self._named, token=self._token, files=METADATA_FILES).folder)
        found = release_of(model)
        if found is None:
            raise InvalidRequestError(
                "The model was not opened with AutoLoramModel, so that nothing says which release it is. Give it: "
                "RecoverCallback(release=...)."
            )
        return found

    def _catch_up(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        if not self._folder(args, state.global_step).exists():
            self._recover(args, state, model)

    def _recover(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        assert self._release is not None, "on_train_begin comes first"
        checkpoint = checkpoint_folder(_run_of(args), state.global_step)
        adapter = adapter_in(checkpoint, model)
        if not (adapter / RECORD).exists() and not (checkpoint / SEAL_FILE).exists():
            write_origin(adapter, self._release, masked=is_masked(model))
        recover(
            adapter, self._folder(args, state.global_step), release=self._release.folder, dtype=self._dtype,
            overwrite=True,
        )  # fmt: skip
        self._delete_orphans(args)

    def _folder(self, args: TrainingArguments, step: int) -> Path:
        return (self._out_dir or _run_of(args)) / f"recovered-{step}"

    def _delete_orphans(self, args: TrainingArguments) -> None:
        kept = set(steps_in(_run_of(args)))
        out_dir = self._out_dir or _run_of(args)
        for folder in [*out_dir.iterdir()] if out_dir.is_dir() else []:
            match = _RECOVERED_NAME.fullmatch(folder.name)
            if match and int(match[1]) not in kept and _is_recovered(folder):
                shutil.rmtree(folder)


class SealCallback(TrainerCallback):
    """Seal every checkpoint that a Trainer saves, and keep the newest ones and the best.

    Give it in `callbacks=[...]` when the Trainer is made, after `RecoverCallback`, and resume with
    `latest_checkpoint(output_dir)`. Leave `save_total_limit` to it: the Trainer deletes old checkpoints before the new
    one is sealed. With several processes, all must see the folder.

    It also holds on to what a resumed Trainer would lose: the type of the factors (PEFT loads bfloat16 ones, which TRL
    trains on a quantized model, as float32), and that the run had ended.

    Args:
        keep: how many sealed checkpoints to keep, the newest ones; the best one is kept besides.

    Raises:
        InvalidRequestError: `keep` is less than one.

    Example:
        >>> from loram_hub.finetuning import SealCallback, latest_checkpoint  # doctest: +SKIP
        >>> trainer = SFTTrainer(model, args, callbacks=[SealCallback(keep=2)], ...)  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=latest_checkpoint(args.output_dir))  # doctest: +SKIP
    """

    def __init__(self, *, keep: int = 2) -> None:
        """Take the settings."""
        if keep < 1:
            raise InvalidRequestError(f"{keep} checkpoints cannot be kept: at least 1 is needed to resume from.")
        self._keep = keep
        self._saw_init = False

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Have PEFT load a checkpoint's factors in the type they have."""
        self._saw_init = True
        model = kwargs["model"]
        if isinstance(model, PeftModel):
            vars(model)["load_adapter"] = partial(model.load_adapter, autocast_adapter_dtype=False)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Check what the run resumes from, and that it does not begin behind a checkpoint that is whole.

        Raises:
            InvalidRequestError: the Trainer's settings do not go with sealed checkpoints, the run had ended, or it was
                masked and is not, or the other way round.
            VerificationError: the checkpoint that was resumed from is torn.
            PlanMismatchError: it is of another release.
            IncompatibleError: the model is masked, and FSDP has shared it out.
        """
        refuse_sharded(kwargs["model"])
        check_arguments(args)
        if state.global_step and not self._saw_init:
            raise InvalidRequestError(
                "SealCallback was added after the Trainer was made, too late to resume exactly. Give it in "
                "callbacks=[...]."
            )
        release = release_of(kwargs["model"])
        run = _run_of(args)
        doing = f"Looking at the checkpoints in {run}"
        _on_first_process(lambda: check_start(run, state, args.world_size, release), doing)
        _on_first_process(lambda: _check_masking(checkpoint_folder(run, state.global_step), kwargs["model"]), doing)
        if _on_first_process(lambda: has_damaged_best(run, state), doing):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Seal what was just saved, then delete what is older than the ones to keep.

        Raises:
            ResourceError: the disk is full or cannot be written to; the older checkpoints are as they were.
        """
        run = _run_of(args)
        checkpoint = checkpoint_folder(run, state.global_step)
        model = kwargs["model"]
        release = release_of(model)

        def seal() -> None:
            if release is not None and isinstance(model, PeftModel):
                adapter = adapter_in(checkpoint, model)
                if not (adapter / RECORD).exists():
                    write_origin(adapter, release, masked=is_masked(model))
            seal_checkpoint(
                checkpoint,
                max_steps=state.max_steps,
                has_stopped=control.should_training_stop,
                processes=args.world_size,
                plan_sha256=None if release is None else release.plan.digest,
            )
            delete_old(run, newest=state.global_step, keep=self._keep, best=state.best_global_step)

        _on_first_process(seal, f"Sealing {checkpoint}")


def _run_of(args: TrainingArguments) -> Path:
    assert args.output_dir is not None, "TrainingArguments gives it a default"
    return Path(args.output_dir)


def _check_masking(checkpoint: Path, model: nn.Module) -> None:
    """Check that a run which resumes is masked if it was, and only then."""
    if not checkpoint.is_dir() or not isinstance(model, PeftModel):
        return
    adapter = adapter_in(checkpoint, model)
    if (adapter / RECORD).exists() and was_masked(adapter) != is_masked(model):
        has, needs = ("is not", "Call mask_lora_(trainer.model)") if was_masked(adapter) else ("is", "Do not mask it")
        raise InvalidRequestError(
            f"{checkpoint} was trained {'' if was_masked(adapter) else 'un'}masked, and the model {has} masked now. "
            f"{needs} before training, or begin a new run."
        )


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _is_recovered(folder: Path) -> bool:
    """Whether a folder is an adapter that was recovered, and not somebody's of that name."""
    return (folder / RECORD).is_file() and read_json(folder / RECORD).get("kind") == RECOVERED


def _on_first_process(action: Callable[[], Result], doing: str) -> Result:
    """Wait for all processes, let the first one act, and give all its result, or raise its error on all."""
    if not (dist.is_available() and dist.is_initialized()):
        with resource_errors(doing):
            return action()
    outcome: list[Any] = [None]
    with peers_needed():
        dist.barrier()
        if dist.get_rank() == 0:
            try:
                with resource_errors(doing):
                    outcome = [action()]
            except (LoramError, OSError) as err:
                outcome = [err]
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    result: Result = outcome[0]
    return result
