"""Layouts of records: from the columns of a dataset to a conversation, a pair of texts, or a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal, NoReturn

from loram_hub.errors import InvalidRequestError
from loram_hub.instructions.sources import DataSource, Format

Role = Literal["system", "user", "assistant", "tool"]
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A message of a conversation."""

    role: Role
    """Who speaks."""
    text: str
    """What is said."""
    learned: bool = True
    """Whether an answer may be learned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A prompt and its completion, word for word."""

    prompt: str
    """What the model is given."""
    completion: str
    """What it should write."""


Content = tuple[Turn, ...] | Pair | str
"""A conversation, a pair, or a text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A record with its place, read strictly: an error names both."""

    place: str
    """Where it stands."""
    format: Format
    """What it is read as."""
    values: Mapping[str, object]
    """The record."""

    def text(self, column: str, *, optional: bool = False) -> str:
        """Return the text of a column; empty if `optional` and it is missing or null."""
        value = self.values.get(column)
        if value is None and optional:
            return ""
        if column not in self.values:
            self.refuse_missing(column)
        if isinstance(value, str):
            return self.checked(value, f"the column {column!r}")
        self.refuse(f"holds {_shown(value)} in the column {column!r}, where a text is needed.")

    def checked(self, text: str, name: str) -> str:
        """Return a text that tokenizers can take: JSON may escape half of a surrogate pair, which is no character."""
        try:
            text.encode()
        except UnicodeEncodeError as err:
            self.refuse(
                f"holds the lone surrogate {text[err.start]!r} in {name} at character {err.start + 1:,}, which is no "
                "character: a text was cut within one, as between two UTF-16 units of an emoji. Mend it, or leave such "
                "records out (bad_records: drop)."
            )
        return text

    def refuse(self, problem: str) -> NoReturn:
        """Raise `InvalidRequestError` with the place in front."""
        raise InvalidRequestError(f"{self.place} {problem}")

    def refuse_missing(self, column: str) -> NoReturn:
        """Raise `InvalidRequestError` because the record has no such column."""
        columns = [str(name) for name in self.values]
        near = get_close_matches(column, columns, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        self.refuse(
            f"has no column {column!r}, and is read as {self.format}; its columns are: {', '.join(columns)}. {hint}"
            "Records of several formats belong into sources of their own."
        )


Reader = Callable[[Row, DataSource, bool], Content]
"""Takes the content out of a record; the last argument: make a conversation of what is not one."""


def recognised(place: str, record: Mapping[str, object], source: DataSource) -> Format:
    """Tell the format of a source by its first record.

    Raises:
        InvalidRequestError: its columns are those of no known format.
    """
    columns = set(record)
    if source.messages_column in columns:
        return "messages"
    if {source.prompt_column, source.completion_column} <= columns:
        return "prompt-completion"
    if "conversations" in columns:
        return "openhermes-2.5"
    if {"question", "response"} <= columns:
        return "openorca"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    if {"question", "answer"} <= columns and "####" in str(record["answer"]):
        return "gsm8k"
    if source.text_column in columns:
        return "text"
    raise InvalidRequestError(
        f"{place} has the columns {', '.join(map(str, record)) or '(none)'}, which are those of no known format. Name "
        "the columns (prompt_column and completion_column, messages_column, or text_column), or the format."
    )


def content_of(place: str, record: Mapping[str, object], source: DataSource, *, form: Format) -> Content:
    """Take the content out of a record.

    Args:
        place: where the record stands.
        record: its columns.
        source: names the columns and the style.
        form: the layout, not `auto`.

    Returns:
        A conversation of at least one turn, a pair, or a text.

    Raises:
        InvalidRequestError: a column is missing or holds something else than text or messages.
    """
    row = Row(place=place, format=form, values=record)
    content = _READERS[form](row, source, source.style == "chat")
    return _merged(content) if source.system == "merge" and isinstance(content, tuple) else content


def _merged(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Put a leading system message in front of the first question."""
    if len(turns) < 2 or turns[0].role != "system" or turns[1].role != "user":
        return turns
    return (Turn(role="user", text=f"{turns[0].text}\n\n{turns[1].text}"), *turns[2:])


def _pair(row: Row, source: DataSource, chat: bool) -> Content:
    names = (source.prompt_column, source.completion_column)
    prompt, completion = (row.values.get(name) for name in names)
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = (replace(turn, learned=False) for turn in _turns(row, names[0], prompt))
        return (*asked, *_turns(row, names[1], completion))
    question, answer = row.text(names[0]), _answer(row, names[1])
    return _exchange(question, answer) if chat else Pair(prompt=question, completion=answer)


def _messages(row: Row, source: DataSource, chat: bool) -> Content:
    return _turns(row, source.messages_column, row.values.get(source.messages_column))


def _text(row: Row, source: DataSource, chat: bool) -> Content:
    return _answer(row, source.text_column)


def _openhermes(row: Row, source: DataSource, chat: bool) -> Content:
    return _turns(row, "conversations", row.values.get("conversations"))


def _openorca(row: Row, source: DataSource, chat: bool) -> Content:
    system = row.text("system_prompt", optional=True)
    opening = (Turn(role="system", text=system),) if system.strip() else ()
    return (*opening, *_exchange(row.text("question"), _answer(row, "response")))


def _alpaca(row: Row, source: DataSource, chat: bool) -> Content:
    instruction, given = row.text("instruction"), row.text("input", optional=True)
    answer = _answer(row, "output")
    if chat:
        return _exchange(f"{instruction}\n\n{given}" if given.strip() else instruction, answer)
    template = _ALPACA_WITH_INPUT if given.strip() else _ALPACA
    return Pair(prompt=template.format(instruction=instruction, input=given), completion=answer)


def _gsm8k(row: Row, source: DataSource, chat: bool) -> Content:
    question, answer = row.text("question"), _answer(row, "answer")
    if chat:
        return _exchange(question, answer)
    return Pair(prompt=f"Question: {question}\nAnswer:", completion=f" {answer}" if answer.strip() else "")


_READERS: Mapping[Format, Reader] = {
    "prompt-completion": _pair,
    "messages": _messages,
    "text": _text,
    "openhermes-2.5": _openhermes,
    "openorca": _openorca,
    "alpaca": _alpaca,
    "gsm8k": _gsm8k,
}
# The prompts with which the Alpaca model was trained; the answer starts on the line after.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
    "\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


# --- parts of records


def _answer(row: Row, column: str) -> str:
    """Return a text that may be null: that is an empty answer, which is counted and left out."""
    is_null = column in row.values and row.values[column] is None
    return "" if is_null else row.text(column)


def _exchange(question: str, answer: str) -> tuple[Turn, ...]:
    return (Turn(role="user", text=question), Turn(role="assistant", text=answer))


def _turns(row: Row, column: str, messages: object) -> tuple[Turn, ...]:
    """Read a list of messages, as `role` and `content` or as `from` and `value`."""
    if column not in row.values:
        row.refuse_missing(column)
    if not isinstance(messages, list) or not messages:
        row.refuse(f"holds {_shown(messages)} in the column {column!r}, where a list of messages is needed.")
    return tuple(_turn(row, f"{column}[{number}]", message) for number, message in enumerate(messages))


def _turn(row: Row, name: str, message: object) -> Turn:
    if not isinstance(message, Mapping):
        row.refuse(f"holds {_shown(message)} in {name}, where a message with role and content is needed.")
    keys = ("role", "content") if message.get("role") is not None else ("from", "value")
    role, text = (message.get(key) for key in keys)
    if not isinstance(role, str) or role not in _ROLES:
        row.refuse(f"has a message {name} with the role {role!r:.80}; known ones are: {', '.join(_ROLES)}.")
    if message.get("tool_calls"):
        row.refuse(f"has a message {name} with tool_calls, which are not read. Write them out as text.")
    if text is None and _ROLES[role] == "assistant":
        text = ""
    if isinstance(text, list):
        row.refuse(
            f"holds a list of {len(text)} parts as the content of {name}, where a text is needed. Join the texts of "
            "the parts into one; images and other media cannot be learned from."
        )
    if not isinstance(text, str):
        row.refuse(f"holds {_shown(text)} as the text of {name}, where a text is needed.")
    return Turn(role=_ROLES[role], text=row.checked(text, name), learned=message.get("weight") != 0)


def _shown(value: object) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "nan, which other tools write for an empty cell,"
    return f"{value!r:.60} ({'null' if value is None else type(value).__name__})"
