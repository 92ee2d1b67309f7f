"""A model streamed layer by layer: for importance, sparsification, refit and teacher. Its depth costs no memory."""

from __future__ import annotations

from loram_hub.streaming.model import StreamedModel as StreamedModel
from loram_hub.streaming.model import check_device as check_device
from loram_hub.streaming.stand_ins import TensorFile as TensorFile
from loram_hub.streaming.stand_ins import first_output as first_output
from loram_hub.streaming.stand_ins import return_freed_memory as return_freed_memory
