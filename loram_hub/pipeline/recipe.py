"""A recipe: everything that decides what a release will be, in one frozen record; the YAML of `publish/` has its keys.

What two stages share is said once: the seed and the device stand at the top, and what defines the training stream
(sequence length, batch, steps, held-out sequences, shuffling) stands under `align`, from where `teach` takes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from loram_hub.alignment.settings import AlignmentSettings
from loram_hub.corpora import DEFAULT_CORPORA, Corpus
from loram_hub.errors import InvalidRequestError
from loram_hub.estimation import Hardware
from loram_hub.hub import Gate
from loram_hub.importance import parse_importance
from loram_hub.plan import PruningSettings
from loram_hub.recipes import FLAT, PATH
from loram_hub.refitting.settings import RefitSettings
from loram_hub.teaching.settings import TeachingSettings

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneStage:
    """What is removed from the base model."""

    structure: PruningSettings = field(metadata={FLAT: ()})
    """Ratio and whole layers."""
    importance: str = "taylor"
    """How channel groups are scored: `random`, `magnitude[:l1|:l2]` or `taylor[:param_first|:vectorize|...]`."""
    calibration: str | None = field(default=None, metadata={PATH: ""})
    """Texts for `taylor` and for the refit: a file, a folder or a dataset id (`org/name` or `org/name:config`)."""

    def __post_init__(self) -> None:
        """Check that there is such an importance; raises `InvalidRequestError`."""
        parse_importance(self.importance)


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitStage:
    """Closed-form refit of o_proj and down_proj right after pruning; its calibration is that of `prune`."""

    settings: RefitSettings = field(default_factory=RefitSettings, metadata={FLAT: ("seed",)})
    """What is solved for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachStage:
    """Targets of the base model for `align.distillation`, on the tokens that `align` will train on."""

    settings: TeachingSettings = field(
        default_factory=TeachingSettings,
        metadata={FLAT: ("sequences", "sequence_length", "seed", "held_out", "shuffle_window", "repeat")},
    )
    """How they are computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignStage:
    """Continual pre-training of the pruned weights."""

    settings: AlignmentSettings = field(default_factory=AlignmentSettings, metadata={FLAT: ("seed",)})
    """How they are trained."""
    corpora: tuple[Corpus, ...] = field(default=DEFAULT_CORPORA, metadata={PATH: "source"})
    """Texts to train on, mixed by their weights; FineWeb and OpenWebMath, half each, if none are named."""
    launcher: tuple[str, ...] = ()
    """Command that starts the processes, for clusters; `-m loram_hub align ...` is added to it and `$VARIABLES` are
    filled in. By default torchrun on this machine if `processes` is above 1."""
    report_to: tuple[str, ...] = ()
    """Trackers that get the curves as well: trackio, wandb, tensorboard."""

    def __post_init__(self) -> None:
        """Check that there is something to train on."""
        if not self.corpora:
            raise InvalidRequestError("corpora is an empty list; leave it out for the default ones, or name some.")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeStage:
    """Quantization of what was pruned and aligned."""

    type: Literal["nf4"] = "nf4"
    """Data type of the projections; embeddings, lm_head and norms stay in 16 bit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateStage:
    """Held-out loss of base and release, for the card."""

    data: str = field(metadata={PATH: ""})
    """Texts or prompt/completion tasks: a file, a folder or a dataset id."""
    limit: int | None = None
    """Records that are read at most."""
    base: bool = True
    """Whether the base model is measured, too; it must fit on the device."""
    max_tokens: int = 1024
    """Longest sequence in tokens."""
    batch_size: int = 8
    """Sequences per forward pass at most."""
    device: str | None = None
    """Where, if not where the other stages run; `auto` spreads a model over all GPUs."""

    def __post_init__(self) -> None:
        """Check ranges; raises `InvalidRequestError`."""
        for name in ("limit", "max_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name} is {value}; at least 1 is needed.")


