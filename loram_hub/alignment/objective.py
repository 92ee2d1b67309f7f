"""What is minimized: next-token loss, and divergence from a teacher, with a chunk of the logits in memory at a time.

With a vocabulary of 128k, the fp32 logits of 4 x 512 tokens are 1 GiB, and as much again in the backward pass. Each
chunk of tokens is therefore taken through the head by itself and, where there are several, run again in the backward
pass.

Divergence: the teacher (the original model) gives its k most probable tokens at each position, p_1 ... p_k, and what
is left, p_0 = 1 - sum p_i. With the student's probabilities q of the same k + 1 events,

    KL = sum_{i=0}^{k} p_i log(p_i / q_i),

the divergence of the two distributions over the vocabulary when everything outside of the teacher's k tokens counts as
one event. It is zero for a student that agrees, and never above the divergence over the whole vocabulary.

Shapes in this file: B sequences, T tokens, N = B * (T - 1) predicted positions, H hidden_size, V vocabulary, k tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint as recompute

TokenLosses = tuple[torch.Tensor, torch.Tensor | None]
Teacher = tuple[torch.Tensor, torch.Tensor]

# Below it 1 - sum q is rounding error in fp32.
_LEAST_REST = 1e-6


def token_losses(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden_BTH: torch.Tensor,
    ids_BT: torch.Tensor,
    *,
    chunk: int,
    teacher: Teacher | None = None,
) -> TokenLosses:
    """Return next-token loss and divergence of each sequence, summed over its T - 1 predicted positions.

    Args:
        logits: the model's head, (1, N, H) -> (1, N, V).
        hidden_BTH: last hidden states.
        ids_BT: the sequences, int64.
        chunk: positions whose logits are in memory at a time.
        teacher: token ids, int64, and log-probabilities, (B, T, k) each; what position t says of token t + 1.

    Returns:
        Next-token loss (B,) and divergence (B,) or None, in nats, fp32.
    """
    sequences, tokens = ids_BT.shape
    hidden_NH = hidden_BTH[:, :-1].reshape(-1, hidden_BTH.shape[-1])
    inputs = [hidden_NH, ids_BT[:, 1:].reshape(-1)]
    if teacher is not None:
        inputs += [part[:, :-1].reshape(len(hidden_NH), -1) for part in teacher]

    def of_chunk(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _chunk_losses(logits(parts[0][None])[0], *parts[1:])

    if len(hidden_NH) <= chunk:  # nothing is gained by running a single chunk twice
        found = of_chunk(*inputs)
    else:
        chunks = [
            recompute(of_chunk, *parts, use_reentrant=False, preserve_rng_state=False)
            for parts in zip(*(each.split(chunk) for each in inputs), strict=True)
        ]
        found = tuple(torch.cat(losses) for losses in zip(*chunks, strict=True))
    sums = [losses.view(sequences, tokens - 1).sum(dim=1) for losses in found]
    return sums[0], sums[1] if teacher is not None else None


def _chunk_losses(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    teacher_ids_Nk: torch.Tensor | None = None,
    teacher_log_probs_Nk: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    logits_NV = logits_NV.float()
    log_sum_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
    next_token_N = (log_sum_N1 - logits_NV.gather(-1, targets_N[:, None]))[:, 0]
    if teacher_ids_Nk is None or teacher_log_probs_Nk is None:
        return (next_token_N,)
    log_q_Nk = logits_NV.gather(-1, teacher_ids_Nk) - log_sum_N1
    log_p_Nk = teacher_log_probs_Nk.float()
    p_Nk = log_p_Nk.exp()
    rest_p_N = (1 - p_Nk.sum(dim=-1)).clamp(min=0)  # fp16 rounds; a sum may come out a little above 1
    rest_q_N = (1 - log_q_Nk.exp().sum(dim=-1)).clamp(min=_LEAST_REST)
    of_rest_N = torch.xlogy(rest_p_N, rest_p_N) - rest_p_N * rest_q_N.log()
    return next_token_N, (p_Nk * (log_p_Nk - log_q_Nk)).sum(dim=-1) + of_rest_N
