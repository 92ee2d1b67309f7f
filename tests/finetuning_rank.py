"""What `torchrun` starts in the tests: the `loram` command; each process tells its factors in the end."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from trl.trainer.sft_trainer import SFTTrainer

import loram_hub.cli.finetuning  # noqa: F401 (adds its command)
from loram_hub.cli import main

_train = SFTTrainer.train


def _train_and_tell(self: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
    done = _train(self, *args, **kwargs)
    digest = hashlib.sha256()
    for name, parameter in sorted(self.model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().float().numpy().tobytes())
    Path(sys.argv[1], f"factors-{os.environ['RANK']}").write_text(digest.hexdigest())
    return done


if __name__ == "__main__":
    SFTTrainer.train = _train_and_tell  # type: ignore[method-assign]
    main(sys.argv[2:], prog_name="loram")
