"""What to change where a training does not fit: every option that saves memory, with what it saves, best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from loram_hub.architecture import Architecture
from loram_hub.errors import InvalidRequestError
from loram_hub.estimation import TrainingShape, training_memory
from loram_hub.fitting.subjects import Subject


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """One change, made alone."""

    change: str
    """What to do, as a phrase."""
    option: str
    """The option of `loram estimate` that tries it."""
    saved_bytes: int
    """What the highest moment is lower."""
    fits: bool
    """Whether that alone is enough."""


def advise(subject: Subject, shape: TrainingShape, budget: int) -> tuple[Advice, ...]:
    """Try each change alone.

    Args:
        subject: what is trained.
        shape: how.
        budget: bytes of the GPU.

    Returns:
        Those that save something, the largest saving first.
    """

    def total(changed: TrainingShape, quantized: bool) -> int:
        return training_memory(subject.architecture, subject.layers, changed, quantized=quantized).total

    now = total(shape, subject.quantized)
    found = []
    for change, option, changed, quantized in _changes(subject, shape):
        try:
            then = total(changed, quantized)
        except InvalidRequestError:  # tied embeddings take no option of their own
            continue
        if then < now:
            found.append(Advice(change=change, option=option, saved_bytes=now - then, fits=then <= budget))
    return tuple(sorted(found, key=lambda advice: -advice.saved_bytes))


def _changes(subject: Subject, shape: TrainingShape) -> Iterator[tuple[str, str, TrainingShape, bool]]:
    quantized = subject.quantized
    if not quantized:
        yield "train on an NF4 release of it ('loram quantize')", "", shape, True
    if shape.masked_lora:
        yield "plain LoRA, not masked", "--plain-lora", replace(shape, masked_lora=False), quantized
    if not shape.checkpointing:
        yield "gradient checkpointing", "--checkpointing", replace(shape, checkpointing=True), quantized
    for change, option, changed in (*_smaller(shape), *_memory_options(subject.architecture, shape)):
        yield change, option, changed, quantized


def _smaller(shape: TrainingShape) -> Iterator[tuple[str, str, TrainingShape]]:
    if shape.micro_batch > 1:
        half = shape.micro_batch // 2
        yield f"micro-batch {half}, more of them per step", f"--micro-batch {half}", replace(shape, micro_batch=half)
    if shape.sequence_length > 1:
        half = shape.sequence_length // 2
        yield f"sequences of {half} tokens", f"--seq {half}", replace(shape, sequence_length=half)
    if shape.rank > 1:
        yield f"rank {shape.rank // 2}", f"--rank {shape.rank // 2}", replace(shape, rank=shape.rank // 2)
    if shape.dropout:
        yield "no LoRA dropout", "--dropout 0", replace(shape, dropout=0.0)
    if shape.optimizer != "paged_adamw_8bit":
        changed = replace(shape, optimizer="paged_adamw_8bit")
        yield "paged 8-bit AdamW", "--optim paged_adamw_8bit", changed


def _memory_options(architecture: Architecture, shape: TrainingShape) -> Iterator[tuple[str, str, TrainingShape]]:
    options = shape.options
    if not options.activation_offloading:
        changed = replace(shape, options=replace(options, activation_offloading=True))
        yield "activations offloaded to main memory", "--offload-activations", changed
    if architecture.tie_word_embeddings:
        changed = replace(shape, options=replace(options, embedding="int8", lm_head="int8"))
        yield "the tied embedding in int8", "--embedding int8 --lm-head int8", changed
        return
    if options.embedding != "cpu":
        changed = replace(shape, options=replace(options, embedding="cpu"))
        yield "embedding in main memory", "--embedding cpu", changed
    if options.lm_head != "nf4":
        yield "lm_head in NF4", "--lm-head nf4", replace(shape, options=replace(options, lm_head="nf4"))
    if options.lm_head == "device":
        yield "lm_head in int8", "--lm-head int8", replace(shape, options=replace(options, lm_head="int8"))
