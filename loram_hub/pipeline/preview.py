"""What a run will do and need, before it starts; and what it did, when it is over."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loram_hub.alignment.estimates import estimate
from loram_hub.architecture import Architecture, Indices, Space
from loram_hub.estimation import (
    AlignmentShape,
    Cost,
    Hardware,
    ModelSize,
    SparseCounts,
    align_cost,
    evaluate_cost,
    model_size,
    prune_cost,
    quantize_cost,
    refit_cost,
    sparsify_cost,
    teach_cost,
    transfer_cost,
)
from loram_hub.pipeline.recipe import Recipe
from loram_hub.plan import Plan, PruningSettings, planned_sizes, pruned_layers
from loram_hub.pruning import CALIBRATION_SAMPLES, CALIBRATION_TOKENS
from loram_hub.sparsification import asked_counts
from loram_hub.texts import dataset_id

DOWNLOAD = "download"
"""Name of the row for the base's weights, where they are not on this machine."""
_BYTES_PER_TOKEN = 4
"""Of English text, roughly: to tell tokens from the size of a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePreview:
    """A line of the table that stands before a run."""

    name: str
    state: str
    """`to do`, `holds`, or `freed` (made, and deleted when nothing needed it any more)."""
    why: str
    cost: Cost
    """What it needs when it runs."""
    seconds: float | None
    """Estimated time; None without hardware in the recipe."""
    price: float | None
    """Of that time, in US dollars; None where the recipe names none."""

    @property
    def is_to_do(self) -> bool:
        """Whether it will run."""
        return self.state == "to do"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """What a run will do and need."""

    recipe: Recipe
    folder: Path
    """The work folder."""
    rows: tuple[StagePreview, ...]
    notes: tuple[str, ...]
    """What was decided or could not be checked."""
    problems: tuple[str, ...]
    """What would stop the run; each says what to do."""

    @property
    def disk_bytes(self) -> int:
        """Most bytes on the disk at once, of what is still to do: all outputs and the largest scratch."""
        to_do = [row.cost for row in self.rows if row.is_to_do]
        return sum(cost.output_bytes for cost in to_do) + max((cost.scratch_bytes for cost in to_do), default=0)

    @property
    def seconds(self) -> float | None:
        """Estimated time of what is to do."""
        return _total(row.seconds for row in self.rows if row.is_to_do)

    @property
    def price(self) -> float | None:
        """Of that time, in US dollars."""
        return _total(row.price for row in self.rows if row.is_to_do)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        rows = [asdict(row) for row in self.rows]
        return {
            "repo_id": self.recipe.repo_id,
            "folder": str(self.folder),
            "stages": rows,
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
            "price": self.price,
            "notes": list(self.notes),
            "problems": list(self.problems),
        }


def _total(values: Any) -> float | None:  # noqa: ANN401 (an iterable of numbers and None)
    found = list(values)
    return None if None in found else float(sum(found))


def stage_costs(recipe: Recipe, architecture: Architecture) -> dict[str, Cost]:
    """Estimate every stage of a recipe from its base's config alone.

    Args:
        recipe: what is made.
        architecture: of the base.

    Returns:
        Costs by stage, in their order; first that of downloading the base.
    """
    base, pruned = model_size(architecture), _pruned_size(recipe, architecture)
    costs = {
        DOWNLOAD: transfer_cost(base.bytes_16, kept=True),
        "prune": _prune_cost(recipe, architecture, base, pruned),
    }
    if recipe.refit is not None:
        refit = recipe.refit.settings
        costs["refit"] = refit_cost(base, pruned, tokens=refit.samples * refit.tokens)
    if recipe.teach is not None:
        teach = recipe.teaching_settings
        costs["teach"] = teach_cost(
            base,
            sequences=teach.sequences,
            sequence_length=teach.sequence_length,
            k=teach.k,
            block_sequences=teach.block_sequences,
            gpus=recipe.align_settings.processes or 1,
        )
    if recipe.align is not None:
        costs["align"] = _align_cost(recipe, architecture, pruned)
    final_bytes = pruned.bytes_16 if recipe.quantize is None else pruned.nf4_bytes
    mask_bytes = sparse_counts_of(recipe, architecture).mask_bytes if recipe.prune.is_sparse else 0
    if recipe.quantize is not None:
        costs["quantize"] = quantize_cost(pruned)
    if recipe.evaluate is not None:
        models = [(base, base.bytes_16)] if recipe.evaluate.base else []
        spread = 1
        if recipe.hardware is not None and recipe.evaluate.device == "auto":
            spread = recipe.hardware.on_one_node
        costs["evaluate"] = evaluate_cost(
            [*models, (pruned, final_bytes)], tokens=_evaluated_tokens(recipe), spread=spread
        )
    costs["card"] = Cost()
    if recipe.push is not None:
        costs["push"] = transfer_cost(final_bytes + mask_bytes, kept=False)
    return {name: _with_masks(name, cost, mask_bytes) for name, cost in costs.items()}


def sparse_counts_of(recipe: Recipe, architecture: Architecture) -> SparseCounts:
    """Count what is left of the base where single weights are removed, as the method rounds their number."""
    return asked_counts(architecture, recipe.prune.sparsity_settings)


def _pruned_size(recipe: Recipe, architecture: Architecture) -> ModelSize:
    """Measure the pruned model; one that lost single weights computes and stores as many numbers as its base."""
    if recipe.prune.is_sparse:
        return model_size(architecture)
    return model_size(architecture, planned_sizes(architecture, recipe.prune.structure))


def _prune_cost(recipe: Recipe, architecture: Architecture, base: ModelSize, pruned: ModelSize) -> Cost:
    if recipe.prune.is_sparse:
        settings = recipe.prune.sparsity_settings
        counts = sparse_counts_of(recipe, architecture)
        return sparsify_cost(base, counts, method=settings.method, tokens=settings.samples * settings.tokens)
    method = recipe.prune.scores.partition(":")[0]
    return prune_cost(base, pruned, method=method, tokens=CALIBRATION_SAMPLES * CALIBRATION_TOKENS)


def _with_masks(name: str, cost: Cost, mask_bytes: int) -> Cost:
    """Add the masks that lie beside the weights of a sparse release."""
    if name not in ("align", "quantize"):
        return cost
    return replace(cost, output_bytes=cost.output_bytes + mask_bytes)


def _align_cost(recipe: Recipe, architecture: Architecture, pruned: ModelSize) -> Cost:
    settings = recipe.align_settings
    on_gpu = (recipe.device or "cpu").startswith("cuda")
    precision = settings.precision if settings.precision != "auto" else "mixed" if on_gpu else "fp32"
    processes = settings.processes or 1
    held = estimate(_plan_of(recipe, architecture), settings, precision=precision, processes=processes)
    shape = AlignmentShape(
        tokens=settings.tokens,
        sequence_length=settings.sequence_length,
        micro_batch_size=settings.micro_batch_size,
        loss_chunk=settings.chunk_for(pruned.vocab_size),
        precision=precision,
        activation_checkpointing=settings.activation_checkpointing,
        checkpoints=-(-settings.steps // settings.save_every),
        evaluated_tokens=_held_out_tokens(recipe),
        keep_checkpoints=settings.keep_checkpoints,
        processes=processes,
    )
    return align_cost(pruned, shape, state_bytes=held.process_bytes, checkpoint_bytes=held.checkpoint_bytes)


def _held_out_tokens(recipe: Recipe) -> int:
    """Return how many tokens are evaluated on while aligning: before the first step, every so often, after the last."""
    assert recipe.align is not None
    settings = recipe.align_settings
    evaluations = 1 + -(-settings.steps // settings.evaluate_every)
    return evaluations * len(recipe.align.corpora) * settings.held_out * settings.sequence_length


def _plan_of(recipe: Recipe, architecture: Architecture) -> Plan:
    if recipe.prune.is_sparse:
        return Plan(architecture, {}, masks_sha256="")  # which weights it keeps does not matter to estimates
    return plan_of_any_groups(architecture, recipe.prune.structure)


def plan_of_any_groups(architecture: Architecture, structure: PruningSettings) -> Plan:
    """Return a plan with the sizes that pruning will give; which groups it keeps does not matter to estimates."""
    sizes = planned_sizes(architecture, structure)
    kept: dict[int, dict[Space, Indices]] = {
        layer: {
            "kv_heads": np.arange(sizes[layer].kv_heads, dtype=np.int32),
            "channels": np.arange(sizes[layer].channels, dtype=np.int32),
        }
        for layer in pruned_layers(architecture, structure)
    }
    return Plan(architecture, kept)


def _evaluated_tokens(recipe: Recipe) -> int:
    """Return about how many tokens are evaluated on, taking records for shorter than `max_tokens`; 0 if unknown."""
    stage = recipe.evaluate
    assert stage is not None
    if stage.limit is not None:
        return stage.limit * stage.max_tokens
    path = Path(stage.data).expanduser()
    return path.stat().st_size // _BYTES_PER_TOKEN if dataset_id(stage.data) is None and path.is_file() else 0


def describe(recipe: Recipe, architecture: Architecture) -> list[str]:
    """State hardware, memory, disk, time and money of a whole recipe, in the lines that head the recipes of `publish/`.

    Args:
        recipe: with its hardware.
        architecture: of its base.
    """
    hardware = recipe.hardware
    assert hardware is not None, "only a recipe that names its hardware can be described"
    costs = stage_costs(recipe, architecture)
    base, pruned = model_size(architecture), _pruned_size(recipe, architecture)
    seconds = {name: cost.seconds(hardware) for name, cost in costs.items()}
    disk = sum(cost.output_bytes for cost in costs.values()) + max(cost.scratch_bytes for cost in costs.values())
    most = max(costs, key=lambda name: costs[name].memory_bytes)
    lines = [
        f"Parameters: {base.parameters:,} -> {_parameters_left(recipe, architecture):,}; "
        f"{size_text(pruned.bytes_16)} in bf16, {size_text(pruned.nf4_bytes)} in NF4"
        + _masks_text(recipe, architecture),
        f"Hardware:   {_machine(hardware)}",
        f"Memory:     {size_text(costs[most].memory_bytes)} of each at most, in {most}",
        f"Disk:       {size_text(disk)}, of it {size_text(costs[DOWNLOAD].output_bytes)} for the base"
        + (f" and {size_text(costs['align'].scratch_bytes)} for checkpoints" if "align" in costs else ""),
        f"Time:       {hours_text(sum(seconds.values()))}"
        + (f", of it {hours_text(seconds['align'])} in align" if "align" in seconds else ""),
    ]
    price = hardware.price(sum(seconds.values()))
    return [
        *lines,
        *([] if price is None else [f"Cost:       ${price:,.0f} at ${hardware.price_per_gpu_hour:g} a GPU hour"]),
    ]


def _parameters_left(recipe: Recipe, architecture: Architecture) -> int:
    if recipe.prune.is_sparse:
        return sparse_counts_of(recipe, architecture).pruned_parameters
    return _pruned_size(recipe, architecture).parameters


def _masks_text(recipe: Recipe, architecture: Architecture) -> str:
    if not recipe.prune.is_sparse:
        return ""
    return f", zeros included; masks {size_text(sparse_counts_of(recipe, architecture).mask_bytes)}"


def _machine(hardware: Hardware) -> str:
    return f"{hardware.count} x {hardware.gpu}, {hardware.tflops:g} TFLOP/s each, {hardware.utilization:.0%} of it used"


def size_text(nbytes: float) -> str:
    """Write a number of bytes for people, in powers of ten, as disks and clouds count."""
    scale, unit = (1e9, "GB") if nbytes >= 1e9 else (1e6, "MB")
    return f"{nbytes / scale:,.0f} {unit}" if nbytes >= 10 * scale else f"{nbytes / scale:.1f} {unit}"


def hours_text(seconds: float) -> str:
    """Write a time for people."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
