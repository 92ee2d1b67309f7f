"""Masked LoRA on sparse releases: gradients reach the weights that were kept, and no others.

LoRAM (arXiv 2502.13533) trains its non-structured variants, LoRAM-Semi and LoRAM-Unst, with

    y = x (W_P + s (B A) o M)^T

where W_P is the pruned weight and M its mask, 1 for kept weights. What was pruned so stays at zero in training, and the
factors are told nothing by it. On the original model the factors act unmasked: (B A) o M is of full rank and B A is
not, so that recovery, which could only change the update by masking it, is the identity.

`product` is the mathematics and what it costs, `layers` and `nf4` put it into PEFT's layers, `masking` puts these on a
model. Stock trainers, DistributedDataParallel, checkpointing and autocast need nothing else; that FSDP shares out the
parameters is not supported.
"""

from loram_hub.adapter.live import is_masked as is_masked
from loram_hub.masked_lora.layers import MaskedLayer as MaskedLayer
from loram_hub.masked_lora.masking import mask_lora_ as mask_lora_
from loram_hub.masked_lora.masking import refuse_sharded as refuse_sharded

__all__ = ["MaskedLayer", "is_masked", "mask_lora_", "refuse_sharded"]
