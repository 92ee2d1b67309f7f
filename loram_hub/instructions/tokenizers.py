"""Whether a tokenizer is the one that a release was made with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from loram_hub.errors import CheckpointError, IncompatibleError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "The quick brown fox, 1,234.5 = x^2 + \\frac{a}{b}.\n\n    def f(x): return [x]\tÜber Ångström 数学 λόγος"
"""Its ids tell apart tokenizers with the same vocabulary and different rules."""


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what decides over token ids, the same for every copy of a tokenizer, however it was saved.

    The file `tokenizer.json` would not do: every version of its library writes it a little differently.

    Args:
        tokenizer: any; its chat template does not count.

    Returns:
        64 hexadecimal digits.
    """
    described = [
        sorted(tokenizer.get_vocab().items()),
        list(tokenizer(_PROBE, verbose=False)["input_ids"]),
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, release: Path, *, allow_other: bool = False) -> None:
    """Raise unless a tokenizer gives the ids that the tokenizer of a release gives.

    Args:
        tokenizer: the one to be used.
        release: folder of the release, or of any model.
        allow_other: take another one all the same, to train on purpose with changed rules; ids that the model does not
            have are refused by `read_instructions` in any case.

    Raises:
        IncompatibleError: it is another tokenizer.
        CheckpointError: the release has no tokenizer that can be opened.
    """
    if allow_other:
        return
    from transformers import AutoTokenizer

    try:
        own: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(release)
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{release} has no tokenizer that transformers can open: {err}") from err
    if tokenizer_digest(tokenizer) != tokenizer_digest(own):
        raise IncompatibleError(
            f"The tokenizer {tokenizer.name_or_path!r} is not that of {release}: {_difference(tokenizer, own)}. An "
            "adapter trained with it would fail on the base. Use the release's own, or allow another one on purpose."
        )


def _difference(given: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> str:
    vocabulary, expected = given.get_vocab(), own.get_vocab()
    if added := sorted(vocabulary.keys() - expected.keys()):
        return f"it has {len(added):,} tokens more, {added[0]!r} for one"
    if missing := sorted(expected.keys() - vocabulary.keys()):
        return f"it lacks {len(missing):,} tokens, {missing[0]!r} for one"
    if moved := [token for token, idx in vocabulary.items() if expected[token] != idx]:
        return f"{len(moved):,} tokens have other ids, {moved[0]!r} for one"
    return "the same texts, or their beginnings and ends, become other tokens"
