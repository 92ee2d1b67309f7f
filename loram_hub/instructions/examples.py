"""Examples as TRL takes them: a row of `prompt` and `completion`, of `messages`, or of `text`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from loram_hub.instructions.layouts import Content, Pair, Turn
from loram_hub.instructions.sampling import content_key
from loram_hub.instructions.sources import Turns

Kind = Literal["prompt-completion", "chat", "whole-chat", "text"]
"""Columns of an example; `chat` has lists of messages as prompt and completion, `whole-chat` one list of messages."""
Messages = list[dict[str, str]]
Reason = Literal[
    "empty completion",
    "no answer to a question",
    "refused by the chat template",
    "changed by the chat template",
    "longer than max_length",
    "prompt fills max_length",
    "nothing to learn",
    "malformed",
]
"""Why something is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One thing to learn."""

    place: str
    """Where its record stands."""
    kind: Kind
    """Which columns the row has."""
    row: Mapping[str, str | Messages]
    """What TRL is given."""
    key: int
    """`content_key` of the question: the same in every example of a record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """Something that is left out."""

    place: str
    """Where it stands."""
    reason: Reason
    """Why."""
    detail: str = ""
    """More about it, where there is more."""


def examples_of(place: str, content: Content, *, chat: bool, turns: Turns) -> list[Example | Drop]:
    """Make the examples of a record's content.

    Args:
        place: where the record stands.
        content: from `layouts.content_of`.
        chat: leave the turns of a conversation for the chat template; otherwise they are written out in plain words.
        turns: which answers are learned.

    Returns:
        The examples, and what is left out, in order; one of either at least.
    """
    if isinstance(content, str):
        return [_example(place, "text", {"text": content}, content, learned=content)]
    if isinstance(content, Pair):
        row = {"prompt": content.prompt, "completion": content.completion}
        key = content.prompt if content.prompt.strip() else content.completion
        return [_example(place, "prompt-completion", row, key, learned=content.completion)]
    answers = [number for number in range(1, len(content)) if _is_answer(content, number)]
    if not answers:
        return [Drop(place=place, reason="no answer to a question")]
    question = next(turn.text for turn in content if turn.role == "user" or turn.role == "tool")
    if turns == "whole":
        return [_whole(place, content[: answers[-1] + 1], question, chat)]
    chosen = answers if turns == "every" else answers[-1:]
    return [_answered(place, content[:number], content[number], question, chat) for number in chosen]


def _is_answer(turns: Sequence[Turn], number: int) -> bool:
    turn = turns[number]
    return turn.role == "assistant" and turn.learned and turns[number - 1].role in ("user", "tool")


def _answered(place: str, before: Sequence[Turn], answer: Turn, question: str, chat: bool) -> Example | Drop:
    if chat:
        messages: dict[str, str | Messages] = {"prompt": _messages(before), "completion": _messages([answer])}
        return _example(place, "chat", messages, question, learned=answer.text)
    row = {"prompt": _plain(before) + _ANSWER, "completion": answer.text}
    return _example(place, "prompt-completion", row, question, learned=answer.text)


def _whole(place: str, turns: Sequence[Turn], question: str, chat: bool) -> Example | Drop:
    row: dict[str, str | Messages] = {"messages": _messages(turns)} if chat else {"text": _plain(turns).rstrip("\n")}
    return _example(place, "whole-chat" if chat else "text", row, question, learned=turns[-1].text)


def _example(
    place: str, kind: Kind, row: Mapping[str, str | Messages], question: str, *, learned: str
) -> Example | Drop:
    if not learned.strip():
        return Drop(place=place, reason="empty completion")
    return Example(place=place, kind=kind, row=row, key=content_key(question))


def _messages(turns: Sequence[Turn]) -> Messages:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


_ANSWER = "### Response:\n"
_HEADINGS = {"system": "", "user": "### Instruction:\n", "assistant": _ANSWER, "tool": "### Input:\n"}


def _plain(turns: Sequence[Turn]) -> str:
    """Write turns out under headings of plain words: no token that a base model was not trained on."""
    return "".join(f"{_HEADINGS[turn.role]}{turn.text}\n\n" for turn in turns)
