"""Which single weights a sparse release keeps: patterns, their bits on disk, and `weight_masks.safetensors`.

Structured pruning is described by kept indices of channel groups (`plan`). SparseGPT, Wanda and magnitude pruning keep
every shape and leave zeros: each projection has a mask of its own shape. M = 1 means *kept*. docs/format.md has the
file to the byte. No torch.
"""

from loram_hub.masks.codes import decode_mask as decode_mask
from loram_hub.masks.codes import encode_mask as encode_mask
from loram_hub.masks.codes import row_bytes as row_bytes
from loram_hub.masks.mask_files import WEIGHT_MASKS as WEIGHT_MASKS
from loram_hub.masks.mask_files import MaskFile as MaskFile
from loram_hub.masks.mask_files import MaskWriter as MaskWriter
from loram_hub.masks.patterns import UNSTRUCTURED as UNSTRUCTURED
from loram_hub.masks.patterns import Pattern as Pattern
from loram_hub.masks.patterns import parse_pattern as parse_pattern
from loram_hub.masks.places import mask_bytes as mask_bytes
from loram_hub.masks.places import projection_shapes as projection_shapes
