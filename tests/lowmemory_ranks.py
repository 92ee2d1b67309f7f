"""Two ranks of DistributedDataParallel, forked from one interpreter that has imported everything.

    python lowmemory_ranks.py ORDER OUT_DIR     ORDER: {"release": folder, "options": {name: MemoryOptions}}

Each rank steps on its own half of the same batch and writes the norms of the gradients that it ends with.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP imports it: once, before the fork
from test_lowmemory import IDS, adapted
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from loram_hub.auto import AutoLoramModel
from loram_hub.lowmemory import MemoryOptions, reduce_memory_


def _gradients(release: str, options: dict[str, Any], rank: int) -> float:
    model = AutoLoramModel.from_pretrained(release, dtype=torch.float32)
    reduce_memory_(model, MemoryOptions(**options))
    tuned = adapted(model)
    half = IDS[rank : rank + 1]
    distributed_model = DistributedDataParallel(tuned)
    distributed_model(input_ids=half, labels=half).loss.backward()
    return sum(weight.grad.norm().item() for name, weight in tuned.named_parameters() if "lora_" in name)


def main() -> None:
    order, out_dir = json.loads(sys.argv[1]), Path(sys.argv[2])
    child = os.fork()
    rank = 0 if child else 1
    distributed.init_process_group("gloo", init_method=f"file://{out_dir}/rendezvous", rank=rank, world_size=2)
    found = {name: _gradients(order["release"], options, rank) for name, options in order["options"].items()}
    (out_dir / f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()
    if child and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit("the second rank failed")


if __name__ == "__main__":
    main()
