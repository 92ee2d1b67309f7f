"""loram-hub: publish pruned models for LoRAM training, and recover the adapters trained on them to full size.

LoRAM (arXiv 2502.13533): train LoRA on a pruned model, recover the low-rank factors, infer on the original model.

The names below load their modules on first use, so that `recover`, `verify` and `info` never import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loram_hub.alignment import align as align
    from loram_hub.auto import AutoLoramModel as AutoLoramModel
    from loram_hub.downstream import evaluate_tasks as evaluate_tasks
    from loram_hub.errors import LoramError as LoramError
    from loram_hub.estimation import MemoryOptions as MemoryOptions
    from loram_hub.evaluation import evaluate as evaluate
    from loram_hub.finetuning import RecoverCallback as RecoverCallback
    from loram_hub.finetuning import finetune as finetune
    from loram_hub.fitting import estimate_memory as estimate_memory
    from loram_hub.inspection import count_parameters as count_parameters
    from loram_hub.inspection import info as info
    from loram_hub.inspection import verify as verify
    from loram_hub.lowmemory import reduce_memory_ as reduce_memory_
    from loram_hub.masked_lora import mask_lora_ as mask_lora_
    from loram_hub.merging import merge as merge
    from loram_hub.pipeline import publish as publish
    from loram_hub.pruning import prune as prune
    from loram_hub.pushing import push as push
    from loram_hub.pushing import push_adapter as push_adapter
    from loram_hub.quantization import quantize as quantize
    from loram_hub.recovery import recover as recover
    from loram_hub.refitting import refit as refit
    from loram_hub.reporting import report as report
    from loram_hub.rescaling import recover_scaled as recover_scaled
    from loram_hub.sparsification import SparsitySettings as SparsitySettings
    from loram_hub.sparsification import sparsify as sparsify
    from loram_hub.studies import run_study as run_study
    from loram_hub.teaching import teach as teach
    from loram_hub.updates import update_norms as update_norms

_HOME = {
    "AutoLoramModel": "auto",
    "LoramError": "errors",
    "MemoryOptions": "estimation",
    "RecoverCallback": "finetuning",
    "SparsitySettings": "sparsification",
    "align": "alignment",
    "count_parameters": "inspection",
    "estimate_memory": "fitting",
    "evaluate": "evaluation",
    "evaluate_tasks": "downstream",
    "finetune": "finetuning",
    "info": "inspection",
    "mask_lora_": "masked_lora",
    "merge": "merging",
    "prune": "pruning",
    "publish": "pipeline",
    "push": "pushing",
    "push_adapter": "pushing",
    "quantize": "quantization",
    "recover": "recovery",
    "recover_scaled": "rescaling",
    "reduce_memory_": "lowmemory",
    "refit": "refitting",
    "report": "reporting",
    "run_study": "studies",
    "sparsify": "sparsification",
    "teach": "teaching",
    "update_norms": "updates",
    "verify": "inspection",
}

__all__ = [
    "AutoLoramModel",
    "LoramError",
    "MemoryOptions",
    "RecoverCallback",
    "SparsitySettings",
    "align",
    "count_parameters",
    "estimate_memory",
    "evaluate",
    "evaluate_tasks",
    "finetune",
    "info",
    "mask_lora_",
    "merge",
    "prune",
    "publish",
    "push",
    "push_adapter",
    "quantize",
    "recover",
    "recover_scaled",
    "reduce_memory_",
    "refit",
    "report",
    "run_study",
    "sparsify",
    "teach",
    "update_norms",
    "verify",
]

_OWN = "loram_hub"


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {_OWN!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{_OWN}.{_HOME[name]}"), name)
    except ModuleNotFoundError as err:
        if err.name is None or err.name.split(".")[0] == _OWN:
            raise
        from loram_hub.errors import MissingDependencyError

        raise MissingDependencyError(
            f"loram_hub.{name} needs {err.name}, which is not installed. Install torch for your machine first, then "
            "'loram-hub[consume]' to train, or 'loram-hub[publish]' to prune."
        ) from err


def __dir__() -> list[str]:
    return sorted(__all__)
