"""A model of which one decoder layer at a time is in memory.

The model is built on the meta device. Its own preamble runs once with recorders in place of the decoder layers, so
masks, rotary embeddings and scalings are the library's; then layers are given their weights one after another, run by
whoever streams, and emptied again. Memory does not grow with depth.

Shapes in this file: N samples, T tokens, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loram_hub.architecture import EMBEDDING, LAYER_PREFIX, LM_HEAD, Architecture, LayerSizes, layer_tensor
from loram_hub.checkpoint import Checkpoint
from loram_hub.errors import InvalidRequestError
from loram_hub.release import base_config_of
from loram_hub.shaping import shrink_layer_
from loram_hub.streaming.stand_ins import HiddenStates, Recorder, first_output, return_freed_memory


def check_device(device: str | None) -> None:
    """Raise `InvalidRequestError` if nothing can be computed on a device here: at once, not after the first layers."""
    try:
        torch.empty(1, device=device or "cpu")
    except (RuntimeError, AssertionError) as err:
        raise InvalidRequestError(f"device {device!r} cannot be used here: {str(err).splitlines()[0]}") from err


class StreamedModel:
    """A base model or an unquantized release, streamed layer by layer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        *,
        sizes: Sequence[LayerSizes] | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the model without weights.

        Args:
            checkpoint: its weights, open as long as the model is used.
            architecture: of the base.
            sizes: width of each layer; None if all are whole.
            device: where layers compute; None for the CPU.
            dtype: what they compute in; None for fp32 on the CPU and the stored type elsewhere.
        """
        self._checkpoint, self._architecture = checkpoint, architecture
        self.device = torch.device(device or "cpu")
        stored = checkpoint.read(layer_tensor(0, architecture.projections[0].name)).dtype
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else stored)
        values = base_config_of(checkpoint.config) if "loram" in checkpoint.config else dict(checkpoint.config)
        config = CONFIG_MAPPING[architecture.family.model_type].from_dict(values)
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()
        self.layers: list[nn.Module] = list(self._model.model.layers)
        for layer, widths in zip(self.layers, sizes or (), strict=sizes is not None):
            if widths != architecture.whole_layer:
                shrink_layer_(layer, architecture, widths)

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """Give a decoder layer its weights (in the compute dtype, without gradients), and take them away again."""
        with self._loaded(self.layers[number], f"{LAYER_PREFIX}.{number}.") as module:
            yield module

    def embed(self, ids_NT: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Run the model's own preamble.

        The model runs whole, with recorders in place of its layers: masks, rotary embeddings and scalings are then
        the library's.

        Args:
            ids_NT: token ids, int64, of equally long sequences.

        Returns:
            The first layer's input on the CPU, (N, T, H), and the other arguments of every layer.
        """
        inner = self._model.model
        recorders = [Recorder(layer) for layer in self.layers]
        inner.layers = nn.ModuleList(recorders)
        parts = [(module, f"model.{name}.") for name, module in inner.named_children() if name != "layers"]
        try:
            with ExitStack() as loaded, torch.no_grad():
                for module, prefix in parts:
                    loaded.enter_context(self._loaded(module, prefix))
                hidden_NTH = torch.empty(*ids_NT.shape, self._architecture.hidden_size, dtype=self.dtype)
                for sample, ids in enumerate(ids_NT.split(1)):
                    inner(input_ids=ids.to(self.device), use_cache=False)
                    hidden_NTH[sample] = cast("torch.Tensor", recorders[0].hidden_states)[0]
        finally:
            inner.layers = nn.ModuleList(self.layers)
        return hidden_NTH, [recorder.kwargs for recorder in recorders]

    def run(self, module: nn.Module, hidden_BTH: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Run a layer that has its weights on one batch, without gradients; the result is on the device."""
        with torch.no_grad():
            return first_output(module(hidden_BTH.to(self.device), **kwargs))

    def forward_(
        self, module: nn.Module, hidden_NTH: torch.Tensor, kwargs: Mapping[str, Any], *, batch_size: int
    ) -> torch.Tensor:
        """Run a layer that has its weights on hidden states on the CPU, and put its outputs in their place."""
        for batch in hidden_NTH.split(batch_size):
            batch.copy_(self.run(module, batch, kwargs))
        return hidden_NTH

    @contextmanager
    def head(self) -> Iterator[Callable[..., Any]]:
        """Give final norm and lm_head their weights.

        Yields:
            A function (hidden states on the device, **arguments of the causal language model) -> its output: logits
            pass through the library's own code, soft caps and scalings included.
        """
        inner = self._model.model
        self._model.model = stand_in = HiddenStates(inner.norm)
        untied = LM_HEAD in self._checkpoint.tensors and not self._architecture.tie_word_embeddings
        alias = {} if untied else {LM_HEAD: EMBEDDING}

        def run(hidden_NTH: torch.Tensor, **kwargs: Any) -> Any:  # noqa: ANN401 (as the model's)
            stand_in.hidden_states = hidden_NTH
            return self._model(use_cache=False, **kwargs)

        try:
            with (
                self._loaded(inner.norm, "model.norm."),
                self._loaded(self._model.lm_head, LM_HEAD.removesuffix("weight"), alias=alias),
            ):
                yield run
        finally:
            self._model.model = inner

    @contextmanager
    def _loaded(self, module: nn.Module, prefix: str, *, alias: Mapping[str, str] | None = None) -> Iterator[nn.Module]:
        for owner in module.modules():
            if owner._non_persistent_buffers_set:  # rotary frequencies, embedding scales: computed, not stored
                for name in owner._non_persistent_buffers_set:
                    buffer = cast("torch.Tensor", owner._buffers[name])
                    owner._buffers[name] = torch.empty_like(buffer, device=self.device)
                with torch.no_grad():
                    self._model._init_weights(owner)
        for name, _ in list(module.named_parameters()):
            stored = (alias or {}).get(prefix + name, prefix + name)
            tensor = self._checkpoint.read(stored).to(self.device, self.dtype)
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
        try:
            yield module
        finally:
            module.to("meta")
            return_freed_memory()
