"""The consumer's side, run in the project's environment: prune a base of the Hub, train on the release, recover.

    python train.py org/base FOLDER

writes FOLDER/release, FOLDER/pruned (as stock PEFT saves it) and FOLDER/recovered.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from loram_hub import AutoLoramModel, prune, recover

STEPS = 20


def main(base: str, folder: Path) -> None:
    """Make release, pruned adapter and recovered adapter."""
    torch.manual_seed(0)
    prune(base, folder / "release", pruning_ratio=0.5, importance="random", keep_first=1, keep_last=1)
    model = AutoLoramModel.from_pretrained(folder / "release", dtype=torch.float32)
    lora = LoraConfig(r=12, lora_alpha=24, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora).train()
    ids = torch.randint(3, model.config.vocab_size, (4, 32))
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=5e-3)
    for _ in range(STEPS):
        loss = tuned(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(str(folder / "pruned"))
    recover(folder / "pruned", folder / "recovered")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
