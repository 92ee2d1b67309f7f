"""Train in less memory than NF4 alone needs: embedding and lm_head leave 16 bit or the device.

    weight.py     CompressedWeight: a frozen matrix with 8 or 4 bits per weight that torch takes for any other
    rows.py       how it is kept, and read by rows
    host.py       HostEmbedding: the embedding in main memory
    reducing.py   reduce_memory_: put them into a model

That logits are never whole needs nothing of this: TRL (1.16) multiplies by the lm_head in pieces of 4,096 tokens and
32,768 words, scales and caps the logits as the family does, and computes each piece again in the backward pass.
Liger's loss is refused by TRL for the same reason.
"""

from loram_hub.estimation.options import MemoryOptions
from loram_hub.lowmemory.reducing import MemorySavings, reduce_memory_

__all__ = ["MemoryOptions", "MemorySavings", "reduce_memory_"]
