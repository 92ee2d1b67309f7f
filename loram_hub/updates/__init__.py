"""How large is what an adapter adds, head by head and channel by channel? The norms of LoRAM's appendix C. No torch.

An adapter adds s B A to a weight, with B (out, r), A (r, in) and s = alpha / r. LoRAM (arXiv 2502.13533) compares such
updates by two figures, after recovery:

    C.1, eq. 10   the L2 norm of the part of the update that belongs to one attention head: its rows for q, k and v, its
                  columns for o
    C.2, eq. 11   the mean, over the active channels of a layer, of the norm of a channel: its row for gate and up, its
                  column for down

B A is never formed. With b_i a row of B and a_j a column of A,

    |row i of B A|^2    = b_i (A A^T) b_i^T
    |column j of B A|^2 = a_j^T (B^T B) a_j

and the square of a head's norm is the sum over its lines; the two products are r x r. Sums are in float64: a norm is
good to about 1e-8 of |b_i| |A|, however much cancels.

What the two figures are here, to the letter:

- The update is scaled, s counts (alpha / sqrt(r) under rank-stabilized LoRA, with the module's own alpha if it has
  one): this is what the weight gains.
- A head's norm is the Frobenius norm of its slice, q and o per query head, k and v per KV head.
- A channel is *active* where its own line of the factor that pruning cuts has a number that is not 0: its row of B for
  gate and up, its column of A for down. In a recovered adapter all others were pruned, since recovery writes zeros
  there. A channel that was kept and whose row of B never left its initial 0 is not active either.
- A pruned adapter is seen as what it will be once recovered: its norms stand where its release's heads and channels
  have their places in the base model. Heads and channels that were pruned away have the norm 0.
- What has no LoRA has NaN.

`reading` opens the adapter and finds the sizes of its model, `slices` says which lines belong to which head, `norms`
computes.
"""

from loram_hub.updates.norms import UpdateNorms as UpdateNorms
from loram_hub.updates.norms import update_norms as update_norms
from loram_hub.updates.slices import CHANNEL_PARTS as CHANNEL_PARTS
from loram_hub.updates.slices import HEAD_PARTS as HEAD_PARTS
from loram_hub.updates.slices import Part as Part
