"""What the commands of the documents find: a Hub with tiny models under the names they use, and a reader's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # ships no types
from builders import save_tokenizer, sparse_config
from docs_runner import ROOT, Session
from hub_server import HubServer
from hub_server.accounts import TOKENS, Token
from pipeline_materials import some_texts

ME = "hf_me"
"""The reader's token."""
ACCOUNTS: Mapping[str, Token] = {**TOKENS, ME: Token("me", "write")}
ORGANIZATIONS = {"org": ("me", "alice")}
BASES: Mapping[str, str] = {
    "meta-llama/Llama-3.1-70B": "llama3.1",
    "meta-llama/Llama-2-70b-hf": "llama2",
    "meta-llama/Llama-2-13b-hf": "llama2",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
}
"""Licences by name; all have the weights of one tiny model."""
_LICENCES: Mapping[str, str] = {  # the repository of SmolLM2 holds none
    "llama3.1": "Llama 3.1 Community License Agreement\n...\n",
    "llama2": "Llama 2 Community License Agreement\n...\n",
}
RELEASE, SPARSE_RELEASE, RELEASED_FROM = (
    "org/Llama-3.1-70B-LoRAM-0.85",
    "org/Llama-3.1-70B-LoRAM-Semi-4of8",
    "meta-llama/Llama-3.1-70B",
)

SHORTENED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "publish/llama-2-70b.yaml": (
        "it asks for 8 GPUs and 105 M tokens",
        {
            "device": "cpu",
            "align": {"steps": 2, "warmup_steps": 1, "batch_size": 2, "sequence_length": 16, "micro_batch_size": 2,
                      "processes": 1, "held_out": 2, "shuffle_window": 16},
            "evaluate": {"limit": 4, "max_tokens": 32, "device": "cpu"},
        },
    ),
    "consume/finetune-20gb.yaml": (
        "it asks for 400 steps of 128 examples",
        {"data": {"held_out": 4}, "training": {"steps": 2, "batch_size": 4, "max_tokens": 64}},
    ),
}  # fmt: skip
"""Recipes that are run in fewer steps, and why; nothing else of them is changed."""
SHORTENED_SCRIPTS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "consume/finetune_lora.py": (
        "its defaults are 400 steps of 128 examples",
        {'("--steps", 400)': '("--steps", 2)', '("--accumulation", 32)': '("--accumulation", 1)'},
    ),
}
"""Scripts, with other defaults."""
READERS_OWN: Mapping[str, str] = {
    "my-recipe.yaml": "publish/llama-2-70b.yaml",
    "my-task.yaml": "consume/finetune-20gb.yaml",
}
"""Recipes that a reader has written, and what each is a copy of."""


def reader_folder(folder: Path, made: Path, names: Sequence[str]) -> Path:
    """Make the folder that a reader works in: a clone's recipes and scripts, and data of their own.

    Args:
        folder: To make.
        made: Where `fill` has worked.
        names: What the reader has made already, of MADE.
    """
    for part in ("publish", "consume"):
        shutil.copytree(ROOT / part, folder / part)
    shutil.copy(ROOT / "LICENSE", folder)
    for name, (_, changes) in SHORTENED.items():
        path = folder / name
        path.write_text(yaml.safe_dump(_merged(yaml.safe_load(path.read_text()), changes)))
    for name, (_, replacements) in SHORTENED_SCRIPTS.items():
        path = folder / name
        for written, shortened in replacements.items():
            assert written in path.read_text()
            path.write_text(path.read_text().replace(written, shortened))
    for mine, copied in READERS_OWN.items():
        shutil.copy(folder / copied, folder / mine)
    tasks = [{"prompt": f"w{n % 40 + 4} w{n % 30 + 9}", "completion": f" w{n % 20 + 5}"} for n in range(24)]
    texts = [{"text": text} for text in some_texts(200)]
    data = {"tasks": tasks, "train": tasks, "dev": tasks[:8], "held_out": tasks[8:], "texts": texts}
    for name in names:
        shutil.copytree(made / MADE[name], folder / name)
    for name, records in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("")  # the environment is that of the tests
    return folder


MADE: Mapping[str, str] = {
    "BASE": "base",
    "my-release": "release",
    "my-task": "reader/my-task",
    "my-adapter": "reader/my-task/recovered",
    "plain-lora": "reader/my-task/recovered",
}
"""What readers may have made before, by the name that the documents give it, and where `fill` makes it."""


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return values | {
        key: _merged(values.get(key, {}), value) if isinstance(value, Mapping) else value
        for key, value in changes.items()
    }


def fill(hub: HubServer, session: Session) -> None:
    """Put base models, the release and data sets on the Hub, made by the `loram` command where there is one."""
    session.run(
        "python",
        "from pathlib import Path\n"
        "from builders import save_base, sparse_config\n"
        "save_base(Path('base'), sparse_config(layers=8), dtype='bfloat16')\n",
        "docs_hub.py",
    )
    base = save_tokenizer(session.folder / "base", sparse_config()["vocab_size"])
    (base / "USE_POLICY.md").write_text("# Llama Acceptable Use Policy\n")
    for name, licence in BASES.items():
        (base / "LICENSE").unlink(missing_ok=True)
        if licence in _LICENCES:
            (base / "LICENSE").write_text(_LICENCES[licence])
        (base / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A tiny model\n")
        hub.add_repo(name, base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# A model of the reader's own\n")
    (base / "LICENSE").write_text("MIT License\n\nPermission is hereby granted, free of charge, ...\n")
    session.run(
        "sh",
        f"loram --quiet prune {RELEASED_FROM} release --pruning-ratio 0.85 --importance random --quantize\n"
        f"loram --quiet card release --repo-id {RELEASE}\n"
        f"loram --quiet prune {RELEASED_FROM} sparse --method magnitude --pattern 4:8\n"
        f"loram --quiet card sparse --repo-id {SPARSE_RELEASE}\n",
        "docs_hub.py",
    )
    hub.add_repo(RELEASE, session.folder / "release")
    hub.add_repo(SPARSE_RELEASE, session.folder / "sparse")
    for name, config, records in _datasets():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        splits = "".join(f"  - split: {split}\n    path: data.jsonl\n" for split in ("train", "test"))
        card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{splits}---\n"
        hub.add_repo(name, {"README.md": card.encode(), "data.jsonl": lines.encode()}, kind="datasets")
    reader_folder(session.folder / "reader", session.folder, ())
    train = "(cd reader; loram --quiet finetune consume/finetune-20gb.yaml --out my-task)"
    session.run("sh", train, "docs_hub.py")


def _datasets() -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Return data sets in the layouts that those of the name have."""
    texts = [{"text": text} for text in some_texts(300)]
    short = some_texts(40, words=5)
    return [
        ("HuggingFaceFW/fineweb", "sample-10BT", texts),
        ("open-web-math/open-web-math", "default", texts),
        ("allenai/c4", "en", texts),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", texts),
        ("openai/gsm8k", "main", [{"question": text, "answer": f"{text} #### 4"} for text in short]),
        (
            "teknium/OpenHermes-2.5", "default",
            [{"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "w5"}]} for text in short],
        ),
    ]  # fmt: skip
