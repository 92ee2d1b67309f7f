"""The sound artefacts that the corpus alters: small releases and adapters of one base model, made the usual way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from builders import SEVEN, projections, random_factors, save_adapter, save_base, save_tokenizer, tiny_config
from safetensors.torch import load_file

from loram_hub.checkpoint import INDEX_FILE, SINGLE_FILE, ShardWriter
from loram_hub.manifest import MANIFEST, file_entries
from loram_hub.pruning import prune
from loram_hub.recovery import recover
from loram_hub.release import open_metadata
from loram_hub.seals import SEAL, seal

SUBJECTS = ("bf16", "nf4", "sharded", "recovered", "peft")
# Every layer is pruned, so that all have one size and stock libraries can be shown the same weights.
STRUCTURE: dict[str, Any] = {"importance": "random", "pruning_ratio": 0.4, "keep_first": 0, "keep_last": 0}


def build_subjects(folder: Path) -> None:
    """Write a base model and one sound artefact of each kind below a folder: `base` and the names of `SUBJECTS`."""
    base = save_tokenizer(save_base(folder / "base", tiny_config(), dtype="bfloat16"))
    (base / "LICENSE").write_text("Do what you like.\n")
    prune(base, folder / "bf16", **STRUCTURE)
    prune(base, folder / "nf4", quantize=True, **STRUCTURE)
    prune(base, folder / "sharded", **STRUCTURE)
    shard(folder / "sharded", max_shard_bytes=12_000)
    plan = open_metadata(folder / "bf16").plan
    trained = save_adapter(folder / "trained", random_factors(projections(plan)), targets=list(SEVEN), base="org/tiny")
    recover(trained, folder / "recovered", release=folder / "bf16")
    save_peft_adapter(folder / "peft", base)


def save_peft_adapter(folder: Path, base: Path) -> None:
    """Save an adapter for the base model with PEFT itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=list(SEVEN)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


def shard(folder: Path, *, max_shard_bytes: int) -> None:
    """Distribute the weights of a release over several files."""
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    writer = ShardWriter(folder, max_shard_bytes=max_shard_bytes)
    for name in sorted(tensors):
        writer.add(name, tensors[name])
    assert len(writer.finish()) > 2
    assert (folder / INDEX_FILE).is_file()
    reseal(folder)


def reseal(folder: Path, **changes: Any) -> None:
    """Give an altered release a manifest that fits it, as whoever publishes it can: hashes, sizes, seal."""
    values = json.loads((folder / MANIFEST).read_text())
    values["files"] = {name: {"sha256": e.sha256, "size": e.size} for name, e in file_entries(folder).items()}
    write_manifest(folder, values | changes)


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Write a manifest, of whatever content, with a seal that fits."""
    text = seal({key: value for key, value in values.items() if key != SEAL})
    (folder / MANIFEST).write_text(text, encoding="utf-8")
