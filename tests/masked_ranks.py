"""Two processes that have DistributedDataParallel train a masked adapter, and are refused when FSDP shares it out.

One forks the other, so that one pays for the imports.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from test_masked_lora import IDS, adapted
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerControl, TrainerState, TrainingArguments

from loram_hub.errors import IncompatibleError
from loram_hub.finetuning import RecoverCallback, SealCallback
from loram_hub.masked_lora import MaskedLayer


def train(rank: int, release: Path, out: Path) -> None:
    """Write the gradients of this process after one step on its half of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(adapted(release))
    ids = IDS[rank : rank + 1]
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name.removeprefix("module."): each.grad for name, each in model.named_parameters() if each.requires_grad}
    torch.save(found, out / f"{rank}.pt")
    (out / "refused.json" if rank == 0 else out / "refused-too.json").write_text(json.dumps(refusals(release)))
    dist.destroy_process_group()


def refusals(release: Path) -> dict[str, str]:
    """Return what is said of a masked model that is shared out."""
    model = adapted(release)
    fully_shard(model)
    layer = next(module for module in model.modules() if isinstance(module, MaskedLayer))
    asked: dict[str, Callable[[], object]] = {"forward": lambda: layer(torch.zeros(1, model.config.hidden_size))}
    for callback in (SealCallback(), RecoverCallback()):
        begin = partial(callback.on_train_begin, TrainingArguments(use_cpu=True), TrainerState(), TrainerControl())
        asked[type(callback).__name__] = partial(begin, model=model)
    said = {}
    for name, ask in asked.items():
        try:
            ask()
        except IncompatibleError as err:
            said[name] = str(err)
    return said


if __name__ == "__main__":
    child = os.fork()
    train(int(child == 0), Path(sys.argv[1]), Path(sys.argv[2]))
    if child:
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
