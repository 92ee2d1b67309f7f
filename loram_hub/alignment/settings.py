"""What an alignment run is asked for; the same record for Python, the command line and recipes. No torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from loram_hub.architecture import EMBEDDING, LM_HEAD
from loram_hub.errors import InvalidRequestError

Precision = Literal["fp32", "mixed", "bf16"]
Optimizer = Literal["adamw", "adamw_8bit"]
Trainable = Literal["full", "no-embeddings", "norms+projections"]

FREE = frozenset(
    {
        "micro_batch_size", "activation_checkpointing", "compile", "loss_chunk", "save_every", "keep_checkpoints",
        "processes",
    }
)  # fmt: skip
"""Settings that a resumed run may change: they decide how the same numbers are computed, not which."""

_LOGITS_BYTES = 2**29
_LEAST_CHUNK = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentSettings:
    """How the pruned weights are trained further (LoRAM, eq. 8).

    Sequences, batch, steps, learning rate and warm-up are the paper's; what it does not name (weight decay, clipping,
    the moments) is what transformers' `Trainer`, with which the authors trained, does unless told otherwise.
    """

    sequence_length: int = 512
    """Tokens of a sequence."""
    batch_size: int = 128
    """Sequences of one optimizer step, over all processes."""
    steps: int = 1600
    """Optimizer steps; 200 already help."""
    learning_rate: float = 5e-5
    """Highest learning rate, reached when the warm-up ends."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero, linearly; then it falls as a half cosine."""
    min_lr_ratio: float = 0.0
    """Share of `learning_rate` at which the cosine ends."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms and biases have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, taken over all trained weights; 0 leaves them as they are."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    epsilon: float = 1e-8
    """Term that keeps Adam's denominator from zero."""
    trainable: Trainable = "full"
    """`full`: every weight. `no-embeddings`: all but the token embeddings (and the lm_head where it is tied to them).
    `norms+projections`: the decoder layers and the final norm alone, no untied lm_head either."""
    distillation: float = 0.0
    """Weight w of the divergence from the teacher: the objective is (1 - w) * LM loss + w * KL."""
    seed: int = 0
    """Seed of the order of texts; nothing else is random."""
    shuffle_window: int = 1000
    """Documents that are shuffled among each other."""
    repeat: bool = False
    """Whether a corpus that is used up starts again, in another order; otherwise that is an error."""
    held_out: int = 32
    """Sequences of each corpus that are kept for evaluation and never trained on."""
    evaluate_every: int = 100
    """Steps between evaluations on the held-out sequences; before the first and after the last there always is one."""
    micro_batch_size: int = 4
    """Sequences that a process takes through the model at a time; memory, not the result, depends on it."""
    precision: Literal["auto", "fp32", "mixed", "bf16"] = "auto"
    """`mixed`: fp32 weights and optimizer state, bf16 arithmetic. `bf16`: bf16 weights and state, half the memory;
    small updates are lost to rounding. `auto`: `mixed` where a GPU has bf16, else `fp32`."""
    optimizer: Optimizer = "adamw"
    """`adamw`, fused; or bitsandbytes' 8-bit AdamW, on CUDA, whose state takes a quarter of the memory."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and run the layer again: less memory, a third more work."""
    compile: bool = False
    """Compile each decoder layer with torch.compile."""
    loss_chunk: int | None = None
    """Tokens whose logits are in memory at a time; None for as many as fit half a GiB in fp32."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept; older ones are deleted."""
    processes: int | None = None
    """Number of processes that the run is meant for; started with another number, it stops. None takes any number."""

    def __post_init__(self) -> None:
        """Check types and ranges; raises `InvalidRequestError`."""
        _check_counts(self)
        _check_numbers(self)
        _check_choices(self)
        if self.warmup_steps >= self.steps:
            raise InvalidRequestError(
                f"warmup_steps is {self.warmup_steps} of {self.steps} steps; the learning rate would never be reached. "
                f"Set warmup_steps (--warmup-steps) below steps ({self.steps // 16}, say)."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)

    @property
    def tokens(self) -> int:
        """Tokens that are trained on."""
        return self.steps * self.batch_size * self.sequence_length

    def chunk_for(self, vocab_size: int) -> int:
        """Tokens whose logits are in memory at a time."""
        return self.loss_chunk or max(_LEAST_CHUNK, _LOGITS_BYTES // (4 * vocab_size))


def is_trained(name: str, trainable: Trainable) -> bool:
    """Return whether a tensor, by its name, is trained; a tied lm_head goes by the name of the embeddings."""
    frozen = {"full": (), "no-embeddings": (EMBEDDING,), "norms+projections": (EMBEDDING, LM_HEAD)}
    return name not in frozen[trainable]


_LEAST: dict[str, int] = {
    "sequence_length": 2,
    "batch_size": 1,
    "steps": 1,
    "warmup_steps": 0,
    "seed": 0,
    "shuffle_window": 1,
    "held_out": 0,
    "evaluate_every": 1,
    "micro_batch_size": 1,
    "save_every": 1,
    "keep_checkpoints": 1,
    "loss_chunk": 1,
    "processes": 1,
}
_OPTIONAL = ("loss_chunk", "processes")
# name: (least, most, whether the least itself is allowed)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "learning_rate": (0.0, 1.0, False),
    "min_lr_ratio": (0.0, 1.0, True),
    "weight_decay": (0.0, 1.0, True),
    "max_grad_norm": (0.0, math.inf, True),
    "beta1": (0.0, 1.0, True),
    "beta2": (0.0, 1.0, True),
    "epsilon": (0.0, 1.0, False),
    "distillation": (0.0, 1.0, True),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "precision": ("auto", *get_args(Precision)),
    "optimizer": get_args(Optimizer),
    "trainable": get_args(Trainable),
}


def _check_counts(settings: AlignmentSettings) -> None:
    for name, least in _LEAST.items():
        value = getattr(settings, name)
        if value is None and name in _OPTIONAL:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidRequestError(f"{name} is {value!r}; a whole number of at least {least} is needed.")


def _check_numbers(settings: AlignmentSettings) -> None:
    for name, (least, most, inclusive) in _RANGES.items():
        value = getattr(settings, name)
        sound = not isinstance(value, bool) and isinstance(value, int | float)
        if not sound or not (least <= value <= most if inclusive else least < value <= most):  # also refuses NaN
            bounds = f"{'at least' if inclusive else 'above'} {least:g}" + (
                f" and at most {most:g}" if math.isfinite(most) else ""
            )
            raise InvalidRequestError(f"{name} is {value!r}; a number {bounds} is needed.")
    if 1.0 in (settings.beta1, settings.beta2) or math.isinf(settings.max_grad_norm):
        raise InvalidRequestError(
            f"beta1 {settings.beta1} and beta2 {settings.beta2} must lie below 1, max_grad_norm "
            f"{settings.max_grad_norm} must be finite (0 switches clipping off)."
        )


def _check_choices(settings: AlignmentSettings) -> None:
    for name, choices in _CHOICES.items():
        if getattr(settings, name) not in choices:
            raise InvalidRequestError(f"{name} is {getattr(settings, name)!r}; choose {' or '.join(choices)}.")
    for name in ("repeat", "activation_checkpointing", "compile"):
        if not isinstance(getattr(settings, name), bool):
            raise InvalidRequestError(f"{name} is {getattr(settings, name)!r}; true or false is needed.")
