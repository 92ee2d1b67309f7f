"""A fine-tuning recipe: everything that decides what a run will give, in one frozen record; YAML has its keys.

A key that is left out takes what its docstring says, most often the value of the LoRAM paper; those of `memory` take
the preset's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from loram_hub.adapter import MODEL_ID
from loram_hub.errors import InvalidRequestError
from loram_hub.estimation.options import MemoryOptions
from loram_hub.finetuning.presets import PRESETS, OptimizerName, PresetName
from loram_hub.instructions import DataSource
from loram_hub.recipes import PATH

HELD_OUT = "held_out"
"""Name of the evaluation set that is taken out of the training data."""

MASKED_BY_DEFAULT = False
"""Whether adapters of sparse releases are trained masked where a recipe does not say. The paper masks; measured on the
original model, adapters trained without are better (docs/variants.md)."""

ALL_PROJECTIONS = "all-linear"
"""Target that stands for the projections of every layer, without the lm_head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """What is trained on, and what is measured during training."""

    train: tuple[DataSource, ...] = field(metadata={PATH: "source"})
    """Sources of training examples, one after the other, shuffled together."""
    evaluate: tuple[DataSource, ...] = field(default=(), metadata={PATH: "source"})
    """What is measured during training, each source under its `name`: examples like those that are trained on, which
    say how well the task is learnt, and others, which say what is forgotten."""
    held_out: float = 0.0
    """What is taken out of `train`, by its content, and measured as `held_out`: a share below 1, or a number."""
    too_long: Literal["drop", "truncate", "error"] | None = None
    """What becomes of examples of more than `training.max_tokens` tokens. Left out: texts are truncated, answers that
    would be cut are dropped."""
    bad_records: Literal["error", "drop"] = "error"
    """What becomes of records that are not laid out as their format says."""
    tokenizer: str | None = field(default=None, metadata={PATH: ""})
    """Tokenizer to take instead of the release's, such as one with a chat template; it must give the same ids."""
    allow_other_tokenizer: bool = False
    """Take `tokenizer` even if it gives other ids."""

    def __post_init__(self) -> None:
        """Check that there is something to train on; raises `InvalidRequestError`."""
        if not self.train:
            raise InvalidRequestError("train is an empty list; name at least one source to train on.")
        if self.held_out < 0:
            raise InvalidRequestError(f"held_out is {self.held_out:g}; a share or a number of examples is needed.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSection:
    """The adapter."""

    r: int = 8
    """Rank of every module."""
    alpha: int = 16
    """Updates are scaled by alpha / r."""
    dropout: float = 0.05
    """Share of inputs of the adapter that is dropped in training, from 0 to below 1."""
    targets: tuple[str, ...] = (ALL_PROJECTIONS,)
    """Modules that get an adapter, by their last name (`q_proj`) or full path; `all-linear` is every projection."""
    masked: bool | None = None
    """On a sparse release: whether the update is masked as the weights are, as the LoRAM paper has it; dropout then
    takes input features for a whole micro-batch. Left out, it is not. On a structured release there is nothing to
    mask."""

    def __post_init__(self) -> None:
        """Check ranges; raises `InvalidRequestError`."""
        _refuse_below(self, 1, "r", "alpha")
        if not 0 <= self.dropout < 1:
            raise InvalidRequestError(f"dropout is {self.dropout:g}; a share from 0 to below 1 is needed.")
        if not self.targets:
            raise InvalidRequestError("targets is an empty list; name modules, or leave it out for every projection.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSection:
    """How it is trained."""

    steps: int | None = None
    """Optimizer steps; left out, 400, or as many as `epochs` takes."""
    epochs: float | None = None
    """Passes over the training examples, instead of `steps`."""
    batch_size: int = 128
    """Examples of a step, over all processes."""
    micro_batch: int | None = None
    """Examples that a process takes at a time. Left out: as many as the estimate fits into the GPU, at most 16; on a
    CPU at most 4."""
    max_tokens: int = 512
    """Longest sequence in tokens."""
    learning_rate: float = 1e-3
    """Highest learning rate."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How it falls."""
    warmup_steps: int | None = None
    """Steps in which it rises from 0; left out, a twentieth of all."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped."""

    def __post_init__(self) -> None:
        """Check ranges; raises `InvalidRequestError`."""
        if self.steps is not None and self.epochs is not None:
            raise InvalidRequestError(f"steps is {self.steps} and epochs {self.epochs:g}; give one of them.")
        _refuse_below(self, 1, "steps", "batch_size", "micro_batch", "max_tokens")
        _refuse_below(self, 0, "warmup_steps", "weight_decay")
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InvalidRequestError(f"{name} is {value:g}; a number above 0 is needed.")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise InvalidRequestError(
                f"batch_size is {self.batch_size}, no multiple of micro_batch {self.micro_batch}. Change one of them."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySection:
    """What the run may cost in memory; what is left out is the preset's."""

    gpu: str | None = None
    """GPU that the run must fit, such as `20GB` or `rtx4090`. Without it: the GPU that is there."""
    gradient_checkpointing: bool | None = None
    """Compute activations anew for the backward pass: much less memory, a third more work."""
    optimizer: OptimizerName | None = None
    """`auto` is paged 8-bit AdamW on CUDA and torch's AdamW on a CPU; the 8-bit ones need CUDA."""
    embedding: Literal["device", "cpu", "int8"] | None = None
    """Where the input embedding is: on the device, in the CPU's memory, or on the device in 8 bit."""
    lm_head: Literal["device", "nf4", "int8"] | None = None
    """How the frozen lm_head is kept: as it is stored, in NF4 or in 8 bit."""
    activation_offloading: bool | None = None
    """Keep what checkpointing stores in the CPU's memory; CUDA alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSection:
    """Measurement during training, on the evaluation sets of `data`."""

    every: int | None = None
    """Steps between evaluations; left out, a tenth of all."""
    patience: int | None = None
    """Evaluations without improvement after which training stops, and the best adapter is kept. Left out: never, and
    the last one is."""
    metric: str | None = None
    """Set whose loss `patience` watches: `held_out`, or the name of a source of `data.evaluate`. Left out: the first of
    these."""
    batch_size: int | None = None
    """Examples per forward pass on each process; left out, the micro-batch."""

    def __post_init__(self) -> None:
        """Check ranges; raises `InvalidRequestError`."""
        _refuse_below(self, 1, "every", "patience", "batch_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSection:
    """What a run that is cut off goes on from."""

    every: int | None = None
    """Steps between checkpoints; left out, as `evaluation.every`."""
    keep: int = 2
    """Newest ones that stay, besides the best."""
    recover: bool = True
    """Put the recovered adapter of each beside it."""

    def __post_init__(self) -> None:
        """Check ranges; raises `InvalidRequestError`."""
        _refuse_below(self, 1, "every", "keep")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedSection:
    """Several processes, which `torchrun` or `accelerate launch` starts."""

    processes: int | None = None
    """How many must have been started; left out, any number."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: each process holds the whole release. `fsdp`: they share it (FSDP2); GPUs alone."""

    def __post_init__(self) -> None:
        """Check ranges; raises `InvalidRequestError`."""
        _refuse_below(self, 1, "processes")


@dataclass(frozen=True, kw_only=True, slots=True)
class PushSection:
    """Where the recovered adapter goes."""

    repo_id: str
    """Hub id, `name/adapter`."""
    private: bool | None = None
    """Visibility. Left out: as the repository is."""
    license: str | None = None
    """The Hub's identifier of the original model's licence, such as `llama3.1`. Left out: what its card, licence text
    or name tells; a model of which nothing does needs it."""

    def __post_init__(self) -> None:
        """Check the id; raises `InvalidRequestError`."""
        if MODEL_ID.fullmatch(self.repo_id) is None or "/" not in self.repo_id:
            raise InvalidRequestError(f"repo_id is {self.repo_id!r:.200}, which is no Hub id; give one as org/name.")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneRecipe:
    """How an adapter is trained on a release and recovered."""

    release: str = field(metadata={PATH: ""})
    """The release to train on: Hub id or folder."""
    revision: str | None = None
    """Branch, tag or commit of the release."""
    base: str | None = field(default=None, metadata={PATH: ""})
    """The model that the adapter is for, to make sure that the release was made from it: Hub id or folder. Left out:
    what the release names."""
    preset: PresetName = "paper"
    """How the run fits a GPU: see `memory`."""
    seed: int = 0
    """Of the adapter's start, the order of examples, dropout, and what is held out."""
    device: Literal["cuda", "cpu"] | None = None
    """Where to train; left out, CUDA where torch sees a GPU."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """What is computed in. Left out: 16 bit where the device multiplies it in hardware, else 32."""
    data: DataSection
    """Training examples and evaluation sets."""
    lora: LoraSection = field(default_factory=LoraSection)
    """The adapter."""
    training: TrainingSection = field(default_factory=TrainingSection)
    """Steps, batch, learning rate."""
    memory: MemorySection = field(default_factory=MemorySection)
    """What it may cost in memory, where that is not the preset's."""
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    """Measurement during training."""
    checkpoints: CheckpointSection = field(default_factory=CheckpointSection)
    """What a run that is cut off goes on from."""
    distributed: DistributedSection = field(default_factory=DistributedSection)
    """Several processes."""
    report_to: tuple[str, ...] = ()
    """Trackers that get the curves: trackio, wandb, tensorboard."""
    push: PushSection | None = None
    """Where the recovered adapter goes on the Hub; left out, it stays on this machine."""

    def __post_init__(self) -> None:
        """Check what no section can check alone; raises `InvalidRequestError`."""
        if not 0 <= self.seed < 2**32:
            raise InvalidRequestError(f"seed is {self.seed}; a whole number from 0 to 2^32 - 1 is needed.")
        sets, watched = self.evaluation_sets, self.evaluation.metric
        if len(set(sets)) != len(sets):
            raise InvalidRequestError(f"data.evaluate has sets of one name ({', '.join(sets)}). Give each its `name`.")
        if watched is not None and watched not in sets:
            raise InvalidRequestError(
                f"evaluation.metric is {watched!r:.100}; what is measured is {', '.join(sets) or 'nothing'}."
            )
        if self.evaluation.patience is not None and not sets:
            raise InvalidRequestError(
                "evaluation.patience needs something to measure: name sources in data.evaluate, or give data.held_out."
            )

    @property
    def evaluation_sets(self) -> tuple[str, ...]:
        """Names of the sets that are measured; the first one is what `evaluation.patience` watches by default."""
        held_out = (HELD_OUT,) if self.data.held_out else ()
        return (*held_out, *(source.label for source in self.data.evaluate))

    @property
    def watched(self) -> str | None:
        """Name of the set whose loss decides over the adapter that is kept; None if the last one is."""
        if self.evaluation.patience is None:
            return None
        return self.evaluation.metric or self.evaluation_sets[0]

    @property
    def gpu(self) -> str | None:
        """GPU that the run must fit; None for the one that is there."""
        return self.memory.gpu or PRESETS[self.preset].gpu

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are computed anew for the backward pass."""
        asked = self.memory.gradient_checkpointing
        return PRESETS[self.preset].gradient_checkpointing if asked is None else asked

    @property
    def optimizer(self) -> OptimizerName:
        """The optimizer, perhaps `auto`."""
        return self.memory.optimizer or PRESETS[self.preset].optimizer

    @property
    def memory_options(self) -> MemoryOptions:
        """Where embedding and lm_head are, and in which type."""
        preset, asked = PRESETS[self.preset].options, self.memory
        offloading = asked.activation_offloading
        return MemoryOptions(
            embedding=asked.embedding or preset.embedding,
            lm_head=asked.lm_head or preset.lm_head,
            activation_offloading=preset.activation_offloading if offloading is None else offloading,
        )


def _refuse_below(section: object, least: int, *names: str) -> None:
    """Refuse numbers of a section that are given and too small."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value < least:
            raise InvalidRequestError(f"{name} is {value:g}; at least {least} is needed.")
