"""An estimate in words, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loram_hub.fitting.estimating import Fit

LABELS = {
    "projections": "projections",
    "scales": "scales of NF4",
    "embedding": "embedding",
    "lm_head": "lm_head",
    "rest": "norms, biases",
    "masks": "masks of LoRA",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "inputs": "inputs of layers",
    "activations": "activations",
    "logits": "logits",
    "workspace": "workspace",
    "context": "CUDA context (set aside)",
    "fragmentation": "fragmentation (set aside)",
}
"""What the components of a breakdown are called."""


def fit_text(fit: Fit) -> str:
    """Write an estimate as `loram estimate` prints it."""
    return "\n".join(_lines(fit))


def _lines(fit: Fit) -> Iterator[str]:
    subject, shape = fit.subject, fit.shape
    weights = "NF4" if subject.quantized else "16 bit"
    yield f"{subject.id}: {'sparse ' if subject.is_sparse else ''}{subject.kind}, {weights}"
    yield (
        f"sequences of {shape.sequence_length:,} tokens, micro-batch {shape.micro_batch}, rank {shape.rank}"
        f"{' (masked)' if shape.masked_lora else ''}, "
        f"{shape.optimizer}, {'with' if shape.checkpointing else 'without'} gradient checkpointing"
    )
    options = shape.options
    yield (
        f"embedding: {options.embedding}, lm_head: {options.lm_head}, activations "
        f"{'offloaded' if options.activation_offloading else 'on the device'}"
    )
    yield ""
    rows = [(LABELS[name], nbytes) for name, nbytes in fit.breakdown.components() if nbytes]
    yield from _table([*rows, (f"highest moment: {fit.breakdown.moment}", fit.breakdown.total)])
    yield ""
    words = f"{gib(abs(fit.free_bytes))} {'free' if fit.fits else 'missing'}"
    yield f"{'Fits' if fit.fits else 'Does not fit'} {fit.gpu.name} ({gib(fit.gpu.nbytes)}): {words}"
    yield from _solutions(fit)
    if not fit.fits and fit.advice:
        yield "What would lower it, each alone:"
        changes = [(f"{each.change}{' (enough)' if each.fits else ''}", -each.saved_bytes) for each in fit.advice]
        yield from _table(changes)
    if subject.is_sparse:
        yield (
            "The zeros of a sparse release take as much memory as other weights: it trains in what its base trains in."
        )
    yield "An estimate from formulas, not a measurement; the two reserves are assumptions."


def _solutions(fit: Fit) -> Iterator[str]:
    found = (
        ("sequence", fit.largest.sequence_length, "tokens"),
        ("micro-batch", fit.largest.micro_batch, "sequences"),
        ("rank", fit.largest.rank, ""),
    )
    for what, value, unit in found:
        words = "not even 1 fits" if value is None else f"every {what} up to {value:,} {unit}".rstrip() + " fits"
        yield f"  {what}, all else as above: {words}"
    if fit.subject.kind != "release" or fit.subject.is_sparse:
        ratio = fit.smallest_ratio
        words = "not even the largest fits" if ratio is None else f"every one from {ratio:.3f} on fits"
        what = "pruning ratio of a structured release of its base" if fit.subject.is_sparse else "pruning ratio"
        yield f"  {what}: {words}"


def gib(nbytes: int) -> str:
    """Write bytes in GiB, and what is less than a tenth of one in MiB."""
    return f"{nbytes / 2**30:.2f} GiB" if abs(nbytes) >= 2**30 // 10 else f"{nbytes / 2**20:.2f} MiB"


def _table(rows: Sequence[tuple[str, int]]) -> list[str]:
    width = max(len(label) for label, _ in rows)
    return [f"  {label.ljust(width)}  {gib(nbytes):>10}" for label, nbytes in rows]
