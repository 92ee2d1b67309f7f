"""What the `prune` stage of a sparse release needs; those of all other stages are in `loram_hub.estimation`."""

from __future__ import annotations

from loram_hub.estimation import SIXTEEN_BIT, Cost, ModelSize, SparseCounts
from loram_hub.sparsification import SparsitySettings

_FP32 = 4


def sparsify_cost(base: ModelSize, counts: SparseCounts, settings: SparsitySettings) -> Cost:
    """Estimate `sparsify`.

    With D tokens of calibration each layer of N parameters runs twice, 4 N D operations. SparseGPT has, for each tensor
    of K columns that enters a layer's matrices, the products of its columns (2 D K^2 operations), their decomposition
    and inverse (2 K^3 / 3), and for each matrix of O rows that it enters the updates (O K^2). In memory are a layer,
    the widest matrices that share an input twice over, the products of one layer, three more of the widest, and the
    hidden states of the calibration. A GPU does these operations in fp32, and columns one after another, so that it
    takes longer than its peak in bf16 says.

    Pruned layers and their masks lie in a work folder until the release is there, so that the disk holds the weights
    twice over.

    Args:
        base: the model.
        counts: what is kept.
        settings: method and calibration; where the base's context is shorter than its rows, less is needed.
    """
    tokens = settings.samples * settings.tokens if settings.needs_calibration else 0
    in_memory = 3 * _FP32 * base.largest_tensor  # weights, scores, and the sorting of them
    flops = 0.0
    if settings.needs_calibration:
        flops += 4.0 * sum(base.layers) * tokens
        in_memory = _FP32 * base.largest_layer + 2 * _FP32 * _widest(base) + SIXTEEN_BIT * tokens * base.hidden_size
    if settings.method == "sparsegpt":
        flops += sum(_operations(base, widths, tokens) for widths in base.widths)
        squares = [[columns**2 for columns, _ in _inputs(base, widths)] for widths in base.widths]
        in_memory += _FP32 * max(sum(layer) + 3 * max(layer) for layer in squares)
    output = base.bytes_16 + counts.mask_bytes
    finished = SIXTEEN_BIT * counts.prunable_weights + 2 * counts.mask_bytes
    return Cost(
        output_bytes=output,
        scratch_bytes=finished,
        memory_bytes=in_memory,
        flops=flops,
        disk_bytes=base.bytes_16 + 3 * finished + output,  # finished layers are written, hashed and read
    )


def _inputs(base: ModelSize, widths: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
    """Columns of each tensor that enters matrices of a layer, and the rows of those together."""
    query, key, channels = widths
    hidden = base.hidden_size
    return (hidden, query + 2 * key), (query, hidden), (hidden, 2 * channels), (channels, hidden)


def _operations(base: ModelSize, widths: tuple[int, int, int], tokens: int) -> float:
    inputs = _inputs(base, widths)
    return sum(2.0 * tokens * columns**2 + 2 / 3 * columns**3 + rows * columns**2 for columns, rows in inputs)


def _widest(base: ModelSize) -> int:
    return max(columns * rows for widths in base.widths for columns, rows in _inputs(base, widths))