@dataclass(frozen=True, kw_only=True, slots=True)
class PushStage:
    """How the release appears on the Hub."""

    private: bool | None = None
    """Visibility in the end. Left out: as the repository is; a new one is public unless its base is gated."""
    gated: Gate | None = None
    """How access is granted. Left out: as the repository is, `auto` if the base is gated."""
    tag: str | None = None
    """Tag for the commit, such as v1."""
    collection: str | None = None
    """Slug of a collection, or the title of one of yours; made if there is none."""
    message: str | None = None
    """Title of the commit."""
    overwrite: bool = False
    """Replace a card that was edited on the Hub, and delete files that loaders would open and no push put there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one release is made, from base model to Hub."""

    base: str = field(metadata={PATH: ""})
    """The base model: Hub id or folder with safetensors."""
    repo_id: str
    """Hub id of the release, `org/name`; its name is also that of the work folder."""
    revision: str | None = None
    """Branch, tag or commit of the base; the first run pins it to a commit."""
    license: str | None = None
    """Licence of the base as the Hub names it. Left out: what its card, licence file or name tells."""
    license_file: str | None = field(default=None, metadata={PATH: ""})
    """Text of that licence, for bases whose repository holds none; it travels along as LICENSE."""
    seed: int = 0
    """Seed of everything that is drawn: calibration texts, random importance, the order of training texts."""
    device: str | None = None
    """Where all stages compute: `cuda`, or the CPU if left out."""
    prune: PruneStage
    """What is removed."""
    refit: RefitStage | None = None
    """Closed-form refit; left out, the kept weights stay the base's."""
    teach: TeachStage | None = None
    """Targets for distillation; left out, `align` trains on the next token alone."""
    align: AlignStage | None = None
    """Continual pre-training; left out, the weights stay the base's own."""
    quantize: QuantizeStage | None = None
    """Quantization; left out, the release stays in 16 bit."""
    evaluate: EvaluateStage | None = None
    """Measurement for the card."""
    push: PushStage | None = None
    """How it is published; left out, the release stays on this machine."""
    hardware: Hardware | None = None
    """The machine that the estimates of time, memory and cost are for; what is made does not depend on it."""

    def __post_init__(self) -> None:
        """Check what no section can check alone; raises `InvalidRequestError`."""
        if _REPO_ID.fullmatch(self.repo_id) is None:
            raise InvalidRequestError(f"repo_id is {self.repo_id!r:.200}, which is no Hub id; give one as org/name.")
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as err:
            raise InvalidRequestError(f"repo_id is {self.repo_id!r}, which is no Hub id: {err}") from err
        if self.seed < 0:
            raise InvalidRequestError(f"seed is {self.seed}; a whole number from 0 is needed.")
        if self.prune.calibration is None and (self.prune.importance.startswith("taylor") or self.refit is not None):
            raise InvalidRequestError(
                "prune.calibration is missing: Taylor importance and the refit need texts like those that the base was "
                "trained on. Name a file, folder or dataset; importance magnitude and random need none."
            )

        distillation = 0.0 if self.align is None else self.align.settings.distillation
        if (distillation > 0) != (self.teach is not None):
            raise InvalidRequestError(
                f"align.distillation is {distillation:g}, and there is {'no' if self.teach is None else 'a'} section "
                "teach; the one needs the other. An empty section, `teach: {}`, has the defaults."
            )

    @property
    def align_settings(self) -> AlignmentSettings:
        """Settings of the alignment, with the recipe's seed; only if there is one."""
        assert self.align is not None
        return replace(self.align.settings, seed=self.seed)

    @property
    def teaching_settings(self) -> TeachingSettings:
        """Settings of the teacher, with what `align` says of the tokens; only if there are both."""
        assert self.teach is not None
        align = self.align_settings
        return replace(
            self.teach.settings,
            sequences=align.steps * align.batch_size,
            sequence_length=align.sequence_length,
            seed=align.seed,
            held_out=align.held_out,
            shuffle_window=align.shuffle_window,
            repeat=align.repeat,
        )

    @property
    def name(self) -> str:
        """Name of the release without its organization."""
        return self.repo_id.partition("/")[2]
