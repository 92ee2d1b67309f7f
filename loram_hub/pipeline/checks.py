"""What can fail late, checked early: before hours of work, and in a dry run."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants
from transformers import AutoTokenizer

from loram_hub.corpora import PackedStream, check_enough
from loram_hub.errors import AccessError, InvalidRequestError, LoramError, MissingDependencyError, ResourceError
from loram_hub.hub import look_up, why_not_writable
from loram_hub.importance import parse_importance
from loram_hub.licences import duties
from loram_hub.pipeline.assessment import Assessed
from loram_hub.pipeline.launching import check_launcher, launcher_of
from loram_hub.pipeline.materials import Materials
from loram_hub.pipeline.preview import DOWNLOAD, StagePreview
from loram_hub.pipeline.recipe import Recipe
from loram_hub.pipeline.stages import Job, refuse_to_replace_edits
from loram_hub.plan import planned_sizes
from loram_hub.pruning import check_prune
from loram_hub.streaming import check_device
from loram_hub.texts import read_examples

_NEEDED = {
    "quantize": ("bitsandbytes",),
    "teach": ("datasets",),
    "align": ("datasets",),
    "card": ("jinja2", "matplotlib"),
}
"""Packages that a stage imports late."""
BY_CARD = "(loram card does)"
"""What a duty says where a generated card meets it."""
_TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)


class Findings:
    """Problems and notes, gathered so that all of them can be said at once."""

    def __init__(self) -> None:
        self.problems: list[LoramError] = []
        self.notes: list[str] = []

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather an error instead of raising it."""
        try:
            yield
        except LoramError as err:
            self.problems.append(err)


def find_problems(job: Job, assessed: Sequence[Assessed], rows: Sequence[StagePreview]) -> Findings:
    """Check everything that the stages to do will need.

    Args:
        job: recipe and materials.
        assessed: the stages; those that hold are not checked.
        rows: their estimates.
    """
    found = Findings()
    to_do = {one.stage.name for one in assessed if one.state == "to do"}
    checks = {
        "prune": _check_prune,
        "align": _check_align,
        "evaluate": _check_evaluate,
        "card": lambda job, _: refuse_to_replace_edits(job),
        "push": _check_push,
    }
    for name in (one.stage.name for one in assessed if one.stage.name in to_do):
        with found.gathered():
            _check_packages(name)
        if name in checks:
            with found.gathered():
                checks[name](job, found)
    with found.gathered():
        _check_disk(job, rows)
    found.notes += _memory_notes(job.recipe, rows)
    return found


