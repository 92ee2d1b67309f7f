"""Two processes that DistributedDataParallel has train a masked adapter; forked, so that one pays for the imports."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_masked_lora import IDS, adapted
from torch.nn.parallel import DistributedDataParallel


def train(rank: int, release: Path, out: Path) -> None:
    """Write the gradients of this process after one step on its half of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(adapted(release))
    ids = IDS[rank : rank + 1]
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name.removeprefix("module."): each.grad for name, each in model.named_parameters() if each.requires_grad}
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    child = os.fork()
    train(int(child == 0), Path(sys.argv[1]), Path(sys.argv[2]))
    if child:
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
