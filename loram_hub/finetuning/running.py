"""`finetune`: a recipe, from release to recovered adapter; run again after an interruption, it goes on."""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loram_hub.files import dump_json
from loram_hub.finetuning.checkpoints import SealedCheckpoint, latest_checkpoint
from loram_hub.finetuning.loading import open_model
from loram_hub.finetuning.preparing import Prepared, prepare
from loram_hub.finetuning.processes import expected_processes, joined_processes
from loram_hub.finetuning.publishing import check_push
from loram_hub.finetuning.recipe import FinetuneRecipe
from loram_hub.finetuning.results import (
    RECORD_FORMAT,
    FinetuneResult,
    adapter_facts,
    chosen_checkpoint,
    copy_adapter,
    digests_of,
    history_of,
    is_intact,
    losses_at,
    result_of,
    versions,
)
from loram_hub.finetuning.runs import Resume, RunFolder
from loram_hub.finetuning.training import memory_errors, train
from loram_hub.pushing import push_adapter
from loram_hub.recipes import read_file
from loram_hub.recovery import recover

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class FinetunePreview:
    """What `finetune` would do."""

    folder: Path
    """Of the run."""
    prepared: Prepared
    """Release, data, estimate, schedule."""
    resumes_from: int | None
    """Step of the checkpoint that it would go on from; None if it would begin."""
    is_finished: bool
    """Whether the run was trained to its end before."""
    pushes_to: str | None
    """Hub id of where the recovered adapter would go; None if nowhere, or if it is there."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        prepared, fit = self.prepared, self.prepared.sizing.fit
        base = prepared.materials.release.manifest.base
        return {
            "folder": str(self.folder),
            "release": {"id": prepared.materials.source.id, "commit": prepared.materials.source.commit},
            "base": {"id": base.id, "commit": base.commit},
            "data": prepared.data.report.to_dict(),
            "schedule": asdict(prepared.schedule),
            "adapter_parameters": prepared.materials.adapter_parameters(prepared.recipe.lora.r),
            "targets": list(prepared.materials.targets),
            "masked": prepared.materials.is_masked,
            "estimate": None if fit is None else fit.to_dict(),
            "disk_bytes": prepared.disk_bytes,
            "device": prepared.processes.device,
            "resumes_from": self.resumes_from,
            "is_finished": self.is_finished,
            "pushes_to": self.pushes_to,
        }


def finetune(
    recipe: FinetuneRecipe | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    resume: Resume = "auto",
    token: str | bool | None = None,
) -> FinetuneResult:
    """Train LoRA on a release with TRL and PEFT as they are, and recover the adapter for the original model.

    Started by `torchrun` or `accelerate launch`, the processes train together; all call it. What can go wrong is
    looked for before the weights are loaded. Called again after an interruption, it goes on from the newest whole
    checkpoint and ends with the same adapter.

    Args:
        recipe: the recipe, or its file.
        out_dir: folder of the run; see `loram_hub.finetuning.runs`.
        resume: `auto` goes on with the run that is in `out_dir`; `never` starts anew.
        token: of the Hub.

    Returns:
        Where the adapters are, their losses, and the command that serves the recovered one.

    Raises:
        InvalidRequestError: the recipe or the data cannot be, or `out_dir` holds something else.
        IncompatibleError: release, base, tokenizer or memory options do not fit each other.
        VerificationError: the release was altered, or a data file is damaged.
        ResourceError: memory or disk do not suffice.
        TrainingError: loss or gradients are not finite, or another process ended.
        AccessError: the Hub refused or could not be reached.

    Example:
        >>> from loram_hub import finetune  # doctest: +SKIP
        >>> print(finetune("consume/finetune-20gb.yaml", "my-task").serving_command)  # doctest: +SKIP
    """
    chosen, folder = _opened(recipe, out_dir)
    with joined_processes(chosen) as processes:
        folder.refuse_foreign()
        prepared = prepare(chosen, folder, processes, token=token)
        with folder.locked() if processes.is_first else nullcontext():
            return _Run(prepared, folder, resume, token).do()


def check_finetune(
    recipe: FinetuneRecipe | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    resume: Resume = "auto",
    token: str | bool | None = None,
) -> FinetunePreview:
    """Say what `finetune` would do and what it would need; nothing is written to `out_dir`, and no weights are fetched.

    The data are read in full, and stay in the cache of `datasets`, where the run finds them.

    Arguments and errors are those of `finetune`.

    Returns:
        Data report, estimate, schedule.
    """
    chosen, folder = _opened(recipe, out_dir)
    prepared = prepare(chosen, folder, expected_processes(chosen), token=token)
    folder.check(prepared.identity, resume=resume)
    goes_on = resume == "auto"
    latest = latest_checkpoint(folder.checkpoints) if goes_on else None
    record = folder.finished() if goes_on else None
    _check_push(prepared, folder, record, token)
    return FinetunePreview(
        folder=folder.folder,
        prepared=prepared,
        resumes_from=None if latest is None else latest.step,
        is_finished=record is not None and is_intact(folder.adapter, record["adapter"]),
        pushes_to=_pushes_to(prepared, record),
    )


def _check_push(
    prepared: Prepared, folder: RunFolder, record: Mapping[str, Any] | None, token: str | bool | None
) -> None:
    """Look for what would stop the push of a run, if there is one to come."""
    push = prepared.recipe.push
    if push is not None and _pushes_to(prepared, record) is not None:
        is_there = record is not None and is_intact(folder.recovered, record["recovered"])
        check_push(push, prepared.materials, folder.recovered if is_there else None, token=token)


def _pushes_to(prepared: Prepared, record: Mapping[str, Any] | None) -> str | None:
    """Return where a run has yet to push its adapter; None if nowhere."""
    push = prepared.recipe.push
    done = None if record is None else record["pushed_to"]
    return None if push is None or push.repo_id == done else push.repo_id


def _opened(
    recipe: FinetuneRecipe | str | os.PathLike[str], out_dir: str | os.PathLike[str]
) -> tuple[FinetuneRecipe, RunFolder]:
    chosen = recipe if isinstance(recipe, FinetuneRecipe) else read_file(FinetuneRecipe, recipe)
    return chosen, RunFolder(Path(out_dir).expanduser().absolute())


class _Run:
    """One run, on one of its processes."""

    def __init__(self, prepared: Prepared, folder: RunFolder, resume: Resume, token: str | bool | None) -> None:
        self._prepared, self._folder, self._resume, self._token = prepared, folder, resume, token
        self._processes = prepared.processes

    def do(self) -> FinetuneResult:
        """Train what is left to train, then write what the run gives, then push it."""
        record = self._processes.from_first(self._begin)
        resumed = None
        if record is None:
            start = latest_checkpoint(self._folder.checkpoints)
            seconds = 0.0
            if start is None or not start.has_stopped:
                seconds = self._train(start)
            record = self._processes.from_first(lambda: self._finish(seconds))
            resumed = None if start is None else start.step
        finished = record
        record = self._processes.from_first(lambda: self._push(finished))
        return result_of(self._folder.folder, record, resumed_from=resumed)

    def _begin(self) -> dict[str, Any] | None:
        """Check and mark the folder; return the record of a run that is finished already."""
        folder, identity = self._folder, self._prepared.identity
        folder.check(identity, resume=self._resume)
        record = folder.finished() if self._resume == "auto" else None
        _check_push(self._prepared, folder, record, self._token)
        folder.begin(identity, resume=self._resume)
        if record is None or not is_intact(folder.adapter, record["adapter"]):
            return None
        logger.info("%s is finished", folder.folder)
        return record if is_intact(folder.recovered, record["recovered"]) else self._recover_again(record)

    def _recover_again(self, record: dict[str, Any]) -> dict[str, Any]:
        """Make the recovered adapter of a finished run anew, which is gone or was altered."""
        logger.warning("%s is not what the run wrote; recovering it anew", self._folder.recovered)
        record = {**record, **self._recovered()}
        self._folder.finish(record)
        return record

    def _train(self, start: SealedCheckpoint | None) -> float:
        prepared, schedule = self._prepared, self._prepared.schedule
        step = 0 if start is None else start.step
        if start is not None:
            logger.info("Going on from step %d of %d", step, schedule.steps)
        layout = {"processes": schedule.processes, "micro_batch": schedule.micro_batch}
        self._processes.from_first(lambda: self._folder.note_start(step, layout))
        began = time.monotonic()
        with memory_errors(prepared.sizing.explain):
            model = open_model(prepared.recipe, prepared.materials, self._processes, token=self._token)
            train(
                model,
                prepared.data,
                recipe=prepared.recipe,
                materials=prepared.materials,
                schedule=schedule,
                processes=self._processes,
                folder=self._folder.checkpoints,
                resume_from=start,
            )
        del model
        gc.collect()  # a trainer and its model refer to each other
        return time.monotonic() - began

    def _finish(self, seconds: float) -> dict[str, Any]:
        """Take the adapter from its checkpoint, recover it, write down how it came about; on the first process."""
        recipe, folder = self._prepared.recipe, self._folder
        chosen = chosen_checkpoint(folder.checkpoints, best=recipe.watched is not None)
        last = latest_checkpoint(folder.checkpoints)
        assert last is not None
        copy_adapter(chosen.folder, folder.adapter)
        template = self._prepared.foreign_template
        if template is not None:
            folder.write_template(template)
        history = history_of(last.folder)
        training, evaluations = losses_at(history, chosen.step)
        record = {
            **self._facts(),
            **self._recovered(),
            "adapter": {"files": digests_of(folder.adapter)},
            "steps": chosen.step,
            "last_step": last.step,
            "starts": folder.known_starts(),
            "losses": {"training": training, "evaluations": evaluations},
            "history": history,
            "has_chat_template": template is not None,
            "pushed_to": None,
            "seconds": seconds,
            "peak_device_bytes": torch.cuda.max_memory_allocated() if self._processes.on_cuda else None,
        }
        folder.finish(record)
        return record

    def _recovered(self) -> dict[str, Any]:
        """Recover the adapter for the original model, and say what it is."""
        folder, release = self._folder, self._prepared.materials.release.folder
        recovered = recover(folder.adapter, folder.recovered, release=release, overwrite=True)
        return {"recovered": {**adapter_facts(recovered), "files": digests_of(folder.recovered)}}

    def _push(self, record: dict[str, Any]) -> dict[str, Any]:
        """Push the recovered adapter if that was asked for and not done, and write that down."""
        push, repo_id = self._prepared.recipe.push, _pushes_to(self._prepared, record)
        if push is None or repo_id is None:
            return record
        push_adapter(self._folder.recovered, repo_id, private=push.private, license=push.license, token=self._token)
        record = {**record, "pushed_to": repo_id}
        self._folder.finish(record)
        return record

    def _facts(self) -> dict[str, Any]:
        """What the record says of how the run was set up."""
        prepared, processes = self._prepared, self._processes
        release, fit = prepared.materials.release, prepared.sizing.fit
        facts = {
            "format": RECORD_FORMAT,
            "recipe": asdict(prepared.recipe),
            "release": {
                "id": prepared.materials.source.id,
                "commit": prepared.materials.source.commit,
                "plan_sha256": release.plan.digest,
            },
            "masked": prepared.materials.is_masked,
            "data": prepared.data.report.to_dict(),
            "schedule": asdict(prepared.schedule),
            "estimated_device_bytes": None if fit is None else fit.breakdown.total,
            "device": torch.cuda.get_device_name(processes.local_rank) if processes.on_cuda else "cpu",
            "versions": versions(),
        }
        read_back: dict[str, Any] = json.loads(dump_json(facts))
        return read_back
