"""What can fail late, checked early: before hours of work, and in a dry run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoTokenizer

from loram_hub.alignment.optimization import check_optimizer
from loram_hub.alignment.trackers import check_trackers
from loram_hub.checkpoint import read_config
from loram_hub.corpora import PackedStream, check_enough
from loram_hub.errors import AccessError, InvalidRequestError, LoramError, MissingDependencyError
from loram_hub.evaluation import encode_examples
from loram_hub.files import sha256_of
from loram_hub.hub import look_up, why_not_writable
from loram_hub.importance import parse_importance
from loram_hub.licences import duties
from loram_hub.manifest import MANIFEST, read_manifest
from loram_hub.pipeline.assessment import Assessed, differences
from loram_hub.pipeline.launching import check_launcher
from loram_hub.pipeline.materials import Materials
from loram_hub.pipeline.preview import StagePreview
from loram_hub.pipeline.recipe import Recipe
from loram_hub.pipeline.room import check_disk, check_hardware, hardware_notes
from loram_hub.pipeline.stages import PRUNED, Job, refuse_to_replace_edits, refuse_to_replace_edits_on_hub
from loram_hub.plan import planned_sizes
from loram_hub.pruning import check_prune
from loram_hub.sparsification import SparsitySettings, asked_counts, check_sparsify
from loram_hub.streaming import check_device
from loram_hub.texts import dataset_id, read_examples

_NEEDED = {
    "quantize": ("bitsandbytes",),
    "teach": ("datasets",),
    "align": ("datasets",),
    "card": ("jinja2", "matplotlib"),
}
"""Packages that a stage imports late."""
BY_CARD = "(loram card does)"
"""What a duty says where a generated card meets it."""
_LOOKED_AT = 100
"""Records of a dataset on the Hub that are looked at: the first may be empty."""
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


def find_problems(
    job: Job, assessed: Sequence[Assessed], rows: Sequence[StagePreview], *, keep_intermediate: bool = True
) -> Findings:
    """Check everything that the stages to do will need.

    Args:
        job: recipe and materials.
        assessed: the stages; those that hold are not checked.
        rows: their estimates.
        keep_intermediate: whether outputs stay when nothing needs them any more.
    """
    found = Findings()
    checks: Mapping[str, Callable[[Job, Findings], None]] = {
        "prune": _check_prune,
        "teach": _check_teach,
        "align": _check_align,
        "evaluate": _check_evaluate,
        "push": lambda job, found: _check_push(job, found, assessed),
    }
    to_do = [one for one in assessed if one.state == "to do"]
    for one in to_do:
        with found.gathered():
            _check_packages(one.stage.name)
        with found.gathered():
            _refuse_to_lose_files(job, one)
        if one.stage.name in checks:
            with found.gathered():
                checks[one.stage.name](job, found)
    if any(one.stage.name == "card" or one.stage.output == job.final for one in to_do):
        with found.gathered():
            refuse_to_replace_edits(job)
    with found.gathered():
        check_hardware(job.recipe)
    with found.gathered():
        check_disk(job, assessed, rows, keep_intermediate=keep_intermediate)
    found.notes += hardware_notes(job.recipe, rows)
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


def _refuse_to_lose_files(job: Job, one: Assessed) -> None:
    """Raise `InvalidRequestError` if making an output anew would delete files that no stage has put there."""
    folder = one.stage.output
    if folder is None or not (folder / MANIFEST).is_file():
        return
    try:
        listed = read_manifest(folder).files
    except LoramError:
        return  # torn or altered: nothing tells what belongs there
    card = job.work.record("card")
    generated = {} if card is None else card.facts.get("files", {})
    foreign = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in listed or name == MANIFEST or path.name.startswith("."):
            continue
        if name not in generated or (folder != job.final and sha256_of(path) != generated[name]):
            foreign.append(name)
    if foreign:
        raise InvalidRequestError(
            f"{folder} holds {', '.join(foreign)}, which no stage has put there, or which was edited since. To make "
            f"{one.stage.name} again ({one.why}) would delete that. Move it out of the folder, then run this again."
        )


def _check_prune(job: Job, found: Findings) -> None:
    recipe, materials = job.recipe, job.materials
    check_device(recipe.device)
    if recipe.prune.is_sparse:
        asked_counts(materials.architecture, recipe.prune.sparsity_settings)
        _check_context(job)
    else:
        planned_sizes(materials.architecture, recipe.prune.structure)
    if materials.calibration is not None:
        read_examples(materials.calibration, limit=_LOOKED_AT)
    if not materials.has_weights and not Path(recipe.base).expanduser().is_dir():
        found.notes.append(f"The weights of {materials.base.id} are not here yet; they are looked at when they are.")
        return
    (_check_sparsify if recipe.prune.is_sparse else _check_structured)(job)


def _check_structured(job: Job) -> None:
    stage = job.recipe.prune
    method = parse_importance(stage.scores).method
    check_prune(
        job.materials.base.folder,
        job.work.folder / PRUNED,
        **asdict(stage.structure),
        importance="random" if method == "taylor" else stage.scores,  # the texts were looked at above
        seed=job.recipe.seed,
        overwrite=True,
    )


def _check_sparsify(job: Job) -> None:
    settings = job.recipe.prune.sparsity_settings
    without_texts = SparsitySettings(method="magnitude", sparsity=settings.sparsity, pattern=settings.pattern)
    check_sparsify(  # the texts were looked at above
        job.materials.base.folder,
        job.work.folder / PRUNED,
        settings=without_texts,
        seed=job.recipe.seed,
        overwrite=True,
    )


def _check_context(job: Job) -> None:
    """Check that rows of calibration, where the recipe gives their length, are no longer than the base's context."""
    tokens, longest = job.recipe.prune.tokens, _positions(job)
    if tokens is not None and longest is not None and tokens > longest:
        raise InvalidRequestError(
            f"prune.tokens is {tokens:,}; the model has positions for {longest:,} tokens. Lower it, or leave it out."
        )


