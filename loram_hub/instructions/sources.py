"""What is trained on: where records lie, how they are laid out, and what of them is learned."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loram_hub.errors import InvalidRequestError

Format = Literal["auto", "prompt-completion", "messages", "text", "openhermes-2.5", "openorca", "alpaca", "gsm8k"]
"""How records are laid out; the last four are those of the datasets of these names."""
Style = Literal["auto", "chat", "plain"]
"""Whether the tokenizer's chat template is put around a conversation, or plain words."""
Turns = Literal["every", "last", "whole"]
"""Which answers of a conversation are learned."""

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""Kinds of files that are read; others in a folder are passed over."""
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[^@\s]+)?")
_NAME = re.compile(r"\w[\w .-]{0,63}")
_COLUMNS = ("prompt_column", "completion_column", "messages_column", "text_column")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """Records to fine-tune or to evaluate on.

    Raises:
        InvalidRequestError: a value is outside its domain, or two contradict each other.
    """

    source: str
    """Id of a dataset on the Hub (`org/name`, also with `@revision`), a file, or a folder of files of one kind. Kinds:
    `.jsonl`, `.json` (a list), `.csv`, `.parquet`."""
    subset: str | None = None
    """Configuration of a Hub dataset (`main` of `openai/gsm8k`); null: the only or the default one."""
    split: str = "train"
    """Split of a Hub dataset, also a part of one (`test[:500]`); files have none."""
    format: Format = "auto"
    """Layout of the records; `auto` tells it by the columns of the first one."""
    style: Style = "auto"
    """`chat`: the chat template of the tokenizer, as a chat server uses it. `plain`: words as headings, for base models
    that have no template. `auto`: chat for messages, OpenHermes-2.5 and OpenOrca; plain for the others."""
    turns: Turns = "every"
    """Answers of a conversation that are learned: `every` one, each as an example of its own behind all that stands
    before it; the `last` one; or the `whole` conversation, questions included, as one example."""
    system: Literal["keep", "merge"] = "keep"
    """What becomes of system messages; `merge` puts them in front of the first question, for templates that refuse
    them."""
    limit: int | None = None
    """Records to take, at least 1: a sample by the seed, in the order of the source; null: all."""
    name: str | None = None
    """What reports and curves call it: up to 64 letters, digits, spaces and `_.-`; null: made of the source."""
    prompt_column: str = "prompt"
    """Column of the format prompt-completion: a text, or a list of messages."""
    completion_column: str = "completion"
    """Column of the format prompt-completion: the answer."""
    messages_column: str = "messages"
    """Column of the format messages: a list of `role` and `content`, or `from` and `value`."""
    text_column: str = "text"
    """Column of the format text."""

    def __post_init__(self) -> None:
        for field in ("source", "split", *_COLUMNS):
            if not getattr(self, field).strip():
                raise InvalidRequestError(f"A data source ({self.source!r}) has an empty {field}.")
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise InvalidRequestError(
                f"The data source {self.source!r} has the name {self.name!r:.80}; a name has 1 to 64 letters, digits, "
                "spaces and _.- and starts with a letter, digit or _."
            )
        if self.limit is not None and self.limit < 1:
            raise InvalidRequestError(f"{self.label} has limit {self.limit}; 1 record is the least. Leave it out: all.")
        if self.format == "text" and self.style == "chat":
            raise InvalidRequestError(
                f"{self.label} has format text and style chat; a text has no turns that a chat template could mark."
            )

    def check_place(self) -> None:
        """Check what the source names; a recipe makes its paths absolute only after it has built its sections.

        Raises:
            InvalidRequestError: it is neither a file or folder nor a possible Hub id, or it is a file and asks for a
                subset or split.
        """
        if self.is_local:
            if self.subset is not None or self.split != "train":
                raise InvalidRequestError(
                    f"{self.source} is a local file or folder: subset and split are for datasets on the Hub. Name the "
                    "file of the split."
                )
        elif not _HUB_ID.fullmatch(self.source) or self.path.suffix in SUFFIXES:
            raise InvalidRequestError(
                f"{self.source!r} is no existing file or folder, and no Hub dataset id (org/name) either."
            )

    @property
    def path(self) -> Path:
        """The source as a path."""
        return Path(self.source).expanduser()

    @property
    def is_local(self) -> bool:
        """Whether the source is an existing file or folder."""
        return self.path.exists()

    @property
    def repository(self) -> str:
        """Id of the Hub dataset, without its revision."""
        return self.source.partition("@")[0]

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of the Hub dataset; None where the source does not name one."""
        return None if self.is_local else self.source.partition("@")[2] or None

    @property
    def label(self) -> str:
        """Its name in messages: the given one, or the source's last part with subset and split."""
        if self.name is not None:
            return self.name
        if self.is_local:
            return self.path.stem or self.source
        parts = [self.repository.rpartition("/")[2], self.subset or "", "" if self.split == "train" else self.split]
        return "-".join(part for part in parts if part)
