"""What may go wrong when a run's adapter is pushed, looked at before it is trained."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from peft import LoraConfig
from safetensors.numpy import save_file

from loram_hub.adapter import WEIGHTS, factor_name, module_shape
from loram_hub.errors import InvalidRequestError
from loram_hub.finetuning.materials import Materials
from loram_hub.finetuning.origins import write_origin
from loram_hub.finetuning.recipe import PushSection
from loram_hub.hub import why_not_writable
from loram_hub.pushing import push_adapter
from loram_hub.recovery import recover


def check_push(push: PushSection, materials: Materials, recovered: Path | None, *, token: str | bool | None) -> None:
    """Try everything about a push but the upload.

    Args:
        push: where to, and on which terms.
        materials: the release.
        recovered: the adapter; None before it is trained: one of zeros takes its place.
        token: of the Hub.

    Raises:
        InvalidRequestError: the token may not write there, the base's licence is unknown or has a duty that is not met,
            or the repository holds something else.
        AccessError: the Hub could not be reached.
    """
    refusal = why_not_writable(push.repo_id, token=token)
    if refusal is not None:
        raise InvalidRequestError(f"push.repo_id {push.repo_id} cannot be written to: {refusal}.")
    if recovered is not None:
        _refuse_problems(push, recovered, token)
        return
    with tempfile.TemporaryDirectory(prefix="loram-") as folder:
        trained, stand_in = Path(folder, "adapter"), Path(folder, "recovered")
        _save_zeros(trained, materials)
        recover(trained, stand_in, release=materials.release.folder)
        _refuse_problems(push, stand_in, token)


def _refuse_problems(push: PushSection, adapter: Path, token: str | bool | None) -> None:
    try:
        planned = push_adapter(
            adapter, push.repo_id, private=push.private, license=push.license, token=token, dry_run=True
        )
    except InvalidRequestError as err:
        raise InvalidRequestError(f"The adapter could not be pushed (push.license is {push.license}): {err}") from err
    if planned.problems:
        raise InvalidRequestError(
            f"The adapter could not be pushed to {push.repo_id}. {' '.join(planned.problems)} What has to lie beside "
            "the adapter can be put into the run's folder recovered/ when that is there: train without `push`, then "
            "run it again with it."
        )


def _save_zeros(folder: Path, materials: Materials) -> None:
    """Write an adapter of rank 1 on one module of the release, as training would leave it."""
    module, release = materials.modules[0], materials.release
    shape = module_shape(release.architecture, module, release.plan.layers)
    assert shape is not None, "a target is a module of the release"
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=[module], task_type="CAUSAL_LM", base_model_name_or_path=materials.name
    )
    config.save_pretrained(str(folder))
    factors = {"A": np.zeros((1, shape[1]), np.float32), "B": np.zeros((shape[0], 1), np.float32)}
    save_file({factor_name(module, name): factor for name, factor in factors.items()}, folder / WEIGHTS)  # type: ignore[arg-type]  # A or B
    write_origin(folder, release)
