"""Examples as token ids, with the tokens that count marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loram_hub.errors import InvalidRequestError
from loram_hub.texts import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example as token ids, ready for any of the models."""

    ids: tuple[int, ...]
    """Prompt, completion and (for a task) the end-of-sequence token."""
    scored_from: int
    """Position of the first scored token, at least 1: nothing predicts the first token of a sequence."""

    @property
    def scored_tokens(self) -> int:
        """Tokens that count in the loss."""
        return len(self.ids) - self.scored_from


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int = 1024,
    cut: Literal["start of prompt", "end"] = "start of prompt",
) -> tuple[list[EncodedExample], int]:
    """Turn examples into token ids with the tokens that count marked.

    Prompt and completion are tokenized together, as TRL does in training; what the prompt alone already determines is
    not scored. A task ends with the end-of-sequence token, which is scored: when to stop is part of the task. A plain
    text does not.

    Args:
        examples: tasks and texts.
        tokenizer: of the models to be compared.
        max_tokens: longest sequence, at least 2.
        cut: what a task that is longer loses. One that loses its `end` may have no token left to score, and is then
            left out; a plain text is split instead.

    Returns:
        The sequences, and how many examples were longer than `max_tokens`.

    Raises:
        InvalidRequestError: nothing is left to score, or `max_tokens` is below 2.
    """
    opening = len(tokenizer("")["input_ids"])
    if max_tokens < opening + 2:
        raise InvalidRequestError(f"max_tokens is {max_tokens}; at least {opening + 2} are needed to score one token.")
    encoded: list[EncodedExample] = []
    cut_examples = 0
    for example in examples:
        if example.prompt:
            sequences, is_cut = _encode_task(example, tokenizer, opening, max_tokens, keep_start=cut == "end")
        else:
            sequences, is_cut = _encode_text(example, tokenizer, opening, max_tokens)
        encoded += [sequence for sequence in sequences if sequence.scored_tokens > 0]
        cut_examples += is_cut
    if not encoded:
        raise InvalidRequestError(f"None of the {len(examples):,} examples has a token to score.")
    return encoded, cut_examples


def _encode_task(
    example: Example, tokenizer: PreTrainedTokenizerBase, opening: int, max_tokens: int, *, keep_start: bool
) -> tuple[list[EncodedExample], bool]:
    prompt = tokenizer(example.prompt)["input_ids"]
    ids = tokenizer(example.prompt + example.completion)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    scored_from = _common_prefix(prompt, ids)
    excess = max(0, len(ids) - max_tokens)
    dropped = 0 if keep_start else min(excess, scored_from - opening)
    ids = (ids[:opening] + ids[opening + dropped :])[:max_tokens]
    return [EncodedExample(tuple(ids), max(1, scored_from - dropped))], excess > 0


def _encode_text(
    example: Example, tokenizer: PreTrainedTokenizerBase, opening: int, max_tokens: int
) -> tuple[list[EncodedExample], bool]:
    ids = tokenizer(example.completion)["input_ids"]
    width = max_tokens - opening
    windows = [ids[:opening] + ids[start : start + width] for start in range(opening, len(ids), width)]
    return [EncodedExample(tuple(window), max(1, opening)) for window in windows], len(windows) > 1


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((idx for idx, (a, b) in pairs if a != b), min(len(left), len(right)))
