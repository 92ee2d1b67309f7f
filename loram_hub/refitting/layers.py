"""A release's new o_proj and down_proj weights, layer by layer, from activations that are streamed.

`output`: the base runs over the calibration. Each matrix is solved so that, on the base's own activations at the kept
inputs, it gives what the whole matrix gives.

`residual`: base and release run over the calibration in lockstep. In each pruned layer first o_proj, then down_proj is
solved so that the release's residual stream lands on the base's: for the base's stream after the sub-block, less the
release's stream as the sub-block leaves it. What one matrix cannot mend, the next one sees. Base and release are never
in memory together: one layer of one of them is.

Both take the activations from the library's own layers, by hooks, in fp32. Memory: a decoder layer, the residual
streams of the calibration, and the normal equations of one matrix (`residual`) or two (`output`): flat in depth.

Shapes in this file: N samples, B samples of a batch, T tokens, H hidden_size, K kept columns, O rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loram_hub.architecture import Weight, layer_tensor
from loram_hub.checkpoint import Checkpoint
from loram_hub.plan import Plan
from loram_hub.refitting.least_squares import ColumnFit
from loram_hub.refitting.settings import RefitSettings
from loram_hub.streaming import StreamedModel, return_freed_memory

BATCH_SIZE = 8
"""Samples in one forward pass; fixed, for the bytes of a release depend on it."""

Solved = Mapping[str, torch.Tensor]
"""New weights by full name, in the type they are stored in."""


def refitted_layers(plan: Plan) -> list[int]:
    """Numbers of the layers that lost anything, ascending; no other is refitted."""
    return [layer for layer, sizes in enumerate(plan.layers) if sizes != plan.architecture.whole_layer]


def refitted_weights(plan: Plan, layer: int, settings: RefitSettings) -> list[Weight]:
    """The matrices of a refitted layer that are solved for, in the order of the computation.

    One with all its columns gives what the base's gives already; the residual stream may still need it.
    """
    architecture = plan.architecture
    return [
        weight
        for weight in architecture.output_projections
        if settings.target == "residual"
        or architecture.shape(weight, plan.layers[layer]) != architecture.shape(weight, architecture.whole_layer)
    ]


def solve_layers(
    base: Checkpoint, release: Checkpoint, plan: Plan, ids_NT: torch.Tensor, settings: RefitSettings, device: str
) -> Iterator[tuple[int, Solved]]:
    """Yield the new weights of each refitted layer, ascending.

    Args:
        base: weights of the model that the release was pruned from.
        release: weights of the release.
        plan: what was kept.
        ids_NT: calibration, int64.
        settings: what to solve for.
        device: where to compute.
    """
    base_model = StreamedModel(base, plan.architecture, device=device, dtype=torch.float32)
    if settings.target == "output":
        return _solve_outputs(base_model, release, plan, ids_NT, settings)
    release_model = StreamedModel(release, plan.architecture, sizes=plan.layers, device=device, dtype=torch.float32)
    return _solve_residuals(base_model, release_model, release, plan, ids_NT, settings)


def _solve_outputs(
    base: StreamedModel, release: Checkpoint, plan: Plan, ids_NT: torch.Tensor, settings: RefitSettings
) -> Iterator[tuple[int, Solved]]:
    wanted = refitted_layers(plan)
    hidden_NTH, layer_kwargs = base.embed(ids_NT)
    for layer in range(wanted[-1] + 1):
        weights = refitted_weights(plan, layer, settings) if layer in wanted else []
        matrices = [_PrunedMatrix(release, plan, layer, weight, base.device) for weight in weights]
        with base.layer(layer) as module:
            _compare(base, module, matrices, hidden_NTH, layer_kwargs[layer])
        solved = {matrix.name: matrix.fit.solve(settings.ridge, matrix.dtype) for matrix in matrices}
        del matrices
        return_freed_memory()  # before the next layer has its weights
        if solved:
            yield layer, solved


def _compare(
    base: StreamedModel,
    module: nn.Module,
    matrices: Sequence[_PrunedMatrix],
    hidden_NTH: torch.Tensor,
    kwargs: Mapping[str, Any],
) -> None:
    """Run the base's layer in place, and show its activations to the release's matrices."""
    with _watched(module, [matrix.path for matrix in matrices]) as seen:
        for states_BTH in hidden_NTH.split(BATCH_SIZE):
            states_BTH.copy_(base.run(module, states_BTH, kwargs))
            for matrix in matrices:
                matrix.compare(seen[matrix.path])


class _PrunedMatrix:
    """What a release has of one of the base's matrices."""

    def __init__(self, release: Checkpoint, plan: Plan, layer: int, weight: Weight, device: torch.device) -> None:
        self.name, self.path = layer_tensor(layer, weight.name), weight.module
        stored_OK = release.read(self.name)
        self.dtype = stored_OK.dtype
        self._weight_OK = stored_OK.to(device, torch.float32)
        bias = layer_tensor(layer, f"{weight.module}.bias")
        self._bias_O = release.read(bias).to(device, torch.float32) if bias in release.tensors else None
        self._columns_K = torch.from_numpy(plan.kept_on_axes(self.name)[1]).to(device)
        self.fit = ColumnFit(self.name, self._weight_OK)

    def compare(self, seen: _Seen) -> None:
        """Add what the release's matrix falls short of on a batch of the base's activations."""
        kept_BTK = seen.inputs[..., self._columns_K]
        self.fit.add(kept_BTK, seen.outputs - nn.functional.linear(kept_BTK, self._weight_OK, self._bias_O))


