"""Tasks of lm-evaluation-harness on each model in turn: the way in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from loram_hub.downstream.backends import As, check_way, models_of, visit_models
from loram_hub.downstream.catalogue import PlannedTask, check_needs, plan_tasks
from loram_hub.downstream.collecting import Collector
from loram_hub.downstream.loading import load_tasks
from loram_hub.downstream.presets import requested
from loram_hub.downstream.programs import Limits, run_program
from loram_hub.downstream.results import TaskResults
from loram_hub.errors import InvalidRequestError
from loram_hub.evaluation import check_given, find_subjects, placement, provenance_of
from loram_hub.files import sha256_of

SEED = 1234
"""The harness's own, so that few-shot examples are those of a plain `lm_eval` run."""


def evaluate_tasks(
    tasks: str | Sequence[str],
    *,
    base: str | os.PathLike[str] | None = None,
    release: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    recovered: str | os.PathLike[str] | None = None,
    as_: As = "adapter",
    include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = SEED,
    run_generated_code: bool = False,
    limits: Limits | None = None,
    allow_base_mismatch: bool = False,
) -> TaskResults:
    """Measure base, pruned, pruned + adapter, and base + recovered adapter on tasks of lm-evaluation-harness.

    Args:
        tasks: presets (`paper`, `math`, `csr`, `code`), tasks, groups and tags; one text with commas, or several.
        base: the original model, folder or Hub id.
        release: the pruned model, folder or Hub id.
        adapter: the adapter trained on the release.
        recovered: the recovered adapter, for the base.
        as_: how base and recovered adapter are put together: as PEFT `adapter`; `merged` first, as by `loram merge`, in
            the folder that TMPDIR names; by `vllm`, with the adapter as a server has it. vLLM measures one model a
            call: the base with the recovered adapter if one is given, otherwise the base.
        include_path: folders with task files of your own in the harness's format. A task file may name Python functions
            beside it, which are then run.
        num_fewshot: solved examples in front of each question; None for the preset's or the task's own number. Tasks
            that insist on none keep none.
        limit: measure only the first so many questions of each task.
        batch_size: sequences per forward pass.
        device: where the models run; None for the CPU, `auto` to spread each over all GPUs.
        dtype: that the models compute in; None for the best the device has in hardware.
        seed: of few-shot examples and of sampling.
        run_generated_code: allow tasks whose answers are programs (HumanEval): what the model writes is then run on
            this machine, see `loram_hub.downstream.programs`.
        limits: of each generated program.
        allow_base_mismatch: take another state of the base than the one that the recovered adapter was made for.

    Returns:
        The numbers, and all that is needed to repeat them.

    Raises:
        InvalidRequestError: no model or task, an unknown task, or generated code that was not allowed.
        AccessError: data of a task cannot be had; in offline mode this is said before any model is loaded.
        IncompatibleError: the base is not at the commit that the recovered adapter names.
        MissingDependencyError: lm-eval, peft or vLLM is needed and not installed.

    Example:
        >>> from loram_hub.downstream import evaluate_tasks  # doctest: +SKIP
        >>> evaluate_tasks("csr", base="org/model", recovered="my-adapter").to_dict()  # doctest: +SKIP
    """
    date = datetime.now(UTC).isoformat(timespec="seconds")
    given = {"base": base, "release": release, "adapter": adapter, "recovered": recovered}
    folders = _folders(include_path)
    requests = requested(tasks, num_fewshot=num_fewshot)
    planned = check_tasks(
        tasks, base=base, release=release, adapter=adapter, recovered=recovered, as_=as_, include_path=folders,
        num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, run_generated_code=run_generated_code,
    )  # fmt: skip
    collector = Collector(
        planned={task.name: task for task in planned},
        loaded=load_tasks([request.task for request in requests], planned, folders),
        limit=limit,
        seed=seed,
        limits=limits or Limits(),
    )
    subjects = find_subjects(**given, allow_base_mismatch=allow_base_mismatch)  # last: models are larger than data
    where = placement(device, dtype)
    visit_models(
        collector.measure, subjects, where, as_=as_, batch_size=batch_size, seed=seed, mismatch=allow_base_mismatch
    )
    settings = {
        "tasks": [request.task for request in requests], "task_files": _task_files(planned, folders), "as": as_,
        "num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size, "device": device or "cpu",
        "dtype": str(where.dtype).removeprefix("torch."), "seed": seed, "allow_base_mismatch": allow_base_mismatch,
        "limits": asdict(collector.limits) if collector.confinement else None,
    }  # fmt: skip
    order = {name: place for place, name in enumerate(models_of(subjects, as_))}
    return TaskResults(
        scores=tuple(sorted(collector.scores, key=lambda score: order[score.model])),
        tasks=tuple(collector.tasks.values()),
        models=tuple(sorted(collector.models, key=lambda model: order[model.model])),
        confinement=collector.confinement,
        provenance=provenance_of(subjects, settings),
        date=date,
    )


def check_tasks(
    tasks: str | Sequence[str],
    *,
    base: str | os.PathLike[str] | None = None,
    release: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    recovered: str | os.PathLike[str] | None = None,
    as_: str = "adapter",
    include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    run_generated_code: bool = False,
    missing_data: bool = False,
) -> tuple[PlannedTask, ...]:
    """Refuse what `evaluate_tasks` could not measure, before data and models are opened.

    Arguments and errors are those of `evaluate_tasks`; where programs are to be run, one is, to see that it can be.
    With `missing_data`, tasks whose data are not here pass in offline mode, too: what is returned says which.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InvalidRequestError(f"batch_size is {batch_size} and limit {limit}; both are at least 1.")
    planned = preview_tasks(tasks, include_path=include_path, num_fewshot=num_fewshot)
    check_needs(planned, run_generated_code=run_generated_code, missing_data=missing_data)
    check_given(base=base, release=release, adapter=adapter, recovered=recovered)
    check_way(as_, has_release=release is not None)
    if any(task.runs_code for task in planned):
        run_program("", "")
    return planned


def _folders(include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    listed = [include_path] if isinstance(include_path, str | os.PathLike) else list(include_path)
    return [Path(folder).expanduser().resolve() for folder in listed]


def _task_files(planned: Sequence[PlannedTask], folders: Sequence[Path]) -> dict[str, str]:
    """Return the hashes of task files that are not the harness's."""
    return {
        task.name: sha256_of(task.file)
        for task in planned
        if any(folder in task.file.resolve().parents for folder in folders)
    }


def preview_tasks(
    tasks: str | Sequence[str],
    *,
    include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    num_fewshot: int | None = None,
) -> tuple[PlannedTask, ...]:
    """Say what `evaluate_tasks` would measure and download, without loading anything; arguments are the same."""
    requests = requested(tasks, num_fewshot=num_fewshot)
    return plan_tasks(requests, include_path=_folders(include_path))
