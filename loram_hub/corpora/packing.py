"""One corpus as a stream of equally long sequences: documents one after another, cut without waste.

The stream is (opening, document, end of sequence), (opening, document, end of sequence), ...; it is cut every
`sequence_length` tokens, wherever that falls. Nothing is dropped and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from loram_hub.corpora.documents import Place, ShuffledDocuments
from loram_hub.corpora.encoding import Ids, TextEncoder
from loram_hub.errors import InvalidRequestError


class PackedCorpus:
    """Cuts the documents of one corpus into sequences, and can go on from any of them.

    Args:
        name: the corpus's, for messages.
        documents: its documents.
        encoder: turns them into ids.
        sequence_length: tokens per sequence.
        repeat: read the corpus again when it ends, in another order.
    """

    def __init__(
        self, name: str, documents: ShuffledDocuments, encoder: TextEncoder, *, sequence_length: int, repeat: bool
    ) -> None:
        self._name, self._documents, self._encoder = name, documents, encoder
        self._length, self._repeat = sequence_length, repeat
        self.sequences = 0
        """Sequences that were cut."""
        self.documents = 0
        """Documents whose beginning they contain; one that is read again counts again."""
        # Tokens that are not cut yet; the first one of each document is stored as its complement, a negative number.
        self._tokens: Ids = np.empty(0, dtype=np.int32)
        # What was left before the last documents were added, and where these come from: tokens are not kept in states.
        self._carry, self._carry_place = self._tokens, documents.start
        self._place = documents.start
        self._cut = 0

    @property
    def epoch(self) -> int:
        """How often the corpus was read to its end, a little ahead of what was cut."""
        return self._place.epoch

    def next_sequence(self) -> Ids:
        """Cut the next sequence.

        Returns:
            Token ids, (sequence_length,) int32.

        Raises:
            InvalidRequestError: the corpus is at its end and is not to be repeated, or it is empty.
            VerificationError: a file is damaged.
            AccessError: the network failed; the same call can be made again.
        """
        while len(self._tokens) - self._cut < self._length:
            self._add_documents()
        piece = self._tokens[self._cut : self._cut + self._length]
        self._cut += self._length
        self.sequences += 1
        self.documents += int(np.count_nonzero(piece < 0))
        return np.where(piece < 0, ~piece, piece)

    def _add_documents(self) -> None:
        carry, place = self._tokens[self._cut :], self._place
        texts, behind = self._documents.read(place)
        if not texts and not self._repeat:
            raise self._at_end(len(carry))
        self._carry, self._carry_place = carry.copy(), place
        self._tokens = np.concatenate([carry, self._encoded(texts)]) if texts else self._carry
        self._place, self._cut = behind, 0

    def _encoded(self, texts: list[str]) -> Ids:
        ids, starts = self._encoder.encode(texts)
        ids[starts] = ~ids[starts]
        return ids

    def _at_end(self, left: int) -> InvalidRequestError:
        tokens = self.sequences * self._length + left
        return InvalidRequestError(
            f"The corpus {self._name} is at its end: its {tokens:,} tokens make {self.sequences:,} sequences of "
            f"{self._length:,}, and one more was asked for. Give more text or a smaller weight, train for fewer steps, "
            "or let it be repeated (repeat)."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where the cutting stands, as JSON; it grows with the sequence length, not with the corpus."""
        return {
            "sequences": self.sequences,
            "documents": self.documents,
            "place": asdict(self._carry_place),
            "carry": self._carry.tolist(),
            "cut": self._cut,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; reads the window that it lies in, and what stands before it in its file.

        Raises:
            VerificationError: a file is damaged.
            AccessError: the network failed; nothing has changed.
        """
        place, carry = Place(**state["place"]), np.asarray(state["carry"], dtype=np.int32)
        texts, behind = self._documents.read(place) if state["cut"] else ([], place)
        tokens = np.concatenate([carry, self._encoded(texts)]) if texts else carry
        self._carry, self._carry_place, self._place = carry, place, behind
        self._tokens, self._cut = tokens, int(state["cut"])
        self.sequences, self.documents = int(state["sequences"]), int(state["documents"])
