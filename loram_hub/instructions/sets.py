"""The sets that are trained and evaluated on, and what is reported of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from loram_hub.instructions.collecting import Collected
from loram_hub.instructions.examples import Kind
from loram_hub.instructions.reports import SetReport, lengths_of
from loram_hub.instructions.sampling import Keys, Positions

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]  # ships no types

TRAIN, HELD_OUT = "train", "held_out"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleSet:
    """A set with three numbers for each row."""

    name: str
    """`train`, `held_out`, or the name of an evaluation source."""
    kind: Kind
    """Which columns its rows have."""
    dataset: Dataset
    """Its rows."""
    lengths: npt.NDArray[np.uint32]
    """Tokens of each row before any cut, (rows,)."""
    learned: npt.NDArray[np.uint32]
    """Tokens of each row that count in the loss, (rows,)."""
    keys: Keys
    """`content_key` of each row's question, (rows,)."""

    def report(self, *, max_length: int, training: ExampleSet) -> SetReport:
        """Return what is told of the set, next to the one that is trained on."""
        shared = 0 if self is training else int(np.isin(self.keys, training.keys).sum())
        return SetReport(
            name=self.name,
            kind=self.kind,
            examples=len(self.lengths),
            tokens=int(np.minimum(self.lengths, max_length).sum(dtype=np.int64)),
            learned_tokens=int(self.learned.sum(dtype=np.int64)),
            truncated=int((self.lengths > max_length).sum()),
            lengths=lengths_of(self.lengths),
            learned_lengths=lengths_of(self.learned),
            repeated=len(self.keys) - len(np.unique(self.keys)),
            shared_with_training=shared,
        )


def sets_of(training: Collected, held_out: Positions, evaluated: Mapping[str, Collected]) -> Iterator[ExampleSet]:
    """Yield the training set without what is held out, what is held out if anything is, and the evaluation sets."""
    if len(held_out):
        kept = np.setdiff1d(np.arange(len(training.lengths)), held_out)
        yield _part(TRAIN, training, kept)
        yield _part(HELD_OUT, training, held_out)
    else:
        yield _whole(TRAIN, training)
    yield from (_whole(name, collected) for name, collected in evaluated.items())


def _part(name: str, collected: Collected, rows: Positions) -> ExampleSet:
    return ExampleSet(
        name=name,
        kind=collected.kind,
        dataset=collected.dataset.select(rows),
        lengths=collected.lengths[rows],
        learned=collected.learned[rows],
        keys=collected.keys[rows],
    )


def _whole(name: str, collected: Collected) -> ExampleSet:
    return ExampleSet(
        name=name,
        kind=collected.kind,
        dataset=collected.dataset,
        lengths=collected.lengths,
        learned=collected.learned,
        keys=collected.keys,
    )
