"""What a report is about, as it was read: frozen records. Any text in them may be a stranger's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from loram_hub.architecture import Space
from loram_hub.cards.evaluations import Evaluation
from loram_hub.cards.pictures import Curve
from loram_hub.estimation import SparseCounts, TrainingShape
from loram_hub.plan import ParameterCounts
from loram_hub.release import Release
from loram_hub.studies.aggregation import Results
from loram_hub.studies.conditions import Conditions
from loram_hub.updates import UpdateNorms

Numbers = npt.NDArray[np.float64]
AdapterKind = Literal["recovered adapter", "pruned adapter", "plain LoRA adapter"]


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class ReleaseFacts:
    """A release, opened by its metadata."""

    name: str
    """Hub id, or the folder's name."""
    commit: str | None
    """On the Hub; None for a folder."""
    release: Release
    """Its weights need not be there."""
    counts: ParameterCounts | SparseCounts
    """Parameters and bytes."""
    licence: str | None
    """What its base's licence is called; None if it is not known here."""
    manifest_sha256: str
    """Of loram.json, which has the hash of every other file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCurves:
    """Losses over the steps of a training."""

    training: Curve
    """(step, nats per token) pairs of the training loss; may be empty."""
    held_out: Mapping[str, Curve]
    """The same on held-out data, by name. A loss that was not finite is NaN, here and in training."""


def finite_points(points: Curve) -> Curve:
    """Return the points of a curve whose losses are finite."""
    return tuple(point for point in points if math.isfinite(point[1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentFacts:
    """An alignment, from a release's manifest or from the log of a run."""

    name: str
    """Of the release or run."""
    curves: LossCurves
    """Held-out losses begin at step 0, before the first update: those of the unaligned model."""
    tokens: int | None
    """Tokens that were trained on; None if it is not said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """A fine-tuning run."""

    name: str
    """The folder's name."""
    release: str | None
    """What was trained on, Hub id or a folder's name."""
    commit: str | None
    """Its commit on the Hub; None for a folder."""
    plan_sha256: str | None
    """Digest of its plan; None if it is not said."""
    is_finished: bool
    """Whether it has written its record."""
    step: int | None
    """Step whose adapter was taken, or that was reached; None before the first checkpoint."""
    curves: LossCurves
    """Losses in training and of each evaluation set."""
    settings: tuple[tuple[str, str], ...]
    """What was asked for, to be shown."""
    versions: Mapping[str, str]
    """Of the packages involved."""
    shape: TrainingShape | None
    """For the estimate of its memory; None if the record does not give it."""
    peak_device_bytes: int | None
    """Most that torch held on the GPU; None without one."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class AdapterFacts:
    """An adapter."""

    name: str
    """Hub id, or the folder's name."""
    commit: str | None
    """On the Hub; None for a folder."""
    kind: AdapterKind
    """What it is."""
    base: str | None
    """The model that it names, which for a pruned adapter is the release."""
    release: str | None
    """The release that a recovered adapter was trained on, as its record has it."""
    plan_sha256: str | None
    """Digest of the plan of that release; None if it is not said."""
    rank: int
    """Largest rank of a module."""
    alpha: float
    """As its config has it."""
    modules: int
    """Adapted modules."""
    parameters: int
    """Numbers in all factors."""
    nbytes: int
    """Of the weight file."""
    files: Mapping[str, str]
    """SHA-256 of config and weights, by file name."""
    is_compared: bool
    """Whether it was named as the one that others are compared with."""
    norms: UpdateNorms | None
    """Of its update; None if they could not be computed."""
    why_no_norms: str | None = None
    """What stood in the way of them."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class ScoreBands:
    """Importance of the groups of one space, layer by layer."""

    groups: int
    """Groups in a layer."""
    kept: Numbers
    """(layers, 3): 5th, 50th and 95th percentile of the scores of kept groups; NaN where a layer was not scored."""
    pruned: Numbers
    """The same of pruned groups; NaN where none was pruned."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class ImportanceFacts:
    """Importance scores of a pruning."""

    name: str
    """The file's name."""
    method: str | None
    """How they were computed; None if it is not said."""
    has_plan: bool
    """Whether a release at hand says what was kept; if not, all groups are among `kept`."""
    bands: Mapping[Space, ScoreBands]
    """By space."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredPart:
    """A model or adapter, as an evaluation names it."""

    part: str
    """`base`, `release`, `adapter` or `recovered`."""
    id: str
    """Hub id or the name of a folder."""
    commit: str | None
    """On the Hub; None for a folder."""
    files: Mapping[str, str]
    """SHA-256 by file name."""
    here: str | None
    """Name of the release or adapter at hand that has these very files; None if none has."""
    is_other: bool
    """Whether there is a release or an adapter of this kind at hand, and none has these files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationFacts:
    """Measured losses, all on the same tokens."""

    name: str
    """The file's name."""
    evaluation: Evaluation
    """What was measured."""
    parts: tuple[MeasuredPart, ...]
    """Models and adapters that it says it measured; empty if it does not say."""
    settings: tuple[tuple[str, str], ...]
    """How it was measured, with which versions, to be shown."""
    misfit: str | None
    """Why it can be of none of the adapters at hand, by their sizes; None if it can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFacts:
    """A stage of a publish work folder that was completed."""

    name: str
    seconds: float
    """Time it took."""
    nbytes: int
    """Bytes of its output."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class StudyFacts:
    """A study."""

    name: str
    """The folder's name."""
    results: Results
    """Its rows."""
    shows: tuple[str, ...] | None
    """Parts of its page, none for all; None where only its rows are there."""
    conditions: Conditions | None
    """Machines, versions and command; None if the folder does not tell them."""
    has_command: bool
    """Whether the command is the one that was run, and none put together from the rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All that was found in the sources, in their order."""

    releases: tuple[ReleaseFacts, ...] = ()
    alignments: tuple[AlignmentFacts, ...] = ()
    importances: tuple[ImportanceFacts, ...] = ()
    runs: tuple[RunFacts, ...] = ()
    adapters: tuple[AdapterFacts, ...] = ()
    evaluations: tuple[EvaluationFacts, ...] = ()
    studies: tuple[StudyFacts, ...] = ()
    stages: tuple[StageFacts, ...] = field(default=())
