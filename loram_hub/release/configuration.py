"""`config.json` of a release: the base model's, marked, without anything that would run code or load other files."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loram_hub.architecture import Architecture, architecture_of
from loram_hub.checkpoint import CONFIG
from loram_hub.errors import IncompatibleError, InvalidRequestError, VerificationError
from loram_hub.files import dump_json, read_json
from loram_hub.manifest import FLOAT_TYPES, FORMAT, STRUCTURED_FORMAT, Manifest
from loram_hub.release.nf4 import bitsandbytes_config
from loram_hub.release.settings import (
    MODEL_KEYS,
    check_generation_settings,
    check_model_settings,
    sound_generation_settings,
)
from loram_hub.seals import check_depth

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
_MENDED = (GENERATION_CONFIG, "tokenizer_config.json")

MODEL_TYPE_PREFIX = "loram_"
"""Releases carry a `model_type` of their own: with the base's, stock transformers opens an NF4 release without a word
and builds modules of the wrong declared size."""

_CODE = "would run code from the release. loram-hub never does"
_ELSEWHERE = "would load another file than the one that was checked"
REFUSED_KEYS: Mapping[str, str] = {
    "auto_map": _CODE,
    "custom_pipelines": _CODE,
    "custom_generate": _CODE,
    "trust_remote_code": _CODE,
    "model_file": _CODE,
    "kernel_config": _CODE,
    "use_kernels": _CODE,
    "transformers_weights": _ELSEWHERE,
    "configuration_files": _ELSEWHERE,
    "gguf_file": _ELSEWHERE,
    "subfolder": _ELSEWHERE,
    "compression_config": "would have the weights read as another format",
    "distributed_config": "would change how the model is built",
    "fusion_config": "would change how the model is built",
    "per_layer_config": "would change how the model is built",
}
"""Keys that no JSON file of a release may have, at any depth, and what each of them does."""

# transformers takes any other value for a repository on the Hub whose compiled code it is to fetch.
_IMPLEMENTATIONS = frozenset(
    {
        None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention",
        "grouped_mm", "batched_mm",
    }
)  # fmt: skip
_IMPLEMENTATION_KEYS = frozenset(
    {
        f"{mark}{kind}_implementation{end}"
        for mark in ("", "_")
        for kind in ("attn", "experts")
        for end in ("", "_internal")
    }
)
_LARGEST_NUMBER = 2**63
_LONGEST_TEXT = 100_000
# transformers writes 10^30 for "no limit".
_LENGTH = re.compile(r"(model_)?max_(\w*_)?len(gth)?", re.ASCII)


def release_config(
    base_config: Mapping[str, Any], *, quantization_config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Make the `config.json` of a release from the base model's: of its settings those that the families here have.

    It is marked as that of a structured release; what is sealed as a sparse one has its mark replaced by that.
    """
    config: dict[str, Any] = {key: without_refused(value) for key, value in base_config.items() if key in MODEL_KEYS}
    config["model_type"] = MODEL_TYPE_PREFIX + str(base_config["model_type"])
    config["loram"] = {"format": STRUCTURED_FORMAT}
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    return config


def base_config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a release's config back into the base model's: its own `model_type`, no `loram` mark.

    Raises:
        VerificationError: the config carries no `loram_` model_type, or wants code to be run (`auto_map`).
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type.startswith(MODEL_TYPE_PREFIX):
        raise VerificationError(
            f"{CONFIG} has model_type {model_type!r:.100}; a release has one that starts with {MODEL_TYPE_PREFIX!r}."
        )
    check_keys(config, source=CONFIG)
    base = {key: value for key, value in config.items() if key != "loram"}
    base["model_type"] = model_type.removeprefix(MODEL_TYPE_PREFIX)
    return base


def architecture_in(config: Mapping[str, Any]) -> Architecture:
    """Read the base's architecture from a release's config.

    Raises:
        VerificationError: see `base_config_of`; or a size is out of bounds.
        UnsupportedModelError: the family is unknown here.
    """
    try:
        return architecture_of(base_config_of(config), find_culprit=False)
    except InvalidRequestError as err:  # nobody asked for anything: the file is at fault
        raise VerificationError(str(err)) from err


def check_keys(values: Mapping[str, Any], *, source: str) -> None:
    """Check a JSON file of a release for what must not be in it, at any depth.

    Args:
        values: the parsed file: a config, a generation config, a tokenizer's.
        source: names it in errors.

    Raises:
        VerificationError: a key would have code run or another file loaded; or a value is absurdly deep, long or large.
    """
    check_depth(values, source=source)
    for key, value in _pairs(values):
        if key in REFUSED_KEYS and value is not None and value is not False:  # which say "no"
            raise VerificationError(
                f"{source} has the key {key}, which {REFUSED_KEYS[key]}. Remove it and make a new release."
            )
        if key in _IMPLEMENTATION_KEYS and (isinstance(value, dict | list) or value not in _IMPLEMENTATIONS):
            raise VerificationError(f"{source} asks for {key} {value!r:.100}, which would fetch and run compiled code.")
        if isinstance(value, str) and len(value) > _LONGEST_TEXT and key != "chat_template":
            raise VerificationError(f"{source} has {len(value):,} characters under {key!r:.100}.")
        if isinstance(value, int | float) and abs(value) > _LARGEST_NUMBER and not _LENGTH.fullmatch(key):
            raise VerificationError(f"{source} has a number beyond 2^63 under {key!r:.100}.")


