"""A base model's most probable next tokens, with one decoder layer in memory.

A block of S sequences goes through the layers together: its hidden states stay in memory while the layers are read one
after another. For C sequences of T tokens, weights of B bytes and hidden states of b bytes per number,

    weights are read ceil(C / S) times, ceil(C / S) * B bytes in all
    a block's hidden states take S * T * hidden_size * b bytes

so twice the block is half the reading for twice the memory. A 70B model in bf16 (B = 140 GB) on 105 M tokens, with the
default block of 512 sequences of 512 tokens: 400 passes, 56 TB of reading, 4.3 GB of hidden states; with 8,192
sequences 25 passes, 3.5 TB and 69 GB. Several processes share the blocks. Neither grows with depth.

Shapes in this file: N sequences, T tokens, H hidden_size, V vocab_size, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loram_hub.architecture import Architecture
from loram_hub.checkpoint import Checkpoint
from loram_hub.errors import VerificationError
from loram_hub.streaming import StreamedModel
from loram_hub.teaching.settings import TeachingSettings

_LOGITS = 2**25
"""Logits in memory at a time, in fp32 and twice: 128 MiB each."""
_LEAST_LOG_PROB = float(np.finfo(np.float16).min)


class StreamedTeacher:
    """A base model that gives targets for block after block."""

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, settings: TeachingSettings, device: str
    ) -> None:
        """Build the model without weights.

        Args:
            checkpoint: the base's, open as long as the teacher is used.
            architecture: of the base.
            settings: what is asked for.
            device: where layers compute.
        """
        dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
        self._model = StreamedModel(checkpoint, architecture, device=device, dtype=dtype)
        self._k, self._batch_size = settings.k, settings.batch_size
        self._chunk = max(1, _LOGITS // architecture.vocab_size)

    @property
    def compute_type(self) -> str:
        """What layers compute in: `float32`, `bfloat16`, ..."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self._model.layers)

    def targets(
        self, ids_NT: torch.Tensor, layer_done: Callable[[], object]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
        """Return the K most probable next tokens of each position and their log-probabilities.

        Args:
            ids_NT: token ids, int64.
            layer_done: called after each layer.

        Returns:
            Token ids (N, T, K) and log-probabilities over the whole vocabulary (N, T, K), the most probable first, of
            equally probable ones the lower id.

        Raises:
            VerificationError: the model's output is not finite.
        """
        hidden_NTH, layer_kwargs = self._model.embed(ids_NT)
        for layer, kwargs in enumerate(layer_kwargs):
            with self._model.layer(layer) as module:
                self._model.forward_(module, hidden_NTH, kwargs, batch_size=self._batch_size)
            layer_done()
        token_ids = np.empty((*ids_NT.shape, self._k), dtype=np.int32)
        log_probs = np.empty((*ids_NT.shape, self._k), dtype=np.float16)
        with self._model.head() as head, torch.no_grad():
            # One sequence at a time, so that a block's size does not change how its numbers are rounded.
            for number, states_TH in enumerate(hidden_NTH):
                for start in range(0, len(states_TH), self._chunk):
                    part = slice(start, start + self._chunk)
                    token_ids[number, part], log_probs[number, part] = self._top(head, states_TH[part])
        return token_ids, log_probs

    def _top(self, head: Callable[..., Any], states_TH: torch.Tensor) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        log_probs_TV = head(states_TH[None].to(self._model.device)).logits[0].float().log_softmax(-1)
        top = log_probs_TV.topk(self._k, dim=-1)
        if not bool(top.values.isfinite().all()):
            raise VerificationError(
                f"The base's logits are not finite in {self.compute_type}. Is it sound? Compute in float32 (dtype), "
                "or fetch it again."
            )
        ids_TK, by_id = top.indices.sort(dim=-1)
        values_TK, by_value = top.values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
        rounded = values_TK.clamp(_LEAST_LOG_PROB, 0).half()
        return ids_TK.gather(-1, by_value).int().cpu().numpy(), rounded.cpu().numpy()