def _solve_residuals(
    base: StreamedModel,
    pruned: StreamedModel,
    release: Checkpoint,
    plan: Plan,
    ids_NT: torch.Tensor,
    settings: RefitSettings,
) -> Iterator[tuple[int, Solved]]:
    wanted = refitted_layers(plan)
    (base_NTH, base_kwargs), (pruned_NTH, pruned_kwargs) = base.embed(ids_NT), pruned.embed(ids_NT)
    attention, mlp = plan.architecture.output_projections
    for layer in range(wanted[-1] + 1):
        with base.layer(layer) as module:
            between_NTH = _advance(base, module, attention, base_NTH, base_kwargs[layer])
        targets = {attention: between_NTH, mlp: base_NTH} if layer in wanted else {}
        solved: dict[str, torch.Tensor] = {}
        with pruned.layer(layer) as module:
            for weight, target_NTH in targets.items():
                name, parameter = layer_tensor(layer, weight.name), module.get_parameter(weight.name)
                fit = ColumnFit(name, parameter)
                _show_stream(pruned, module, weight, fit, pruned_NTH, target_NTH, pruned_kwargs[layer])
                solved[name] = fit.solve(settings.ridge, release.read(name).dtype)
                parameter.copy_(solved[name])  # what follows sees what the release will hold
                del fit, parameter
            pruned.forward_(module, pruned_NTH, pruned_kwargs[layer], batch_size=BATCH_SIZE)
        if solved:
            yield layer, solved


def _advance(
    model: StreamedModel, module: nn.Module, attention: Weight, hidden_NTH: torch.Tensor, kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """Run a layer in place; returns the residual stream between attention and MLP, (N, T, H)."""
    between_NTH = torch.empty_like(hidden_NTH)
    with _watched(module, [attention.module]) as seen:
        for states_BTH, between_BTH in zip(hidden_NTH.split(BATCH_SIZE), between_NTH.split(BATCH_SIZE), strict=True):
            outputs_BTH = model.run(module, states_BTH, kwargs)
            between_BTH.copy_(states_BTH.to(model.device) + seen[attention.module].outputs)
            states_BTH.copy_(outputs_BTH)
    return between_NTH


def _show_stream(
    model: StreamedModel,
    module: nn.Module,
    weight: Weight,
    fit: ColumnFit,
    hidden_NTH: torch.Tensor,
    target_NTH: torch.Tensor,
    kwargs: Mapping[str, Any],
) -> None:
    """Show the fit of one of a layer's matrices how far the residual stream after its sub-block is from the target."""
    ends_attention = "query" in weight.axes[1]
    with _watched(module, [weight.module]) as seen:
        for states_BTH, target_BTH in zip(hidden_NTH.split(BATCH_SIZE), target_NTH.split(BATCH_SIZE), strict=True):
            reached_BTH = model.run(module, states_BTH, kwargs)
            if ends_attention:
                reached_BTH = states_BTH.to(model.device) + seen[weight.module].outputs
            fit.add(seen[weight.module].inputs, target_BTH.to(model.device) - reached_BTH)


@dataclass(slots=True)
class _Seen:
    """What a module was last called with, and what it gave."""

    inputs: torch.Tensor
    outputs: torch.Tensor


@contextmanager
def _watched(layer: nn.Module, modules: Iterable[str]) -> Iterator[Mapping[str, _Seen]]:
    """Keep inputs and outputs of a layer's modules at its last forward pass, by their paths."""
    seen: dict[str, _Seen] = {}

    def keep(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen[path] = _Seen(args[0], output)

        return hook

    handles = [layer.get_submodule(path).register_forward_hook(keep(path)) for path in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
