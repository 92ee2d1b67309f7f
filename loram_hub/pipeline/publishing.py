"""`publish`: a recipe, stage by stage, from base model to Hub; run again, it does what is missing."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loram_hub.errors import InvalidRequestError, LoramError
from loram_hub.pipeline.assessment import Assessed, assess
from loram_hub.pipeline.checks import Findings, find_problems, refuse_inside_of_ranks
from loram_hub.pipeline.materials import Materials, find_materials
from loram_hub.pipeline.preview import DOWNLOAD, Preview, StagePreview, hours_text, stage_costs
from loram_hub.pipeline.reading import read_recipe
from loram_hub.pipeline.recipe import Recipe
from loram_hub.pipeline.stages import STAGES, Job, Stage, refuse_to_replace_edits, stages_of
from loram_hub.pipeline.workspace import Record, Workspace, folder_bytes, remove

logger = logging.getLogger(__name__)

_WEIGHTS = ("prune", "refit", "teach", "align", "quantize")
"""Stages whose outputs are large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOutcome:
    """What became of a stage."""

    name: str
    made: bool
    """Whether it ran; otherwise what was made before still held."""
    why: str
    seconds: float
    """Time it took, now or when it was made."""
    nbytes: int
    """Bytes of its output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What `publish` did."""

    repo_id: str
    folder: Path
    """The work folder."""
    release: Path
    """The release in it."""
    stages: tuple[StageOutcome, ...]
    commit: str | None
    """Commit on the Hub; None if it was not pushed."""
    url: str | None
    """Page on the Hub; None if it was not pushed."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"folder": str(self.folder), "release": str(self.release)}


def publish(
    recipe: Recipe | str | os.PathLike[str],
    *,
    work_dir: str | os.PathLike[str] | None = None,
    until: str | None = None,
    keep_intermediate: bool = True,
    ignore_versions: bool = False,
    announce: Callable[[Preview], None] | None = None,
    token: str | bool | None = None,
) -> Published:
    """Make a release by its recipe and publish it; run again after an interruption, it goes on.

    Each stage is skipped if its output was made of the same things before: its part of the recipe, its inputs by their
    hashes, the versions of the tools. What can fail late is checked before the first stage.

    Args:
        recipe: the recipe, or its file.
        work_dir: where outputs and records go; None for a folder of the release's name in the current one.
        until: name of the last stage to run; None for all.
        keep_intermediate: keep outputs that only later stages need; else they are deleted once those are done.
        ignore_versions: keep what other versions of the tools have made.
        announce: is shown what will be done, before it begins.
        token: of the Hub.

    Returns:
        What was done.

    Raises:
        InvalidRequestError: the recipe or an argument cannot be; or several things are wrong, all of which it names.
        ResourceError: another process is at work in the folder, or disk or memory do not suffice.
        LoramError: what the stages raise.

    Example:
        >>> from loram_hub import publish  # doctest: +SKIP
        >>> publish("publish/llama-2-13b.yaml", until="quantize")  # doctest: +SKIP
    """
    chosen, work = _opened(recipe, work_dir, until)
    with work.locked():
        job = _job(chosen, work, token)
        work.write_pins({**work.pins, **job.materials.pins})
        runner = _Runner(job, until=until, keep_intermediate=keep_intermediate, ignore_versions=ignore_versions)
        preview = runner.preview()
        if announce is not None:
            announce(preview)
        runner.refuse_problems()
        return runner.run()


def check_publish(
    recipe: Recipe | str | os.PathLike[str],
    *,
    work_dir: str | os.PathLike[str] | None = None,
    until: str | None = None,
    keep_intermediate: bool = True,
    ignore_versions: bool = False,
    token: str | bool | None = None,
) -> Preview:
    """Say what `publish` would do, what it would need and what would stop it; nothing is written.

    Of a base on the Hub config and tokenizer are fetched into the Hub's cache, but no weights. Arguments are those of
    `publish`.

    Returns:
        The stages with their estimates; and everything that would stop the run.

    Raises:
        LoramError: the recipe cannot be, or what it names does not exist.
    """
    chosen, work = _opened(recipe, work_dir, until)
    job = _job(chosen, work, token)
    runner = _Runner(job, until=until, keep_intermediate=keep_intermediate, ignore_versions=ignore_versions)
    return runner.preview()


def _opened(
    recipe: Recipe | str | os.PathLike[str], work_dir: str | os.PathLike[str] | None, until: str | None
) -> tuple[Recipe, Workspace]:
    refuse_inside_of_ranks()
    chosen = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    if until is not None and until not in STAGES:
        raise InvalidRequestError(f"until is {until!r}; the stages are {', '.join(STAGES)}.")
    return chosen, Workspace(Path(work_dir or chosen.name).expanduser().absolute())


def _job(recipe: Recipe, work: Workspace, token: str | bool | None) -> Job:
    materials: Materials = find_materials(recipe, work.pins, token=token)
    return Job(recipe=recipe, work=work, materials=materials, token=token)


class _Runner:
    """Runs the stages of one job up to the last one that is wanted."""

    def __init__(self, job: Job, *, until: str | None, keep_intermediate: bool, ignore_versions: bool) -> None:
        self._job, self._keep, self._ignore_versions = job, keep_intermediate, ignore_versions
        self._all = stages_of(job)
        self._stages = self._up_to(until)
        self._found = Findings()

    def _up_to(self, until: str | None) -> tuple[Stage, ...]:
        names = [stage.name for stage in self._all]
        if until is None:
            return self._all
        if until not in names:
            raise InvalidRequestError(f"The recipe has no stage {until!r}; it has {', '.join(names)}.")
        return self._all[: names.index(until) + 1]

    def preview(self) -> Preview:
        """Look at all stages, and check what those that are to do will need."""
        recipe, materials = self._job.recipe, self._job.materials
        assessed = self._assessed()
        costs = stage_costs(recipe, materials.architecture)
        states = {one.stage.name: (str(one.state), one.why) for one in assessed}
        if any(one.state == "to do" and "base" in one.stage.inputs for one in assessed) and not materials.has_weights:
            states = {DOWNLOAD: ("to do", f"{materials.base.id} is not on this machine"), **states}
        rows = tuple(self._row(name, state, why, costs) for name, (state, why) in states.items())
        self._found = find_problems(self._job, assessed, rows, keep_intermediate=self._keep)
        return Preview(
            recipe=recipe,
            folder=self._job.work.folder,
            rows=rows,
            notes=tuple(self._found.notes),
            problems=tuple(map(str, self._found.problems)),
        )

    def _row(self, name: str, state: str, why: str, costs: dict[str, Any]) -> StagePreview:
        hardware = self._job.recipe.hardware
        seconds = None if hardware is None else costs[name].seconds(hardware)
        price = None if hardware is None or seconds is None else hardware.price(seconds)
        return StagePreview(name=name, state=state, why=why, cost=costs[name], seconds=seconds, price=price)

    def refuse_problems(self) -> None:
        """Raise what stops the run, all of it at once."""
        problems = self._found.problems
        if len(problems) == 1:
            raise problems[0]
        if problems:
            listed = " ".join(f"({number}) {problem}" for number, problem in enumerate(problems, start=1))
            raise type(problems[0])(f"Nothing was done: {len(problems)} things stop it. {listed}")

    def run(self) -> Published:
        """Run what is to do, until nothing is."""
        made: dict[str, str] = {}
        while one := next((one for one in self._assessed() if one.state == "to do"), None):
            if one.stage.name in made:
                raise LoramError(f"{one.stage.name} was made and does not hold: {one.why}. Something else writes here.")
            self._make(one)
            made[one.stage.name] = one.why
            if not self._keep:
                self._free()
        return self._published(made)

    def _assessed(self) -> tuple[Assessed, ...]:
        job = self._job
        return assess(self._stages, job.materials.digests, job.work, ignore_versions=self._ignore_versions)

    def _make(self, one: Assessed) -> None:
        """Run a stage and write down what its output was made of."""
        stage, work = one.stage, self._job.work
        logger.info("%s: %s", stage.name, one.why)
        if stage.output == self._job.final:
            refuse_to_replace_edits(self._job)  # also where the card's own stage is left out
        if stage.resumes and not one.resumes:
            for path in stage.leftovers:
                remove(path)
            work.write_started(stage.name, one.made_of)
        began = time.monotonic()
        facts = stage.run()
        gc.collect()  # models refer to themselves
        seconds = time.monotonic() - began
        nbytes = 0 if stage.output is None else folder_bytes(stage.output)
        digest = stage.digest(facts)
        record = Record(made_of=one.made_of, digest=digest, nbytes=nbytes, seconds=seconds, facts=facts)
        work.write_record(stage.name, record)
        logger.info("%s: done in %s", stage.name, hours_text(seconds))

    def _free(self) -> None:
        """Delete outputs that no stage needs any more, not even one that this run leaves out."""
        assessed = assess(self._all, self._job.materials.digests, self._job.work, ignore_versions=self._ignore_versions)
        needed = {name for one in assessed if one.state == "to do" for name in one.stage.inputs}
        for one in assessed:
            stage, record = one.stage, one.record
            if one.state != "holds" or stage.name not in _WEIGHTS or stage.name in needed or record is None:
                continue
            if stage.output is not None and stage.output != self._job.final:
                self._job.work.write_record(stage.name, replace(record, freed=True))
                remove(stage.output)
                logger.info("%s: deleted %s, which nothing needs any more", stage.name, stage.output)

    def _published(self, made: dict[str, str]) -> Published:
        records = {stage.name: self._job.work.record(stage.name) for stage in self._stages}
        outcomes = tuple(
            StageOutcome(
                name=name,
                made=name in made,
                why=made.get(name, "made before"),
                seconds=record.seconds,
                nbytes=record.nbytes,
            )
            for name, record in records.items()
            if record is not None
        )
        pushed = records.get("push")
        return Published(
            repo_id=self._job.recipe.repo_id,
            folder=self._job.work.folder,
            release=self._job.final,
            stages=outcomes,
            commit=None if pushed is None else str(pushed.facts["commit"]),
            url=None if pushed is None else str(pushed.facts["url"]),
        )
