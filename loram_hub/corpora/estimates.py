"""Whether local corpora can be large enough at all, told from the sizes of their files before anything is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loram_hub.corpora.corpus import Corpus
from loram_hub.corpora.files import COMPRESSIONS, find_files
from loram_hub.errors import InvalidRequestError

_AROUND_A_TEXT = 4
"""Tokens that a document can have beyond its bytes: what opens and ends it."""


def check_enough(corpora: Sequence[Corpus], *, sequences: int, sequence_length: int, held_out: int = 0) -> None:
    """Raise where a corpus has fewer bytes than tokens are to be taken from it, for a token takes a byte at least.

    Only what is certain is said: parquet and compressed files, and datasets on the Hub, pass unseen.

    Args:
        corpora: as a stream would get them.
        sequences: what the training takes from all of them.
        sequence_length: tokens per sequence.
        held_out: sequences held out of each.

    Raises:
        InvalidRequestError: a corpus is too short, or there is nothing to read in it.
    """
    total = sum(corpus.weight for corpus in corpora)
    for corpus in corpora:
        most = _most_tokens(corpus) if corpus.is_local else None
        share = math.floor(sequences * corpus.weight / total)
        least = max(share - (len(corpora) - 1), 0) + held_out  # shares are exact to a sequence or so
        if most is not None and most < least * sequence_length:
            raise InvalidRequestError(
                f"The corpus {corpus.name} holds {most:,} tokens at the most; {share:,} sequences of "
                f"{sequence_length:,} are to be taken from it, and {held_out:,} held out. Give more text or a smaller "
                "weight, train for fewer steps, or let it be repeated (repeat)."
            )


def _most_tokens(corpus: Corpus) -> int | None:
    """Return an upper bound of a local corpus's tokens; None where file sizes give none."""
    files = find_files(corpus)
    if files.builder == "parquet" or any(path.suffix in COMPRESSIONS for path in files.paths):
        return None
    return sum(path.stat().st_size + _AROUND_A_TEXT for path in files.paths)
