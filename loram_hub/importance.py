"""Importance: one score per channel group, higher is kept.

    random      uniform, seeded (LoRAM-Rand)
    magnitude   sum of |w|^p over the group, p = 1 (`l1`) or 2 (`l2`, the default)
    taylor      first- or second-order estimate of the loss when the group goes (LoRAM-Stru), as LLM-Pruner defines it
                (arXiv 2305.11627, eqs. 3-6): with weight W, gradient G of the mean loss over all calibration tokens,
                and F = 1/N sum_n g_n^2 over the N samples' own gradients,
                  param_first   |W o G|                    abs first, then the sum (the default)
                  vectorize     W o G                      sum along the removed slice first, then abs
                  param_second  |W o F o W|
                  param_mix     |W o G - 1/2 W o F o W|

A group's score is the sum over its rows of q, k, v, gate, up and its columns of o, down; biases and norms do not
count (as in LLM-Pruner). Query heads are credited to the KV head that serves them, h // (heads per KV head);
LLM-Pruner folds them by h % num_key_value_heads, which credits the wrong one under grouped-query attention.

Taylor is exact with one decoder layer in memory. Forward: stream the layers, write each layer's input to a temporary
file. Backward: reload a layer, re-run it with gradients on its stored input, reduce the weight gradients to group
scores, drop them, pass the input's gradient on. The scores equal a full backward to rounding; every weight is read
twice; memory does not grow with depth.

Shapes in this file: N samples, T tokens, H hidden_size, O out_features, I in_features.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loram_hub.architecture import (
    EMBEDDING,
    LAYER_PREFIX,
    LM_HEAD,
    SPACE_OF_UNIT,
    Architecture,
    Space,
    Weight,
    layer_tensor,
)
from loram_hub.checkpoint import Checkpoint
from loram_hub.errors import InvalidRequestError
from loram_hub.files import resource_errors

Scores = Mapping[int, Mapping[Space, npt.NDArray[np.float32]]]
"""Per pruned layer and space: one fp32 score per group."""

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
    _check_calibration(calibration, architecture)
    taylor = _StreamedTaylor(checkpoint, architecture, str(importance.variant), device or "cpu", dtype, batch_size)
    return taylor.scores(calibration, wanted)


def _check_calibration(ids: torch.Tensor, architecture: Architecture) -> None:
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2 or ids.is_floating_point():
        raise InvalidRequestError(
            "Calibration must be token ids of shape (samples, tokens), at least 1 sample of 2 tokens; "
            f"found {ids.dtype} of shape {tuple(ids.shape)}."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= architecture.vocab_size:
        raise InvalidRequestError(
            f"Calibration has token ids from {low} to {high}; "
            f"the vocabulary has {architecture.vocab_size:,}. Wrong tokenizer?"
        )


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
    scores = _GroupScores(architecture)
    for weight in architecture.projections:
        scores.add(weight, checkpoint.read(layer_tensor(layer, weight.name)).float().abs().pow(power))
    return scores.result()


class _GroupScores:
    """Sum element scores of a layer's matrices into one number per channel group, in fp32."""

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._sums: dict[Space, npt.NDArray[np.float32]] = {
            "kv_heads": np.zeros(architecture.num_key_value_heads, dtype=np.float32),
            "channels": np.zeros(architecture.intermediate_size, dtype=np.float32),
        }

    def add(self, weight: Weight, element_scores_OI: torch.Tensor, *, abs_after_sum: bool = False) -> None:
        """Add a matrix's element scores, (O, I) fp32, over the lines that belong to prunable units."""
        for axis, units in enumerate(weight.axes):
            if not any(unit in SPACE_OF_UNIT for unit in units):
                continue
            lines = element_scores_OI.sum(dim=1 - axis)
            if abs_after_sum:
                lines = lines.abs()
            start = 0
            for unit in units:
                width = self._architecture.unit_width(unit, self._architecture.whole_layer)
                rows = self._architecture.group_rows[unit]
                groups = lines[start : start + width].view(-1, rows).sum(dim=1)
                self._sums[SPACE_OF_UNIT[unit]] += groups.cpu().numpy()
                start += width

    def result(self) -> dict[Space, npt.NDArray[np.float32]]:
        return self._sums


class _StreamedTaylor:
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
        last = len(self._layers)
        with (
            resource_errors("Storing layer inputs for Taylor importance"),
            _TensorFile() as stored_inputs,
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
                    gradients = _WeightGradients(module if layer in wanted else None, ids_NT.shape[0], self._variant)
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

    def _embed(self, ids_NT: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Run the model's own preamble; return the first layer's input and the other arguments of every layer.

        The model runs whole, with recorders in place of its layers: masks, rotary embeddings and scalings are then
        the library's.
        """
        inner = self._model.model
        recorders = [_Recorder(layer) for layer in self._layers]
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
                _first(module(hidden_NTH[batch].to(self._device), **kwargs)).cpu()
                for batch in self._batches(len(hidden_NTH))
            ]
        return torch.cat(outputs)

    def _loss_gradient(self, hidden_NTH: torch.Tensor, ids_NT: torch.Tensor) -> torch.Tensor:
        """Gradient of the mean next-token loss with respect to the last layer's output, (N, T, H)."""
        inner = self._model.model
        norm = inner.norm
        self._model.model = stand_in = _HiddenStates(norm)
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
            _first(module(inputs, **kwargs)).backward(gradient_NTH[batch].to(self._device))
            passed_on.append(cast("torch.Tensor", inputs.grad).cpu())
            collect()
        return torch.cat(passed_on)

    def _reduce(self, module: nn.Module, gradients: _WeightGradients) -> dict[Space, npt.NDArray[np.float32]]:
        scores = _GroupScores(self._architecture)
        for weight in self._architecture.projections:
            values = module.get_parameter(weight.name).detach().float()
            elements = gradients.element_scores(weight.name, values)
            scores.add(weight, elements, abs_after_sum=self._variant == "vectorize")
        return scores.result()


class _WeightGradients:
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


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it is called with and passes the hidden states through."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._stands_for = [layer]  # in a list, so that it is no submodule
        self.hidden_states: torch.Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (as nn.Module's)
        """Answer for the layer, for models that ask one for its attention type."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"][0], name)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 (any layer's)
        self.hidden_states, self.kwargs = hidden_states, kwargs
        return hidden_states


class _HiddenStates(nn.Module):
    """Stands in for a model's body: its last hidden states are given."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.hidden_states: torch.Tensor | None = None

    def forward(self, **_: Any) -> BaseModelOutputWithPast:  # noqa: ANN401 (any model's)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(self.hidden_states))


def _first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


class _TensorFile:
    """Equal tensors in a temporary file: layer inputs cost disk, not memory (70B, 10 x 64 tokens: 1.7 GB)."""

    def __enter__(self) -> _TensorFile:
        self._file = tempfile.TemporaryFile(prefix="loram-taylor-")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, slot: int, tensor: torch.Tensor) -> None:
        self._like = torch.empty_like(tensor, device="meta")
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.seek(slot * data.nbytes)
        self._file.write(data.data)

    def read(self, slot: int) -> torch.Tensor:
        nbytes = self._like.numel() * self._like.element_size()
        self._file.seek(slot * nbytes)
        data = bytearray(nbytes)
        self._file.readinto(data)
        return torch.frombuffer(data, dtype=self._like.dtype).view(self._like.shape)
