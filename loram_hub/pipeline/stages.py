"""The stages of a release: what each reads, what decides over its output, how it is run and recognized.

    prune -> refit? -> align? (with teach?) -> quantize? -> evaluate? -> card -> push?

A stage is data: its inputs by name, its part of the recipe, and two functions. What decides when it has to be redone is
in `assessment`, and knows none of them by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loram_hub.alignment.settings import FREE
from loram_hub.cards import make_card, write_card
from loram_hub.digests import git_sha1_of, remembered_sha256
from loram_hub.errors import InvalidRequestError, LoramError, VerificationError
from loram_hub.evaluation import EvaluationTable, evaluate
from loram_hub.files import dump_json, read_json, resource_errors, sha256_of
from loram_hub.hub import Source, fetch_release, resolve
from loram_hub.importance import parse_importance
from loram_hub.manifest import MANIFEST
from loram_hub.pipeline.launching import align_in_processes, teach_in_processes
from loram_hub.pipeline.materials import LICENSE, Materials
from loram_hub.pipeline.recipe import PruneStage, Recipe
from loram_hub.pipeline.remote import CARD, check_pushed, refuse_to_replace_card
from loram_hub.pipeline.workspace import Workspace, remove
from loram_hub.pruning import prune
from loram_hub.pushing import push
from loram_hub.quantization import quantize
from loram_hub.refitting import refit
from loram_hub.sparsification import sparsify
from loram_hub.sparsification.finished import work_folder
from loram_hub.teaching import TeacherShards
from loram_hub.teaching.records import TEACHER
from loram_hub.teaching.shards import shard_name

STAGES = ("prune", "refit", "teach", "align", "quantize", "evaluate", "card", "push")
"""Names of all stages, in their order."""
PRUNED = "pruned"
"""Name of the folder of what `prune` makes."""
IMPORTANCE = "importance.safetensors"
"""Name of the file with the scores that its plan was made from, if channel groups are removed. For pictures and other
ratios: no stage reads it, and none is redone for its sake."""
Facts = Mapping[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Stage:
    """One step of a recipe."""

    name: str
    """One of `STAGES`."""
    output: Path | None
    """Folder or file that it makes; None if it makes none of its own."""
    inputs: tuple[str, ...]
    """Stages and materials that it reads."""
    part: Mapping[str, Any]
    """What of the recipe decides over its output."""
    run: Callable[[], Facts]
    """Makes the output, replacing what is there; returns what later stages or reruns ask for."""
    digest: Callable[[Facts], str]
    """Returns a digest of the output, given what `run` returned; raises `LoramError` if it is not whole."""
    resumes: bool = False
    """Whether a run that was cut off goes on where it was."""
    uses_tools: bool = True
    """Whether versions of other packages decide over the output."""
    may_be_edited: bool = False
    """Whether people may change the output; it is kept as they left it."""
    leftovers: tuple[Path, ...] = ()
    """What a run that goes on takes up; removed before one that starts anew."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Job:
    """A recipe with what it is made from and where."""

    recipe: Recipe
    work: Workspace
    materials: Materials
    token: str | bool | None

    @property
    def final(self) -> Path:
        """The release that is published."""
        recipe = self.recipe
        name = "quantized" if recipe.quantize else self._last_weights()
        return self.work.folder / name

    @property
    def device(self) -> str:
        """Where stages compute that name no other place."""
        return self.recipe.device or "cpu"

    def _last_weights(self) -> str:
        return "aligned" if self.recipe.align else "refitted" if self.recipe.refit else PRUNED

    def whole_base(self) -> Source:
        """Return the base with its weights, downloading them if they are not here."""
        base = self.materials.base
        if base.commit is None or Path(self.recipe.base).expanduser().is_dir():
            return base
        return resolve(self.recipe.base, revision=base.commit, token=self.token)


def stages_of(job: Job) -> tuple[Stage, ...]:
    """Return the stages of a recipe in the order in which they run."""
    recipe = job.recipe
    stages = [_prune_stage(job)]
    if recipe.refit is not None:
        stages.append(_refit_stage(job, after=stages[-1]))
    if recipe.align is not None:
        source = stages[-1]
        stages += [] if recipe.teach is None else [_teach_stage(job)]
        stages.append(_align_stage(job, after=source))
    if recipe.quantize is not None:
        stages.append(_quantize_stage(job, after=stages[-1]))
    final = stages[-1].name
    if recipe.evaluate is not None:
        stages.append(_evaluate_stage(job, final))
    stages.append(_card_stage(job, final))
    if recipe.push is not None:
        stages.append(_push_stage(job, final))
    return tuple(stages)


