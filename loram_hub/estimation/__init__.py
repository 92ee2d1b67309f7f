"""Bytes on disk and in memory, floating-point operations, seconds, money: from `config.json` and a few settings.

Nothing is measured here, and nothing is read. `costs` tells what making a release needs on a machine (`hardware`).
`training` tells what a fine-tuning (`settings`, `options`) holds in the memory of a GPU (`gpus`), `standing` what of it
is there all the time, `layers` what a decoder layer adds; `solving` reads that backward. `sparsity` counts what is left
where single weights are removed.
"""

from loram_hub.estimation.costs import (
    TAYLOR_LAYERS,
    AlignmentShape,
    activation_bytes,
    align_cost,
    evaluate_cost,
    prune_cost,
    quantize_cost,
    refit_cost,
    sparsify_cost,
    teach_cost,
    transfer_cost,
)
from loram_hub.estimation.gpus import CARDS, GpuMemory, gpu_memory
from loram_hub.estimation.hardware import Cost, Hardware
from loram_hub.estimation.options import MemoryOptions
from loram_hub.estimation.settings import Optimizer, Reserves, TrainingShape, chosen_targets
from loram_hub.estimation.sizes import SIXTEEN_BIT, ModelSize, model_size
from loram_hub.estimation.solving import Largest, largest_settings, largest_that_fits, smallest_ratio
from loram_hub.estimation.sparsity import (
    SparseCounts,
    kept_of,
    mask_memory,
    planned_sparse_counts,
    removed_of,
    sparse_counts,
)
from loram_hub.estimation.training import MemoryBreakdown, training_memory

__all__ = [
    "CARDS",
    "SIXTEEN_BIT",
    "TAYLOR_LAYERS",
    "AlignmentShape",
    "Cost",
    "GpuMemory",
    "Hardware",
    "Largest",
    "MemoryBreakdown",
    "MemoryOptions",
    "ModelSize",
    "Optimizer",
    "Reserves",
    "SparseCounts",
    "TrainingShape",
    "activation_bytes",
    "align_cost",
    "chosen_targets",
    "evaluate_cost",
    "gpu_memory",
    "kept_of",
    "largest_settings",
    "largest_that_fits",
    "mask_memory",
    "model_size",
    "planned_sparse_counts",
    "prune_cost",
    "quantize_cost",
    "refit_cost",
    "removed_of",
    "smallest_ratio",
    "sparse_counts",
    "sparsify_cost",
    "teach_cost",
    "training_memory",
    "transfer_cost",
]
