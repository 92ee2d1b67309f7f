"""Which release an adapter was trained on: PEFT writes down neither its commit nor its plan, so it is written for PEFT.

Two releases of one ratio give adapters of equal shapes that belong to different channels. With the plan's digest beside
the adapter, `recover` refuses the wrong release instead of guessing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel

from loram_hub.adapter import CONFIG, MASKED_FIELD, RECORD
from loram_hub.errors import CheckpointError, InvalidRequestError
from loram_hub.files import dump_json, read_json, resource_errors
from loram_hub.hub import source_of
from loram_hub.release import Release

if TYPE_CHECKING:
    from torch import nn


def release_of(model: nn.Module | None) -> Release | None:
    """Return the release that a model, with or without an adapter, was opened from; None if it was opened otherwise."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = getattr(base, "loram", None)
    return found if isinstance(found, Release) else None


def pin_release_(model: nn.Module | None, release: Release) -> None:
    """Have PEFT write the commit of a release from the Hub into `adapter_config.json`, where it leaves the place empty.

    Args:
        model: with an adapter; its configuration is changed.
        release: that it lives on.
    """
    source = source_of(release.folder)
    if isinstance(model, PeftModel) and source.commit is not None:
        for config in model.peft_config.values():
            if config.base_model_name_or_path == source.id:
                config.revision = config.revision or source.commit


def write_origin(adapter: Path, release: Release, *, masked: bool = False) -> None:
    """Write `loram.json` beside an adapter that was trained on a release: the digest of its plan, and how it trained.

    Name and commit of the release are in `adapter_config.json`, where PEFT has places for them.

    Args:
        adapter: its folder.
        release: that it lives on.
        masked: whether its update is masked, see `loram_hub.masked_lora`.

    Raises:
        ResourceError: the disk is full or cannot be written to.
    """
    values = {"plan_sha256": release.plan.digest} | ({MASKED_FIELD: True} if masked else {})
    with resource_errors(f"Writing {adapter}"):
        (adapter / RECORD).write_text(dump_json(values), encoding="utf-8")


def was_masked(adapter: Path) -> bool:
    """Whether an adapter's record says that it was trained masked."""
    return (adapter / RECORD).is_file() and read_json(adapter / RECORD).get(MASKED_FIELD) is True


def adapter_in(checkpoint: Path, model: nn.Module | None) -> Path:
    """Return where PEFT put the adapter in a checkpoint: at the top if its name is 'default', else below.

    Raises:
        CheckpointError: there is none.
        InvalidRequestError: the model has no adapter, or several active ones.
    """
    if not isinstance(model, PeftModel) or len(model.active_adapters) != 1:
        raise InvalidRequestError(
            "What can be recovered is the one active adapter of a PeftModel; this model has none."
        )
    name = model.active_adapters[0]
    folder = checkpoint if name == "default" else checkpoint / name
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no adapter: {CONFIG} is missing. Save it with PEFT.")
    return folder
