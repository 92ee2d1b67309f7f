"""Altered adapters as data: recovered ones, whose record holds hashes, and stock ones, which have none.

Each is checked against its base model. Where the attack lies in what a file means, the record is made anew, as whoever
publishes an adapter can.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from trust.alterations import Alter, Alteration, Tensors, data, flip, link, of, remove, replace, text, write
from trust.alterations import tensors as tensors_in

from loram_hub.adapter import CONFIG, RECORD, WEIGHTS
from loram_hub.adapter.record import hash_files
from loram_hub.seals import SEAL, seal

PREFIX = "base_model.model.model.layers.1.mlp.gate_proj"
LORA_A, LORA_B = f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight"
HARMLESS_PICKLE = pickle.dumps([1, 2, 3])


def settings(**changes: Any) -> Alter:
    """Set keys of `adapter_config.json`."""
    return text(CONFIG, lambda content: json.dumps(json.loads(content) | changes))


def factors(**changes: Any) -> Alter:
    """Replace a factor: `A` or `B` of one module, by a function of it; None drops it."""

    def change(found: Tensors) -> None:
        for name, altered in changes.items():
            full = f"{PREFIX}.lora_{name}.weight"
            tensor = found.pop(full)
            if altered is not None:
                found[full] = altered(tensor)

    return tensors_in(change, WEIGHTS)


def extra(name: str, *shape: int) -> Alter:
    """Add a tensor."""
    return tensors_in(lambda found: found.update({name: torch.ones(shape)}), WEIGHTS)


def record(**changes: Any) -> Alter:
    """Set keys of the record and seal it."""

    def alter(folder: Path) -> None:
        values = json.loads((folder / RECORD).read_text()) | changes
        (folder / RECORD).write_text(seal({key: value for key, value in values.items() if key != SEAL}))

    return alter


def recorded(*alters: Alter) -> Alter:
    """Alter a recovered adapter, and make its record anew."""

    def alter(folder: Path) -> None:
        for each in alters:
            each(folder)
        hashes = {name: {"sha256": file.sha256, "size": file.size} for name, file in hash_files(folder).items()}
        record(files=hashes)(folder)

    return alter


def base_in_record(**changes: str) -> Alter:
    """Have the record say something else of the base model."""

    def alter(folder: Path) -> None:
        record(base=json.loads((folder / RECORD).read_text())["base"] | changes)(folder)

    return alter


def swap_factors(found: Tensors) -> None:
    """Give one module the factors of a module of another shape."""
    other = PREFIX.replace("gate_proj", "down_proj")
    for factor in ("lora_A", "lora_B"):
        names = [f"{module}.{factor}.weight" for module in (PREFIX, other)]
        found[names[0]], found[names[1]] = found[names[1]].clone(), found[names[0]].clone()


def set_number(value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 0] = value
        return tensor

    return change


RECOVERED = (
    of(
        "recovered",
        "adapter: a bit of the weights flipped",
        data(WEIGHTS, flip(-2)),
        3,
        "adapter_model.safetensors in .* its record says",
    ),
    of(
        "recovered",
        "adapter: a bit of the config flipped",
        text(CONFIG, replace('"lora_alpha": 8', '"lora_alpha": 9')),
        3,
        "adapter_config.json in .* its record says",
    ),
    of(
        "recovered",
        "adapter: a bit of the record flipped",
        text(RECORD, replace('"r": 4', '"r": 5')),
        3,
        "not what its own sha256 says",
    ),
    of(
        "recovered",
        "adapter: weights truncated",
        data(WEIGHTS, lambda content: content[:-2]),
        3,
        "adapter_model.safetensors.*its tensors end at byte",
    ),
    of(
        "recovered",
        "adapter: weights missing",
        remove(WEIGHTS),
        3,
        "has an adapter_config.json but no adapter_model.safetensors",
    ),
    of(
        "recovered",
        "adapter: record of a newer format",
        record(format=2),
        4,
        "has format 2; this loram-hub reads up to 1",
    ),
    of("recovered", "adapter: record of another kind", record(kind="merged model"), 3, "kind 'merged model'"),
    of("recovered", "adapter: record without hashes", record(files={}), 3, "of files in .* is missing"),
    of(
        "recovered",
        "adapter: record names another base",
        base_in_record(id="org/other"),
        4,
        "loram.json names the base org/other",
    ),
    of(
        "recovered",
        "adapter: config names another base",
        recorded(settings(base_model_name_or_path="org/other")),
        4,
        "adapter_config.json names org/other",
    ),
    of(
        "recovered",
        "adapter: made for another state of the base",
        base_in_record(config_sha256="0" * 64),
        4,
        "was made for a base whose config.json",
    ),
    of(
        "recovered",
        "adapter: config with more settings",
        recorded(settings(lora_dropout=0.5)),
        3,
        "is not in the form that 'loram recover' writes",
    ),
    of(
        "recovered",
        "adapter: weights replaced by those of another shape",
        recorded(tensors_in(swap_factors, WEIGHTS)),
        4,
        r"has shape \(37, 24\), the base model's has \(24, 37\)",
    ),
)
STOCK = (
    of("peft", "adapter: config missing", remove(CONFIG), 3, "is no checkpoint: it has no config.json"),
    of(
        "peft",
        "adapter: weights as a pickle",
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        3,
        "'adapter_model.bin' in .* is a pickle",
    ),
    of(
        "peft",
        "adapter: pickle beside it",
        write("training_args.bin", HARMLESS_PICKLE),
        3,
        "'training_args.bin' in .* is a pickle",
    ),
    of("peft", "adapter: code beside it", write("modeling.py", "import os"), 3, "'modeling.py' in .* is code"),
    of(
        "peft",
        "adapter: other weights beside it",
        write("model.safetensors"),
        3,
        "holds weights beside adapter_model.safetensors",
    ),
    of(
        "peft",
        "adapter: link out of the folder",
        link("tokenizer.json", "../secret"),
        3,
        "is a link that leads out of the folder",
    ),
    of("peft", "adapter: pipe", lambda folder: os.mkfifo(folder / "NOTICE"), 3, "'NOTICE' in .* is no regular file"),
    of(
        "peft",
        "adapter: escape sequence in a file's name",
        write("LICENSE\x1b[2J"),
        3,
        "is no name that a file of an adapter has",
    ),
    of(
        "peft",
        "adapter: config is no JSON",
        text(CONFIG, lambda content: content[:-3]),
        3,
        "adapter_config.json is not valid JSON: Expecting",
    ),
    of(
        "peft",
        "adapter: a key twice in the config",
        text(CONFIG, replace("{", '{"r": 64,')),
        3,
        "has the key 'r' twice",
    ),
    of("peft", "adapter: NaN in the config", settings(lora_alpha=float("nan")), 3, "holds NaN, which is not JSON"),
    of(
        "peft",
        "adapter: config nested without end",
        text(CONFIG, lambda _: '{"a":' * 200_000),
        3,
        "adapter_config.json is not valid JSON: maximum recursion",
    ),
    of("peft", "adapter: another kind of PEFT", settings(peft_type="IA3"), 4, "is 'IA3'; only LORA"),
    of("peft", "adapter: DoRA", settings(use_dora=True), 4, "use_dora is set"),
    of("peft", "adapter: modules_to_save", settings(modules_to_save=["lm_head"]), 4, "modules_to_save is set"),
    of("peft", "adapter: trained biases", settings(bias="all"), 4, "bias is 'all'"),
    of("peft", "adapter: unknown variant", settings(use_novelty=True), 4, "use_novelty is set"),
    of("peft", "adapter: changed base weights", settings(init_lora_weights="pissa"), 4, "init_lora_weights is 'pissa'"),
    of(
        "peft",
        "adapter: base weights changed along the gradient",
        settings(init_lora_weights="lora_ga"),
        4,
        "init_lora_weights is 'lora_ga'",
    ),
    of(
        "peft",
        "adapter: module to import",
        settings(auto_mapping={"parent_library": "os", "base_model_class": "system"}),
        3,
        "has PEFT import 'os'",
    ),
    of("peft", "adapter: another rank", settings(r=8), 3, "gives it rank 8"),
    of("peft", "adapter: negative rank", settings(r=-4), 3, "is -4; a positive whole number"),
    of("peft", "adapter: alpha is text", settings(lora_alpha="16"), 3, "is '16'; a positive number"),
    of("peft", "adapter: expression without end", settings(target_modules="(a+)+b"), 3, "repeats a repetition"),
    of(
        "peft",
        "adapter: expression of many repetitions",
        settings(target_modules=".*" * 12 + "z"),
        3,
        r"'\.\*\.\*.*more than 5 repetitions",
    ),
    of(
        "peft",
        "adapter: key of many classes",
        settings(rank_pattern={"[^x]*" * 12 + "x": 4}),
        3,
        r"\[\^x\]\*.*more than 5 repetitions",
    ),
    of(
        "peft",
        "adapter: key of many groups",
        settings(alpha_pattern={"(.*)" * 12 + "z": 4}),
        3,
        r"\(\.\*\)\(.*more than 5 repetitions",
    ),
    of(
        "peft",
        "adapter: expression of many options",
        settings(target_modules="a?" * 30 + "a" * 30),
        3,
        r"'a\?a\?.* 8 options",
    ),
    of(
        "peft",
        "adapter: more names than any model has modules",
        settings(target_modules=[f"z{i}" for i in range(100_000)]),
        3,
        "has 100,000 names",
    ),
    of(
        "peft",
        "adapter: base named at great length",
        settings(base_model_name_or_path="x" * 5_000),
        3,
        "base_model_name_or_path in .* text of at most",
    ),
    of(
        "peft",
        "adapter: targets without factors",
        settings(target_modules=["q_proj", "lm_head"]),
        4,
        "'lm_head' is a target of .* missing",
    ),
    of("peft", "adapter: a factor missing", factors(B=None), 4, "has lora_A but no lora_B"),
    of(
        "peft",
        "adapter: a pair missing",
        factors(A=None, B=None),
        4,
        "'model.layers.1.mlp.gate_proj' is a target of .* missing",
    ),
    of(
        "peft",
        "adapter: NaN in a factor",
        factors(A=set_number(float("nan"))),
        3,
        "gate_proj.lora_A.weight' .*holds NaN or infinity",
    ),
    of(
        "peft",
        "adapter: infinity in a factor",
        factors(B=set_number(float("inf"))),
        3,
        "gate_proj.lora_B.weight' .*holds NaN or infinity",
    ),
    of(
        "peft",
        "adapter: factor with a third axis",
        factors(A=lambda tensor: tensor[None]),
        3,
        r"has shape \(1, 4, 24\); two axes",
    ),
    of("peft", "adapter: empty factor", factors(A=lambda tensor: tensor[:0]), 3, r"has shape \(0, 24\); two axes"),
    of("peft", "adapter: factor as integers", factors(A=lambda tensor: tensor.to(torch.int8)), 3, "has dtype 'I8'"),
    of(
        "peft",
        "adapter: factors of a pruned model",
        factors(B=lambda tensor: tensor[:-15]),
        4,
        "does not have the base model's size",
    ),
    of(
        "peft",
        "adapter: copy of a base weight",
        extra("base_model.model.lm_head.base_layer.weight", 53, 24),
        4,
        "is a copy of a frozen weight",
    ),
    of(
        "peft", "adapter: whole weight", extra("base_model.model.lm_head.weight", 53, 24), 4, "a whole weight was saved"
    ),
    of(
        "peft",
        "adapter: LoRA of an embedding",
        extra("base_model.model.model.embed_tokens.lora_embedding_A", 4, 53),
        4,
        "the embedding was a target",
    ),
    of(
        "peft",
        "adapter: module that the base lacks",
        tensors_in(
            lambda found: found.update(
                {
                    f"base_model.model.model.layers.9.mlp.gate_proj.lora_{k}.weight": found[
                        f"{PREFIX}.lora_{k}.weight"
                    ].clone()
                    for k in "AB"
                }
            ),
            WEIGHTS,
        ),
        4,
        "is no linear layer of this llama model",
    ),
    of(
        "peft",
        "adapter: header of JSON nested without end",
        lambda f: (f / WEIGHTS).write_bytes((2**20).to_bytes(8, "little") + b'{"a":' * 2**18),
        3,
        "The header of .* is not valid JSON: maximum recursion",
    ),
)

ADAPTERS: tuple[Alteration, ...] = (*RECOVERED, *STOCK)
