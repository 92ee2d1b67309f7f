"""A release on disk: pruned weights, what was kept, manifest, config, tokenizer. docs/format.md has it to the byte.

`write_release` builds one atomically; `open_release` reads one and checks all that is cheap to check before a tensor is
built; `open_metadata` does so where no weights are at hand; `verify` reads every byte as well. No torch.

`contents` knows which files may be there, `configuration` what they may say, `mask_index` the plan on disk, `weights`
and `nf4` the tensors, `zeros` the weights that masks remove; `opening`, `verification` and `writing` put them together,
`comparison` looks at the base.
"""

from loram_hub.masks import projection_shapes as projection_shapes
from loram_hub.release.comparison import check_base_config as check_base_config
from loram_hub.release.comparison import compare_weights as compare_weights
from loram_hub.release.comparison import refuse_incomparable as refuse_incomparable
from loram_hub.release.configuration import MODEL_TYPE_PREFIX as MODEL_TYPE_PREFIX
from loram_hub.release.configuration import base_config_of as base_config_of
from loram_hub.release.configuration import check_settings as check_settings
from loram_hub.release.configuration import release_config as release_config
from loram_hub.release.contents import check_repository as check_repository
from loram_hub.release.mask_index import MASK_INDEX as MASK_INDEX
from loram_hub.release.mask_index import read_mask_index as read_mask_index
from loram_hub.release.mask_index import write_mask_index as write_mask_index
from loram_hub.release.nf4 import NF4_PARTS as NF4_PARTS
from loram_hub.release.nf4 import bitsandbytes_config as bitsandbytes_config
from loram_hub.release.opening import ADAPTER_CONFIG as ADAPTER_CONFIG
from loram_hub.release.opening import Release as Release
from loram_hub.release.opening import is_release as is_release
from loram_hub.release.opening import open_metadata as open_metadata
from loram_hub.release.opening import open_release as open_release
from loram_hub.release.verification import verify as verify
from loram_hub.release.writing import seal_release as seal_release
from loram_hub.release.writing import write_release as write_release
from loram_hub.release.zeros import NF4_ZERO as NF4_ZERO
from loram_hub.release.zeros import is_nonzero as is_nonzero
