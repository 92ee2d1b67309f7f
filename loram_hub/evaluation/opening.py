"""The models of an evaluation: found, then opened one at a time."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from loram_hub.adapter import MASKED_FIELD, RECORD, check_base, pinned_revision
from loram_hub.auto import AutoLoramModel, supported_dtype
from loram_hub.errors import InvalidRequestError, MissingDependencyError
from loram_hub.files import read_json
from loram_hub.hub import ADAPTER_FILES, Source, resolve
from loram_hub.release import Release

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MODELS = ("base", "pruned", "pruned + adapter", "base + recovered adapter")
"""Names of what is measured, in their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subjects:
    """What an evaluation is about, on this machine."""

    base: Source | None
    """The original model."""
    release: Source | None
    """The pruned model."""
    adapter: Source | None
    """The adapter trained on the release."""
    recovered: Source | None
    """The recovered adapter, for the base."""

    @property
    def models(self) -> tuple[str, ...]:
        """Those of `MODELS` that can be measured."""
        present = (self.base, self.release, self.adapter, self.recovered)
        return tuple(name for name, source in zip(MODELS, present, strict=True) if source is not None)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is: the base's, or the release's, which is the same."""
        source = self.base or self.release
        assert source is not None
        return source.folder


def check_given(
    *,
    base: str | os.PathLike[str] | None,
    release: str | os.PathLike[str] | None,
    adapter: str | os.PathLike[str] | None,
    recovered: str | os.PathLike[str] | None,
) -> None:
    """Raise `InvalidRequestError` if there is no model, or an adapter without its model; nothing is looked for."""
    if base is None and release is None:
        raise InvalidRequestError("There is no model to evaluate: name a base model, a release, or both.")
    if adapter is not None and release is None:
        raise InvalidRequestError("An adapter that was trained on a release needs that release: name it, too.")
    if recovered is not None and base is None:
        raise InvalidRequestError("A recovered adapter needs the base model: name it, too.")


def find_subjects(
    *,
    base: str | os.PathLike[str] | None,
    release: str | os.PathLike[str] | None,
    adapter: str | os.PathLike[str] | None,
    recovered: str | os.PathLike[str] | None,
    allow_base_mismatch: bool,
) -> Subjects:
    """Find and fetch models and adapters; arguments and errors are those of `evaluate`."""
    check_given(base=base, release=release, adapter=adapter, recovered=recovered)
    full_size = None if recovered is None else resolve(recovered, files=ADAPTER_FILES)
    return Subjects(
        base=None if base is None else _find_base(base, full_size, allow_base_mismatch),
        release=None if release is None else resolve(release),
        adapter=None if adapter is None else resolve(adapter, files=ADAPTER_FILES),
        recovered=full_size,
    )


def _find_base(base: str | os.PathLike[str], recovered: Source | None, allow_mismatch: bool) -> Source:
    """Find the base, at the commit that the recovered adapter names if there is one."""
    source = resolve(base, revision=None if recovered is None else pinned_revision(recovered.folder, base))
    if recovered is not None and not allow_mismatch:
        check_base(recovered.folder, source.folder, commit=source.commit)
    return source


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where models run and what they compute in."""

    device_map: str | dict[str, int | str]
    """As transformers takes it."""
    dtype: torch.dtype
    """Of weights that are not quantized, and of the computation."""


def placement(device: str | None, dtype: torch.dtype | None) -> Placement:
    """Choose a device map and a type.

    Args:
        device: None for the CPU, `auto` to spread a model over all GPUs.
        dtype: None for the best that the device has in hardware.
    """
    kind = (device or "cpu").partition(":")[0]
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    device_map: str | dict[str, int | str] = "auto" if device == "auto" else {"": device or "cpu"}
    return Placement(device_map=device_map, dtype=dtype or supported_dtype(kind))


def open_tokenizer(subjects: Subjects) -> PreTrainedTokenizerBase:
    """Open the tokenizer that all models share."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(subjects.tokenizer_folder)
    return tokenizer


def open_base(folder: Path, where: Placement) -> PreTrainedModel:
    """Load the base, or another whole model."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=where.dtype, device_map=where.device_map
    )
    return model


def open_pruned(folder: Path, where: Placement) -> PreTrainedModel:
    """Load a release."""
    return AutoLoramModel.from_pretrained(str(folder), device_map=where.device_map, dtype=where.dtype)


def with_adapter(model: PreTrainedModel, folder: Path) -> nn.Module:
    """Put an adapter on a loaded model; masked on a sparse release, if it was trained so.

    Raises:
        MissingDependencyError: peft is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError as err:
        raise MissingDependencyError("Evaluating an adapter needs peft: pip install peft") from err
    tuned = PeftModel.from_pretrained(model, str(folder))
    if _was_masked(folder, model):
        from loram_hub.masked_lora import mask_lora_

        mask_lora_(tuned)  # on the release it is the masked update that was trained
    return tuned


def removed_weights(model: nn.Module) -> int:
    """Count the weights that are zero in a sparse release; 0 of any other model."""
    release = getattr(model, "loram", None)
    if not isinstance(release, Release) or not release.is_sparse:
        return 0
    return release.manifest.base.parameters - release.manifest.parameters


def _was_masked(adapter: Path, model: nn.Module) -> bool:
    """Whether an adapter's record says that it was trained masked; that of a recovered one does not count here."""
    if (adapter / RECORD).is_file():
        return read_json(adapter / RECORD).get(MASKED_FIELD) is True
    if removed_weights(model):
        logger.warning("%s has no %s that says how it was trained, so it is not masked", adapter, RECORD)
    return False
