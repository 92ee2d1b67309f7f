"""A PEFT LoRA adapter folder: read with suspicion, written in one canonical form. No torch.

Reading accepts what has a full-size equivalent and nothing else: factors A (r, in) and B (out, r) of linear layers, so
that a weight becomes W + s B A with s = alpha / r (alpha / sqrt(r) under rank-stabilized LoRA). Whatever else PEFT can
put into an adapter folder is refused by name; so are pickles, NaN, and a rank in the config that the tensors lack.

Writing gives the adapter that PEFT, vLLM, SGLang and llama.cpp read alike: one rank, one alpha, no patterns, and no
tensors but `lora_A` and `lora_B`. Older vLLM drops `rank_pattern` and `alpha_pattern` without a word (vllm#59799).
Equal input gives equal bytes.

`config` says which adapters are plain LoRA, `tensors` how factors are stored, `reading` and `writing` do the rest.
"""

from loram_hub.adapter.config import CONFIG as CONFIG
from loram_hub.adapter.config import AdapterConfig as AdapterConfig
from loram_hub.adapter.live import read_model as read_model
from loram_hub.adapter.reading import RECORD as RECORD
from loram_hub.adapter.reading import Adapter as Adapter
from loram_hub.adapter.reading import LoraPair as LoraPair
from loram_hub.adapter.reading import read_adapter as read_adapter
from loram_hub.adapter.tensors import DTYPES as DTYPES
from loram_hub.adapter.tensors import WEIGHTS as WEIGHTS
from loram_hub.adapter.tensors import DtypeName as DtypeName
from loram_hub.adapter.tensors import Factor as Factor
from loram_hub.adapter.tensors import convert as convert
from loram_hub.adapter.writing import CanonicalAdapter as CanonicalAdapter
from loram_hub.adapter.writing import linear_modules as linear_modules
from loram_hub.adapter.writing import shortest_targets as shortest_targets
from loram_hub.adapter.writing import write_adapter as write_adapter
