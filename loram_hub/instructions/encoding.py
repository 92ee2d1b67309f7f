"""Token ids of examples, as TRL's SFTTrainer makes them: the ground of every count, and of every refusal.

Strings: prompt and prompt + completion + end-of-sequence token, each tokenized as a whole; the completion starts where
the two differ. Conversations: the same with what the chat template renders, to which no special tokens are added.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from loram_hub.errors import IncompatibleError, InvalidRequestError
from loram_hub.instructions.examples import Drop, Example, Messages, Reason
from loram_hub.instructions.templates import RefusedConversation, check_template, common_prefix, render, render_answered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAST_TOKENS = 3
"""A template may write a line break behind the token that ends a turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """The token ids of an example."""

    example: Example
    """The example, without a begin-of-sequence token that its text spelled out."""
    ids: Sequence[int]
    """Token ids of prompt and completion."""
    learned_from: int
    """Position of the first token that counts in the loss."""
    is_split: bool
    """Whether the prompt alone ends in other tokens than in front of its completion."""
    had_bos: bool
    """Whether the text spelled out the begin-of-sequence token that the tokenizer adds itself."""
    has_control: bool
    """Whether a text within the example spells out a control token."""
    has_end: bool
    """Whether a token that stops a server stands at the end."""


class Encoder:
    """Encodes examples with a model's tokenizer.

    Args:
        tokenizer: the model's.
        vocab_size: rows of the model's embedding; None: not checked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None) -> None:
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._bos = tokenizer.bos_token_id if _opens_with_bos(tokenizer) else None
        specials = {text for text in tokenizer.all_special_tokens if text}
        self._controls = re.compile("|".join(map(re.escape, sorted(specials))) or r"(?!)")
        added = tokenizer.added_tokens_decoder
        self._ends = {*tokenizer.all_special_ids, *(idx for idx, token in added.items() if token.special)}

    def encode(self, examples: Sequence[Example]) -> Iterator[Encoded | Drop]:
        """Encode examples, in order; what the chat template does not take is a `Drop`.

        Raises:
            InvalidRequestError: the tokenizer lacks a chat template, or an end-of-sequence token, that is needed.
            IncompatibleError: an id is outside of the model's vocabulary, or the template doubles the
                begin-of-sequence token.
        """
        prepared = [self._prepare(example) for example in examples]
        texts = [one for one in prepared if isinstance(one, _Texts)]
        prompts = self._tokenize([one.prompt for one in texts], texts)
        wholes = self._tokenize([one.whole for one in texts], texts)
        encoded = iter([self._encoded(*parts) for parts in zip(texts, prompts, wholes, strict=True)])
        for one in prepared:
            yield one if isinstance(one, Drop) else next(encoded)

    def _prepare(self, example: Example) -> _Texts | Drop:
        if example.kind in ("chat", "whole-chat"):
            return self._prepare_chat(example)
        eos = self.tokenizer.eos_token
        if not eos:
            raise InvalidRequestError(
                f"The tokenizer {self.tokenizer.name_or_path!r} has no end-of-sequence token, which must end every "
                "example. Set its eos_token."
            )
        cleaned = self._without_bos(example)
        row = cast(dict[str, str], cleaned.row)
        prompt, learned = row.get("prompt", ""), row["text" if example.kind == "text" else "completion"]
        end = "" if learned.endswith(eos) else str(eos)
        return _Texts(
            example=cleaned,
            prompt=prompt,
            whole=prompt + learned + end,
            is_pair=example.kind == "prompt-completion",
            had_bos=cleaned is not example,
            has_control=self._controls.search(prompt + learned.removesuffix(str(eos))) is not None,
        )

    def _prepare_chat(self, example: Example) -> _Texts | Drop:
        check_template(self.tokenizer, example.place)
        row = cast(dict[str, Messages], example.row)
        try:
            if example.kind == "chat":
                prompt, whole = render_answered(self.tokenizer, row["prompt"], row["completion"])
            else:
                prompt, whole = "", render(self.tokenizer, row["messages"])
        except RefusedConversation as err:
            reason: Reason = "changed by the chat template" if err.is_changed else "refused by the chat template"
            return Drop(place=example.place, reason=reason, detail=str(err))
        contents = [message["content"] for messages in row.values() for message in messages]
        return _Texts(
            example=example,
            prompt=prompt,
            whole=whole,
            is_pair=example.kind == "chat",
            had_bos=False,
            has_control=any(self._controls.search(content) for content in contents),
        )

    def _without_bos(self, example: Example) -> Example:
        """Take a spelled-out begin-of-sequence token off the front where the tokenizer adds one: two would stand."""
        if self._bos is None:
            return example
        bos, row = str(self.tokenizer.bos_token), cast(dict[str, str], example.row)
        first = next(name for name in ("prompt", "text", "completion") if row.get(name))
        text = row[first]
        while text.lstrip().startswith(bos):
            text = text.lstrip().removeprefix(bos)
        return example if text == row[first] else replace(example, row={**row, first: text})

    def _tokenize(self, texts: Sequence[str], given: Sequence[_Texts]) -> list[list[int]]:
        """Tokenize texts, those of conversations without special tokens: the template has written them."""
        found: list[list[int]] = [[] for _ in texts]
        for is_chat in (False, True):
            chosen = [idx for idx, one in enumerate(given) if (one.example.kind in ("chat", "whole-chat")) == is_chat]
            if not chosen:
                continue
            ids = self.tokenizer(
                [texts[idx] for idx in chosen],
                add_special_tokens=not is_chat,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
            for idx, one in zip(chosen, ids, strict=True):
                found[idx] = one
        return found

    def _encoded(self, texts: _Texts, prompt: Sequence[int], ids: Sequence[int]) -> Encoded:
        self._check(texts.example.place, ids)
        start = common_prefix(prompt, ids) if texts.is_pair else 0
        return Encoded(
            example=texts.example,
            ids=ids,
            learned_from=start,
            is_split=texts.is_pair and start < len(prompt),
            had_bos=texts.had_bos,
            has_control=texts.has_control,
            has_end=not self._ends.isdisjoint(ids[-_LAST_TOKENS:]),
        )

    def _check(self, place: str, ids: Sequence[int]) -> None:
        highest = max(ids, default=0)
        name = self.tokenizer.name_or_path
        if self._vocab_size is not None and highest >= self._vocab_size:
            raise IncompatibleError(
                f"The tokenizer {name!r} gives the token id {highest:,} at {place}, and the model has "
                f"{self._vocab_size:,} embeddings. It is another model's tokenizer, or tokens were added to it: load "
                "the release's own."
            )
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            raise IncompatibleError(
                f"The begin-of-sequence token stands twice in front of {place}. The chat template of {name!r} writes "
                "it twice, or the first message spells it out: take it out of one of them."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Texts:
    """What is tokenized of an example."""

    example: Example
    prompt: str
    whole: str
    is_pair: bool
    had_bos: bool
    has_control: bool


def _opens_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id
