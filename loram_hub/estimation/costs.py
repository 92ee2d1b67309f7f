"""What each stage of making a release needs: operations, bytes on disk and in memory.

Letters: N parameters of the model that runs, D tokens, W processes, L layers, H hidden size, V vocabulary, T tokens of
a sequence.

- A token costs 2 N operations forward and 4 N backward (Kaplan et al., arXiv 2001.08361, section 2.1), and 2 N more
  where activation checkpointing runs each layer again. N counts what multiplies: everything but an untied embedding.
  Attention scores are left out; at T = 512 they are about one part in a hundred.
- What each of W processes holds while it trains is told by `loram_hub.alignment.estimates`, beside what holds it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loram_hub.estimation.hardware import Cost
from loram_hub.estimation.sizes import SIXTEEN_BIT, ModelSize
from loram_hub.estimation.sparsity import SparseCounts

TAYLOR_LAYERS = 5
"""Peak memory of streamed Taylor importance in layers: weights, gradients, scores in fp32, activations, and what the
allocator keeps. `benchmarks/taylor_memory.py` measures 5 at 8 to 32 layers."""
_FP32 = 4
_COMPUTED = {"fp32": 4, "mixed": 2, "bf16": 2}
"""Bytes of a weight and an activation where they are computed with."""


def prune_cost(base: ModelSize, pruned: ModelSize, *, method: str, tokens: int) -> Cost:
    """Estimate `prune`.

    Slicing reads every weight once, magnitude scores read them once more, Taylor scores twice: forward, and backward
    with each layer run again, 8 N D operations. Taylor keeps each layer's input on disk, L D H numbers, and
    `TAYLOR_LAYERS` layers in memory; the others hold the largest tensor.

    Args:
        base: before.
        pruned: after.
        method: `taylor`, `magnitude` or `random`.
        tokens: of calibration.
    """
    taylor = method == "taylor"
    reads = {"taylor": 3, "magnitude": 2}.get(method, 1)
    return Cost(
        output_bytes=pruned.bytes_16,
        scratch_bytes=4 * len(base.layers) * tokens * base.hidden_size if taylor else 0,
        memory_bytes=SIXTEEN_BIT * max(base.largest_tensor, TAYLOR_LAYERS * base.largest_layer * taylor),
        flops=8.0 * base.active * tokens if taylor else 0.0,
        disk_bytes=reads * base.bytes_16 + pruned.bytes_16,
    )


def sparsify_cost(base: ModelSize, counts: SparseCounts, *, method: str, tokens: int) -> Cost:
    """Estimate `sparsify`.

    With D tokens of calibration each layer of N parameters runs twice, 4 N D operations. SparseGPT has, for each tensor
    of K columns that enters a layer's matrices, the products of its columns (2 D K^2 operations), their decomposition
    and inverse (2 K^3 / 3), and for each matrix of O rows that it enters the updates (O K^2), all of it in fp32. In
    memory are a layer, the widest matrices that share an input twice over, the products of one layer, three more of the
    widest, and the hidden states of the calibration. Columns are pruned one after another: a GPU, which starts work for
    each of them, takes longer than its operations say.

    Pruned layers and their masks lie in a work folder until the release is there, so that the disk holds the weights
    twice over.

    Args:
        base: before.
        counts: what is kept.
        method: `sparsegpt`, `wanda` or `magnitude`.
        tokens: of calibration; `magnitude` has none.
    """
    in_memory = 3 * _FP32 * base.largest_tensor  # weights, scores, and the sorting of them
    flops = fp32_flops = 0.0
    if method != "magnitude":
        flops = 4.0 * sum(base.layers) * tokens
        widest = max(columns * rows for widths in base.widths for columns, rows in _inputs(base, widths))
        in_memory = _FP32 * base.largest_layer + 2 * _FP32 * widest + SIXTEEN_BIT * tokens * base.hidden_size
    if method == "sparsegpt":
        fp32_flops = sum(
            2.0 * tokens * columns**2 + 2 / 3 * columns**3 + rows * columns**2
            for widths in base.widths
            for columns, rows in _inputs(base, widths)
        )
        squares = [[columns**2 for columns, _ in _inputs(base, widths)] for widths in base.widths]
        in_memory += _FP32 * max(sum(layer) + 3 * max(layer) for layer in squares)
    output = base.bytes_16 + counts.mask_bytes
    finished = SIXTEEN_BIT * counts.prunable_weights + 2 * counts.mask_bytes
    return Cost(
        output_bytes=output,
        scratch_bytes=finished,
        memory_bytes=in_memory,
        flops=flops,
        fp32_flops=fp32_flops,
        disk_bytes=base.bytes_16 + 3 * finished + output,  # finished layers are written, hashed and read
    )


def _inputs(base: ModelSize, widths: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
    """Columns of each tensor that enters matrices of a layer, and the rows of those together."""
    query, key, channels = widths
    hidden = base.hidden_size
    return (hidden, query + 2 * key), (query, hidden), (hidden, 2 * channels), (channels, hidden)


def refit_cost(base: ModelSize, pruned: ModelSize, *, tokens: int) -> Cost:
    """Estimate `refit`: base and pruned model run once side by side, a layer of each in memory.

    A layer of K kept inputs adds a K x K matrix of products in fp64 (8 K^2 bytes, 2 K^2 D operations) and its
    factorization (K^3 / 3).
    """
    inputs = [max(query, channels) for query, _, channels in pruned.widths]
    products = sum(2.0 * kept**2 * tokens + kept**3 / 3 for kept in inputs)
    return Cost(
        output_bytes=pruned.bytes_16,
        memory_bytes=SIXTEEN_BIT * (base.largest_layer + pruned.largest_layer) + 3 * 8 * max(inputs) ** 2,
        flops=2.0 * (base.active + pruned.active) * tokens + products,
        disk_bytes=base.bytes_16 + 3 * pruned.bytes_16,
    )


def teach_cost(
    base: ModelSize, *, sequences: int, sequence_length: int, k: int, block_sequences: int, gpus: int
) -> Cost:
    """Estimate `teach`: 2 N D operations; the base is read once for every block of sequences.

    Written are, for each of D positions, k token ids (4 bytes), k log-probabilities (2 bytes) and the token itself.
    In memory are two layers and the hidden states of a block.
    """
    tokens = sequences * sequence_length
    written = tokens * (6 * k + 4)
    blocks = -(-sequences // block_sequences)
    return Cost(
        output_bytes=written,
        memory_bytes=SIXTEEN_BIT * (2 * base.largest_layer + 2 * block_sequences * sequence_length * base.hidden_size),
        flops=2.0 * base.active * tokens,
        disk_bytes=blocks * base.bytes_16 + written,
        gpus=gpus,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentShape:
    """The settings of an alignment that decide what it needs."""

    tokens: int
    """D, over all steps."""
    sequence_length: int
    micro_batch_size: int
    """Sequences that a process takes through the model at a time."""
    loss_chunk: int
    """Tokens whose logits are in memory at a time."""
    precision: str
    """`mixed`, `bf16` or `fp32`."""
    activation_checkpointing: bool
    checkpoints: int
    """How often one is written."""
    evaluated_tokens: int = 0
    """Held-out tokens, over all evaluations."""
    keep_checkpoints: int
    processes: int
    """W."""


def activation_bytes(pruned: ModelSize, shape: AlignmentShape) -> int:
    """Bytes of activations of one micro-batch, and of the logits of one chunk.

    A layer with Q query and K key rows and C channels keeps c (4 H + 3 Q + 3 K + 4 C) bytes per token: inputs of the
    projections, queries and keys before and after rotation, values, gate and up and their product; and 8 H for the
    norms in fp32. Attention scores are not kept (scaled_dot_product_attention). With activation checkpointing a layer
    keeps c H, and one at a time has all of it. A chunk of n tokens has n V logits, their gradients in fp32, and both
    in c bytes.
    """
    computed = _COMPUTED[shape.precision]
    tokens = shape.micro_batch_size * shape.sequence_length
    hidden = pruned.hidden_size
    per_layer = [
        computed * (4 * hidden + 3 * query + 3 * key + 4 * channels) + 8 * hidden
        for query, key, channels in pruned.widths
    ]
    kept = computed * hidden * len(per_layer) + max(per_layer) if shape.activation_checkpointing else sum(per_layer)
    logits = min(shape.loss_chunk, tokens) * pruned.vocab_size * (8 + 2 * computed)
    return tokens * kept + logits


def align_cost(pruned: ModelSize, shape: AlignmentShape, *, state_bytes: int, checkpoint_bytes: int) -> Cost:
    """Estimate `align`: 6 N D operations, 8 N D with activation checkpointing, divided among W processes.

    A held-out token takes 2 N more. Training waits while a checkpoint is written and while it is read again to be
    hashed; both are taken to be as fast as the disk, though a page cache that holds a checkpoint makes the second
    faster. On the disk are the checkpoints that are kept and the one that is being written.

    Args:
        pruned: what is trained.
        shape: how.
        state_bytes: what a process holds besides activations: its rows of weights, gradients and optimizer state, and
            what it gathers to compute with. `loram_hub.alignment.estimates` has the formula.
        checkpoint_bytes: of one checkpoint.
    """
    per_token = 8.0 if shape.activation_checkpointing else 6.0
    return Cost(
        output_bytes=pruned.bytes_16,
        scratch_bytes=(shape.keep_checkpoints + 1) * checkpoint_bytes,
        memory_bytes=state_bytes + activation_bytes(pruned, shape),
        flops=pruned.active * (per_token * shape.tokens + 2.0 * shape.evaluated_tokens),
        waited_bytes=2 * pruned.bytes_16 + 2 * checkpoint_bytes * shape.checkpoints,
        gpus=shape.processes,
    )


def quantize_cost(pruned: ModelSize) -> Cost:
    """Estimate `quantize`: every weight is read once; the largest tensor and its codes are in memory."""
    return Cost(
        output_bytes=pruned.nf4_bytes,
        memory_bytes=SIXTEEN_BIT * 2 * pruned.largest_tensor,
        disk_bytes=pruned.bytes_16 + pruned.nf4_bytes,
    )


def evaluate_cost(models: Iterable[tuple[ModelSize, int]], *, tokens: int, spread: int = 1) -> Cost:
    """Estimate `evaluate`: 2 N D operations for each model, one after the other; each is in memory as a whole.

    Args:
        models: size and bytes of each as it is stored.
        tokens: D at most.
        spread: GPUs of one node that a model is spread over; they work in turn.
    """
    found = list(models)
    return Cost(
        memory_bytes=max(nbytes for _, nbytes in found) // spread,
        flops=sum(2.0 * model.active * tokens for model, _ in found),
        waited_bytes=sum(nbytes for _, nbytes in found),
    )


def transfer_cost(nbytes: int, *, kept: bool) -> Cost:
    """Estimate a download (which stays on the disk) or an upload."""
    return Cost(output_bytes=nbytes if kept else 0, network_bytes=nbytes)
