"""The model streamed and pruned, layer after layer.

Each layer runs twice over the calibration: with its own weights, when the inputs of its matrices are looked at, and
with the pruned ones, whose outputs feed the next. A layer that an earlier run has finished runs once. One layer is in
memory at a time, beside the hidden states of the calibration and what is known of one layer's inputs: flat in depth.

Shapes in this file: N samples, T tokens, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn

from loram_hub.architecture import Architecture, Weight, layer_tensor
from loram_hub.checkpoint import Checkpoint
from loram_hub.errors import VerificationError
from loram_hub.sparsification.finished import FinishedLayers
from loram_hub.sparsification.matrices import SparseMatrix, prune_matrices
from loram_hub.sparsification.settings import SparsitySettings
from loram_hub.sparsification.statistics import Hessian, InputNorms, Statistic, collected
from loram_hub.streaming import StreamedModel

TOKENS_AT_ONCE = 2048
"""Tokens in one forward pass, or one sample if it is longer; fixed, for the bytes of a release depend on it."""

Pruned = dict[str, SparseMatrix]
"""The matrices of a layer by full name, weights in the type that they are stored in, on the CPU."""


def prune_layers(
    checkpoint: Checkpoint,
    architecture: Architecture,
    ids_NT: torch.Tensor | None,
    settings: SparsitySettings,
    finished: FinishedLayers,
    *,
    device: str | None,
) -> None:
    """Prune every layer that is not finished, and add it to those that are.

    Args:
        checkpoint: the base, open.
        architecture: its architecture.
        ids_NT: calibration, int64; None for magnitude.
        settings: method, and how much of which pattern.
        finished: the layers that are done.
        device: where to compute; None for the CPU.

    Raises:
        VerificationError: a weight or an activation is not finite.
        ResourceError: the disk is full.
    """
    last = architecture.num_hidden_layers - 1
    with tqdm(total=last + 1, initial=finished.count, desc=f"Pruning ({settings.method})", unit="layer") as bar:
        if finished.count > last:
            return
        if ids_NT is None:
            for layer in range(finished.count, last + 1):
                finished.add(layer, _pruned_by_magnitude(checkpoint, architecture, layer, settings, device))
                bar.update()
            return
        model = StreamedModel(checkpoint, architecture, device=device)
        hidden_NTH, kwargs = model.embed(ids_NT)
        batch_size = max(1, TOKENS_AT_ONCE // ids_NT.shape[1])
        for layer in range(last + 1):
            with model.layer(layer) as module:
                if layer < finished.count:
                    _take_up_(module, finished, architecture, layer)
                else:
                    statistics = _input_statistics(
                        model, module, architecture, hidden_NTH, kwargs[layer], settings, batch_size
                    )
                    finished.add(layer, _prune_(module, statistics, layer, checkpoint, settings))
                    bar.update()
                if layer < last:
                    model.forward_(module, hidden_NTH, kwargs[layer], batch_size=batch_size)


def _take_up_(module: nn.Module, finished: FinishedLayers, architecture: Architecture, layer: int) -> None:
    """Give a layer the weights that an earlier run has pruned."""
    for weight in architecture.projections:
        module.get_parameter(weight.name).copy_(finished.weight(layer, layer_tensor(layer, weight.name)))


def _input_statistics(
    model: StreamedModel,
    module: nn.Module,
    architecture: Architecture,
    hidden_NTH: torch.Tensor,
    kwargs: Mapping[str, Any],
    settings: SparsitySettings,
    batch_size: int,
) -> list[tuple[Statistic, list[Weight]]]:
    """Run a layer with the weights that it has, and return what its matrices are given, with those given the same."""
    kind: type[Statistic] = Hessian if settings.method == "sparsegpt" else InputNorms
    weights = {weight.module: weight for weight in architecture.projections}
    with collected(module, weights, kind) as found:
        for states_BTH in hidden_NTH.split(batch_size):
            model.run(module, states_BTH, kwargs)
    sharing: dict[int, tuple[Statistic, list[Weight]]] = {}
    for path, statistic in found.items():
        sharing.setdefault(id(statistic), (statistic, []))[1].append(weights[path])
    return list(sharing.values())


def _prune_(
    module: nn.Module,
    statistics: list[tuple[Statistic, list[Weight]]],
    layer: int,
    checkpoint: Checkpoint,
    settings: SparsitySettings,
) -> Pruned:
    """Prune a layer in place, in the precision that its weights are stored in; uses the statistics up."""
    pruned: Pruned = {}
    while statistics:
        inputs, weights = statistics.pop(0)
        parameters = {layer_tensor(layer, weight.name): module.get_parameter(weight.name) for weight in weights}
        dense = {name: parameter.float() for name, parameter in parameters.items()}
        for name, matrix in prune_matrices(dense, inputs, settings):
            pruned[name] = _as_stored(name, matrix, checkpoint)
            parameters[name].copy_(pruned[name].weight_OI)
    return pruned


def _pruned_by_magnitude(
    checkpoint: Checkpoint, architecture: Architecture, layer: int, settings: SparsitySettings, device: str | None
) -> Pruned:
    pruned: Pruned = {}
    for weight in architecture.projections:
        name = layer_tensor(layer, weight.name)
        dense = {name: checkpoint.read(name).to(device or "cpu", torch.float32)}
        pruned |= {name: _as_stored(name, matrix, checkpoint) for name, matrix in prune_matrices(dense, None, settings)}
    return pruned


def _as_stored(name: str, matrix: SparseMatrix, checkpoint: Checkpoint) -> SparseMatrix:
    """Round a matrix to the type that the base has it in: what the next layers see is what the release will hold."""
    dtype = checkpoint.read_rows(name, 0, 1).dtype
    weight_OI = matrix.weight_OI.to(dtype)
    if not bool(weight_OI.isfinite().all()):
        raise VerificationError(f"The pruned {name} is not finite in {dtype}. Give more calibration or dampening.")
    return SparseMatrix(weight_OI.cpu(), matrix.mask_OI.cpu(), matrix.dampening)
