"""What servers are asked to serve: bases, and adapters that were trained on releases of them and recovered."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from builders import save_base, save_tokenizer, tiny_config
from hub_server import HubServer
from safetensors.numpy import load_file, save_file

from loram_hub.adapter import CONFIG, MARK, WEIGHTS

HERE = Path(__file__).parent
LogProbs = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A base and the adapters that were made for it."""

    hub: HubServer
    """Has them as `org/base`, `alice/tuned` (recovered) and `alice/forgotten` (not recovered)."""
    folder: Path
    base: Path
    recovered: Path
    pruned: Path
    """As PEFT saved it on the release."""
    unmarked: Path
    """The same without its mark."""

    def environment(self, home: str, **more: str) -> dict[str, str]:
        """Return the environment of a process for which the loopback Hub is the Hub, and that cannot import us."""
        found = self.hub.environment(self.folder / home, xet=False, **more)
        del found["PYTHONPATH"]
        return found


@contextlib.contextmanager
def trained(folder: Path, save: Callable[[Path], Path]) -> Iterator[Case]:
    """Put a base on the loopback Hub; train, save and recover in a process of this project's environment."""
    base = save(folder / "base")
    recovered, pruned, unmarked = (folder / name for name in ("recovered", "pruned", "unmarked"))
    with HubServer(folder / "hub") as hub:
        hub.add_repo("org/base", base)
        train = [sys.executable, str(HERE / "train.py"), "org/base", str(folder)]
        subprocess.run(train, check=True, env=hub.environment(folder / "home"))
        hub.add_repo("alice/tuned", recovered)
        hub.add_repo("alice/forgotten", pruned)
        tensors = load_file(pruned / WEIGHTS)
        others = {name: tensor for name, tensor in tensors.items() if not name.endswith(MARK)}
        assert len(others) == len(tensors) - 1
        unmarked.mkdir()
        shutil.copy(pruned / CONFIG, unmarked)
        save_file(others, unmarked / WEIGHTS)
        yield Case(hub=hub, folder=folder, base=base, recovered=recovered, pruned=pruned, unmarked=unmarked)


def save_tiny_llama(folder: Path) -> Path:
    """Write a base of sizes that vLLM takes on a CPU, and a tokenizer."""
    config = tiny_config(vocab_size=1000, hidden_size=128, intermediate_size=352, num_attention_heads=4)
    save_base(folder, config | {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256})
    return save_tokenizer(folder, vocab_size=1000)


def save_smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M."""
    from loram_hub.demo.base_model import base_model

    return shutil.copytree(base_model(), folder)


def reference(
    base: Path, adapter: Path | None, prompts: Sequence[Sequence[int]], tokens: npt.NDArray[np.int64]
) -> LogProbs:
    """Return what stock transformers and PEFT compute in float32 at each generated token.

    Args:
        base: the original model.
        adapter: a full-size adapter; None for the base alone.
        prompts: token ids.
        tokens: what was generated, (prompts, tokens).

    Returns:
        Log-probabilities, (prompts, tokens, vocabulary).
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    found = []
    with torch.no_grad():
        for prompt, generated in zip(prompts, tokens.tolist(), strict=True):
            logits = model.eval()(torch.tensor([[*prompt, *generated]])).logits[0, len(prompt) - 1 : -1]
            found.append(logits.float().log_softmax(-1).numpy())
    return np.stack(found)
