"""The command that serves an adapter, exact to the option."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from loram_hub.adapter import MODEL_ID, max_lora_rank
from loram_hub.doctor.rules import Target

PLACEHOLDER = "BASE"
"""Stands for the base model where nobody named one."""

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,255}")


def unservable_name(base: str, revision: str | None) -> str | None:
    """Say why no command can be given for a base that an adapter names; None if one can.

    A name that is neither a folder here nor an id on the Hub could be an option of the server, or text that shows as
    something else than what is run.
    """
    is_id = base.isascii() and MODEL_ID.fullmatch(base) is not None
    if base.startswith("-") or not (is_id or os.path.isdir(os.path.expanduser(base))):
        return f"the base is named {base!r:.200}, which is neither a folder here nor an id on the Hub; give --base"
    if revision is not None and _REVISION.fullmatch(revision) is None:
        return f"the base's revision is named {revision!r:.200}, which is none of the Hub's; give --revision"
    return None


def serving_command(
    target: Target, *, adapter: str, folder: Path, base: str, revision: str | None, rank: int
) -> tuple[str, ...]:
    """Return the lines to run, or for PEFT the lines of Python.

    Args:
        target: the server.
        adapter: what the server opens it by: folder or Hub id.
        folder: where its files are on this machine.
        base: folder or Hub id of the base model.
        revision: of the base, if it is a Hub id; None for the latest.
        rank: largest rank of a module.
    """
    name = adapter_name(adapter)
    pin = ("--revision", revision) if revision is not None and not os.path.isdir(os.path.expanduser(base)) else ()
    if target == "vllm":
        lora = ("--enable-lora", "--max-lora-rank", str(max_lora_rank(rank)), "--lora-modules", f"{name}={adapter}")
        return (shlex.join(("vllm", "serve", base, *pin, *lora)),)
    if target == "sglang":
        lora = ("--enable-lora", "--lora-paths", f"{name}={adapter}", "--max-lora-rank", str(rank))
        return (shlex.join(("python", "-m", "sglang.launch_server", "--model-path", base, *pin, *lora)),)
    if target == "llamacpp":
        return _llamacpp_commands(folder, base)
    pinned = f", revision={revision!r}" if pin else ""
    return (
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base!r}{pinned})",
        f"model = PeftModel.from_pretrained(base, {adapter!r})",
    )


def adapter_name(adapter: str) -> str:
    """Name an adapter for requests: the last part of its path or id, in letters that need no quoting."""
    last = Path(adapter).resolve().name if Path(adapter).is_dir() else adapter.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "adapter"


def _llamacpp_commands(folder: Path, base: str) -> tuple[str, ...]:
    is_folder = os.path.isdir(os.path.expanduser(base))
    named = ("--base", base) if is_folder else ("--base-model-id", base)
    whole = (base,) if is_folder else (base, "--remote")
    return (
        shlex.join(("python", "convert_hf_to_gguf.py", *whole, "--outfile", "base.gguf")),
        shlex.join(("python", "convert_lora_to_gguf.py", *named, str(folder), "--outfile", "adapter.gguf")),
        "llama-server -m base.gguf --lora adapter.gguf",
    )
