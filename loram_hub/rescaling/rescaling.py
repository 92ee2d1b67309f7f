"""Recover an adapter and choose one number that all of it is multiplied by: `loram recover --calibrate-scale`.

The factors were trained beside pruned weights. On the original model their direction is right and their length need not
be: with W = W_0 + c s B^R A^R, the loss on a small development set is a smooth function of c, and its minimum is found
along that one line. Each c costs a forward pass of the original model over the set; nothing is trained and no weight is
loaded twice, because PEFT lets the scale of a loaded adapter be set.

The set must be neither what the adapter was trained on (its best c is too large) nor what results are reported on. c is
baked into lora_B, so the written adapter is as plain as any: alpha and rank stay, and every server reads it. The record
beside it says what c is, on what it was chosen, and the loss at each c that was tried.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm

from loram_hub.adapter import (
    DTYPES,
    RECORD,
    Adapter,
    CanonicalAdapter,
    DtypeName,
    Factor,
    ScaleRecord,
    check_base,
    convert,
    hash_files,
    read_adapter,
    read_record,
    write_adapter,
)
from loram_hub.auto import supported_dtype
from loram_hub.checkpoint import Checkpoint
from loram_hub.errors import CheckpointError, IncompatibleError, InvalidRequestError, MissingDependencyError
from loram_hub.evaluation import EncodedExample, HeldOutLoss, encode_examples, held_out_loss
from loram_hub.files import atomic_folder, refuse_existing, resource_errors
from loram_hub.hub import Source, check_base_checkpoint, resolve
from loram_hub.recovery import RecoveredAdapter, recover
from loram_hub.rescaling.search import ScaleSearch, lowest
from loram_hub.texts import Specification, read_examples

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FEW_EXAMPLES = 32
"""Below this many sequences the standard error itself is a guess."""
_GROUPS = 16
"""Fewest groups of sequences, if there are as many sequences, whose losses are compared between two scales."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaledAdapter:
    """An adapter folder for the original model, as `recover_scaled` wrote it."""

    adapter: RecoveredAdapter
    """What was recovered, and where it is."""
    scale: ScaleRecord
    """What was chosen and why, as in the adapter's record."""

    @property
    def gain(self) -> float:
        """Loss at scale 1 minus loss at the chosen one on the development set, in nats per token; at least 0."""
        losses = dict(self.scale.losses)
        return losses[1.0] - losses[self.scale.factor]


