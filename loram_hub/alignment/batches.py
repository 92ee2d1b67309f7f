"""The training stream, read by the first process and handed to all.

Batch s of B sequences is the sequences s*B to s*B + B - 1 of the stream, whatever the number of processes; each takes
its rows. An error in reading reaches all processes, in place of the batch that could not be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loram_hub.alignment.launch import Ranks
from loram_hub.corpora import PackedStream


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Batch:
    """The sequences of one optimizer step."""

    ids: npt.NDArray[np.int32]
    """Token ids, (batch_size, tokens)."""
    corpora: npt.NDArray[np.int32]
    """Which corpus each sequence is from, (batch_size,)."""
    first: int
    """Number of the first sequence in the stream."""


class BatchFeed:
    """Hands out batch after batch; the next one is read while the last is trained on."""

    def __init__(self, stream: PackedStream | None, *, batch_size: int, ranks: Ranks) -> None:
        """Take over the stream.

        Args:
            stream: of the first process; None on the others.
            batch_size: sequences of a batch.
            ranks: the processes.
        """
        self._stream, self._batch_size, self._ranks = stream, batch_size, ranks
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._coming: Future[tuple[Batch, Mapping[str, Any]]] | None = None
        self.position: Mapping[str, Any] = {} if stream is None else stream.state_dict()
        """State of the stream after the batch that was handed out last; empty on all processes but the first."""

    def go_to(self, position: Mapping[str, Any]) -> None:
        """Go on from a saved position; before the first batch."""
        if self._stream is not None:
            self._stream.load_state_dict(position)
        self.position = position

    def next_batch(self) -> Batch:
        """Return the next batch, the same on all processes.

        Raises:
            LoramError: what the stream raises; `position` is still that after the last batch.
        """
        return self._ranks.first(self._take)

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _take(self) -> Batch:
        coming = self._coming or self._reader.submit(self._read)
        self._coming = None
        batch, self.position = coming.result()
        self._coming = self._reader.submit(self._read)
        return batch

    def _read(self) -> tuple[Batch, Mapping[str, Any]]:
        assert self._stream is not None
        found = [next(self._stream) for _ in range(self._batch_size)]
        batch = Batch(
            ids=np.stack([sequence.ids for sequence in found]),
            corpora=np.array([sequence.corpus for sequence in found], dtype=np.int32),
            first=found[0].index,
        )
        return batch, self._stream.state_dict()
