"""A tiny base, texts, and a recipe that makes a release of them in seconds."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builders import save_base, save_tokenizer, tiny_config

from loram_hub.files import dump_json


def save_tiny_base(folder: Path, *, dtype: str = "bfloat16", **config: Any) -> Path:
    """Write a base model of 6 layers with tokenizer, card and licence."""
    if config.get("model_type") == "qwen2":  # for which transformers 5.23 takes a Qwen2Tokenizer, whatever is there
        base = save_base(folder, tiny_config(**{"layers": 6, "vocab_size": 264, **config}), dtype=dtype)
        _save_byte_tokenizer(base)
    else:
        base = save_tokenizer(save_base(folder, tiny_config(**{"layers": 6, **config}), dtype=dtype))
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (base / "LICENSE").write_text("MIT License\n\nPermission is hereby granted, free of charge, ...\n")
    return base


def _save_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {sign: number for number, sign in enumerate(sorted(ByteLevel.alphabet()))}
    special = "<|endoftext|>"
    Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=special, pad_token=special).save_pretrained(folder)


def some_texts(count: int = 240, *, seed: int = 0, words: int = 60) -> list[str]:
    """Return texts of the words that `save_tokenizer` knows."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(4, 53)}" for _ in range(words)) for _ in range(count)]


def save_texts(path: Path, *, count: int = 240, seed: int = 0) -> Path:
    """Write texts to a .jsonl file."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some_texts(count, seed=seed)))
    return path


def tiny_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe with every stage but push, for the base and the texts in a folder."""
    recipe: dict[str, Any] = {
        "base": str(folder / "base"),
        "repo_id": "org/Tiny-LoRAM",
        "prune": {
            "pruning_ratio": 0.4, "keep_first": 1, "keep_last": 1, "importance": "taylor",
            "calibration": str(folder / "texts.jsonl"),
        },
        "align": {
            "corpora": [{"source": str(folder / "texts.jsonl")}], "steps": 4, "batch_size": 4, "sequence_length": 16,
            "warmup_steps": 1, "held_out": 2, "save_every": 1, "shuffle_window": 32,
        },
        "quantize": {},
        "evaluate": {"data": str(folder / "texts.jsonl"), "limit": 4, "max_tokens": 32},
    }  # fmt: skip
    return recipe | changes


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> Path:
    """Write a recipe; JSON is YAML, too."""
    path.write_text(dump_json(recipe))
    return path


def content_of(folder: Path) -> dict[str, str]:
    """Hash every file of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
