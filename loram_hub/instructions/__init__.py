"""Fine-tuning data: records of any known layout become the columns that TRL's SFTTrainer takes, and are checked first.

sources     what is read and how
files       records of local files;  opening: sources opened and pinned
layouts     columns to conversations;  examples: conversations to rows;  templates: the tokenizer's chat template
encoding    token ids as TRL makes them;  collecting: judged, counted and stored as they come
sampling    samples and held-out sets by hash;  sets, findings, reports: what there is to know of the data
tokenizers  whether a tokenizer is the release's

The trainer tokenizes by itself. Tokens are made here to find out beforehand what it would cut, drop or learn in
silence, and a script that loads the same records with `datasets` trains on the same tokens.
"""

from loram_hub.instructions.collecting import BadRecords as BadRecords
from loram_hub.instructions.collecting import TooLong as TooLong
from loram_hub.instructions.reading import Instructions as Instructions
from loram_hub.instructions.reading import read_instructions as read_instructions
from loram_hub.instructions.reports import DataRecord as DataRecord
from loram_hub.instructions.reports import DataReport as DataReport
from loram_hub.instructions.reports import Dropped as Dropped
from loram_hub.instructions.reports import Lengths as Lengths
from loram_hub.instructions.reports import SetReport as SetReport
from loram_hub.instructions.sources import DataSource as DataSource
from loram_hub.instructions.sources import Format as Format
from loram_hub.instructions.sources import Style as Style
from loram_hub.instructions.sources import Turns as Turns
from loram_hub.instructions.tokenizers import check_tokenizer as check_tokenizer
from loram_hub.instructions.tokenizers import tokenizer_digest as tokenizer_digest
