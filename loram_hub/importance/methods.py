"""The methods by name, and the two that need no gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub.utils import tqdm

from loram_hub.architecture import Architecture, Space, layer_tensor
from loram_hub.checkpoint import Checkpoint
from loram_hub.errors import InvalidRequestError
from loram_hub.importance.groups import GroupScores, Scores
from loram_hub.importance.taylor import StreamedTaylor
from loram_hub.texts import check_calibration

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "random": (),
    "magnitude": ("l2", "l1"),
    "taylor": ("param_first", "vectorize", "param_second", "param_mix"),
}
"""Importance methods with their variants, the default first; written `method:variant`."""


@dataclass(frozen=True, slots=True)
class Importance:
    """A method and its variant."""

    method: str
    variant: str | None

    def __str__(self) -> str:
        """Return `method:variant`, the form `parse_importance` reads."""
        return self.method if self.variant is None else f"{self.method}:{self.variant}"


def parse_importance(text: str) -> Importance:
    """Read `random`, `magnitude`, `magnitude:l1`, `taylor`, `taylor:vectorize`, ...

    Raises:
        InvalidRequestError: no such method or variant.
    """
    method, _, variant = text.partition(":")
    variants = VARIANTS.get(method)
    if variants is None or (variant and variant not in variants):
        known = [name for m, vs in VARIANTS.items() for name in (m, *(f"{m}:{v}" for v in vs))]
        raise InvalidRequestError(f"Importance {text!r} is unknown; choose one of {', '.join(known)}.")
    return Importance(method, variant or (variants[0] if variants else None))


def importance_scores(
    checkpoint: Checkpoint,
    architecture: Architecture,
    layers: Iterable[int],
    *,
    importance: Importance,
    calibration: torch.Tensor | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
) -> Scores:
    """Score every channel group of the given layers.

    Args:
        checkpoint: the base model, open.
        architecture: its architecture.
        layers: numbers of the layers to score.
        importance: method and variant.
        calibration: token ids, int64, (N, T); needed by `taylor` alone.
        seed: of `random`.
        device: where `taylor` computes; None for the CPU.
        dtype: what `taylor` computes in; None for fp32 on the CPU and the stored type elsewhere. Gradients always add
            up in fp32.
        batch_size: samples per forward and backward pass; changes memory and speed, not the scores.

    Returns:
        fp32 scores per layer and space, `kv_heads` (num_key_value_heads,) and `channels` (intermediate_size,).

    Raises:
        InvalidRequestError: `taylor` without usable calibration ids.
    """
    wanted = sorted(set(layers))
    if importance.method == "random":
        return {layer: _random_scores(architecture, layer, seed) for layer in wanted}
    if importance.method == "magnitude":
        power = 1 if importance.variant == "l1" else 2
        bar = tqdm(wanted, desc=f"Importance ({importance})", unit="layer")
        return {layer: _magnitude_scores(checkpoint, architecture, layer, power) for layer in bar}
    if calibration is None:
        raise InvalidRequestError("Taylor importance needs calibration: token ids, or a file or dataset with texts.")
    check_calibration(calibration, vocab_size=architecture.vocab_size)
    taylor = StreamedTaylor(checkpoint, architecture, str(importance.variant), device or "cpu", dtype, batch_size)
    return taylor.scores(calibration, wanted)


def _random_scores(architecture: Architecture, layer: int, seed: int) -> dict[Space, npt.NDArray[np.float32]]:
    rng = np.random.default_rng([seed, layer])
    whole = architecture.whole_layer
    return {
        "kv_heads": rng.random(whole.kv_heads, dtype=np.float32),
        "channels": rng.random(whole.channels, dtype=np.float32),
    }


def _magnitude_scores(
    checkpoint: Checkpoint, architecture: Architecture, layer: int, power: int
) -> dict[Space, npt.NDArray[np.float32]]:
    scores = GroupScores(architecture)
    for weight in architecture.projections:
        scores.add(weight, checkpoint.read(layer_tensor(layer, weight.name)).float().abs().pow(power))
    return scores.result()
