"""Everything that can go wrong in a run, looked at before the weights are loaded."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loram_hub.alignment.trackers import check_trackers
from loram_hub.errors import IncompatibleError, InvalidRequestError, ResourceError
from loram_hub.files import dump_json, sha256_of
from loram_hub.finetuning.materials import Materials, open_materials
from loram_hub.finetuning.processes import Processes
from loram_hub.finetuning.recipe import FinetuneRecipe
from loram_hub.finetuning.runs import RunFolder
from loram_hub.finetuning.schedule import Schedule, schedule_of
from loram_hub.finetuning.sizing import Sizing, size_of
from loram_hub.instructions import Instructions, read_instructions
from loram_hub.instructions.storing import stored_sha256
from loram_hub.manifest import MANIFEST

logger = logging.getLogger(__name__)

_FREE = ("release", "revision", "base", "device", "distributed", "checkpoints", "report_to", "push", "data")
"""Parts of a recipe that do not decide over the numbers of a run, or whose content is known better."""
_FREE_MEMORY = ("gpu", "gradient_checkpointing", "activation_offloading")
_STATE_BYTES = 12
"""Of a checkpoint, for each number of the adapter: itself and two moments, at most in fp32."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Prepared:
    """A run that nothing is known to stop."""

    recipe: FinetuneRecipe
    """What is asked for."""
    processes: Processes
    """Which there are."""
    materials: Materials
    """The release, opened."""
    data: Instructions
    """To train and evaluate on."""
    sizing: Sizing
    """The estimate, and the micro-batch that follows from it."""
    schedule: Schedule
    """Steps, batches and intervals."""
    disk_bytes: int
    """What the run writes, at most."""

    @property
    def foreign_template(self) -> str | None:
        """The chat template that examples were written with, if a server would not find it beside the base model."""
        kinds = {one.kind for one in self.data.report.sets}
        if self.recipe.data.tokenizer is None or not kinds & {"chat", "whole-chat"}:
            return None
        return self.materials.foreign_template

    @property
    def identity(self) -> dict[str, Any]:
        """What decides over the numbers of the run, as JSON values."""
        recipe = {name: value for name, value in asdict(self.recipe).items() if name not in _FREE}
        recipe["memory"] = {name: value for name, value in recipe["memory"].items() if name not in _FREE_MEMORY}
        recipe["training"] = {**recipe["training"], "steps": self.schedule.steps, "micro_batch": None}
        is_sparse = self.materials.release.manifest.is_sparse
        recipe["lora"] = {**recipe["lora"], "masked": self.materials.is_masked if is_sparse else None}
        report = self.data.report
        values = {
            "release_sha256": sha256_of(self.materials.release.folder / MANIFEST),
            "data": [
                {"commit": one.commit, "sha256": one.sha256, "rows": one.rows, "format": one.format}
                for one in report.records
            ],
            "sets": [
                {"name": one.name, "examples": one.examples, "tokens": one.tokens, "stored_sha256": stored_sha256(rows)}
                for one, rows in zip(report.sets, (self.data.train, *self.data.evaluations.values()), strict=True)
            ],
            "tokenizer_sha256": report.tokenizer_sha256,
            "recipe": recipe,
        }
        read_back: dict[str, Any] = json.loads(dump_json(values))  # tuples become lists, as they will be read
        return read_back


def prepare(recipe: FinetuneRecipe, folder: RunFolder, processes: Processes, *, token: str | bool | None) -> Prepared:
    """Open and check everything that a run needs, except for the weights.

    Args:
        recipe: what is asked for.
        folder: of the run.
        processes: which there are.
        token: of the Hub.

    Raises:
        LoramError: what opening a release, its data and its trackers raises; the message says what to do.
        ResourceError: it does not fit the GPU that is there, or the disk.
    """
    check_trackers(recipe.report_to)
    _check_options(recipe, processes)
    materials = open_materials(recipe, token=token)
    if materials.is_masked and recipe.distributed.sharding == "fsdp":
        raise IncompatibleError(
            "lora.masked is true and distributed.sharding is fsdp: masked updates of parameters that FSDP shares out "
            "are not supported. Say `masked: false`, or `sharding: ddp`."
        )
    sizing = size_of(recipe, materials, processes)
    data = read_instructions(
        recipe.data.train,
        materials.tokenizer,
        max_length=recipe.training.max_tokens,
        evaluations=recipe.data.evaluate,
        held_out=recipe.data.held_out,
        vocab_size=materials.release.architecture.vocab_size,
        seed=recipe.seed,
        too_long=recipe.data.too_long,
        bad_records=recipe.data.bad_records,
        token=token,
    )
    schedule = schedule_of(recipe, examples=len(data.train), micro_batch=sizing.micro_batch, processes=processes.size)
    if len(data.train) < schedule.batch_size:
        logger.warning(
            "training.batch_size is %d and there are %d examples to train on: each step takes these, all of them",
            schedule.batch_size, len(data.train),
        )  # fmt: skip
    disk_bytes = _disk_bytes(recipe, materials, schedule)
    _check_disk(folder.folder, disk_bytes)
    return Prepared(
        recipe=recipe,
        processes=processes,
        materials=materials,
        data=data,
        sizing=sizing,
        schedule=schedule,
        disk_bytes=disk_bytes,
    )


def _check_options(recipe: FinetuneRecipe, processes: Processes) -> None:
    """Refuse options that need what is not there."""
    if not processes.on_cuda and recipe.optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        raise InvalidRequestError(
            f"memory.optimizer is {recipe.optimizer}, which bitsandbytes has for CUDA alone, and this run is on a CPU. "
            "Say auto."
        )
    if not processes.on_cuda and recipe.dtype == "float16":
        raise InvalidRequestError(
            "dtype is float16, whose gradients need scaling that torch has for GPUs, and this run is on a CPU. Say "
            "float32 or bfloat16, or leave it out."
        )
    options = recipe.memory_options
    if not processes.on_cuda and options.activation_offloading:
        raise InvalidRequestError(
            "memory.activation_offloading moves activations from a GPU to main memory, and this run is on a CPU. Leave "
            "it out."
        )
    if recipe.distributed.sharding == "fsdp" and (options.embedding, options.lm_head) != ("device", "device"):
        raise IncompatibleError(
            f"memory.embedding is {options.embedding} and memory.lm_head {options.lm_head}: FSDP shares out neither. "
            "Say device for both, or distributed.sharding: ddp."
        )


def _disk_bytes(recipe: FinetuneRecipe, materials: Materials, schedule: Schedule) -> int:
    """Return the bytes that lie in the folder of a run at most: one checkpoint more is written before one goes."""
    trained = materials.adapter_parameters(recipe.lora.r)
    recovered = 2 * materials.adapter_parameters(recipe.lora.r, recovered=True)
    kept = min(recipe.checkpoints.keep + 2, -(-schedule.steps // schedule.save_every) + 1)
    per_checkpoint = _STATE_BYTES * trained + (recovered if recipe.checkpoints.recover else 0)
    return kept * per_checkpoint + 4 * trained + recovered


def _check_disk(folder: Path, nbytes: int) -> None:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise ResourceError(
            f"The disk of {existing} has {free / 1e9:,.1f} GB free; checkpoints and adapters of this run take up to "
            f"{nbytes / 1e9:,.1f} GB. Free some space, lower checkpoints.keep, say checkpoints.recover: false, or "
            "write elsewhere."
        )
