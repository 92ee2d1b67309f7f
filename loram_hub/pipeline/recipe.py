"""A recipe: everything that decides what a release will be, in one frozen record; the YAML of `publish/` has its keys.

What two stages share is said once: the seed and the device stand at the top, and what defines the training stream
(sequence length, batch, steps, held-out sequences, shuffling) stands under `align`, from where `teach` takes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from loram_hub.alignment.settings import AlignmentSettings
from loram_hub.corpora import DEFAULT_CORPORA, Corpus
from loram_hub.errors import InvalidRequestError
from loram_hub.estimation import Hardware
from loram_hub.hub import Gate
from loram_hub.importance import parse_importance
from loram_hub.plan import PruningSettings
from loram_hub.recipes import FLAT, PATH, keys_of
from loram_hub.refitting.settings import RefitSettings
from loram_hub.sparsification.settings import SparsitySettings
from loram_hub.teaching.settings import TeachingSettings

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)

_STRUCTURED = ("pruning_ratio", "keep_first", "keep_last", "round_to", "importance")
_MAGNITUDE = ("sparsity", "pattern")
_WANDA = (*_MAGNITUDE, "samples", "tokens")
_SPARSE = (*_WANDA, "dampening", "block_size")
_KEYS = {"structured": _STRUCTURED, "sparsegpt": _SPARSE, "wanda": _WANDA, "magnitude": _MAGNITUDE}
"""Keys that a method has, besides `calibration`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneStage:
    """What is removed from the base model: channel groups, or single weights.

    Keys of the one way have no meaning for the other and are refused there, so none of them has a default here.
    """

    method: Literal["structured", "sparsegpt", "wanda", "magnitude"] = "structured"
    """`structured` removes channel groups (LoRAM-Rand, LoRAM-Stru). The others remove single weights: shapes stay, and
    training takes the memory of the base (LoRAM-Semi is `sparsegpt` with a pattern, LoRAM-Unst with a sparsity)."""
    pruning_ratio: float | None = None
    """Share removed of each prunable dimension of each pruned layer, in [0, 1); 0.85 in `loram-0.85`. `structured`
    alone, which needs it."""
    keep_first: int | None = None
    """Layers at the start that stay whole; `structured` alone, where it is 4 if left out."""
    keep_last: int | None = None
    """Layers at the end that stay whole; `structured` alone, where it is 2 if left out."""
    round_to: int | None = None
    """Round the kept MLP channels up to a multiple of this (64 suits NF4); `structured` alone, where the paper's exact
    count is kept if it is left out."""
    importance: str | None = None
    """How channel groups are scored: `random`, `magnitude[:l1|:l2]` or `taylor[:param_first|:vectorize|...]`;
    `structured` alone, where it is `taylor` if left out."""
    sparsity: float | None = None
    """Share of the projections' weights that is removed, wherever they lie, in (0, 1). Every method but `structured`
    needs this or `pattern`."""
    pattern: str | None = None
    """`"n:m"`, in quotes: n of every m consecutive inputs of an output are kept, as in `"4:8"`. Every method but
    `structured` needs this or `sparsity`."""
    dampening: float | None = None
    """Share of the Hessian's mean diagonal that is added to it; `sparsegpt` alone, where it is 0.01 if left out."""
    block_size: int | None = None
    """Columns that are pruned before the others are updated; `sparsegpt` alone, where it is 128 if left out."""
    samples: int | None = None
    """Rows of calibration; `sparsegpt` and `wanda` alone, where it is 128 if left out."""
    tokens: int | None = None
    """Tokens in a row of calibration; `sparsegpt` and `wanda` alone, where it is 2048, or the base's context if that is
    shorter, if left out."""
    calibration: str | None = field(default=None, metadata={PATH: ""})
    """Texts for `taylor`, `sparsegpt`, `wanda` and the refit: a file, a folder or a dataset id (`org/name` or
    `org/name:config`)."""

    def __post_init__(self) -> None:
        """Check that the keys suit the method, and their values; raises `InvalidRequestError`."""
        self._refuse_keys_of_others()
        if self.is_sparse:
            _ = self.sparsity_settings
            return
        parse_importance(self.scores)
        if self.pruning_ratio is not None:  # a recipe without one is refused as a whole
            _ = self.structure

    @property
    def is_sparse(self) -> bool:
        """Whether single weights are removed."""
        return self.method != "structured"

    @property
    def structure(self) -> PruningSettings:
        """Ratio and whole layers; only if channel groups are removed."""
        assert not self.is_sparse
        assert self.pruning_ratio is not None
        given = self._given(("keep_first", "keep_last", "round_to"))
        return PruningSettings(pruning_ratio=self.pruning_ratio, **given)

    @property
    def scores(self) -> str:
        """The importance of channel groups, with its default."""
        return self.importance or "taylor"

    @property
    def sparsity_settings(self) -> SparsitySettings:
        """Which weights are removed and how; only if single weights are."""
        assert self.method != "structured"
        return SparsitySettings(method=self.method, **self._given(_SPARSE))

    @property
    def needs_calibration(self) -> bool:
        """Whether the weights that go are chosen with the help of texts."""
        return self.sparsity_settings.needs_calibration if self.is_sparse else self.scores.startswith("taylor")

    def _given(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _refuse_keys_of_others(self) -> None:
        of_others = [name for name in self._given((*_STRUCTURED, *_SPARSE)) if name not in _KEYS[self.method]]
        if of_others:
            methods = [method for method, names in _KEYS.items() if of_others[0] in names]
            raise InvalidRequestError(
                f"{of_others[0]} is given, and method is {self.method}. That key belongs to {' or '.join(methods)}; "
                f"{self.method} has {', '.join(_KEYS[self.method])}."
            )


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
        self._check_prune()
        distillation = 0.0 if self.align is None else self.align.settings.distillation
        if (distillation > 0) != (self.teach is not None):
            raise InvalidRequestError(
                f"align.distillation is {distillation:g}, and there is {'no' if self.teach is None else 'a'} section "
                "teach; the one needs the other. An empty section, `teach: {}`, has the defaults."
            )

    def _check_prune(self) -> None:
        prune = self.prune
        if not prune.is_sparse and prune.pruning_ratio is None:
            raise InvalidRequestError(
                f"prune.pruning_ratio is missing. {keys_of(PruneStage)['pruning_ratio'].text} To remove single "
                "weights, name a method and prune.sparsity or prune.pattern."
            )
        if prune.is_sparse and self.refit is not None:
            raise InvalidRequestError(
                f"There is a section refit, and prune.method is {prune.method}: a refit would fill the gaps that "
                "single weights leave. Leave it out; sparsegpt solves for the kept weights while it prunes."
            )
        if prune.calibration is None and (prune.needs_calibration or self.refit is not None):
            raise InvalidRequestError(
                "prune.calibration is missing: Taylor importance, SparseGPT, Wanda and the refit need texts like those "
                "that the base was trained on. Name a file, folder or dataset; importance magnitude and random, and "
                "method magnitude, need none."
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
