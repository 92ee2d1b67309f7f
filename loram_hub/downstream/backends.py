"""Models as the harness takes them: opened here and wrapped, merged first, or by vLLM."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import nn

from loram_hub.adapter import max_lora_rank, read_adapter
from loram_hub.downstream.catalogue import quiet_harness
from loram_hub.errors import InvalidRequestError, MissingDependencyError
from loram_hub.evaluation import (
    Placement,
    Subjects,
    open_base,
    open_pruned,
    open_tokenizer,
    removed_weights,
    stored_parameters,
    with_adapter,
)
from loram_hub.merging import merge

As = Literal["adapter", "merged", "vllm"]
"""How the base and the recovered adapter are put together."""
WAYS: tuple[As, ...] = ("adapter", "merged", "vllm")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Wrapped:
    """A model that the harness can ask."""

    model: str
    """One of `loram_hub.evaluation.MODELS`."""
    backend: str
    """What runs it."""
    parameters: int | None
    """See `MeasuredModel`."""
    lm: Any
    """Of the harness, untyped."""


Measure = Callable[[Wrapped], None]


def check_way(as_: str, *, has_release: bool) -> None:
    """Refuse what cannot be opened, before anything is.

    Raises:
        InvalidRequestError: no such way, or vLLM was asked for a release.
        MissingDependencyError: vLLM is not installed.
    """
    if as_ not in WAYS:
        raise InvalidRequestError(f"as_ is {as_!r:.40}; one of {', '.join(WAYS)} is needed.")
    if as_ != "vllm":
        return
    if has_release:
        raise InvalidRequestError(
            "vLLM opens no release: a pruned model is there to be trained on. Measure it with as_='adapter'; with "
            "vLLM, name a base and a recovered adapter."
        )
    if find_spec("vllm") is None:
        raise MissingDependencyError("as_='vllm' needs vLLM: pip install vllm, on a machine with a GPU that it knows.")


def models_of(subjects: Subjects, as_: As) -> tuple[str, ...]:
    """Return the models that are measured; vLLM, which leaves its memory only with the process, runs one at a time."""
    return subjects.models[-1:] if as_ == "vllm" else subjects.models


def visit_models(
    measure: Measure, subjects: Subjects, where: Placement, *, as_: As, batch_size: int, seed: int, mismatch: bool
) -> None:
    """Open one model after another and hand it over; none is kept, so two are never in memory at once.

    Args:
        measure: called with each model, in the order of `MODELS`, the release's after the base's.
        subjects: what there is.
        where: device and type.
        as_: how base and recovered adapter are put together.
        batch_size: sequences per forward pass.
        seed: of vLLM's sampling; the others draw from torch's generator.
        mismatch: merge into another state of the base than the adapter was made for.
    """
    if as_ == "vllm":
        measure(_under_vllm(subjects, where, batch_size=batch_size, seed=seed))
        return
    if subjects.base is not None:
        folder, recovered = subjects.base.folder, subjects.recovered
        gc.collect()  # a model wrapped by PEFT refers to itself, so the last one may still be there
        model = open_base(folder, where)
        measure(_wrapped("base", model, "transformers", subjects, batch_size))
        if recovered is not None and as_ == "adapter":
            tuned = with_adapter(model, recovered.folder)
            measure(_wrapped("base + recovered adapter", tuned, "transformers, adapter", subjects, batch_size))
            del tuned
        del model
        gc.collect()
        if recovered is not None and as_ == "merged":
            with _merged(folder, recovered.folder, mismatch) as merged:
                model = open_base(merged, where)
                wrapped = _wrapped("base + recovered adapter", model, "transformers, merged", subjects, batch_size)
                measure(replace(wrapped, parameters=None))  # the base's number: it says nothing of the adapter
                del model, wrapped
    if subjects.release is not None:
        gc.collect()
        pruned = open_pruned(subjects.release.folder, where)
        removed = removed_weights(pruned)
        measure(_wrapped("pruned", pruned, "transformers", subjects, batch_size, removed=removed))
        if subjects.adapter is not None:
            tuned = with_adapter(pruned, subjects.adapter.folder)
            wrapped = _wrapped(
                "pruned + adapter", tuned, "transformers, adapter", subjects, batch_size, removed=removed
            )
            measure(wrapped)


def _wrapped(
    name: str, model: nn.Module, backend: str, subjects: Subjects, batch_size: int, *, removed: int = 0
) -> Wrapped:
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]  # ships no types

    with quiet_harness():
        lm = HFLM(pretrained=model, tokenizer=open_tokenizer(subjects), batch_size=batch_size)
    return Wrapped(model=name, backend=backend, parameters=stored_parameters(model, removed=removed), lm=lm)


@contextmanager
def _merged(base: Path, adapter: Path, mismatch: bool) -> Iterator[Path]:
    """Write the merged model, as `loram merge` does, for as long as it is measured; TMPDIR says where."""
    with tempfile.TemporaryDirectory(prefix="loram-merged-") as folder:
        yield merge(base, adapter, Path(folder) / "merged", allow_base_mismatch=mismatch).folder


def vllm_arguments(subjects: Subjects, where: Placement, *, batch_size: int, seed: int) -> dict[str, Any]:
    """Return the arguments of the harness's vLLM backend."""
    assert subjects.base is not None
    arguments: dict[str, Any] = {
        "pretrained": str(subjects.base.folder),
        "dtype": str(where.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "seed": seed,
    }
    if subjects.recovered is not None:
        rank = max(pair.rank for pair in read_adapter(subjects.recovered.folder).pairs.values())
        arguments |= {"lora_local_path": str(subjects.recovered.folder), "max_lora_rank": max_lora_rank(rank)}
    return arguments


def _under_vllm(subjects: Subjects, where: Placement, *, batch_size: int, seed: int) -> Wrapped:
    from lm_eval.api.registry import get_model  # type: ignore[import-untyped]

    arguments = vllm_arguments(subjects, where, batch_size=batch_size, seed=seed)
    with quiet_harness():
        lm = get_model("vllm")(**arguments)
    return Wrapped(model=subjects.models[-1], backend="vllm", parameters=None, lm=lm)
