"""What the tests of alignment train: a small release with a tokenizer, and texts that can be learnt."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from builders import save_base, save_tokenizer, tiny_config

from loram_hub.corpora import Corpus
from loram_hub.pruning import prune
from loram_hub.sparsification import SparsitySettings, sparsify

TOKENS = 16
SETTINGS: dict[str, Any] = {
    "sequence_length": TOKENS,
    "batch_size": 8,
    "steps": 12,
    "warmup_steps": 3,
    "learning_rate": 1e-2,
    "held_out": 3,  # no multiple of two processes
    "shuffle_window": 100,
    "evaluate_every": 5,
    "save_every": 100,
    "micro_batch_size": 8,
}
"""Of a short run."""


def save_release(
    folder: Path, model_type: str = "llama", *, dtype: str = "float32", has_tokenizer: bool = True, **changes: Any
) -> Path:
    """Write a pruned release and return its folder."""
    base = save_base(folder / "base", tiny_config(model_type, **changes), dtype=dtype)
    if has_tokenizer:
        save_tokenizer(base)
    prune(base, folder / "release", pruning_ratio=0.5, importance="random", keep_first=1, keep_last=1)
    return folder / "release"


def save_texts(path: Path, *, stride: int, documents: int = 400, seed: int = 0) -> Path:
    """Write texts in which each word follows from the one before it."""
    rng = random.Random(seed)
    lines = []
    for _ in range(documents):
        first, count = rng.randrange(49), rng.randrange(3, 30)
        words = (f"w{4 + (first + stride * number) % 49}" for number in range(count))
        lines.append(json.dumps({"text": " ".join(words)}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def save_corpora(folder: Path) -> list[Corpus]:
    """Write two corpora of unequal weight."""
    return [
        Corpus(source=str(save_texts(folder / "steps.jsonl", stride=1)), weight=0.75),
        Corpus(source=str(save_texts(folder / "strides.jsonl", stride=3)), weight=0.25),
    ]


def save_sparse_release(folder: Path) -> Path:
    """Write a release of which 55 % of the projections' weights were removed, and return its folder."""
    base = save_tokenizer(save_base(folder / "base", tiny_config()))
    settings = SparsitySettings(method="magnitude", sparsity=0.55)
    return sparsify(base, folder / "release", settings=settings).folder
