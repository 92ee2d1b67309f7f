"""The pruned model, sharded over the processes: each holds, trains and reads from disk its own rows of every tensor.

The stock model is built without memory in its pruned shapes, `fully_shard` (torch FSDP2) is put on each decoder layer
and on what remains, and each process then reads its rows. A layer is gathered when it computes and let go right after.
FSDP2 takes a layer as it is, so it does not matter that widths differ from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recompute
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from loram_hub.alignment.launch import Ranks
from loram_hub.alignment.objective import TokenLosses, token_losses
from loram_hub.alignment.settings import AlignmentSettings, Precision, is_trained
from loram_hub.architecture import EMBEDDING
from loram_hub.auto import model_on_meta
from loram_hub.checkpoint import Checkpoint
from loram_hub.release import Release

STORED: dict[str, torch.dtype] = {"fp32": torch.float32, "mixed": torch.float32, "bf16": torch.bfloat16}
"""Type of the weights, gradients and optimizer state that a process holds, by precision."""


class TrainedModel(nn.Module):
    """A causal language model whose logits never exist whole: `forward` goes from token ids to losses.

    Parameters have the names that they have in the stock model, and so in a release.
    """

    def __init__(self, lm: PreTrainedModel, *, loss_chunk: int) -> None:
        super().__init__()
        self.model = lm.get_submodule("model")
        self.lm_head = lm.get_submodule("lm_head")
        self.loss_chunk = loss_chunk
        self._given = _GivenHiddenStates()
        vars(lm)["_modules"]["model"] = self._given
        self._lm = [lm]  # in a list, so that it is no submodule

    def forward(
        self, ids: torch.Tensor, teacher: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return next-token loss and divergence of each sequence, summed over its positions, fp32.

        Args:
            ids: token ids, (sequences, tokens), int64.
            teacher: from `TeacherShards.targets`, (sequences, tokens, k): token ids int64 and their log-probabilities.
        """
        hidden = self.model(input_ids=ids, use_cache=False).last_hidden_state
        losses: TokenLosses = token_losses(self._logits, hidden, ids, chunk=self.loss_chunk, teacher=teacher)
        return losses

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Pass last hidden states through the library's own head: soft caps and scalings included."""
        self._given.hidden_states = hidden
        try:
            return cast("torch.Tensor", self._lm[0](input_ids=None, inputs_embeds=hidden, use_cache=False).logits)
        finally:
            self._given.hidden_states = None


class _GivenHiddenStates(nn.Module):
    """Stands in for a model's body once that has run."""

    hidden_states: torch.Tensor | None = None

    def forward(self, **_: Any) -> BaseModelOutputWithPast:  # noqa: ANN401 (any model's)
        return BaseModelOutputWithPast(last_hidden_state=self.hidden_states)


def sharded_model(release: Release, settings: AlignmentSettings, ranks: Ranks, *, precision: Precision) -> TrainedModel:
    """Build the model of an unquantized release, sharded over the processes, with the weights of the release.

    Args:
        release: verified.
        settings: what is trained and how.
        ranks: the processes.
        precision: the one that `auto` stands for here.
    """
    lm = model_on_meta(release).eval()  # no dropout: a resumed run must draw no random numbers
    for parameter in lm.parameters():
        parameter.data = parameter.data.to(STORED[precision])
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(is_trained(name, settings.trainable))
    buffers = list(_computed_buffers(lm, ranks.device))
    model = TrainedModel(lm, loss_chunk=settings.chunk_for(release.architecture.vocab_size))
    _shard_(model, settings, ranks, precision)
    model.to_empty(device=ranks.device)
    for owner, name, buffer in buffers:
        owner._buffers[name] = buffer
    if release.architecture.tie_word_embeddings:  # `to_empty` has made two of one
        model.lm_head.register_parameter("weight", model.get_parameter(EMBEDDING))
    _read_rows_(model, release, ranks)
    return model


def local_rows(rows: int, ranks: Ranks) -> slice:
    """Return which rows of a tensor FSDP2 gives to this process: equal parts, rounded up, the last may be smaller."""
    part = -(-rows // ranks.size)
    return slice(min(ranks.rank * part, rows), min((ranks.rank + 1) * part, rows))


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the rows of a sharded tensor that this process holds: the same memory, no copy."""
    return cast("DTensor", tensor)._local_tensor


def _computed_buffers(lm: PreTrainedModel, device: torch.device) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Compute what no checkpoint stores (rotary frequencies, embedding scales), as transformers does on loading."""
    for owner in lm.modules():
        if not owner._non_persistent_buffers_set:
            continue
        for name in owner._non_persistent_buffers_set:
            owner._buffers[name] = torch.empty_like(cast("torch.Tensor", owner._buffers[name]), device=device)
        with torch.no_grad():
            lm._init_weights(owner)
        for name in sorted(owner._non_persistent_buffers_set):
            yield owner, name, cast("torch.Tensor", owner._buffers[name])


def _shard_(model: TrainedModel, settings: AlignmentSettings, ranks: Ranks, precision: Precision) -> None:
    dtypes: dict[str, Any] = {}
    if precision == "mixed":
        dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    for layer in cast("nn.ModuleList", model.model.layers):
        if settings.compile:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        if settings.activation_checkpointing:
            layer.forward = partial(recompute, layer.forward, use_reentrant=False, preserve_rng_state=False)
        fully_shard(layer, mesh=ranks.mesh, mp_policy=MixedPrecisionPolicy(**dtypes))
    # The root is called with token ids and a teacher's log-probabilities, which must stay as they are.
    fully_shard(model, mesh=ranks.mesh, mp_policy=MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False))


def _read_rows_(model: TrainedModel, release: Release, ranks: Ranks) -> None:
    with Checkpoint(release.folder) as checkpoint, torch.no_grad():
        for name, parameter in model.named_parameters():
            local, rows = local_of(parameter), local_rows(parameter.shape[0], ranks)
            if rows.start < rows.stop:
                local.copy_(checkpoint.read_rows(name, rows.start, rows.stop))
