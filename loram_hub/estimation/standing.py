"""What a fine-tuning holds on the GPU all the time.

    projections   NF4: half a byte per element; else 2 bytes
    scales        NF4: a byte for 64 elements, 4 bytes for 256 of these, and for each matrix its two code tables and
                  offset (64 + 1,024 + 4 bytes), as bitsandbytes keeps them
    rest          embedding, lm_head, norms and biases in 16 bit, less what `MemoryOptions` take away
    masks         of masked LoRA: a bit for each weight of a target, rows of whole bytes
    adapter       r (rows + columns) for each target: 2 bytes on an NF4 release, as TRL converts it, else 4
    gradients     as many; several processes have another copy in the buckets of DistributedDataParallel
    optimizer     two moments. torch's AdamW: in the type of the adapter. 8 bit: a byte each, and 4 bytes each for 256
                  elements; 4 bytes each for tensors of less than 4,096. Paged: tensors of 100,000 elements or more
                  keep their moments in main memory

Tensors are counted in blocks of 512 bytes, as CUDA's allocator gives them out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from loram_hub.architecture import Architecture, LayerSizes, Weight
from loram_hub.estimation.layers import COMPUTED
from loram_hub.estimation.settings import Optimizer, TrainingShape
from loram_hub.masks import mask_bytes
from loram_hub.plan import NF4_BLOCK, NF4_NESTED_BLOCK

_FP32 = 4
_TABLE_BYTES = (4 * 16, 4 * 256, 4)
_EIGHT_BIT_LEAST, _EIGHT_BIT_BLOCK, _PAGED_LEAST = 4096, 256, 100_000
_GRANULE = 512


def standing_memory(
    architecture: Architecture,
    layers: Sequence[LayerSizes],
    shape: TrainingShape,
    targets: frozenset[str],
    *,
    quantized: bool,
) -> dict[str, int]:
    """Count what is there all the time.

    Args:
        architecture: the base model's.
        layers: sizes of each layer.
        shape: how it is trained.
        targets: last names of the modules that have LoRA.
        quantized: whether the projections are NF4.

    Returns:
        Bytes by the names of `MemoryBreakdown`.

    Raises:
        InvalidRequestError: the memory options do not fit tied embeddings.
    """
    matrices, others = _weights(architecture, layers)
    factors = factor_counts(architecture, layers, shape.rank, targets)
    embedding, head = shape.options.device_bytes(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        tied=architecture.tie_word_embeddings,
    )
    item = COMPUTED if quantized else _FP32
    adapter = sum(_block(item * each) * count for each, count in factors.items())
    return {
        "projections": sum(
            _block(-(-each // 2) if quantized else COMPUTED * each) * count for each, count in matrices.items()
        ),
        "scales": sum(_scale_bytes(each) * count for each, count in matrices.items()) if quantized else 0,
        "embedding": embedding,
        "lm_head": head,
        "rest": sum(_block(COMPUTED * each) * count for each, count in others.items()),
        "masks": _mask_bytes(architecture, layers, targets) if shape.masked_lora else 0,
        "adapter": adapter,
        "gradients": adapter * (2 if shape.processes > 1 else 1),
        "optimizer": sum(_optimizer_bytes(each, shape.optimizer, item) * count for each, count in factors.items()),
    }


def _weights(architecture: Architecture, layers: Sequence[LayerSizes]) -> tuple[Mapping[int, int], Mapping[int, int]]:
    """How many tensors of a number of elements there are: projections, and norms and biases."""
    matrices: Counter[int] = Counter()
    others: Counter[int] = Counter({architecture.hidden_size: 1})
    for sizes, count in Counter(layers).items():
        for weight in architecture.layer_weights:
            (matrices if weight.is_projection else others)[math.prod(architecture.shape(weight, sizes))] += count
    return matrices, others


def _mask_bytes(architecture: Architecture, layers: Sequence[LayerSizes], targets: frozenset[str]) -> int:
    shapes = [architecture.shape(weight, architecture.whole_layer) for weight in _targeted(architecture, targets)]
    return len(layers) * sum(_block(mask_bytes(rows, columns)) for rows, columns in shapes)


def _targeted(architecture: Architecture, targets: frozenset[str]) -> list[Weight]:
    return [weight for weight in architecture.projections if weight.module.rpartition(".")[2] in targets]


def factor_counts(
    architecture: Architecture, layers: Sequence[LayerSizes], rank: int, targets: frozenset[str]
) -> Mapping[int, int]:
    """Count the LoRA factors of each number of elements.

    Args:
        architecture: the base model's.
        layers: sizes of each layer.
        rank: of LoRA.
        targets: last names of the modules that have LoRA.
    """
    found: Counter[int] = Counter()
    for sizes, count in Counter(layers).items():
        for weight in _targeted(architecture, targets):
            for side in architecture.shape(weight, sizes):
                found[rank * side] += count
    return found


def moment_borders(optimizer: Optimizer) -> tuple[int, ...]:
    """Return the numbers of elements from which on a factor's moments take less than those of a smaller one."""
    if optimizer == "adamw_torch":
        return ()
    return (_EIGHT_BIT_LEAST, _PAGED_LEAST) if optimizer == "paged_adamw_8bit" else (_EIGHT_BIT_LEAST,)


def _block(nbytes: int) -> int:
    return -(-nbytes // _GRANULE) * _GRANULE


def _scale_bytes(elements: int) -> int:
    scales = -(-elements // NF4_BLOCK)
    return sum(map(_block, (scales, _FP32 * -(-scales // NF4_NESTED_BLOCK), *_TABLE_BYTES)))


def _optimizer_bytes(elements: int, optimizer: Optimizer, item: int) -> int:
    """Bytes of the two moments of one tensor."""
    if optimizer == "adamw_torch":
        return 2 * _block(item * elements)
    if elements < _EIGHT_BIT_LEAST:
        return 2 * _block(_FP32 * elements)
    paged = optimizer == "paged_adamw_8bit" and elements >= _PAGED_LEAST
    return 2 * (_block(0 if paged else elements) + _block(_FP32 * -(-elements // _EIGHT_BIT_BLOCK)))
