"""The loop: batch, losses, gradients, one step of the optimizer; evaluation, log and checkpoint where they are due.

The loss of a step is the mean over all predicted tokens of the global batch, whatever the number of processes and the
size of the micro-batches. Gradients of each micro-batch are reduced to each process's own rows at once, so that memory
is what `estimates` says; adding them up first would take a whole model's gradients.
"""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub.utils import tqdm
from torch.distributed.fsdp import FSDPModule

from loram_hub.alignment.batches import Batch, BatchFeed
from loram_hub.alignment.checkpoints import CheckpointStore
from loram_hub.alignment.launch import Ranks, peers_needed
from loram_hub.alignment.masking import GradientMasks
from loram_hub.alignment.model import TrainedModel
from loram_hub.alignment.optimization import ShardedAdamW, learning_rate_at
from loram_hub.alignment.settings import AlignmentSettings
from loram_hub.errors import IncompatibleError, LoramError, TrainingError

logger = logging.getLogger(__name__)

_NOT_SAVED = (
    "the weights of this step were not saved, and the last checkpoint is of step {saved} (0: there is none). Lower "
    "learning_rate, set max_grad_norm or choose precision 'fp32', and start anew with resume='never'."
)

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]
Record = Mapping[str, Any]


class Targets(Protocol):
    """What a teacher says of the training stream."""

    def targets(self, first: int, count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
        """Return token ids and log-probabilities, (count, tokens, k) each, of sequences first to first + count - 1."""

    def tokens(self, first: int, count: int) -> npt.NDArray[np.int32]:
        """Return the sequences that these are of, (count, tokens)."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Material:
    """What is trained on."""

    names: tuple[str, ...]
    """Of the corpora."""
    feed: BatchFeed
    """The training stream."""
    held_out: tuple[Ids, ...]
    """Sequences of each corpus, (sequences, tokens)."""
    teacher: Targets | None = None
    """Where there is one."""


class Training:
    """A run, from its first step or from a checkpoint to its last step. All processes call its methods together."""

    def __init__(
        self,
        model: TrainedModel,
        material: Material,
        settings: AlignmentSettings,
        *,
        masks: GradientMasks,
        ranks: Ranks,
        store: CheckpointStore,
        run_sha256: str,
        record: Callable[[Record], None],
    ) -> None:
        """Prepare.

        Args:
            model: sharded.
            material: what is trained on.
            settings: of the run.
            masks: of the gradients; a sparse release stays sparse.
            ranks: the processes.
            store: of the checkpoints.
            run_sha256: tells this run's checkpoints from another's.
            record: takes what each step brought; called on the first process alone.
        """
        self._model, self._material, self._settings, self._ranks = model, material, settings, ranks
        self._masks = masks
        self._store, self._run_sha256, self._record = store, run_sha256, record
        trained = ((name, each) for name, each in model.named_parameters() if each.requires_grad)
        self.optimizer = ShardedAdamW(trained, settings)
        self._step = self._saved = 0

    def resume(self) -> int:
        """Go to the newest checkpoint; return how many steps were done, 0 if there is none."""
        found = self._store.newest()
        if found is not None and found.extra["run_sha256"] != self._run_sha256:
            self._store.clear()  # left by a run that was started anew, with other settings perhaps
            found = None
        if found is None:
            return 0
        self.optimizer.check_loadable(found.extra["processes"], self._ranks)
        self._store.load(found, self.optimizer.state(self._ranks))
        self.optimizer.set_steps(found.step)
        self._ranks.first(lambda: self._material.feed.go_to(found.extra["stream"]))
        self._step = self._saved = found.step
        return found.step

    def run(self) -> None:
        """Train to the last step.

        Raises:
            TrainingError: loss or gradient is not finite, and nothing was changed by it; or the weights or a held-out
                loss are not. The last checkpoint stands.
            ResourceError: memory or disk ran out.
            LoramError: what the training stream raises; a checkpoint of the last step was saved before.
        """
        settings = self._settings
        if self._step == 0 and (before := self._evaluate()):
            self._log({"step": 0, "tokens": 0, "held_out": before})
        hidden = None if self._ranks.is_first else True
        with tqdm(total=settings.steps, initial=self._step, desc="Aligning", unit="step", disable=hidden) as bar:
            while self._step < settings.steps:
                measured = self._train_step()
                if (losses := self._evaluate_if_due()) is not None:
                    measured["held_out"] = losses
                    if self._ranks.is_first:
                        logger.info(
                            "Step %d of %d: loss %.4f, held out %s",
                            self._step,
                            settings.steps,
                            measured["loss"],
                            losses,
                        )
                self._log(measured)
                if self._step % settings.save_every == 0 or self._step == settings.steps:
                    self._save()
                bar.set_postfix(loss=f"{measured['loss']:.3f}", refresh=False)
                bar.update()

    def _train_step(self) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            batch = self._material.feed.next_batch()
        except LoramError:
            if self._step > self._saved:
                self._save()
            raise
        losses, divergences = self._gradients(batch)
        self._masks.apply_(self.optimizer.parameters)
        norm = self.optimizer.clip_(self._ranks)
        self._check_finite(batch, losses, divergences, norm)
        rate = learning_rate_at(self._step, self._settings)
        with peers_needed():
            self.optimizer.step(rate)
        self._step += 1
        seconds = time.perf_counter() - began
        return {
            **self._losses_of(batch, losses, divergences),
            "step": self._step,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens": self._step * batch.ids.size,
            "tokens_per_second": batch.ids.size / seconds,
            "memory_bytes": peak_memory(self._ranks.device),
        }

    def _gradients(self, batch: Batch) -> tuple[Floats, Floats]:
        """Compute gradients; return each sequence's next-token loss and divergence, summed over its positions."""
        weight, (count, tokens) = self._settings.distillation, batch.ids.shape
        # FSDP2 divides the processes' gradients by their number.
        scale = self._ranks.size / (count * (tokens - 1))
        losses = torch.zeros((2, count), dtype=torch.float32, device=self._ranks.device)
        for rows in _parts(self._ranks.rows(count), self._settings.micro_batch_size):
            teacher = self._targets(batch, rows)
            with peers_needed():
                next_token, divergence = self._model(self._ids(batch.ids[rows]), teacher)
                objective = (1 - weight) * next_token.sum()
                if divergence is not None:
                    objective = objective + weight * divergence.sum()
                    losses[1, rows] = divergence.detach()
                (objective * scale).backward()
            losses[0, rows] = next_token.detach()
        found: Floats = self._ranks.sum(losses).double().cpu().numpy()
        return found[0], found[1]

    def _targets(self, batch: Batch, rows: slice) -> tuple[torch.Tensor, torch.Tensor] | None:
        teacher = self._material.teacher
        if teacher is None:
            return None
        first, count = batch.first + rows.start, rows.stop - rows.start

        def read() -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
            if not np.array_equal(teacher.tokens(first, count), batch.ids[rows]):
                raise IncompatibleError(
                    f"The teacher was run on other tokens than those of sequences {first} to {first + count - 1} of "
                    "this training stream. Run it again, on the same corpora and settings."
                )
            return teacher.targets(first, count)

        ids, log_probs = self._ranks.everywhere(read)
        device = self._ranks.device  # torch takes no arrays that may only be read: copies
        return torch.from_numpy(ids.astype(np.int64)).to(device), torch.from_numpy(log_probs.copy()).to(device)

    def _ids(self, ids: Ids) -> torch.Tensor:
        return torch.from_numpy(ids).to(self._ranks.device, torch.int64)

    def _check_weights(self) -> None:
        count = self.optimizer.weights_not_finite(self._ranks)
        if count:
            raise TrainingError(
                f"After step {self._step} of {self._settings.steps} {count:,} of the weights are not finite; "
                f"{_NOT_SAVED.format(saved=self._saved)}"
            )

    def _check_finite(self, batch: Batch, losses: Floats, divergences: Floats, norm: float) -> None:
        bad = np.flatnonzero(~np.isfinite(losses + divergences))
        if not len(bad) and math.isfinite(norm):
            return
        self.optimizer.forget_gradients()
        rows = bad if len(bad) else np.arange(len(losses))
        corpora = sorted({self._material.names[number] for number in batch.corpora[rows]})
        what = "loss" if len(bad) else f"norm of the gradient ({norm})"
        raise TrainingError(
            f"Step {self._step + 1} of {self._settings.steps}: the {what} is not finite, in sequence(s) "
            f"{_ranges(batch.first + rows)} of the stream (corpora: {', '.join(corpora)}). The weights were left as "
            f"step {self._step} made them; the last checkpoint is of step {self._saved}. Lower learning_rate or choose "
            "precision 'fp32', and look at those texts."
        )

    def _losses_of(self, batch: Batch, losses: Floats, divergences: Floats) -> dict[str, Any]:
        positions = batch.ids.shape[1] - 1
        by_corpus = {
            name: float(losses[batch.corpora == number].mean()) / positions
            for number, name in enumerate(self._material.names)
            if (batch.corpora == number).any()
        }
        found: dict[str, Any] = {"loss": float(losses.mean()) / positions, "losses": by_corpus}
        if self._material.teacher is not None:
            weight = self._settings.distillation
            found["divergence"] = float(divergences.mean()) / positions
            found["objective"] = (1 - weight) * found["loss"] + weight * found["divergence"]
        return found

    def _evaluate_if_due(self) -> dict[str, float] | None:
        if self._step % self._settings.evaluate_every and self._step != self._settings.steps:
            return None
        return self._evaluate() or None

    def _evaluate(self) -> dict[str, float]:
        """Return the mean next-token loss on each corpus's held-out sequences."""
        pairs = zip(self._material.names, self._material.held_out, strict=True)
        found = {name: self._held_out_loss(ids) for name, ids in pairs if len(ids)}
        cast("FSDPModule", self._model).reshard()  # what `forward` gathered for a backward pass that does not come
        bad = [name for name, loss in found.items() if not math.isfinite(loss)]
        if bad:
            raise TrainingError(
                f"After step {self._step} of {self._settings.steps} the loss on the held-out texts of "
                f"{', '.join(bad)} is not finite; {_NOT_SAVED.format(saved=self._saved)}"
            )
        return found

    def _held_out_loss(self, ids: Ids) -> float:
        ranks, count = self._ranks, len(ids)
        losses = torch.zeros(count, dtype=torch.float32, device=ranks.device)
        share = -(-count // ranks.size)
        with torch.no_grad():
            for part in _parts(slice(0, share), self._settings.micro_batch_size):
                rows = np.arange(part.start, part.stop) * ranks.size + ranks.rank
                with peers_needed():
                    found, _ = self._model(self._ids(ids[rows % count]))  # all processes must compute as often
                real = torch.from_numpy(rows < count).to(ranks.device)
                losses[torch.from_numpy(rows).to(ranks.device)[real]] = found[real]
        return float(ranks.sum(losses).double().mean().item() / (ids.shape[1] - 1))

    def _save(self) -> None:
        self._check_weights()
        extra = {
            "stream": self._material.feed.position,
            "processes": self._ranks.size,
            "run_sha256": self._run_sha256,
        }
        self._store.save(self._step, self.optimizer.state(self._ranks), extra)
        self._saved = self._step

    def _log(self, measured: Record) -> None:
        self._ranks.first(lambda: self._record(measured))


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has held so far: on its GPU, else altogether."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _parts(rows: slice, size: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def _ranges(numbers: Sequence[int] | npt.NDArray[np.int64]) -> str:
    """Write ascending numbers as ranges: 4-7, 9."""
    found: list[list[int]] = []
    for number in map(int, numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