def _check_teach(job: Job, _: Findings) -> None:
    settings, vocabulary = job.recipe.teaching_settings, job.materials.architecture.vocab_size
    if settings.k > vocabulary:
        raise InvalidRequestError(
            f"teach.k is {settings.k}, and the vocabulary of {job.materials.base.id} has {vocabulary:,} tokens. Keep "
            "fewer."
        )


def _check_align(job: Job, found: Findings) -> None:
    recipe, settings = job.recipe, job.recipe.align_settings
    assert recipe.align is not None
    longest = _positions(job)
    if longest is not None and settings.sequence_length > longest:
        found.problems.append(
            InvalidRequestError(
                f"align.sequence_length is {settings.sequence_length}; the model has positions for {longest:,} tokens."
            )
        )
    with found.gathered():
        check_trackers(recipe.align.report_to)
    with found.gathered():
        check_optimizer(settings, torch.device((recipe.device or "cpu").partition(":")[0]))
    with found.gathered():
        _check_processes(recipe)
    _check_stream(job)


def _check_processes(recipe: Recipe) -> None:
    """Check what will start the processes of `align`, and that there is a GPU for each where they run here."""
    assert recipe.align is not None
    check_launcher(recipe)
    processes, batch_size = recipe.align_settings.processes or 1, recipe.align_settings.batch_size
    if batch_size % processes:
        raise InvalidRequestError(
            f"align.batch_size {batch_size} cannot be divided among {processes} processes; take a multiple."
        )
    if recipe.align.launcher:
        return
    check_device(recipe.device)
    if (recipe.device or "cpu").startswith("cuda") and processes > torch.cuda.device_count():
        raise InvalidRequestError(
            f"align.processes is {processes}, and this machine has {torch.cuda.device_count()} GPUs. Lower it, or name "
            "a launcher that reaches other machines (align.launcher)."
        )


def _check_stream(job: Job) -> None:
    """Check that the corpora can be read with this tokenizer and are not too small."""
    materials, settings = job.materials, job.recipe.align_settings
    if not settings.repeat:
        check_enough(
            materials.corpora,
            sequences=settings.steps * settings.batch_size,
            sequence_length=settings.sequence_length,
            held_out=settings.held_out,
        )
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


def _positions(job: Job) -> int | None:
    longest = read_config(job.materials.base.folder).get("max_position_embeddings")
    return longest if isinstance(longest, int) else None


def _check_evaluate(job: Job, found: Findings) -> None:
    """Check what is evaluated on: a file or folder as far as it will be read, a dataset's first records."""
    stage, data = job.recipe.evaluate, job.materials.data
    assert stage is not None
    assert data is not None
    if stage.device != "auto":
        check_device(stage.device or job.recipe.device)
    longest = _positions(job)
    if longest is not None and stage.max_tokens > longest:
        found.notes.append(
            f"evaluate.max_tokens is {stage.max_tokens}; the model has positions for {longest:,} tokens, and what "
            "comes after them is predicted badly."
        )
    limit = stage.limit if dataset_id(data) is None else min(stage.limit or _LOOKED_AT, _LOOKED_AT)
    tokenizer = AutoTokenizer.from_pretrained(job.materials.base.folder, local_files_only=True)
    encode_examples(read_examples(data, limit=limit), tokenizer, max_tokens=stage.max_tokens)


def _check_push(job: Job, found: Findings, assessed: Sequence[Assessed]) -> None:
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
    if target is not None:
        with found.gathered():
            refuse_to_replace_edits_on_hub(job)
    if target is not None and stage.tag is not None and stage.tag in target.tags:
        _check_tag(stage.tag, target.tags[stage.tag], recipe.repo_id, found, assessed)


def _check_tag(tag: str, commit: str, repo_id: str, found: Findings, assessed: Sequence[Assessed]) -> None:
    """Check that a tag that exists can stay where it is: a tag never moves from one release to another."""
    changed = next((one for one in assessed if one.stage.name != "push" and _comes_out_otherwise(one)), None)
    where = f"The tag {tag} of {repo_id} is on commit {commit[:12]}"
    if changed is not None:
        raise InvalidRequestError(
            f"{where}, and this release will be another one ({changed.stage.name}: {changed.why}), which the tag is "
            "not moved to. Choose another push.tag, or delete the tag on the Hub."
        )
    found.notes.append(f"{where}; the push stops if this release is not the one it is on.")


def _comes_out_otherwise(one: Assessed) -> bool:
    """Tell a stage that is made of other things than before, or for the first time, from one whose output was lost."""
    if one.state != "to do" or one.record is None:
        return one.state == "to do"
    before = one.record.made_of
    known = {name: digest for name, digest in one.made_of["inputs"].items() if digest is not None}
    now = {**one.made_of, "inputs": {**before.get("inputs", {}), **known}}
    return bool(differences(before, now, ignore_versions=False))


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
