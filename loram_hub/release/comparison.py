"""A release against the model it was pruned from: the same config, the same bytes where something was kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loram_hub.checkpoint import CONFIG, index_tensors
from loram_hub.errors import IncompatibleError, InvalidRequestError, VerificationError
from loram_hub.files import read_json, sha256_of
from loram_hub.manifest import Sparsification
from loram_hub.masks import MaskFile
from loram_hub.release.configuration import release_config
from loram_hub.release.opening import Release
from loram_hub.release.zeros import nonzero_rows
from loram_hub.tensors import TensorInfo, item_bytes, read_array, read_rows

_PIECE = 8 * 1024 * 1024  # bytes of the base that are in memory at a time

# What a release may say otherwise than its base: how it is stored, and who wrote it.
_CHANGES = frozenset(
    {"loram", "quantization_config", "dtype", "torch_dtype", "transformers_version", "architectures", "use_cache"}
)
_TRAINERS_CHANGE = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})

Kept = npt.NDArray[np.int64] | None


def check_base_config(release: Release, config: Path) -> None:
    """Compare the base's `config.json` with the one that the release was pruned with, and with the release's own.

    What was saved from memory may say the same in other words, and trainers set its special tokens: there only values
    that both have are compared.

    Raises:
        IncompatibleError: it is another: weights and shapes may have changed since; or the release's says other things.
    """
    expected, found = release.manifest.base.config_sha256, sha256_of(config)
    if found != expected:
        raise IncompatibleError(
            f"{config} has SHA-256 {found[:12]}..., the release was pruned from a base with {expected[:12]}.... "
            f"Give {release.manifest.base.id} at commit {release.manifest.base.commit or 'unknown (a local folder)'}."
        )
    source = read_json(config)
    if not isinstance(source.get("model_type"), str):
        raise IncompatibleError(f"{config} has no model_type, which the base of a release has.")
    base = release_config(source)
    ignored = _CHANGES | (_TRAINERS_CHANGE if release.was_saved else frozenset())
    for key in sorted({*base, *release.config} - ignored):
        has, had = release.config.get(key), base.get(key)
        same = _agree(has, had) if release.was_saved else has == had
        if not same:
            raise IncompatibleError(
                f"{release.folder / CONFIG} has {has!r:.100} for {key}, the base's has {had!r:.100}: the model would "
                "compute something else than the one it was pruned from. Do not use it."
            )


def _agree(one: object, other: object) -> bool:
    """Whether two values say the same as far as both say anything."""
    if one is None or other is None:
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_agree(one[key], other[key]) for key in set(one) & set(other))
    return one == other


def refuse_incomparable(release: Release) -> None:
    """Raise `InvalidRequestError` if a release's weights are not the base's own: nothing could be compared."""
    manifest = release.manifest
    why = (
        "is NF4"
        if manifest.quantization is not None
        else "was pruned by SparseGPT, which changes the weights that it keeps"
        if isinstance(manifest.pruning, Sparsification) and manifest.pruning.method == "sparsegpt"
        else "was refitted"
        if manifest.alignment is not None and set(manifest.alignment) <= {"refit", "earlier"}
        else "was aligned"
        if manifest.alignment is not None
        else "was saved from memory, where it may have been trained"
        if release.was_saved
        else None
    )
    if why is not None:
        raise InvalidRequestError(
            f"{release.folder} {why}: its weights are not the base's own. Only a release that was pruned and nothing "
            "else can be compared with its base; verify it without --full."
        )


def compare_weights(release: Release, base: Path) -> int:
    """Compare every kept weight with the base's, bit by bit, a few megabytes in memory.

    Args:
        release: pruned, neither aligned nor quantized; see `refuse_incomparable`. A sparse one must also be zero where
            its masks remove the base's weights.
        base: checkpoint folder of the base model.

    Returns:
        Bytes compared.

    Raises:
        VerificationError: a kept weight is not the base's.
        IncompatibleError: the base has other tensors or shapes.
        InvalidRequestError: the base is stored in another type.
    """
    refuse_incomparable(release)
    found, originals = index_tensors(release.folder), index_tensors(base)
    _check_headers(release, found, originals, base)
    masks = release.weight_masks
    for name, info in sorted(found.items()):
        same = (
            _is_masked(name, info, originals[name], masks)
            if masks is not None and name in masks
            else _is_slice(info, originals[name], release.plan.kept_on_axes(name))
        )
        if not same:
            raise VerificationError(
                f"{name!r} of {release.folder} is not what {base} has at the kept positions. The release claims to be "
                "pruned and nothing else: do not use it."
            )
    return sum(info.nbytes for info in found.values())


def _check_headers(
    release: Release, found: Mapping[str, TensorInfo], originals: Mapping[str, TensorInfo], base: Path
) -> None:
    """Check that the base has all tensors, whole and in the release's types, before any of them is read."""
    whole = release.architecture.tensor_shapes()
    for name, info in sorted(found.items()):
        original = originals.get(name)
        if original is None or original.shape != whole[name]:
            has = "lacks" if original is None else f"has shape {original.shape} for"
            raise IncompatibleError(f"{base} {has} {name!r}; the release's base has {whole[name]} there.")
        if original.dtype != info.dtype:
            raise InvalidRequestError(
                f"{name!r} is {original.dtype} in {base} and {info.dtype} in the release: the bytes of one type can be "
                "compared, not values across two. Give the base as it was when it was pruned."
            )


def _is_slice(info: TensorInfo, original: TensorInfo, kept: tuple[Kept, ...]) -> bool:
    """Whether a tensor holds the kept rows and columns of the original, bit by bit (NaN equals itself)."""
    rows, columns = (*kept, None, None)[:2]
    if not info.shape:
        return _bits(read_array(info), info.dtype).tobytes() == _bits(read_array(original), info.dtype).tobytes()
    step = max(1, _PIECE * original.shape[0] // max(1, original.nbytes))
    for first in range(0, original.shape[0], step):
        last = min(first + step, original.shape[0])
        begin, end = (first, last) if rows is None else np.searchsorted(rows, (first, last)).tolist()
        if begin == end:
            continue
        expected = _bits(read_rows(original, first, last), info.dtype)
        if rows is not None:
            expected = expected[rows[begin:end] - first]
        if columns is not None:
            expected = expected[:, columns]
        if not np.array_equal(expected, _bits(read_rows(info, begin, end), info.dtype)):
            return False
    return True


def _is_masked(name: str, info: TensorInfo, original: TensorInfo, masks: MaskFile) -> bool:
    """Whether a projection is the original where its mask keeps it, bit by bit, and zero elsewhere."""
    rows, columns = masks.shape(name)
    step = max(1, _PIECE * rows // max(1, original.nbytes))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        kept = masks.read_rows(name, first, last)
        found, expected = (_bits(read_rows(each, first, last), info.dtype) for each in (info, original))
        if np.any((found != expected) & kept) or np.any(nonzero_rows(info, first, last, columns) > kept):
            return False
    return True


def _bits(values: npt.NDArray[np.generic], dtype: str) -> npt.NDArray[np.generic]:
    return values.view(f"u{item_bytes(dtype)}")
