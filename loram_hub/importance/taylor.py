"""Taylor importance with one decoder layer in memory: exact, not an approximation.

Forward: stream the layers, write each layer's input to a temporary file. Backward: reload a layer, re-run it with
gradients on its stored input, reduce the weight gradients to group scores, drop them, pass the input's gradient on. The
scores equal a full backward to rounding; every weight is read twice; memory does not grow with depth.

Shapes in this file: N samples, T tokens, H hidden_size, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loram_hub.architecture import EMBEDDING, LAYER_PREFIX, LM_HEAD, Architecture, Space, layer_tensor
from loram_hub.checkpoint import Checkpoint
from loram_hub.files import resource_errors
from loram_hub.importance.groups import GroupScores, Scores
from loram_hub.importance.stand_ins import HiddenStates, Recorder, TensorFile, first_output, return_freed_memory


class StreamedTaylor:
    """The model on the meta device, of which one part at a time is given real weights."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        variant: str,
        device: str,
        dtype: torch.dtype | None,
        batch_size: int,
    ) -> None:
        self._checkpoint, self._architecture, self._variant = checkpoint, architecture, variant
        self._device = torch.device(device)
        stored = checkpoint.read(layer_tensor(0, architecture.projections[0].name)).dtype
        self._dtype = dtype or (torch.float32 if self._device.type == "cpu" else stored)
        self._batch_size = 1 if variant in ("param_second", "param_mix") else batch_size
        config = CONFIG_MAPPING[architecture.family.model_type].from_dict(dict(checkpoint.config))
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config, dtype=self._dtype).eval()
        self._layers: list[nn.Module] = list(self._model.model.layers)

    def scores(self, ids_NT: torch.Tensor, wanted: list[int]) -> Scores:
        """Score the wanted layers (ascending) on calibration ids, int64."""
        last = len(self._layers)
        with (
            resource_errors("Storing layer inputs for Taylor importance"),
            TensorFile() as stored_inputs,
            tqdm(total=2 * last - wanted[0] + 1, desc="Taylor importance", unit="layer") as bar,
        ):
            hidden_NTH, layer_kwargs = self._embed(ids_NT)
            for layer in range(last):
                stored_inputs.write(layer, hidden_NTH)
                hidden_NTH = self._forward(layer, hidden_NTH, layer_kwargs[layer])
                bar.update()
            gradient_NTH = self._loss_gradient(hidden_NTH, ids_NT)
            bar.update()
            found: dict[int, Mapping[Space, npt.NDArray[np.float32]]] = {}
            for layer in range(last - 1, wanted[0] - 1, -1):
                with self._loaded(self._layers[layer], f"{LAYER_PREFIX}.{layer}.") as module:
                    gradients = WeightGradients(module if layer in wanted else None, ids_NT.shape[0], self._variant)
                    gradient_NTH = self._backward(
                        module, stored_inputs.read(layer), gradient_NTH, layer_kwargs[layer], gradients.collect
                    )
                    if layer in wanted:
                        found[layer] = self._reduce(module, gradients)
                    del gradients
                bar.update()
        return dict(sorted(found.items()))

    @contextmanager
    def _loaded(self, module: nn.Module, prefix: str, *, alias: Mapping[str, str] | None = None) -> Iterator[nn.Module]:
        """Give a part of the model its weights (in the compute dtype, without gradients), and take them away again."""
        for owner in module.modules():
            if owner._non_persistent_buffers_set:  # rotary frequencies, embedding scales: computed, not stored
                for name in owner._non_persistent_buffers_set:
                    owner._buffers[name] = torch.empty_like(
                        cast("torch.Tensor", owner._buffers[name]), device=self._device
                    )
                with torch.no_grad():
                    self._model._init_weights(owner)
        for name, _ in list(module.named_parameters()):
            stored = (alias or {}).get(prefix + name, prefix + name)
            tensor = self._checkpoint.read(stored).to(self._device, self._dtype)
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, torch.nn.Parameter(tensor, requires_grad=False))
        try:
            yield module
        finally:
            module.to("meta")
            return_freed_memory()

    def _embed(self, ids_NT: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Run the model's own preamble; return the first layer's input and the other arguments of every layer.

        The model runs whole, with recorders in place of its layers: masks, rotary embeddings and scalings are then
        the library's.
        """
        inner = self._model.model
        recorders = [Recorder(layer) for layer in self._layers]
        inner.layers = torch.nn.ModuleList(recorders)
        parts = [(module, f"model.{name}.") for name, module in inner.named_children() if name != "layers"]
        try:
            with ExitStack() as loaded, torch.no_grad():
                for module, prefix in parts:
                    loaded.enter_context(self._loaded(module, prefix))
                hidden = []
                for start in range(ids_NT.shape[0]):
                    inner(input_ids=ids_NT[start : start + 1].to(self._device), use_cache=False)
                    hidden.append(cast("torch.Tensor", recorders[0].hidden_states).cpu())
        finally:
            inner.layers = torch.nn.ModuleList(self._layers)
        return torch.cat(hidden), [recorder.kwargs for recorder in recorders]

    def _batches(self, samples: int) -> Iterator[slice]:
        for start in range(0, samples, self._batch_size):
            yield slice(start, min(start + self._batch_size, samples))

    def _forward(self, layer: int, hidden_NTH: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        with self._loaded(self._layers[layer], f"{LAYER_PREFIX}.{layer}.") as module, torch.no_grad():
            outputs = [
                first_output(module(hidden_NTH[batch].to(self._device), **kwargs)).cpu()
                for batch in self._batches(len(hidden_NTH))
            ]
        return torch.cat(outputs)

    def _loss_gradient(self, hidden_NTH: torch.Tensor, ids_NT: torch.Tensor) -> torch.Tensor:
        """Gradient of the mean next-token loss with respect to the last layer's output, (N, T, H)."""
        inner = self._model.model
        norm = inner.norm
        self._model.model = stand_in = HiddenStates(norm)
        lm_head_prefix = LM_HEAD.removesuffix("weight")
        alias = (
            {}
            if LM_HEAD in self._checkpoint.tensors and not self._architecture.tie_word_embeddings
            else {LM_HEAD: EMBEDDING}
        )
        gradients = []
        try:
            with (
                self._loaded(norm, "model.norm."),
                self._loaded(self._model.lm_head, lm_head_prefix, alias=alias),
            ):
                for sample in range(
                    ids_NT.shape[0]
                ):  # one at a time: logits of a large vocabulary are the largest tensor here
                    stand_in.hidden_states = hidden_NTH[sample : sample + 1].to(self._device).requires_grad_()
                    ids = ids_NT[sample : sample + 1].to(self._device)
                    loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss / ids_NT.shape[0]
                    loss.backward()
                    gradients.append(cast("torch.Tensor", stand_in.hidden_states.grad).cpu())
        finally:
            self._model.model = inner
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
            inputs = hidden_NTH[batch].to(self._device).requires_grad_()
            first_output(module(inputs, **kwargs)).backward(gradient_NTH[batch].to(self._device))
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