def mark_format(path: Path, version: int) -> None:
    """Have the `config.json` of a release in the making say of which format it is."""
    config = read_json(path)
    if config.get("loram") != {"format": version}:
        path.write_text(dump_json({**config, "loram": {"format": version}}), encoding="utf-8")


def check_config(config: Mapping[str, Any], manifest: Manifest, *, source: str) -> None:
    """Check that a release's config says of format and quantization what its manifest says.

    Args:
        config: the parsed `config.json`.
        manifest: of the release.
        source: names the config in errors.

    Raises:
        VerificationError: a claim is missing or another one.
        IncompatibleError: the mark is that of a newer format.
    """
    mark = config.get("loram")
    if not isinstance(mark, dict) or set(mark) != {"format"} or type(mark["format"]) is not int:
        raise VerificationError(
            f"{source} has the mark loram = {mark!r:.100}; {{'format': {manifest.format}}} is needed."
        )
    if mark["format"] > FORMAT:
        raise IncompatibleError(
            f"{source} is of format {mark['format']}, this loram-hub reads up to {FORMAT}. Upgrade it."
        )
    if mark["format"] < STRUCTURED_FORMAT:
        raise VerificationError(
            f"{source} is of format {mark['format']}, which never was; {STRUCTURED_FORMAT} is the first."
        )
    if mark["format"] != manifest.format:
        raise VerificationError(
            f"{source} is of format {mark['format']}, the manifest of format {manifest.format}: one of them is from "
            "another release."
        )
    quantization = manifest.quantization
    found = config.get("quantization_config")
    if quantization is None:
        if found is not None:
            raise VerificationError(f"{source} has a quantization_config; the manifest says that nothing is quantized.")
        return
    if not isinstance(found, dict):
        raise VerificationError(f"{source} has no quantization_config; the manifest says that the weights are NF4.")
    expected = bitsandbytes_config(str(quantization.get("dtype")))
    for key in sorted({*expected, *found}):
        allowed = FLOAT_TYPES if key == "bnb_4bit_compute_dtype" else (expected.get(key),)
        if key not in found or key not in expected or not any(_same(found[key], value) for value in allowed):
            raise VerificationError(
                f"{source} has {found.get(key)!r:.100} for quantization_config.{key}; a release has "
                f"{expected.get(key)!r} there."
            )


def check_settings(config: Mapping[str, Any], architecture: Architecture, *, source: str) -> None:
    """Check every setting of a release's config: known to the families here, of its type, within bounds.

    Raises:
        VerificationError: see `settings.check_model_settings`.
    """
    elsewhere = {"loram", "quantization_config", *_IMPLEMENTATION_KEYS}
    check_model_settings(
        {key: value for key, value in config.items() if key not in elsewhere},
        vocab_size=architecture.vocab_size,
        layers=architecture.num_hidden_layers,
        source=source,
    )


def check_companion(path: Path, *, vocab_size: int) -> None:
    """Check a JSON file that travels with the weights: a generation config, a tokenizer's settings.

    Raises:
        VerificationError: it is no strict JSON, has a key that would have code run or another file loaded, or is a
            generation config with other settings than transformers has.
    """
    values = read_json(path)
    check_keys(values, source=str(path))
    if path.name == GENERATION_CONFIG:
        kept = {key: value for key, value in values.items() if key not in REFUSED_KEYS}
        check_generation_settings(kept, vocab_size=vocab_size, source=str(path))


def mend_companions(folder: Path, names: Iterable[str], *, vocab_size: int) -> None:
    """Leave out of the settings files of a release in the making what no release may hold.

    Args:
        folder: with the files, which are written anew where something is left out.
        names: of the files that will belong to the release.
        vocab_size: which token ids there are.
    """
    for name in sorted(set(names)):
        if name not in _MENDED or not (folder / name).is_file():
            continue
        values = read_json(folder / name)
        mended = without_refused(values)
        if name == GENERATION_CONFIG:
            mended = sound_generation_settings(mended, vocab_size=vocab_size)
        if mended != values:
            left_out = ", ".join(sorted(key for key in values if key not in mended)) or "what names code"
            logger.warning("Leaving out of %s what a release may not say: %s", name, ascii(left_out[:200]))
            (folder / name).write_text(dump_json(mended), encoding="utf-8")


def without_refused(value: Any) -> Any:  # noqa: ANN401 (any JSON)
    """Copy a JSON value without the keys that no file of a release may have."""
    if isinstance(value, Mapping):
        refused = {*REFUSED_KEYS, *_IMPLEMENTATION_KEYS}
        return {key: without_refused(item) for key, item in value.items() if key not in refused}
    return [without_refused(item) for item in value] if isinstance(value, list) else value


def _same(found: object, expected: object) -> bool:
    """Equality that tells True from 1 and 6 from 6.0 apart, as a JSON text does."""
    return type(found) is type(expected) and found == expected


def _pairs(values: object) -> Iterator[tuple[str, Any]]:
    waiting: list[tuple[str, Any]] = [("", values)]
    while waiting:
        key, value = waiting.pop()
        yield key, value
        if isinstance(value, Mapping):
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend((key, item) for item in value)
