"""What a corpus is called: a dataset on the Hub, or files here, and its share of the training sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from loram_hub.errors import InvalidRequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Where texts come from, and how much of the training they make up.

    Raises:
        InvalidRequestError: the weight is not a positive finite number, or a name is empty.
    """

    source: str
    """Id of a dataset on the Hub (`org/name`), a file, or a folder of files of one kind. Kinds: `.parquet`, `.jsonl`,
    `.json` and `.txt` (a `.txt` file is one text), all but parquet also as `.gz` or `.zst`. One row group of a parquet
    file is in memory at a time, and all of a `.json` list or a `.txt` file."""
    weight: float = 1.0
    """Share of the sequences, relative to the other corpora's weights; positive."""
    config: str | None = None
    """Configuration of a Hub dataset; None: the only or the default one."""
    split: str = "train"
    """Split of a Hub dataset; files have none."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset; a stream pins it to a commit when it is opened."""
    column: str = "text"
    """Column that holds the texts."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight <= 0:
            raise InvalidRequestError(
                f"The corpus {self.source!r} has the weight {self.weight}. Weights are positive numbers; leave a "
                "corpus out to give it none."
            )
        for name in ("source", "split", "column"):
            if not getattr(self, name).strip():
                raise InvalidRequestError(f"A corpus ({self.source!r}) has an empty {name}.")

    @property
    def is_local(self) -> bool:
        """Whether the source is an existing file or folder."""
        return self.path.exists()

    @property
    def path(self) -> Path:
        """The source as a path."""
        return Path(self.source).expanduser()

    @property
    def name(self) -> str:
        """The source with its configuration, for messages."""
        return self.source if self.config is None else f"{self.source}:{self.config}"


DEFAULT_CORPORA = (
    Corpus(source="HuggingFaceFW/fineweb", weight=0.5, config="sample-10BT"),
    Corpus(source="open-web-math/open-web-math", weight=0.5),
)
"""The paper's mix. `sample-10BT` is FineWeb's random sample of 10 B tokens, a hundred times what alignment needs."""


def parse_corpus(text: str) -> Corpus:
    """Read a corpus as it is written on a command line: `SOURCE[:CONFIG][=WEIGHT]`.

    Args:
        text: for example `HuggingFaceFW/fineweb:sample-10BT=0.5`, or `texts.jsonl`. An existing path is taken as it is,
            whatever signs it contains.

    Returns:
        The corpus.

    Raises:
        InvalidRequestError: the weight is no positive number, or there is no source.
    """
    if Path(text).expanduser().exists():
        return Corpus(source=text)
    source, sign, tail = text.rpartition("=")
    weight = 1.0
    if sign:
        try:
            weight = float(tail)
        except ValueError as err:
            raise InvalidRequestError(
                f"The corpus {text!r} ends in ={tail}, which is no number. Write SOURCE[:CONFIG][=WEIGHT], "
                "for example org/name:config=0.5."
            ) from err
    else:
        source = text
    if Path(source).expanduser().exists():
        return Corpus(source=source, weight=weight)
    source, _, config = source.partition(":")
    return Corpus(source=source, weight=weight, config=config or None)
