"""Taylor importance with one decoder layer in memory: exact, not an approximation.

Forward: stream the layers, write each layer's input to a temporary file. Backward: reload a layer, re-run it with
gradients on its stored input, reduce the weight gradients to group scores, drop them, pass the input's gradient on. The
scores equal a full backward to rounding; every weight is read twice; memory does not grow with depth.

Shapes in this file: N samples, T tokens, H hidden_size, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub.utils import tqdm
from torch import nn

from loram_hub.architecture import Architecture, Space
from loram_hub.checkpoint import Checkpoint
from loram_hub.files import resource_errors
from loram_hub.importance.groups import GroupScores, Scores
from loram_hub.streaming import StreamedModel, TensorFile, first_output


class StreamedTaylor:
    """Taylor scores of a base model that is streamed layer by layer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        variant: str,
        device: str,
        dtype: torch.dtype | None,
        batch_size: int,
    ) -> None:
        self._architecture, self._variant = architecture, variant
        self._model = StreamedModel(checkpoint, architecture, device=device, dtype=dtype)
        self._batch_size = 1 if variant in ("param_second", "param_mix") else batch_size

    def scores(self, ids_NT: torch.Tensor, wanted: list[int]) -> Scores:
        """Score the wanted layers (ascending) on calibration ids, int64."""
        last = len(self._model.layers)
        with (
            resource_errors("Storing layer inputs for Taylor importance"),
            TensorFile() as stored_inputs,
            tqdm(total=2 * last - wanted[0] + 1, desc="Taylor importance", unit="layer") as bar,
        ):
            hidden_NTH, layer_kwargs = self._model.embed(ids_NT)
            for layer in range(last):
                stored_inputs.write(layer, hidden_NTH)
                with self._model.layer(layer) as module:
                    self._model.forward_(module, hidden_NTH, layer_kwargs[layer], batch_size=self._batch_size)
                bar.update()
            gradient_NTH = self._loss_gradient(hidden_NTH, ids_NT)
            bar.update()
            found: dict[int, Mapping[Space, npt.NDArray[np.float32]]] = {}
            for layer in range(last - 1, wanted[0] - 1, -1):
                with self._model.layer(layer) as module:
                    gradients = WeightGradients(module if layer in wanted else None, ids_NT.shape[0], self._variant)
                    gradient_NTH = self._backward(
                        module, stored_inputs.read(layer), gradient_NTH, layer_kwargs[layer], gradients.collect
                    )
                    if layer in wanted:
                        found[layer] = self._reduce(module, gradients)
                    del gradients
                bar.update()
        return dict(sorted(found.items()))

    def _batches(self, samples: int) -> Iterator[slice]:
        for start in range(0, samples, self._batch_size):
            yield slice(start, min(start + self._batch_size, samples))

    def _loss_gradient(self, hidden_NTH: torch.Tensor, ids_NT: torch.Tensor) -> torch.Tensor:
        """Gradient of the mean next-token loss with respect to the last layer's output, (N, T, H)."""
        gradients = []
        with self._model.head() as head:
            for sample in range(len(ids_NT)):  # one at a time: logits of a large vocabulary are the largest tensor here
                hidden = hidden_NTH[sample : sample + 1].to(self._model.device).requires_grad_()
                ids = ids_NT[sample : sample + 1].to(self._model.device)
                loss = head(hidden, input_ids=ids, labels=ids).loss / len(ids_NT)
                loss.backward()
                gradients.append(cast("torch.Tensor", hidden.grad).cpu())
        return torch.cat(gradients)

    def _backward(
        self,
        module: nn.Module,
        hidden_NTH: torch.Tensor,
        gradient_NTH: torch.Tensor,
        kwargs: dict[str, Any],
        collect: Callable[[], None],
    ) -> torch.Tensor:
        passed_on = []
        for batch in self._batches(len(hidden_NTH)):
            inputs = hidden_NTH[batch].to(self._model.device).requires_grad_()
            first_output(module(inputs, **kwargs)).backward(gradient_NTH[batch].to(self._model.device))
            passed_on.append(cast("torch.Tensor", inputs.grad).cpu())
            collect()
        return torch.cat(passed_on)

    def _reduce(self, module: nn.Module, gradients: WeightGradients) -> dict[Space, npt.NDArray[np.float32]]:
        scores = GroupScores(self._architecture)
        for weight in self._architecture.projections:
            values = module.get_parameter(weight.name).detach().float()
            elements = gradients.element_scores(weight.name, values)
            scores.add(weight, elements, abs_after_sum=self._variant == "vectorize")
        return scores.result()


class WeightGradients:
    """Gradients of a layer's matrices, in fp32 over the batches: their sum, and the mean square of the samples' own."""

    def __init__(self, module: nn.Module | None, samples: int, variant: str) -> None:
        self._samples = samples
        self._variant = variant
        self._matrices = {} if module is None else {n: p for n, p in module.named_parameters() if p.ndim == 2}
        for parameter in self._matrices.values():
            parameter.requires_grad_()
        self._sum: dict[str, torch.Tensor] = {}
        self._square: dict[str, torch.Tensor] = {}

    def collect(self) -> None:
        """Take in and clear the gradients that one backward left."""
        for name, parameter in self._matrices.items():
            gradient = cast("torch.Tensor", parameter.grad)
            if self._variant in ("param_second", "param_mix"):
                # The batch is one sample of a mean over N: its own gradient is N times this one, and F = 1/N sum g_n^2.
                square = gradient.float().square().mul_(self._samples)
                self._square[name] = self._square[name].add_(square) if name in self._square else square
            elif gradient.dtype == torch.float32:
                self._sum[name] = gradient  # autograd itself adds the next batch to it, in fp32
                continue
            self._sum[name] = self._sum[name].add_(gradient) if name in self._sum else gradient.float()
            parameter.grad = None

    def element_scores(self, name: str, values_OI: torch.Tensor) -> torch.Tensor:
        """Return the variant's element scores, (O, I) fp32, signed for `vectorize` alone; uses the gradients up."""
        if self._variant == "vectorize":
            return self._sum[name].mul_(values_OI)
        if self._variant == "param_first":
            return self._sum[name].mul_(values_OI).abs_()
        second = self._square[name].mul_(values_OI).mul_(values_OI)
        if self._variant == "param_second":
            return second.abs_()
        return self._sum[name].mul_(values_OI).sub_(second, alpha=0.5).abs_()
