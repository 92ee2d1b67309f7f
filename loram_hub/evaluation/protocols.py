"""Ways to measure a loss that others have fixed, so that numbers can be compared with theirs.

`paper` is that of LoRAM (arXiv 2502.13533): records in the layout of their dataset (Alpaca, OpenHermes, OpenOrca,
GSM8K, ...) written out in plain words, 2,000 of them, cut at 512 tokens; only answers are scored. Two things differ
from the authors' script: the mean is over tokens, where theirs is over the means of batches of 8, and the sample of a
larger set is drawn by our seed, since theirs is not published.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loram_hub.errors import InvalidRequestError
from loram_hub.instructions import DataSource
from loram_hub.instructions.examples import Drop, examples_of
from loram_hub.instructions.layouts import content_of, recognised
from loram_hub.instructions.opening import open_source
from loram_hub.texts import Example, Specification


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How records become scored tokens."""

    name: str
    """What it is called on cards and in results."""
    max_tokens: int
    """Longest sequence, tokens; what is longer loses its end."""
    records: int
    """Records that are measured; all of a set that has fewer."""
    seed: int
    """Of the sample of a set that has more."""


PROTOCOLS: Mapping[str, Protocol] = {"paper": Protocol(name="paper", max_tokens=512, records=2000, seed=0)}
"""By the names that `evaluate` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtocolData:
    """Examples that a protocol chose, and what they were chosen from."""

    examples: list[Example]
    """In the order of the source."""
    origin: dict[str, Any]
    """Protocol, layout, and commit or hash of the data: JSON values."""


def protocol_named(name: str) -> Protocol:
    """Return a protocol; raises `InvalidRequestError` if there is none of this name."""
    if name not in PROTOCOLS:
        raise InvalidRequestError(f"protocol is {name!r:.80}; there is: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def read_by_protocol(data: Specification, protocol: Protocol) -> ProtocolData:
    """Read examples as a protocol wants them.

    Args:
        data: a file, a folder, or a dataset on the Hub (`org/name`, also with `@revision`), in any layout of
            `loram_hub.instructions`.
        protocol: from `protocol_named`.

    Returns:
        The examples that have an answer.

    Raises:
        InvalidRequestError: it is a list, there is no such data, its layout is unknown, or no record has an answer.
        AccessError: the dataset cannot be had from the Hub.
        VerificationError: a file is damaged.
    """
    if not isinstance(data, str | os.PathLike):
        raise InvalidRequestError(f"The protocol {protocol.name!r} reads a file, a folder or a Hub dataset, no list.")
    source = DataSource(source=os.fspath(data), limit=protocol.records, style="plain")
    opened = open_source(source)
    examples: list[Example] = []
    form = None
    for place, record in opened.records(seed=protocol.seed):
        form = recognised(place, record, source) if form is None else form
        content = content_of(place, record, source, form=form)
        made = examples_of(place, content, chat=False, turns="last")
        examples += [_example(one.row) for one in made if not isinstance(one, Drop)]
    if not examples:
        raise InvalidRequestError(f"{source.source} has no record with an answer to score.")
    values = {"name": protocol.name, "max_tokens": protocol.max_tokens, "records": protocol.records}
    origin = {"seed": protocol.seed, "layout": form, "commit": opened.commit, "sha256": opened.sha256}
    return ProtocolData(examples=examples, origin=values | origin)


def _example(row: Mapping[str, Any]) -> Example:
    if "text" in row:
        return Example(prompt="", completion=str(row["text"]))
    return Example(prompt=str(row["prompt"]), completion=str(row["completion"]))
