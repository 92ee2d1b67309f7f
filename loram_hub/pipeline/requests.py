"""What `loram align` and `loram teach` are asked for in a file: settings of the step and its corpora, YAML or JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loram_hub.alignment.settings import AlignmentSettings
from loram_hub.corpora import DEFAULT_CORPORA, Corpus
from loram_hub.recipes import FLAT, PATH, read_section
from loram_hub.teaching.settings import TeachingSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignRequest:
    """What an alignment is asked for."""

    settings: AlignmentSettings = field(default_factory=AlignmentSettings, metadata={FLAT: ()})
    """How the weights are trained."""
    corpora: tuple[Corpus, ...] = field(default=DEFAULT_CORPORA, metadata={PATH: "source"})
    """Texts to train on."""
    report_to: tuple[str, ...] = ()
    """Trackers that get the curves as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachRequest:
    """What a teacher is asked for."""

    settings: TeachingSettings = field(default_factory=TeachingSettings, metadata={FLAT: ()})
    """Which targets, and how they are computed."""
    corpora: tuple[Corpus, ...] = field(default=DEFAULT_CORPORA, metadata={PATH: "source"})
    """Texts that the alignment will train on."""


def align_request(settings: Path | None, given: Mapping[str, Any]) -> AlignRequest:
    """Read what an alignment is asked for.

    Args:
        settings: file with keys like those of a recipe's `align`, and `seed`; None for none.
        given: what outweighs the file.

    Raises:
        InvalidRequestError: see `read_recipe`.
    """
    return read_section(AlignRequest, settings, given)


def teach_request(settings: Path | None, given: Mapping[str, Any]) -> TeachRequest:
    """Read what a teacher is asked for; see `align_request`."""
    return read_section(TeachRequest, settings, given)
