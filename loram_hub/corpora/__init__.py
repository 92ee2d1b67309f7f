"""Corpora for continual training: streamed, mixed by weight, packed into sequences of token ids.

`corpus` names what is read, `opening` opens it through `datasets` and pins it, `documents` shuffles it, `encoding`
turns texts into ids, `packing` cuts one corpus into sequences, `stream` mixes the corpora. The stream is a function of
corpora, tokenizer and settings alone: who trains on it, on how many ranks, after which interruptions changes nothing.
"""

from loram_hub.corpora.corpus import DEFAULT_CORPORA as DEFAULT_CORPORA
from loram_hub.corpora.corpus import Corpus as Corpus
from loram_hub.corpora.corpus import parse_corpus as parse_corpus
from loram_hub.corpora.estimates import check_enough as check_enough
from loram_hub.corpora.stream import Consumed as Consumed
from loram_hub.corpora.stream import PackedSequence as PackedSequence
from loram_hub.corpora.stream import PackedStream as PackedStream
