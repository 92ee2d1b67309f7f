"""The canonical adapter folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loram_hub.adapter.config import CONFIG
from loram_hub.adapter.tensors import CODES, DTYPES, PREFIX, WEIGHTS, DtypeName, Factor
from loram_hub.files import dump_json, resource_errors

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank (0.32, config/lora.py)."""

MODEL_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""Hub ids and bare folder names: nothing that a consumer of the adapter could open as a path of its machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CanonicalAdapter:
    """All of a canonical adapter but its numbers."""

    base_id: str | None
    """Hub id of the model it applies to; None if nobody said."""
    revision: str | None
    """Commit of that model."""
    r: int
    """Rank of every module."""
    lora_alpha: int
    """Scale of every module, times r."""
    target_modules: tuple[str, ...]
    """Sorted."""
    dtype: DtypeName
    """Type of every factor."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each adapted weight, (out_features, in_features), by module path."""

    @property
    def parameters(self) -> int:
        """Numbers in all factors."""
        return sum(self.r * (rows + columns) for rows, columns in self.shapes.values())

    def to_config(self) -> dict[str, object]:
        """Return the content of `adapter_config.json`: what PEFT, old and new, and vLLM need, and no more."""
        return {
            "base_model_name_or_path": self.base_id,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.r,
            "revision": self.revision,
            "target_modules": list(self.target_modules),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }

    def header(self) -> bytes:
        """Return the safetensors header; the data follows in the order of `modules`, lora_A before lora_B."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for module in self.modules:
            rows, columns = self.shapes[module]
            for factor, shape in (("A", (self.r, columns)), ("B", (rows, self.r))):
                end = offset + math.prod(shape) * DTYPES[self.dtype].itemsize
                entries[f"{PREFIX}{module}.lora_{factor}.weight"] = {
                    "dtype": CODES[self.dtype],
                    "shape": list(shape),
                    "data_offsets": [offset, end],
                }
                offset = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        padded = -(-len(text) // 8) * 8  # the data starts aligned
        return padded.to_bytes(8, "little") + text.ljust(padded)

    @property
    def modules(self) -> list[str]:
        """Module paths in the order of their tensors' full names."""
        return sorted(self.shapes, key=lambda module: f"{module}.")

    @property
    def nbytes(self) -> int:
        """Size of the weight file in bytes."""
        return len(self.header()) + self.parameters * DTYPES[self.dtype].itemsize


def write_adapter(folder: Path, adapter: CanonicalAdapter, factors: Callable[[str], tuple[Factor, Factor]]) -> None:
    """Write config and weights into an existing folder, one module in memory at a time.

    The weights are, to the byte, what `safetensors.numpy.save_file` writes, which wants all of them in memory.

    Args:
        folder: where to.
        adapter: everything but the numbers.
        factors: gives lora_A (r, in_features) and lora_B (out_features, r) of a module, contiguous, in `adapter.dtype`.

    Raises:
        ResourceError: the disk is full or not writable.
    """
    with resource_errors(f"Writing {folder}"):
        (folder / CONFIG).write_text(dump_json(adapter.to_config()), encoding="utf-8")
        with (folder / WEIGHTS).open("wb") as file:
            file.write(adapter.header())
            for module in adapter.modules:
                for values in factors(module):
                    file.write(values.reshape(-1).view(np.uint8).data)


def max_lora_rank(rank: int) -> int:
    """The smallest --max-lora-rank with which vLLM serves a rank; the rank itself if vLLM takes none so large."""
    return next((taken for taken in VLLM_RANKS if taken >= rank), rank)