def release_digest(folder: Path) -> str:
    """Return the hash of a release's manifest, which has that of every other file; each was compared.

    Files that have not changed since they were read last are not read again.
    """
    fetch_release(folder)
    return sha256_of(folder / MANIFEST)


def _prune_stage(job: Job) -> Stage:
    recipe, stage, out = job.recipe, job.recipe.prune, job.work.folder / PRUNED
    begun, scores = work_folder(out), job.work.folder / IMPORTANCE

    def run() -> Facts:
        base = str(job.whole_base().folder)
        remove(scores)  # of another plan
        calibration = job.materials.calibration if stage.needs_calibration else None
        common: dict[str, Any] = {"calibration": calibration, "seed": recipe.seed, "device": job.device}
        if stage.is_sparse:
            sparsify(base, out, settings=stage.sparsity_settings, overwrite=True, **common)
        else:
            remove(begun)  # of another method, cut off
            structure: dict[str, Any] = asdict(stage.structure)
            prune(base, out, **structure, importance=stage.scores, importance_out=scores, overwrite=True, **common)
        return {}

    return Stage(
        name="prune",
        output=out,
        inputs=("base", "calibration") if stage.needs_calibration else ("base",),
        part={**_prune_part(stage), "seed": recipe.seed, "device": job.device},
        run=run,
        digest=lambda _: release_digest(out),
        resumes=stage.is_sparse,
        leftovers=(begun,) if stage.is_sparse else (),
    )


def _prune_part(stage: PruneStage) -> dict[str, Any]:
    if stage.is_sparse:
        return asdict(stage.sparsity_settings)
    return {**asdict(stage.structure), "importance": str(parse_importance(stage.scores))}


def _refit_stage(job: Job, *, after: Stage) -> Stage:
    assert job.recipe.refit is not None
    settings = replace(job.recipe.refit.settings, seed=job.recipe.seed)
    source, out = after.output, job.work.folder / "refitted"
    assert source is not None

    def run() -> Facts:
        base = str(job.whole_base().folder)
        refit(
            source, out, base=base, calibration=job.materials.calibration, settings=settings,
            device=job.device, overwrite=True,
        )  # fmt: skip
        return {}

    return Stage(
        name="refit",
        output=out,
        inputs=("base", "calibration", after.name),
        part={**asdict(settings), "device": job.device},
        run=run,
        digest=lambda _: release_digest(out),
    )


def _teach_stage(job: Job) -> Stage:
    out = job.work.folder / "teacher"

    def run() -> Facts:
        base = job.whole_base().folder
        teach_in_processes(job.recipe, base, out, corpora=job.materials.corpora, token=job.token)
        return {}

    def digest(_: Facts) -> str:
        for block, entry in enumerate(TeacherShards.open(out).record.shards):
            if remembered_sha256(out / shard_name(block)) != entry.sha256:
                raise VerificationError(f"{out / shard_name(block)} has another SHA-256 than {TEACHER} says.")
        return sha256_of(out / TEACHER)

    return Stage(
        name="teach",
        output=out,
        inputs=("base", "corpora"),
        part={**asdict(job.recipe.teaching_settings), "device": job.device},
        run=run,
        digest=digest,
        resumes=True,
        leftovers=(out,),
    )


def _align_stage(job: Job, *, after: Stage) -> Stage:
    assert job.recipe.align is not None
    settings = job.recipe.align_settings
    source, out, run_dir = after.output, job.work.folder / "aligned", job.work.folder / "aligned-run"
    teacher = None if job.recipe.teach is None else job.work.folder / "teacher"
    assert source is not None

    def run() -> Facts:
        try:
            release_digest(out)
        except LoramError:
            remove(out)  # `align` takes what its manifest calls the result of this very run for that
        align_in_processes(
            job.recipe, source, out, run_dir=run_dir, corpora=job.materials.corpora, teacher=teacher, token=job.token
        )
        return {}

    return Stage(
        name="align",
        output=out,
        inputs=(after.name, "corpora") if teacher is None else (after.name, "corpora", "teach"),
        part={name: value for name, value in settings.to_dict().items() if name not in FREE} | {"device": job.device},
        run=run,
        digest=lambda _: release_digest(out),
        resumes=True,
        leftovers=(run_dir, out),  # a result of the same settings and other tools is none of the new run
    )


def _quantize_stage(job: Job, *, after: Stage) -> Stage:
    assert job.recipe.quantize is not None
    source, out = after.output, job.work.folder / "quantized"
    assert source is not None

    def run() -> Facts:
        quantize(source, out, device=job.device, overwrite=True)
        return {}

    return Stage(
        name="quantize",
        output=out,
        inputs=(after.name,),
        part={**asdict(job.recipe.quantize), "device": job.device},
        run=run,
        digest=lambda _: release_digest(out),
    )


