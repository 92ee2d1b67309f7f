"""From texts to token ids, as a model in training reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from loram_hub.errors import IncompatibleError, InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = npt.NDArray[np.int32]

_PROBE = "The quick brown fox, 1,234.5 = x^2 + \\frac{a}{b}.\n\n    def f(x): return [x]\tÜber Ångström 数学 λόγος"
"""Its ids tell apart tokenizers with the same vocabulary and different rules."""


class TextEncoder:
    """Turns documents into token ids: what the tokenizer opens its inputs with, the text, the end-of-sequence token.

    A control token that a text spells out, as web pages do with `</s>`, is text: it gives the ids of its characters and
    ends nothing.

    Args:
        tokenizer: the base model's.
        vocab_size: rows of the model's embedding; None: not checked.

    Raises:
        InvalidRequestError: the tokenizer has no end-of-sequence token.
        IncompatibleError: it gives ids that the model does not have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None) -> None:
        eos = tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise InvalidRequestError(
                f"The tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, which must stand between "
                "documents. Set its eos_token."
            )
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos
        self._options = _options_of(tokenizer)
        self._opening = _opening_of(tokenizer)
        self._check(np.asarray([*self._opening, eos], dtype=np.int64))

    def encode(self, texts: Sequence[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Encode documents.

        Args:
            texts: the documents.

        Returns:
            Ids of all documents, one after another, (tokens,) int32; and where each one starts, (documents,).

        Raises:
            IncompatibleError: an id is outside of the model's vocabulary.
        """
        pieces = [np.asarray([*self._opening, *ids, self._eos], dtype=np.int64) for ids in self._plain(texts)]
        ids = np.concatenate(pieces)
        self._check(ids)
        starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])], dtype=np.int64)
        return ids.astype(np.int32), starts

    @cached_property
    def digest(self) -> str:
        """A hash of what decides over ids, the same for every copy of a tokenizer and every version of its library."""
        (probe,) = self._plain([f"{_PROBE} {self._tokenizer.eos_token}"])
        described = [sorted(self._tokenizer.get_vocab().items()), list(probe), list(self._opening), self._eos]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts and nothing around them."""
        encoded: list[list[int]] = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a document may well be longer than the model's context
            **self._options,
        )["input_ids"]
        return encoded

    def _check(self, ids: npt.NDArray[np.int64]) -> None:
        highest = int(ids.max())
        if self._vocab_size is not None and highest >= self._vocab_size:
            raise IncompatibleError(
                f"The tokenizer {self._tokenizer.name_or_path!r} gives the token id {highest:,}, and the model has "
                f"{self._vocab_size:,} embeddings. It is another model's tokenizer: load the base model's."
            )


def _options_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Return the option that keeps control tokens from being read out of texts.

    Tokenizers that do without it, as mistral-common's, refuse it: they take every text for text.
    """
    try:
        tokenizer("a", split_special_tokens=True)
    except (TypeError, ValueError):
        return {}
    return {"split_special_tokens": True}


def _opening_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before a text; some also put ids behind it, which are not these."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()
