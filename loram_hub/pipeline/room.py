"""Whether a run has room on its machine: disks, and the memory and number of its GPUs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import constants

from loram_hub.errors import InvalidRequestError, ResourceError
from loram_hub.pipeline.assessment import Assessed
from loram_hub.pipeline.preview import DOWNLOAD, StagePreview
from loram_hub.pipeline.recipe import Recipe
from loram_hub.pipeline.stages import Job
from loram_hub.pipeline.workspace import folder_bytes


def check_disk(
    job: Job, assessed: Sequence[Assessed], rows: Sequence[StagePreview], *, keep_intermediate: bool = True
) -> None:
    """Check that disks have room for what is still to be written; the base goes to the Hub's cache.

    Args:
        job: recipe and materials.
        assessed: the stages.
        rows: their estimates.
        keep_intermediate: whether outputs stay when nothing needs them any more.

    Raises:
        ResourceError: a disk has less room than that.
    """
    download = sum(row.cost.output_bytes for row in rows if row.is_to_do and row.name == DOWNLOAD)
    download = max(0, download - _cached_bytes(job) if download else 0)
    written = _most_written(job, assessed, rows, keep_intermediate=keep_intermediate)
    places: dict[int, tuple[Path, int]] = {}
    for folder, nbytes in ((Path(constants.HF_HUB_CACHE), download), (job.work.folder, written)):
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        device = existing.stat().st_dev
        places[device] = (existing, places.get(device, (existing, 0))[1] + nbytes)
    for existing, nbytes in places.values():
        free = shutil.disk_usage(existing).free
        if free < nbytes:
            raise ResourceError(
                f"The disk of {existing} has {free / 1e9:,.1f} GB free; {nbytes / 1e9:,.1f} GB more are needed at most "
                f"({download / 1e9:,.1f} GB for the base, {written / 1e9:,.1f} GB for the work folder; what is there "
                "already is not counted). Free some space, keep fewer checkpoints, let intermediate outputs be deleted "
                "(--delete-intermediate), or work elsewhere (--work-dir)."
            )


def _most_written(
    job: Job, assessed: Sequence[Assessed], rows: Sequence[StagePreview], *, keep_intermediate: bool
) -> int:
    """Return the most bytes that the work folder grows by, going through the stages that are to do."""
    costs = {row.name: row.cost for row in rows}
    to_do = [one.stage for one in assessed if one.state == "to do"]
    lying: dict[str, int] = {}
    most = 0
    for number, stage in enumerate(to_do):
        cost = costs[stage.name]
        begun = sum(folder_bytes(path) for path in stage.leftovers)
        most = max(most, sum(lying.values()) + max(0, cost.output_bytes + cost.scratch_bytes - begun))
        begun_output = sum(folder_bytes(path) for path in stage.leftovers if path == stage.output)
        lying[stage.name] = max(0, cost.output_bytes - begun_output)
        if not keep_intermediate:
            needed = {name for later in to_do[number + 1 :] for name in later.inputs}
            final = {one.name for one in to_do if one.output == job.final}
            lying = {name: nbytes for name, nbytes in lying.items() if name in needed | final}
    return most


def _cached_bytes(job: Job) -> int:
    """Return what the Hub's cache has of the base: whole files of its commit, and parts of files."""
    snapshot = job.materials.base.folder
    parts = (snapshot.parent.parent / "blobs").glob("*.incomplete")
    return folder_bytes(snapshot) + sum(part.stat().st_size for part in parts)


def check_hardware(recipe: Recipe) -> None:
    """Raise `InvalidRequestError` if `align` is to run on more GPUs than `hardware` has."""
    if recipe.hardware is None or recipe.align is None:
        return
    processes, count = recipe.align_settings.processes or 1, recipe.hardware.count
    if processes > count:
        raise InvalidRequestError(
            f"align.processes is {processes}, and hardware.count is {count}: times and prices would be those of GPUs "
            f"that the machine does not have. Set hardware.count to {processes} (over all nodes), or lower "
            "align.processes."
        )


def hardware_notes(recipe: Recipe, rows: Sequence[StagePreview]) -> Iterator[str]:
    """Say which stages may not fit, and which GPUs are paid for nothing; estimates are no reason to stop."""
    if recipe.hardware is None:
        return
    memory = recipe.hardware.memory_gib * 2**30
    for row in rows:
        if row.is_to_do and row.cost.memory_bytes > memory:
            yield (
                f"{row.name} may not fit: it needs about {row.cost.memory_bytes / 2**30:,.0f} GiB, and "
                f"hardware.memory_gib is {recipe.hardware.memory_gib:g}."
            )
    if recipe.align is None or (recipe.align.launcher and recipe.align_settings.processes is None):
        return  # how many there will be, the launcher decides
    processes, count = recipe.align_settings.processes or 1, recipe.hardware.count
    if processes < count:
        yield f"align.processes is {processes}, and hardware.count is {count}: {count - processes} GPUs idle in align."
