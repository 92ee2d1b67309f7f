"""`loram.json`: a round trip, and every way in which an untrusted one can be wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loram_hub.errors import CheckpointError, IncompatibleError, VerificationError
from loram_hub.folders import leads_out
from loram_hub.manifest import (
    FORMAT,
    MANIFEST,
    STRUCTURED_FORMAT,
    BaseModel,
    FileEntry,
    Manifest,
    Pruning,
    Sparsification,
    file_entries,
    read_manifest,
    tool_versions,
)
from loram_hub.seals import SEAL, seal

SOUND = Manifest(
    base=BaseModel(id="org/base", commit="c" * 40, config_sha256="d" * 64, parameters=1234),
    pruning=Pruning(
        method="structured",
        importance="taylor:param_first",
        pruning_ratio=0.65,
        keep_first=4,
        keep_last=2,
        round_to=None,
        seed=0,
        calibration={"samples": 10, "tokens": 128},
        plan_sha256="e" * 64,
    ),
    parameters=567,
    alignment={"steps": 200},
    quantization={"type": "nf4", "block": 64, "double_quant": True, "dtype": "bfloat16"},
    recipe={"argument": ["verbatim", 1, None]},
    tools={"python": "3.11"},
    files={"config.json": FileEntry(sha256="f" * 64, size=10)},
)

SPARSE = replace(
    SOUND,
    pruning=Sparsification(
        method="sparsegpt",
        pattern="4:8",
        sparsity=0.5,
        kept_weights=333,
        dampening=0.01,
        block_size=128,
        seed=0,
        calibration={"samples": 128, "tokens": 2048},
        plan_sha256="e" * 64,
    ),
)

Change = Callable[[dict[str, Any]], object]


def write(folder: Path, manifest: Manifest | dict[str, Any]) -> Path:
    """Write a manifest; a dict as whoever alters one can, with a seal that fits."""
    if isinstance(manifest, Manifest):
        text = manifest.to_json()
    else:
        text = seal({key: value for key, value in manifest.items() if key != SEAL})
    (folder / MANIFEST).write_text(text)
    return folder


@pytest.mark.parametrize(
    "manifest",
    [
        SOUND,
        SPARSE,
        replace(SPARSE, pruning=replace(SPARSE.pruning, pattern="3:7", sparsity=1 - 3 / 7)),
        replace(
            SPARSE,
            pruning=replace(
                SPARSE.pruning, method="wanda", pattern="unstructured", sparsity=0.55, dampening=None, block_size=None
            ),
        ),
        replace(SOUND, alignment=None, quantization=None, recipe={}, tools={}, files={}),
        replace(SOUND, base=replace(SOUND.base, commit=None)),
        replace(SOUND, pruning=replace(SOUND.pruning, calibration=None, round_to=64, pruning_ratio=0)),
    ],
)
def test_what_is_written_is_read_back(tmp_path: Path, manifest: Manifest) -> None:
    assert read_manifest(write(tmp_path, manifest)) == manifest


def test_the_text_is_one_for_all_machines() -> None:
    text = SOUND.to_json()

    assert text == SOUND.to_json()
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert text.endswith("}\n")
    assert json.loads(text)["format"] == STRUCTURED_FORMAT == 1
    assert json.loads(SPARSE.to_json())["format"] == 2


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"loram\.json is missing"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("version", [3, 4, 10**9])
def test_a_newer_format_asks_for_an_upgrade_whatever_else_it_holds(tmp_path: Path, version: int) -> None:
    write(tmp_path, {"format": version, "entirely": "new"})

    with pytest.raises(IncompatibleError, match=f"format {version}; this loram-hub reads up to format {FORMAT}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("version", [None, 0, -1, "1", 1.0, True, [1]])
def test_a_format_that_is_no_version_is_refused(tmp_path: Path, version: Any) -> None:
    values = json.loads(SOUND.to_json()) | {"format": version}

    with pytest.raises(VerificationError, match="a positive whole number is needed"):
        read_manifest(write(tmp_path, values))


SECTIONS = ["base", "pruning", "parameters", "alignment", "quantization", "recipe", "tools", "files"]


@pytest.mark.parametrize("field", SECTIONS)
def test_a_missing_section_is_refused(tmp_path: Path, field: str) -> None:
    values = json.loads(SOUND.to_json())
    del values[field]

    with pytest.raises(VerificationError, match=f"Manifest has missing or unknown fields .'{field}'"):
        read_manifest(write(tmp_path, values))


@pytest.mark.parametrize(
    ("record", "field"),
    [
        *((record, field) for record in ("base", "pruning") for field in json.loads(SOUND.to_json())[record]),
        *(("config.json", field) for field in ("sha256", "size")),
    ],
)
def test_a_missing_field_is_refused(tmp_path: Path, record: str, field: str) -> None:
    values = json.loads(SOUND.to_json())
    del (values if record in values else values["files"])[record][field]

    with pytest.raises(VerificationError, match=f"has missing or unknown fields .'{field}'"):
        read_manifest(write(tmp_path, values))


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(surprise=1),
        lambda values: values["base"].update(surprise=1),
        lambda values: values["pruning"].update(surprise=1),
        lambda values: values["files"]["config.json"].update(surprise=1),
    ],
)
def test_an_unknown_field_is_refused(tmp_path: Path, change: Change) -> None:
    values = json.loads(SOUND.to_json())
    change(values)

    with pytest.raises(VerificationError, match=r"unknown fields \['surprise'\]"):
        read_manifest(write(tmp_path, values))


@pytest.mark.parametrize(
    "change",
    [
        *(lambda values, s=section: values.update({s: 3.5}) for section in SECTIONS),
        *(lambda values, s=section: values.update({s: True}) for section in SECTIONS),
        *(lambda values, s=section: values.update({s: []}) for section in SECTIONS),
        lambda values: values["base"].update(id=7),
        lambda values: values["base"].update(parameters="many"),
        lambda values: values["base"].update(parameters=1.5),
        lambda values: values["base"].update(parameters=None),
        lambda values: values["pruning"].update(seed=True),
        lambda values: values["pruning"].update(pruning_ratio="0.65"),
        lambda values: values["pruning"].update(calibration=[]),
        lambda values: values["pruning"].update(keep_first=None),
        lambda values: values["files"].update({"config.json": "f" * 64}),
        lambda values: values["files"]["config.json"].update(size=10.0),
        lambda values: values["files"]["config.json"].update(sha256=None),
        lambda values: values["tools"].update(python=3),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tmp_path: Path, change: Change) -> None:
    values = json.loads(SOUND.to_json())
    change(values)

    with pytest.raises(VerificationError, match=r"loram\.json"):
        read_manifest(write(tmp_path, values))


def test_file_entries_cover_every_file_but_the_manifest_itself(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("abc", "sub/loram.json", MANIFEST):
        (tmp_path / name).write_bytes(b"abc")

    entry = FileEntry(sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", size=3)
    assert file_entries(tmp_path) == {"abc": entry, "sub/loram.json": entry}


def test_tool_versions_name_what_shaped_the_bytes() -> None:
    versions = tool_versions()

    assert {"python", "numpy", "safetensors", "torch", "transformers", "bitsandbytes"} <= set(versions)
    assert all(version[0].isdigit() for version in versions.values())


# -- the seal ---------------------------------------------------------------------------------------------------------


def test_no_byte_of_a_manifest_can_be_flipped(tmp_path: Path) -> None:
    original = SOUND.to_json().encode()
    for position, byte in enumerate(original):
        for flip in (0x01, 0x04, 0x20):  # another digit or letter; another white space; another case
            (tmp_path / MANIFEST).write_bytes(original[:position] + bytes([byte ^ flip]) + original[position + 1 :])
            with pytest.raises((VerificationError, IncompatibleError)):
                read_manifest(tmp_path)

    assert len(original) > 1000


def test_a_manifest_that_was_edited_or_rewritten_is_told_so(tmp_path: Path) -> None:
    values = json.loads(SOUND.to_json())

    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(VerificationError, match="was rewritten: same values, other text"):
        read_manifest(tmp_path)

    values["recipe"]["argument"] = ["another"]
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(VerificationError, match="was changed: it is not what its own sha256 says"):
        read_manifest(tmp_path)

    del values[SEAL]
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(VerificationError, match="has no sha256 of its own"):
        read_manifest(tmp_path)


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"deeper": value}
    return value


def test_a_recipe_may_be_nested_but_not_without_end(tmp_path: Path) -> None:
    deep = replace(SOUND, recipe=nested(20))
    assert read_manifest(write(tmp_path, deep)) == deep

    (tmp_path / MANIFEST).write_text(json.dumps(json.loads(SOUND.to_json()) | {"recipe": nested(400)}))
    with pytest.raises(VerificationError, match="nests deeper than 32 levels"):
        read_manifest(tmp_path)


# -- values that a type alone lets through ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["base"].update(config_sha256="d" * 63), "base.config_sha256 .* 64 hexadecimal digits"),
        (lambda values: values["base"].update(commit="main"), "base.commit 'main'; 40 hexadecimal digits"),
        (lambda values: values["base"].update(id=""), "base.id ''; 1 to 256 printable"),
        (lambda values: values["base"].update(id="x" * 257), "base.id .*; 1 to 256 printable"),
        (lambda values: values["base"].update(id="/etc/passwd"), "base.id '/etc/passwd'; a Hub id or a bare name"),
        (lambda values: values["base"].update(id="../other"), "a Hub id or a bare name is needed, no path"),
        (lambda values: values["base"].update(parameters=-1), "base.parameters -1"),
        (lambda values: values.update(parameters=10**20), r"has parameters about 10\^20"),
        (lambda values: values["pruning"].update(method="other"), "pruning.method 'other'; format 1 has structured"),
        (lambda values: values["pruning"].update(plan_sha256="E" * 64), "pruning.plan_sha256"),
        (lambda values: values["pruning"].update(keep_last=-2), "pruning.keep_last -2"),
        (lambda values: values["files"]["config.json"].update(sha256="xyz"), r"files\['config.json'\].sha256 'xyz'"),
        (lambda values: values["files"]["config.json"].update(size=-1), r"files\['config.json'\].size -1"),
        (lambda values: values["quantization"].update(block=32), "has quantization .*'block': 32"),
        (lambda values: values["quantization"].update(double_quant=1), "has quantization .*'double_quant': 1"),
        (lambda values: values["quantization"].update(dtype="int8"), "has quantization .*'dtype': 'int8'"),
        (lambda values: values["quantization"].pop("dtype"), "has quantization"),
        (lambda values: values["recipe"].update(note="\x1b]0;title\x07"), "control character"),
        (lambda values: values["tools"].update({"x\u202e": "1"}), "control character"),
        (lambda values: values["recipe"].update(note="\ud800"), "control character"),
    ],
)
def test_a_value_that_cannot_be_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    values = json.loads(SOUND.to_json())
    change(values)

    with pytest.raises(VerificationError, match=message) as caught:
        read_manifest(write(tmp_path, values))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_a_manifest_that_is_no_plain_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / MANIFEST)

    with pytest.raises(VerificationError, match="is no plain file"):
        read_manifest(tmp_path)


def test_a_hub_cache_may_keep_its_blobs_on_another_disk(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "models--org--name" / "blobs").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "abc").write_text("content")
    (tmp_path / "secret").write_text("content")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "other.json").symlink_to(tmp_path / "secret")

    assert not leads_out(snapshot / "config.json", snapshot)
    assert leads_out(snapshot / "other.json", snapshot)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "structured"}, "pruning.method 'structured'; format 2 has sparsegpt or wanda or magnitude"),
        ({"pattern": "8:4"}, "pruning.pattern '8:4'"),
        ({"pattern": "4:64"}, "pruning.pattern '4:64'"),
        ({"pattern": "2:8"}, "pruning.sparsity 0.5, which is not that of 2:8"),
        ({"sparsity": 0}, "pruning.sparsity 0; a share between 0 and 1"),
        ({"kept_weights": -1}, "pruning.kept_weights -1"),
        ({"dampening": None}, "pruning.dampening None"),
        ({"block_size": 0}, "pruning.block_size 0"),
        ({"method": "wanda"}, "pruning.dampening 0.01"),
        ({"importance": "random"}, "unknown fields .'importance'"),
    ],
)
def test_a_sparsification_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = json.loads(SPARSE.to_json())
    values["pruning"] |= change

    with pytest.raises(VerificationError, match=message):
        read_manifest(write(tmp_path, values))


@pytest.mark.parametrize(("manifest", "version"), [(SOUND, 2), (SPARSE, 1)])
def test_format_and_way_of_pruning_go_together(tmp_path: Path, manifest: Manifest, version: int) -> None:
    values = json.loads(manifest.to_json()) | {"format": version}

    with pytest.raises(VerificationError, match=f"format {version} has "):
        read_manifest(write(tmp_path, values))


def test_labels_tell_releases_apart() -> None:
    unstructured = replace(SPARSE.pruning, pattern="unstructured", sparsity=0.55)

    assert [one.label for one in (SOUND.pruning, SPARSE.pruning, unstructured)] == [
        "ratio 0.65",
        "SparseGPT 4:8",
        "SparseGPT 0.55",
    ]