@dataclass(frozen=True, slots=True)
class _DevelopmentSet:
    """Encoded sequences in groups of similar length."""

    groups: Sequence[Sequence[EncodedExample]] = field(repr=False)
    batch_size: int

    @classmethod
    def of(cls, encoded: Sequence[EncodedExample], batch_size: int) -> _DevelopmentSet:
        size = max(1, min(batch_size, len(encoded) // _GROUPS))
        ordered = sorted(encoded, key=lambda example: (len(example.ids), example.ids, example.scored_from))
        return cls([ordered[start : start + size] for start in range(0, len(ordered), size)], batch_size)

    @property
    def examples(self) -> int:
        return sum(map(len, self.groups))

    @property
    def tokens(self) -> int:
        return sum(example.scored_tokens for group in self.groups for example in group)

    @property
    def digest(self) -> str:
        """SHA-256 of ids and scored positions; the order of the data does not matter."""
        found = hashlib.sha256()
        for example in (example for group in self.groups for example in group):
            found.update(np.array([len(example.ids), example.scored_from, *example.ids], dtype="<i8").tobytes())
        return found.hexdigest()

    def losses(self, model: Any) -> list[HeldOutLoss]:  # noqa: ANN401 (a PeftModel, which is imported late)
        return [held_out_loss(model, group, batch_size=self.batch_size) for group in self.groups]


def recover_scaled(
    adapter: str | os.PathLike[str] | PeftModel,
    out_dir: str | os.PathLike[str],
    *,
    data: Specification,
    release: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    search: ScaleSearch | None = None,
    device: str | None = None,
    compute_dtype: torch.dtype | None = None,
    dtype: DtypeName = "bfloat16",
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ScaledAdapter:
    """Recover a pruned adapter, multiplied by the one number that suits the original model best on a development set.

    Args:
        adapter: what training gave: a folder saved by PEFT, a Hub id, or the live `PeftModel`.
        out_dir: adapter folder to create; appears whole or not at all.
        data: development set, texts or prompt/completion tasks of the task at hand, see `loram_hub.texts`: neither
            trained on, nor what results are reported on.
        release: the release it was trained on, see `recover`.
        base: the original model, folder or Hub id; None for the one that the release names, at its commit.
        search: range and number of scales, size of the set; None for the defaults.
        device: where the original model runs, `cuda` say; None for the CPU, `auto` to spread it over all GPUs.
        compute_dtype: what it computes in; None for the best the device has in hardware.
        dtype: type of the written factors, rounded once, after they were multiplied.
        overwrite: replace an existing folder.
        dry_run: choose the scale and say what would be written, without writing.
        revision: of the release on the Hub, see `recover`.
        token: of the Hub.

    Returns:
        What was written, and the scale. It is 1.0, with a warning, if no other one is better by more than the standard
        error of the difference over the examples.

    Raises:
        InvalidRequestError: `out_dir` exists, there is no such device, the data hold fewer than two sequences, or no
            base can be found.
        CheckpointError: weights or tokenizer of the base are missing or torn.
        IncompatibleError: the base is not the one that the release was pruned from, or gives no finite loss.
        MissingDependencyError: peft is not installed.
        LoramError: see `recover`.
    """
    target = Path(out_dir).expanduser()
    refuse_existing(target, overwrite=overwrite)
    if dtype not in DTYPES:
        raise InvalidRequestError(f"dtype is {dtype!r}; one of {', '.join(DTYPES)} is needed.")
    _check_device(device)
    search = search or ScaleSearch()
    with tempfile.TemporaryDirectory(prefix="loram-rescaling-") as scratch:
        whole = Path(scratch) / "recovered"
        recovered = recover(adapter, whole, release=release, dtype="float32", revision=revision, token=token)
        source = _find_base(base, recovered, token)
        name = str(adapter) if isinstance(adapter, str | os.PathLike) else "The adapter"
        check_base(whole, source.folder, commit=source.commit, name=name, may_differ=False)
        with Checkpoint(source.folder) as checkpoint:
            check_base_checkpoint(checkpoint, source)
        development = _read_development_set(data, source.folder, search)
        chosen = replace(
            _choose(_open(source.folder, whole, device, compute_dtype), development, search), base_commit=source.commit
        )
        nbytes = _write(whole, target, chosen, dtype, overwrite=overwrite, dry_run=dry_run)
    logger.info("%s with scale %g", "Would write" if dry_run else "Wrote", chosen.factor)
    return ScaledAdapter(adapter=replace(recovered, folder=target, nbytes=nbytes), scale=chosen)


def _find_base(base: str | os.PathLike[str] | None, recovered: RecoveredAdapter, token: str | bool | None) -> Source:
    """Fetch the original model, at the commit that the release was pruned from."""
    if base is None and recovered.revision is None:
        raise InvalidRequestError(
            f"The release was pruned from a local folder, {recovered.base_id!r}; say where it is with --base."
        )
    wanted = recovered.base_id if base is None else base
    revision = recovered.revision if str(wanted) == recovered.base_id else None
    return resolve(wanted, revision=revision, token=token)


def _read_development_set(data: Specification, base: Path, search: ScaleSearch) -> _DevelopmentSet:
    from transformers import AutoTokenizer

    examples = read_examples(data, limit=search.limit)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as err:
        raise CheckpointError(
            f"{base} has no tokenizer that transformers can open, which the development set needs: {err}"
        ) from err
    encoded, cut = encode_examples(examples, tokenizer, max_tokens=search.max_tokens)
    if len(encoded) < 2:
        raise InvalidRequestError(
            f"The development set has {len(encoded)} sequence; one says nothing about others. Give a hundred or more."
        )
    if len(encoded) < _FEW_EXAMPLES:
        logger.warning(
            "The development set has %d sequences only; a scale chosen on so few may not suit others. Give a hundred "
            "or more",
            len(encoded),
        )
    if cut:
        logger.info("%d of %d examples are longer than %d tokens", cut, len(examples), search.max_tokens)
    return _DevelopmentSet.of(encoded, search.batch_size)


def _open(base: Path, adapter: Path, device: str | None, dtype: torch.dtype | None) -> PeftModel:
    try:
        from peft import PeftModel
    except ImportError as err:
        raise MissingDependencyError("Choosing a scale runs the adapter, which needs peft: pip install peft") from err
    from transformers import AutoModelForCausalLM

    placement: str | dict[str, int | str] = "auto" if device == "auto" else {"": device or "cpu"}
    chosen = dtype or supported_dtype(_kind_of_device(device))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=chosen, device_map=placement)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def _check_device(device: str | None) -> None:
    """Check that a model can run there; raises `InvalidRequestError`."""
    if device is None or device == "auto":
        return
    there = ["cpu"]
    if torch.accelerator.is_available() and (accelerator := torch.accelerator.current_accelerator()) is not None:
        there += [accelerator.type, *(f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count()))]
    if device not in there:
        raise InvalidRequestError(f"device is {device!r:.100}; this machine and its torch have {', '.join(there)}.")


def _kind_of_device(device: str | None) -> str:
    if device != "auto":
        return (device or "cpu").partition(":")[0]
    return "cuda" if torch.cuda.is_available() else "cpu"


def _choose(model: PeftModel, development: _DevelopmentSet, search: ScaleSearch) -> ScaleRecord:
    """Try scales on the development set and take the best, or 1.0 if none is better by more than the noise."""
    by_group: dict[float, list[HeldOutLoss]] = {}
    with tqdm(total=search.evaluations, desc="Scale of the adapter", unit="pass") as bar:

        def measure(scale: float) -> float:
            set_scale_(model, scale)
            by_group[scale] = development.losses(model)
            bar.update()
            loss = math.fsum(group.loss * group.tokens for group in by_group[scale]) / development.tokens
            logger.info("scale %g: %.4f nats per token", scale, loss)
            return loss

        losses = {scale: loss for scale, loss in lowest(measure, search).items() if math.isfinite(loss)}
    if 1.0 not in losses:
        raise IncompatibleError(
            "The original model with the recovered adapter gives no finite loss on the development set. Does the base "
            "compute in a type that it was made for? Look with loram eval."
        )
    best = min(losses, key=lambda scale: (losses[scale], abs(math.log(scale))))
    gain, error = losses[1.0] - losses[best], _standard_error(by_group[1.0], by_group[best])
    if best in (search.low, search.high) and best != 1.0:
        logger.warning("The best scale found, %g, is the end of the range; the best of all may lie beyond", best)
    if gain <= error:
        logger.warning(
            "No scale is better than 1 beyond chance: %g gains %.4f nats per token with a standard error of %.4f. The "
            "adapter is written as it was trained",
            best, gain, error,
        )  # fmt: skip
        best, error = 1.0, 0.0
    return ScaleRecord(
        factor=best,
        losses=tuple(sorted(losses.items())),
        standard_error=error,
        examples=development.examples,
        tokens=development.tokens,
        data_sha256=development.digest,
        base_commit=None,
    )


def set_scale_(model: PeftModel, scale: float) -> None:
    """Multiply what a loaded adapter adds by `scale`, compared with the adapter as it was loaded.

    Args:
        model: with one adapter, active.
        scale: 1.0 is the adapter as it was loaded.
    """
    from peft.tuners.lora.layer import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale(str(model.active_adapter), scale)


def _standard_error(before: Sequence[HeldOutLoss], after: Sequence[HeldOutLoss]) -> float:
    """Standard error of the difference of two mean losses on the same groups, as of a ratio of sums over groups."""
    tokens = sum(group.tokens for group in before)
    differences = [(b.loss - a.loss) * b.tokens for b, a in zip(before, after, strict=True)]
    mean = math.fsum(differences) / tokens
    squares = math.fsum((d - mean * b.tokens) ** 2 for d, b in zip(differences, before, strict=True))
    return math.sqrt(squares * len(before) / (len(before) - 1)) / tokens


def _write(whole: Path, target: Path, chosen: ScaleRecord, dtype: DtypeName, *, overwrite: bool, dry_run: bool) -> int:
    """Multiply and round a recovered adapter in fp32, and write it with its record; return the bytes of its weights."""
    recovered = read_adapter(whole)
    canonical = _canonical(recovered, dtype)

    def factors(module: str) -> tuple[Factor, Factor]:
        pair = recovered.pairs[module]
        lora_B = convert(pair.lora_B, dtype, scale=chosen.factor, name=f"lora_B of {module!r}")
        return convert(pair.lora_A, dtype, name=f"lora_A of {module!r}"), lora_B

    if dry_run:
        for module in canonical.modules:  # a number may overflow the type
            factors(module)
        return canonical.nbytes
    with atomic_folder(target, overwrite=overwrite) as folder:
        write_adapter(folder, canonical, factors)
        record = replace(read_record(whole), files=hash_files(folder), scale=chosen)
        with resource_errors(f"Writing {folder}"):
            (folder / RECORD).write_text(record.to_json(), encoding="utf-8")
    return canonical.nbytes


def _canonical(recovered: Adapter, dtype: DtypeName) -> CanonicalAdapter:
    """Describe a recovered adapter in another type."""
    targets = recovered.config.target_modules
    assert isinstance(targets, tuple)  # `recover` lists them
    return CanonicalAdapter(
        base_id=recovered.config.base,
        revision=recovered.config.revision,
        r=recovered.config.r,
        lora_alpha=round(recovered.config.lora_alpha),
        target_modules=targets,
        dtype=dtype,
        shapes={module: pair.shape for module, pair in recovered.pairs.items()},
    )