def _evaluate_stage(job: Job, final: str) -> Stage:
    stage = job.recipe.evaluate
    assert stage is not None
    out = job.work.folder / "evaluation.json"
    device = stage.device or job.device

    def run() -> Facts:
        assert job.materials.data is not None
        table = evaluate(
            job.materials.data,
            base=str(job.whole_base().folder) if stage.base else None,
            release=job.final,
            max_tokens=stage.max_tokens,
            batch_size=stage.batch_size,
            device=device,
            limit=stage.limit,
        )
        with resource_errors(f"Writing {out}"):
            written = out.with_name(f".{out.name}.partial")
            written.write_text(dump_json(_without_times(table)), encoding="utf-8")
            written.replace(out)
        return {}

    return Stage(
        name="evaluate",
        output=out,
        inputs=(final, "data", "base") if stage.base else (final, "data"),
        part={**asdict(stage), "device": device, "data": None},
        run=run,
        digest=lambda _: _file_digest(out),
    )


def _without_times(table: EvaluationTable) -> dict[str, Any]:
    """Leave out what a second run would measure otherwise."""
    values = table.to_dict()
    return values | {"rows": [{k: v for k, v in row.items() if k != "seconds"} for row in values["rows"]]}


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise VerificationError(f"{path} is gone.")
    return sha256_of(path)


def _card_stage(job: Job, final: str) -> Stage:
    recipe, measured = job.recipe, job.work.folder / "evaluation.json"

    def run() -> Facts:
        refuse_to_replace_edits(job)
        added = job.final / LICENSE
        if recipe.license_file is not None:
            with resource_errors(f"Writing {added}"):
                added.write_text(job.materials.licence_texts[LICENSE], encoding="utf-8")
        values = read_json(measured) if recipe.evaluate is not None else None
        card = make_card(job.final, repo_id=recipe.repo_id, license=job.materials.licence.id, evaluation=values)
        names = [*write_card(job.final, card), *([] if recipe.license_file is None else [LICENSE])]
        return {"files": {name: sha256_of(job.final / name) for name in names}}

    return Stage(
        name="card",
        output=None,
        inputs=(final, "licence texts", *(("evaluate",) if recipe.evaluate is not None else ())),
        part={"repo_id": recipe.repo_id, "license": job.materials.licence.id},
        run=run,
        digest=lambda facts: _card_digest(job.final, facts.get("files", {})),
        uses_tools=False,
        may_be_edited=True,
    )


def _card_digest(folder: Path, files: Mapping[str, str]) -> str:
    """Digest the card as it lies there: who edits it after it was made wants it so."""
    found = hashlib.sha256()
    for name in sorted(files):
        if not (folder / name).is_file():
            raise VerificationError(f"{name} is gone.")
        found.update(f"{name}\0{sha256_of(folder / name)}\0".encode())
    return found.hexdigest()


def refuse_to_replace_edits(job: Job) -> None:
    """Raise `InvalidRequestError` if the card was edited since it was made: what replaces it would lose that."""
    known = job.work.record("card")
    for name, sha256 in ({} if known is None else known.facts.get("files", {})).items():
        file = job.final / name
        if file.is_file() and sha256_of(file) != sha256:
            raise InvalidRequestError(
                f"{file} was edited, and what it describes changes now. Keep a copy elsewhere and delete it; a new "
                "card is made then, into which your changes can go."
            )


def refuse_to_replace_edits_on_hub(job: Job) -> None:
    """Raise `InvalidRequestError` if the card on the Hub is not the one that was pushed from here."""
    known = job.work.record("push")
    refuse_to_replace_card(job.recipe, job.final, {} if known is None else known.facts, token=job.token)


def _push_stage(job: Job, final: str) -> Stage:
    recipe, stage = job.recipe, job.recipe.push
    assert stage is not None

    def run() -> Facts:
        refuse_to_replace_edits_on_hub(job)
        pushed = push(job.final, recipe.repo_id, license=job.materials.licence.id, token=job.token, **asdict(stage))
        return {"commit": pushed.commit, "url": pushed.url, "card": git_sha1_of(job.final / CARD)}

    def digest(facts: Facts) -> str:
        check_pushed(recipe, str(facts["commit"]), token=job.token)
        return str(facts["commit"])

    return Stage(
        name="push",
        output=None,
        inputs=(final, "card"),
        part={**asdict(stage), "repo_id": recipe.repo_id, "license": job.materials.licence.id},
        run=run,
        digest=digest,
        uses_tools=False,
    )