def refuse_inside_of_ranks() -> None:
    """Raise `InvalidRequestError` if this is one of many processes that were started to train."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InvalidRequestError(
            f"loram publish was started in {os.environ['WORLD_SIZE']} processes. Start it once: it starts the "
            "processes of align itself (align.processes, or align.launcher for a cluster)."
        )


def _check_packages(stage: str) -> None:
    for name in _NEEDED.get(stage, ()):
        if find_spec(name) is None:
            raise MissingDependencyError(f"{stage} needs {name}, which is not installed: pip install {name}")


def _check_prune(job: Job, found: Findings) -> None:
    recipe, materials = job.recipe, job.materials
    method = parse_importance(recipe.prune.importance).method
    check_device(recipe.device)
    planned_sizes(materials.architecture, recipe.prune.structure)
    if materials.calibration is not None:
        read_examples(materials.calibration, limit=1)
    if not materials.has_weights and not Path(recipe.base).expanduser().is_dir():
        found.notes.append(f"The weights of {materials.base.id} are not here yet; they are looked at when they are.")
        return
    check_prune(
        materials.base.folder,
        job.work.folder / "pruned",
        pruning_ratio=recipe.prune.structure.pruning_ratio,
        importance="random" if method == "taylor" else recipe.prune.importance,  # the texts were looked at above
        keep_first=recipe.prune.structure.keep_first,
        keep_last=recipe.prune.structure.keep_last,
        round_to=recipe.prune.structure.round_to,
        seed=recipe.seed,
        overwrite=True,
    )


def _check_align(job: Job, _: Findings) -> None:
    recipe, materials = job.recipe, job.materials
    settings = recipe.align_settings
    check_launcher(recipe)
    processes = settings.processes or 1
    if settings.batch_size % processes:
        raise InvalidRequestError(
            f"align.batch_size {settings.batch_size} cannot be divided among {processes} processes; take a multiple."
        )
    if not settings.repeat:
        check_enough(
            materials.corpora,
            sequences=settings.steps * settings.batch_size,
            sequence_length=settings.sequence_length,
            held_out=settings.held_out,
        )
    if not launcher_of(recipe):
        check_device(recipe.device)
    stream = PackedStream(
        materials.corpora,
        AutoTokenizer.from_pretrained(materials.base.folder, local_files_only=True),
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        held_out=settings.held_out,
        shuffle_window=settings.shuffle_window,
        repeat=settings.repeat,
        vocab_size=materials.architecture.vocab_size,
        token=job.token,
    )
    next(stream)


def _check_evaluate(job: Job, _: Findings) -> None:
    stage = job.recipe.evaluate
    assert stage is not None
    assert job.materials.data is not None
    if stage.device != "auto":
        check_device(stage.device or job.recipe.device)
    read_examples(job.materials.data, limit=1)


def _check_push(job: Job, found: Findings) -> None:
    """Check what the Hub and the licence will ask of the push, as far as it can be told before there is a release."""
    recipe, stage, materials = job.recipe, job.recipe.push, job.materials
    assert stage is not None
    if stage.tag is not None and (_TAG.fullmatch(stage.tag) is None or stage.tag == "main"):
        raise InvalidRequestError(f"push.tag is {stage.tag!r:.200}, which is no name for a tag; something like v1 is.")
    with found.gathered():
        _check_licence(recipe, materials)
    try:
        refusal = why_not_writable(recipe.repo_id, token=job.token)
        target = look_up(recipe.repo_id, refs=True, token=job.token)
    except AccessError as err:
        found.problems.append(err)
        return
    if refusal is not None:
        raise AccessError(f"{recipe.repo_id} cannot be written to: {refusal}.")
    if target is not None and stage.tag in target.tags:
        found.notes.append(
            f"The tag {stage.tag} of {recipe.repo_id} exists; the push stops if this release is not the one it is on."
        )


def _check_licence(recipe: Recipe, materials: Materials) -> None:
    """Check the duties that a generated card and Notice do not meet: the name, and texts that must travel along."""
    found = duties(materials.licence, repo_name=recipe.repo_id, documents=materials.licence_texts, card="")
    unmet = [duty for duty in found if not duty.met and BY_CARD not in duty.how]
    if unmet:
        listed = " ".join(f"{duty.what}: {duty.how}" for duty in unmet)
        raise InvalidRequestError(
            f"The {materials.licence.title} of {materials.base.id} asks for what {recipe.repo_id} would not have. "
            f"{listed} A text that the base's repository lacks can be named as license_file."
        )


def _memory_notes(recipe: Recipe, rows: Sequence[StagePreview]) -> Iterator[str]:
    """Say which stages may not fit; estimates are no reason to stop."""
    if recipe.hardware is None:
        return
    memory = recipe.hardware.memory_gib * 2**30
    for row in rows:
        if row.is_to_do and row.cost.memory_bytes > memory:
            yield (
                f"{row.name} may not fit: it needs about {row.cost.memory_bytes / 2**30:,.0f} GiB, and "
                f"hardware.memory_gib is {recipe.hardware.memory_gib:g}."
            )


def _check_disk(job: Job, rows: Sequence[StagePreview]) -> None:
    """Raise `ResourceError` if a disk has less room than what is written to it; the base goes to the Hub's cache."""
    to_do = [row for row in rows if row.is_to_do]
    download = sum(row.cost.output_bytes for row in to_do if row.name == DOWNLOAD)
    outputs = sum(row.cost.output_bytes for row in to_do) - download
    scratch = max((row.cost.scratch_bytes for row in to_do), default=0)
    places: dict[int, tuple[Path, int]] = {}
    for folder, nbytes in ((Path(constants.HF_HUB_CACHE), download), (job.work.folder, outputs + scratch)):
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        device = existing.stat().st_dev
        places[device] = (existing, places.get(device, (existing, 0))[1] + nbytes)
    for existing, nbytes in places.values():
        free = shutil.disk_usage(existing).free
        if free < nbytes:
            raise ResourceError(
                f"The disk of {existing} has {free / 1e9:,.1f} GB free; {nbytes / 1e9:,.1f} GB are needed "
                f"({download / 1e9:,.1f} GB base, {outputs / 1e9:,.1f} GB outputs, {scratch / 1e9:,.1f} GB besides). "
                "Free some space, keep fewer checkpoints, let intermediate outputs be deleted, or work elsewhere "
                "(--work-dir)."
            )
