"""A PEFT LoRA adapter folder: read with suspicion, written in one canonical form. No torch.

Reading accepts what has a full-size equivalent and nothing else: factors A (r, in) and B (out, r) of linear layers, so
that a weight becomes W + s B A with s = alpha / r (alpha / sqrt(r) under rank-stabilized LoRA). Whatever else PEFT can
put into an adapter folder is refused by name; so are pickles, NaN, and a rank in the config that the tensors lack.

Writing gives the adapter that PEFT, vLLM, SGLang and llama.cpp read alike: one rank, one alpha, no patterns, and no
tensors but `lora_A` and `lora_B`. Older vLLM drops `rank_pattern` and `alpha_pattern` without a word (vllm#59799).
Equal input gives equal bytes.

`config` says which adapters are plain LoRA, `tensors` how factors are stored, `modules` which layers they adapt; `mark`
tells a pruned adapter from a recovered one, and `marking` (with torch, imported where it is needed) makes PEFT do so;
`reading` takes an adapter into memory, `canonical` and `writing` give it its one form, `record` says where it comes
from and `lineage` for which base it was made; `checking` and `folder` verify a whole folder.
"""

from loram_hub.adapter.canonical import CommonScale as CommonScale
from loram_hub.adapter.canonical import canonical_factors as canonical_factors
from loram_hub.adapter.canonical import common_scale as common_scale
from loram_hub.adapter.canonical import exact_dtype as exact_dtype
from loram_hub.adapter.checking import AdapterKind as AdapterKind
from loram_hub.adapter.checking import CheckedAdapter as CheckedAdapter
from loram_hub.adapter.checking import adapted_shapes as adapted_shapes
from loram_hub.adapter.checking import check_adapter as check_adapter
from loram_hub.adapter.checking import known_architecture as known_architecture
from loram_hub.adapter.checking import local_config as local_config
from loram_hub.adapter.checking import looks_pruned as looks_pruned
from loram_hub.adapter.checking import refuse_pruned as refuse_pruned
from loram_hub.adapter.checking import why_pruned as why_pruned
from loram_hub.adapter.config import CONFIG as CONFIG
from loram_hub.adapter.config import PLAIN_INITS as PLAIN_INITS
from loram_hub.adapter.config import AdapterConfig as AdapterConfig
from loram_hub.adapter.config import check_work as check_work
from loram_hub.adapter.config import is_all_linear as is_all_linear
from loram_hub.adapter.config import parse_config as parse_config
from loram_hub.adapter.lineage import check_base as check_base
from loram_hub.adapter.lineage import pinned_revision as pinned_revision
from loram_hub.adapter.live import read_model as read_model
from loram_hub.adapter.mark import marked_plan as marked_plan
from loram_hub.adapter.modules import LM_HEAD_MODULE as LM_HEAD_MODULE
from loram_hub.adapter.modules import linear_modules as linear_modules
from loram_hub.adapter.modules import module_shape as module_shape
from loram_hub.adapter.modules import shortest_targets as shortest_targets
from loram_hub.adapter.modules import uneven_module as uneven_module
from loram_hub.adapter.reading import Adapter as Adapter
from loram_hub.adapter.reading import LoraPair as LoraPair
from loram_hub.adapter.reading import pair_factors as pair_factors
from loram_hub.adapter.reading import read_adapter as read_adapter
from loram_hub.adapter.record import MASKED_FIELD as MASKED_FIELD
from loram_hub.adapter.record import RECORD as RECORD
from loram_hub.adapter.record import RECOVERED as RECOVERED
from loram_hub.adapter.record import AdapterRecord as AdapterRecord
from loram_hub.adapter.record import FileHash as FileHash
from loram_hub.adapter.record import ScaleRecord as ScaleRecord
from loram_hub.adapter.record import hash_files as hash_files
from loram_hub.adapter.record import read_record as read_record
from loram_hub.adapter.record import training_of as training_of
from loram_hub.adapter.tensors import CODES as CODES
from loram_hub.adapter.tensors import DTYPES as DTYPES
from loram_hub.adapter.tensors import FACTOR_NAME as FACTOR_NAME
from loram_hub.adapter.tensors import FROZEN_COPIES as FROZEN_COPIES
from loram_hub.adapter.tensors import MARK as MARK
from loram_hub.adapter.tensors import PREFIX as PREFIX
from loram_hub.adapter.tensors import WEIGHTS as WEIGHTS
from loram_hub.adapter.tensors import DtypeName as DtypeName
from loram_hub.adapter.tensors import Factor as Factor
from loram_hub.adapter.tensors import convert as convert
from loram_hub.adapter.tensors import factor_name as factor_name
from loram_hub.adapter.tensors import mark_names as mark_names
from loram_hub.adapter.writing import MODEL_ID as MODEL_ID
from loram_hub.adapter.writing import VLLM_RANKS as VLLM_RANKS
from loram_hub.adapter.writing import CanonicalAdapter as CanonicalAdapter
from loram_hub.adapter.writing import max_lora_rank as max_lora_rank
from loram_hub.adapter.writing import write_adapter as write_adapter
