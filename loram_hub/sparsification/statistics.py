"""What a method needs to know of a matrix's inputs, taken from the forward passes of the calibration.

Matrices that are given the same tensor (queries, keys and values; gate and up) share one statistic.

Shapes in this file: B samples of a batch, T tokens, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import nn


class Hessian:
    """H = 2 / N sum x x^T over the tokens of N samples, a running mean in fp32: of SparseGPT's squared error."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.matrix_II = torch.zeros(columns, columns, device=device)
        self._samples = 0

    def add(self, inputs_BTI: torch.Tensor) -> None:
        """Take in a batch."""
        before, self._samples = self._samples, self._samples + len(inputs_BTI)
        inputs_MI = inputs_BTI.flatten(0, -2).float()
        self.matrix_II.addmm_(inputs_MI.T, inputs_MI, beta=before / self._samples, alpha=2 / self._samples)


class InputNorms:
    """|x_j|^2 / N over the tokens of N samples, a running mean in fp32: what Wanda weighs the columns with."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.squares_I = torch.zeros(columns, device=device)
        self._samples = 0

    def add(self, inputs_BTI: torch.Tensor) -> None:
        """Take in a batch."""
        before, self._samples = self._samples, self._samples + len(inputs_BTI)
        squares_I = inputs_BTI.flatten(0, -2).float().square().sum(0)
        self.squares_I.mul_(before / self._samples).add_(squares_I, alpha=1 / self._samples)


Statistic: TypeAlias = Hessian | InputNorms


@contextmanager
def collected(
    layer: nn.Module, modules: Iterable[str], start: Callable[[int, torch.device], Statistic]
) -> Iterator[Mapping[str, Statistic]]:
    """Collect statistics of the inputs of a layer's linear modules while it runs.

    Args:
        layer: the decoder layer.
        modules: paths of its linear modules.
        start: makes a statistic of so many columns on a device.

    Yields:
        The statistic of each module; one and the same for modules that are given the same tensor, one after another.
    """
    found: dict[str, Statistic] = {}
    latest: list[tuple[torch.Tensor, Statistic]] = []  # the tensor is held, so that no other can take its place

    def keep(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs = args[0]
            if latest and latest[0][0] is inputs:
                found[path] = latest[0][1]
                return
            if path not in found:
                found[path] = start(inputs.shape[-1], inputs.device)
            found[path].add(inputs)
            latest[:] = [(inputs, found[path])]

        return hook

    handles = [layer.get_submodule(path).register_forward_pre_hook(keep(path)) for path in modules]
    try:
        yield found
    finally:
        latest.clear()
        for handle in handles:
            handle.remove()
