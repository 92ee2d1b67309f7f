"""What a run leaves: the adapter as trained, the recovered one, and a record of how they came about."""

from __future__ import annotations

import json
import math
import platform
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from loram_hub.adapter import CONFIG, RECORD, WEIGHTS, max_lora_rank
from loram_hub.doctor.commands import serving_command
from loram_hub.errors import CheckpointError, TrainingError
from loram_hub.files import atomic_folder, resource_errors, sha256_of
from loram_hub.finetuning.checkpoints import SealedCheckpoint, checkpoint_folder, latest_checkpoint, open_checkpoint
from loram_hub.finetuning.runs import CHAT_TEMPLATE
from loram_hub.recovery import RecoveredAdapter

RECORD_FORMAT = 1
_PACKAGES = (
    "loram-hub", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "tokenizers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneResult:
    """What `finetune` did."""

    folder: Path
    """Of the run."""
    adapter: Path
    """The adapter as it was trained, in pruned shapes; no server may have it."""
    recovered: Path
    """The adapter for the original model."""
    base_id: str
    """The original model: Hub id, or a folder's name."""
    base_revision: str | None
    """Its commit on the Hub."""
    rank: int
    """Of the recovered adapter."""
    steps: int
    """Optimizer steps after which it was taken."""
    training_loss: float | None
    """Training loss of that step, nats per token that counts; None if it was not logged."""
    evaluation_losses: Mapping[str, float]
    """Loss of each evaluation set at that step, or the last before."""
    resumed_from: int | None
    """Step of the checkpoint that this process went on from; None if it began, or had nothing left to do."""
    pushed_to: str | None
    """Hub id; None if it was not pushed."""
    is_exact: bool
    """Whether all of it was trained by as many processes and with one micro-batch. If not, it is a result, but not the
    one of an undisturbed run."""
    chat_template: Path | None
    """What a server has to be given, since the data were written with the chat template of another tokenizer than the
    release's; None if the original model's own does."""

    @property
    def max_lora_rank(self) -> int:
        """The smallest --max-lora-rank with which vLLM serves it."""
        return max_lora_rank(self.rank)

    @property
    def serving_command(self) -> str:
        """The line that serves the original model with the adapter."""
        line = serving_command(
            "vllm",
            adapter=self.pushed_to or str(self.recovered),
            folder=self.recovered,
            base=self.base_id,
            revision=self.base_revision,
            rank=self.rank,
        )[0]
        return line if self.chat_template is None else f"{line} --chat-template {shlex.quote(str(self.chat_template))}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        paths: dict[str, str | None] = {name: str(getattr(self, name)) for name in ("folder", "adapter", "recovered")}
        paths["chat_template"] = None if self.chat_template is None else str(self.chat_template)
        return asdict(self) | paths | {"serving_command": self.serving_command}


def chosen_checkpoint(folder: Path, *, best: bool) -> SealedCheckpoint:
    """Return the checkpoint whose adapter a run gives: the last, or the one with the lowest loss.

    Args:
        folder: of the checkpoints.
        best: whether the lowest loss decides.

    Raises:
        TrainingError: there is none.
        VerificationError: the best one was altered.
    """
    last = latest_checkpoint(folder)
    if last is None:
        raise TrainingError(f"Training has ended and there is no whole checkpoint in {folder}. Start the run again.")
    step = _trainer_state(last.folder)["best_global_step"] if best else None
    return last if not isinstance(step, int) else open_checkpoint(checkpoint_folder(folder, step))


def copy_adapter(checkpoint: Path, target: Path) -> None:
    """Copy the adapter of a checkpoint, and nothing else of it, to a folder that appears whole or not at all."""
    with atomic_folder(target, overwrite=True) as folder, resource_errors(f"Writing {target}"):
        for name in (CONFIG, WEIGHTS, RECORD):
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, folder / name)
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{checkpoint} holds no adapter: {WEIGHTS} is missing.")


def digests_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of an adapter, by name."""
    return {name: sha256_of(folder / name) for name in (CONFIG, WEIGHTS, RECORD) if (folder / name).is_file()}


def is_intact(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether an adapter is, byte for byte, what a run wrote down of it."""
    known: dict[str, str] = facts["files"]
    return digests_of(folder) == known


def history_of(checkpoint: Path) -> list[dict[str, Any]]:
    """Return what the Trainer logged up to a checkpoint: a record per step, and one per evaluation.

    Under fp16 the gradients of a step that torch's scaler skipped have no finite norm; None stands for it.
    """
    return [
        {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in record.items()
        }
        for record in _trainer_state(checkpoint)["log_history"]
    ]


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read the Trainer's state, whose bytes the seal vouches for; Python's JSON has the NaN that strict JSON lacks."""
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state


def losses_at(history: Sequence[Mapping[str, Any]], step: int) -> tuple[float | None, dict[str, float]]:
    """Return the training loss and the loss of each evaluation set at a step, or the last before it."""
    training: float | None = None
    evaluations: dict[str, float] = {}
    for record in history:
        if record.get("step", 0) > step:
            continue
        if "loss" in record:
            training = float(record["loss"])
        for name, value in record.items():
            if name.startswith("eval_") and name.endswith("_loss"):
                evaluations[name.removeprefix("eval_").removesuffix("_loss")] = float(value)
    return training, evaluations


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def result_of(folder: Path, record: Mapping[str, Any], *, resumed_from: int | None) -> FinetuneResult:
    """Read the result off the record of a run."""
    adapter = record["recovered"]
    return FinetuneResult(
        folder=folder,
        adapter=folder / "adapter",
        recovered=folder / "recovered",
        base_id=adapter["base_id"],
        base_revision=adapter["base_revision"],
        rank=adapter["rank"],
        steps=record["steps"],
        training_loss=record["losses"]["training"],
        evaluation_losses=record["losses"]["evaluations"],
        resumed_from=resumed_from,
        pushed_to=record["pushed_to"],
        is_exact=len({(start["processes"], start["micro_batch"]) for start in record["starts"]}) <= 1,
        chat_template=folder / CHAT_TEMPLATE if record["has_chat_template"] else None,
    )


def adapter_facts(recovered: RecoveredAdapter) -> dict[str, Any]:
    """Return what the record says of the recovered adapter."""
    return {
        "base_id": recovered.base_id,
        "base_revision": recovered.revision,
        "rank": recovered.rank,
        "alpha": recovered.alpha,
        "parameters": recovered.parameters,
        "nbytes": recovered.nbytes,
    }
