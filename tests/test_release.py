"""A release on disk: the round trip, and that nothing altered, missing, added or malformed gets past `verify`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from loram_hub.architecture import architecture_of
from loram_hub.checkpoint import CONFIG, INDEX_FILE, SINGLE_FILE, ShardWriter
from loram_hub.errors import (
    CheckpointError,
    IncompatibleError,
    InvalidRequestError,
    LoramError,
    PlanMismatchError,
    UnsupportedModelError,
    VerificationError,
)
from loram_hub.files import sha256_of
from loram_hub.manifest import MANIFEST, BaseModel, Manifest, Pruning, file_entries
from loram_hub.plan import Plan, parameter_counts
from loram_hub.quantization import as_nf4, nf4_tensors
from loram_hub.release import (
    MASK_INDEX,
    Release,
    base_config_of,
    is_release,
    open_metadata,
    open_release,
    release_config,
    verify,
    write_release,
)
from loram_hub.release.nf4 import dynamic_table, nf4_table
from loram_hub.seals import SEAL, seal

BASE_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 27,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 6,
    "vocab_size": 31,
}
ARCHITECTURE = architecture_of(BASE_CONFIG)
PLAN = Plan(
    ARCHITECTURE,
    {
        0: {"kv_heads": np.array([0, 2], dtype=np.int32), "channels": np.arange(1, 27, 2, dtype=np.int32)},
        1: {"kv_heads": np.array([0, 1], dtype=np.int32), "channels": np.array([*range(12), 26], dtype=np.int32)},
    },
)
HEADS_0 = "model.layers.0.self_attn.kv_heads"
CHANNELS_1 = "model.layers.1.mlp.channels"


def manifest_of(plan: Plan, *, pruning_ratio: float = 0.5) -> Manifest:
    counts = parameter_counts(plan.architecture, plan.layers)
    return Manifest(
        base=BaseModel(id="org/base", commit=None, config_sha256="0" * 64, parameters=counts.original_parameters),
        pruning=Pruning(
            method="structured",
            importance="random",
            pruning_ratio=pruning_ratio,
            keep_first=0,
            keep_last=1,
            round_to=None,
            seed=7,
            calibration=None,
            plan_sha256=plan.digest,
        ),
        parameters=counts.pruned_parameters,
        recipe={"pruning_ratio": 0.5},
    )


def build(folder: Path, *, nf4: bool, max_shard_bytes: int = 10**9) -> Path:
    """Write a small release with random weights of the planned shapes."""
    manifest, config = manifest_of(PLAN), release_config(BASE_CONFIG)
    if nf4:
        manifest, config = as_nf4(manifest, BASE_CONFIG, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with write_release(folder, manifest=manifest, plan=PLAN, config=config) as out:
        (out / "tokenizer.json").write_text("{}")
        writer = ShardWriter(out, max_shard_bytes=max_shard_bytes)
        for name, shape in PLAN.tensor_shapes().items():
            tensor = torch.randn(shape, generator=generator).bfloat16()
            parts = nf4_tensors(name, tensor) if nf4 and "_proj" in name else {name: tensor}
            for part, value in parts.items():
                writer.add(part, value)
        writer.finish()
    return folder


@pytest.fixture(scope="module", params=["bf16", "nf4", "sharded"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound release, to be looked at only."""
    folder = tmp_path_factory.mktemp("release") / request.param
    return build(folder, nf4=request.param == "nf4", max_shard_bytes=4000 if request.param == "sharded" else 10**9)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A sound bf16 release, to be spoilt."""
    return build(tmp_path / "release", nf4=False)


@pytest.fixture
def nf4_release(tmp_path: Path) -> Path:
    """A sound NF4 release, to be spoilt."""
    return build(tmp_path / "nf4", nf4=True)


def reseal(folder: Path, **changes: Any) -> None:
    """Give a spoilt release a manifest with the right hashes, as whoever publishes it can."""
    values = json.loads((folder / MANIFEST).read_text())
    values["files"] = {name: {"sha256": e.sha256, "size": e.size} for name, e in file_entries(folder).items()}
    write_manifest(folder, values | changes)


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(seal({key: value for key, value in values.items() if key != SEAL}))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# -- round trip -------------------------------------------------------------------------------------------------------


def test_a_release_is_read_back_as_it_was_written(sound: Path) -> None:
    for opened in (open_metadata(sound), open_release(sound), verify(sound), verify(str(sound))):
        assert isinstance(opened, Release)
        assert opened.plan.digest == PLAN.digest
        assert opened.plan.layers == PLAN.layers
        assert opened.architecture == ARCHITECTURE
        assert opened.manifest.base == manifest_of(PLAN).base
        assert opened.manifest.pruning == manifest_of(PLAN).pruning
        assert opened.is_quantized == (sound.name == "nf4")
        assert set(opened.manifest.files) == {path.name for path in files_of(sound)} - {MANIFEST}
    assert is_release(sound)


def test_kept_indices_are_stored_under_the_names_of_the_format(sound: Path) -> None:
    arrays = load_arrays(sound / MASK_INDEX)

    assert sorted(arrays) == [
        "model.layers.0.mlp.channels",
        "model.layers.0.self_attn.kv_heads",
        "model.layers.1.mlp.channels",
        "model.layers.1.self_attn.kv_heads",
    ]
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.int32)}
    assert arrays[HEADS_0].tolist() == [0, 2]
    assert arrays[CHANNELS_1].tolist() == [*range(12), 26]


def test_the_config_goes_to_a_release_and_back() -> None:
    config = release_config(BASE_CONFIG | {"auto_map": {"AutoModel": "x.py"}, "_name_or_path": "/home/someone/model"})

    assert config == BASE_CONFIG | {"model_type": "loram_llama", "loram": {"format": 1}}
    assert base_config_of(config) == BASE_CONFIG


def test_metadata_alone_opens_without_the_weights(release: Path) -> None:
    for path in files_of(release):
        if path.name not in (MANIFEST, MASK_INDEX, CONFIG):
            path.unlink()

    assert open_metadata(release).plan.digest == PLAN.digest
    with pytest.raises(CheckpointError, match="which its manifest lists"):
        open_release(release)


def test_an_existing_folder_is_not_overwritten_unasked(release: Path) -> None:
    before = (release / MANIFEST).read_bytes()

    with pytest.raises(InvalidRequestError, match="already exists"):
        build(release, nf4=False)

    assert (release / MANIFEST).read_bytes() == before


def test_a_failure_while_weights_are_written_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        config = release_config(BASE_CONFIG)
        with write_release(tmp_path / "out", manifest=manifest_of(PLAN), plan=PLAN, config=config) as folder:
            ShardWriter(folder).add("w", torch.zeros(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert list(tmp_path.iterdir()) == []


# -- altered, missing, added ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy_to_spoil(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoilt") / sound.name
    shutil.copytree(sound, folder)
    return folder


@settings(max_examples=150)
@given(data=st.data())
def test_any_single_flipped_byte_of_any_listed_file_is_caught(copy_to_spoil: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([p for p in files_of(copy_to_spoil) if p.name != MANIFEST]))
    original = path.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    flip = data.draw(st.integers(1, 255))

    spoilt = bytearray(original)
    spoilt[position] ^= flip
    path.write_bytes(spoilt)
    try:
        with pytest.raises(LoramError):
            verify(copy_to_spoil)
    finally:
        path.write_bytes(original)
    verify(copy_to_spoil)


def every_byte(path: Path) -> Iterator[bytes]:
    original = path.read_bytes()
    for position in range(len(original)):
        yield original[:position] + bytes([original[position] ^ 0x20]) + original[position + 1 :]


def test_each_byte_of_the_mask_indexes_and_the_config_counts(release: Path) -> None:
    caught = 0
    for name in (MASK_INDEX, CONFIG):
        original = (release / name).read_bytes()
        for spoilt in every_byte(release / name):
            (release / name).write_bytes(spoilt)
            with pytest.raises(VerificationError, match=f"{name} was changed"):
                open_metadata(release)
            caught += 1
        (release / name).write_bytes(original)

    assert caught == sum((release / name).stat().st_size for name in (MASK_INDEX, CONFIG))
    assert caught > 500


def test_no_byte_of_the_hashes_in_the_manifest_can_be_flipped(release: Path) -> None:
    original = (release / MANIFEST).read_bytes()
    first, last = original.index(b'"files"'), original.index(b'"format"')
    caught = 0
    for position, spoilt in enumerate(every_byte(release / MANIFEST)):
        if not first <= position < last or original[position : position + 1].isspace():
            continue
        (release / MANIFEST).write_bytes(spoilt)
        with pytest.raises(LoramError):
            verify(release)
        caught += 1

    assert caught > 300


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b""])
@pytest.mark.parametrize("name", ["model.safetensors", MASK_INDEX, CONFIG, "tokenizer.json"])
def test_a_file_of_another_size_is_caught_without_hashing(
    release: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    (release / name).write_bytes(change((release / name).read_bytes()))

    with pytest.raises(VerificationError, match=f"{name} has .* bytes, the manifest says"):
        open_release(release)


def test_opening_hashes_all_but_the_weights_and_verify_hashes_those_too(release: Path) -> None:
    weights = release / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x99")

    open_release(release)
    with pytest.raises(VerificationError, match=r"model\.safetensors was changed: its SHA-256"):
        verify(release)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(release: Path, name: str) -> None:
    (release / name).unlink()

    with pytest.raises(CheckpointError, match=f"lacks {name}, which its manifest lists"):
        open_release(release)


@pytest.mark.parametrize("name", [MANIFEST, MASK_INDEX])
def test_a_checkpoint_without_the_marks_of_a_release_is_told_so(release: Path, name: str) -> None:
    (release / name).unlink()

    assert not is_release(release)
    with pytest.raises(CheckpointError, match=r"is a checkpoint but no LoRAM release: it lacks loram\.json or"):
        open_release(release)


def test_a_folder_that_is_no_checkpoint_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no config\.json"):
        open_release(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        verify(tmp_path / "absent")


@pytest.mark.parametrize("name", ["extra.py", "sub/extra.txt", ".hidden", "sub/loram.json", "model.bin"])
def test_an_added_file_is_named(release: Path, name: str) -> None:
    (release / name).parent.mkdir(exist_ok=True)
    (release / name).write_text("import os")

    with pytest.raises(VerificationError, match=f"holds {name}, which its manifest does not list"):
        verify(release)


def test_a_link_within_a_hub_cache_counts_by_its_content(release: Path) -> None:
    repository = release.parent / "models--org--release"
    folder = repository / "snapshots" / ("c" * 40)
    folder.parent.mkdir(parents=True)
    release.rename(folder)
    blob = repository / "blobs" / "abc"
    blob.parent.mkdir()
    (folder / "tokenizer.json").rename(blob)
    (folder / "tokenizer.json").symlink_to("../../blobs/abc")
    verify(folder)

    blob.write_text("[]")

    with pytest.raises(VerificationError, match=r"tokenizer\.json was changed"):
        open_release(folder)


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "tokenizer.json/../../secret"])
def test_a_link_that_leads_out_of_the_release_is_refused(release: Path, target: str) -> None:
    (release.parent / "secret").write_text("{}")
    (release / "tokenizer.json").unlink()
    (release / "tokenizer.json").symlink_to(target)

    with pytest.raises(VerificationError, match="is a link that leads out of the release"):
        verify(release)


def test_a_link_to_nowhere_is_a_missing_file(release: Path) -> None:
    (release / "tokenizer.json").unlink()
    (release / "tokenizer.json").symlink_to("absent")

    with pytest.raises(CheckpointError, match=r"lacks tokenizer\.json"):
        open_release(release)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/hostname",
        "sub/../../outside",
        "./tokenizer.json",
        "",
        ".",
        "a//b",
        "a\0b",
        "x" * 300,
        "a/" * 600 + "b",
    ],
)
def test_a_manifest_that_lists_a_name_outside_the_release_is_refused(release: Path, name: str) -> None:
    (release.parent / "outside").write_text("secret")
    values = json.loads((release / MANIFEST).read_text())
    values["files"][name] = {"sha256": "0" * 64, "size": 6}
    write_manifest(release, values)

    with pytest.raises(VerificationError, match="which is no name of a file in the release"):
        open_release(release)


@pytest.mark.parametrize("name", [CONFIG, MASK_INDEX])
def test_a_manifest_that_leaves_out_a_file_that_counts_is_refused(release: Path, name: str) -> None:
    values = json.loads((release / MANIFEST).read_text())
    del values["files"][name]
    write_manifest(release, values)

    with pytest.raises(VerificationError, match=r"does not list config\.json and mask_index\.safetensors"):
        open_metadata(release)


# -- rightly hashed, wrongly made -------------------------------------------------------------------------------------


def int32(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({HEADS_0: int32(3)}, PlanMismatchError, r"layer 0 kv_heads must be strictly ascending within \[0, 3\)"),
        ({HEADS_0: int32(-1)}, PlanMismatchError, "runs from -1"),
        ({HEADS_0: int32(1, 1)}, PlanMismatchError, "strictly ascending"),
        ({HEADS_0: int32(2, 0)}, PlanMismatchError, "strictly ascending"),
        ({HEADS_0: int32()}, PlanMismatchError, "keeps nothing"),
        ({HEADS_0: np.array([[1]], dtype=np.int32)}, PlanMismatchError, "int32 with 2 axes"),
        ({HEADS_0: np.array([1], dtype=np.int64)}, PlanMismatchError, "has dtype I64; I32 is needed"),
        ({HEADS_0: np.array([1], dtype=np.float32)}, PlanMismatchError, "has dtype F32"),
        ({CHANNELS_1: int32(0, 27)}, PlanMismatchError, "layer 1 channels"),
        ({HEADS_0: None}, PlanMismatchError, "Layer 0 of the plan lists"),
        ({"model.layers.3.mlp.channels": int32(0)}, PlanMismatchError, "prunes layer 3; the base model has 3"),
        ({"model.layers.00.mlp.channels": int32(0)}, VerificationError, "which is no mask index"),
        ({"model.layers.0.mlp.channels\n": int32(0)}, VerificationError, "which is no mask index"),
        ({"model.layers.٠.mlp.channels": int32(0)}, VerificationError, "which is no mask index"),
        ({"model.layers.9999999.mlp.channels": int32(0)}, VerificationError, "which is no mask index"),
        ({"model.layers.0.mlp.experts": int32(0)}, VerificationError, "which is no mask index"),
        ({HEADS_0: int32(2)}, VerificationError, "is not the plan that loram.json was written for"),
        ({HEADS_0: int32(0, 1)}, VerificationError, "is not the plan that loram.json was written for"),
    ],
)
def test_mask_indexes_that_break_a_rule_are_refused(
    release: Path, change: dict[str, Any], error: type[LoramError], message: str
) -> None:
    arrays = {name: array for name, array in (load_arrays(release / MASK_INDEX) | change).items() if array is not None}
    save_arrays(arrays, release / MASK_INDEX)
    reseal(release)

    with pytest.raises(error, match=message):
        open_metadata(release)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 100, b"{}" * 50])
def test_mask_indexes_that_are_no_safetensors_are_refused(release: Path, content: bytes) -> None:
    (release / MASK_INDEX).write_bytes(content)
    reseal(release)

    with pytest.raises(VerificationError, match="is not a sound safetensors file"):
        open_metadata(release)


def test_mask_indexes_of_absurd_size_are_refused(release: Path) -> None:
    with (release / MASK_INDEX).open("wb") as file:
        file.truncate(256 * 2**20 + 1)
    reseal(release)

    with pytest.raises(VerificationError, match="is larger than 268,435,456 bytes"):
        open_metadata(release)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "llama"}, VerificationError, "has one that starts with 'loram_'"),
        ({"model_type": None}, VerificationError, "model_type None"),
        ({"model_type": "loram_gpt2"}, UnsupportedModelError, "'gpt2' is not supported"),
        ({"model_type": "loram_"}, UnsupportedModelError, "'' is not supported"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, VerificationError, "auto_map, which would run code"),
        ({"auto_map": None}, VerificationError, "auto_map"),
        ({"transformers_weights": "other.safetensors"}, VerificationError, "would load another file"),
        ({"num_hidden_layers": 1}, PlanMismatchError, "prunes layer 1; the base model has 1 layers"),
        ({"hidden_size": "16"}, VerificationError, "hidden_size = '16'"),
        ({"num_hidden_layers": 10**9}, VerificationError, "num_hidden_layers"),
        ({"intermediate_size": 26}, PlanMismatchError, "layer 1 channels"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    release: Path, change: dict[str, Any], error: type[LoramError], message: str
) -> None:
    config = json.loads((release / CONFIG).read_text()) | change
    (release / CONFIG).write_text(json.dumps(config))
    reseal(release)

    with pytest.raises(error, match=message):
        open_metadata(release)


def test_a_newer_format_is_refused_before_anything_else_is_looked_at(release: Path) -> None:
    reseal(release, format=3)
    (release / CONFIG).write_text("no JSON at all")

    with pytest.raises(IncompatibleError, match="Upgrade loram-hub"):
        open_metadata(release)


def spoil_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    reseal(folder)


Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t: t.update({Q0: t[Q0].T}),
            PlanMismatchError,
            r"q_proj.weight' has shape \(16, 24\); the plan gives it \(24, 16\)",
        ),
        (lambda t: t.update({Q0: t[Q0][:-1]}), PlanMismatchError, "q_proj.weight' has shape"),
        (lambda t: t.update({Q0: t[Q0].flatten()}), PlanMismatchError, "q_proj.weight' has shape"),
        (lambda t: t.pop(Q0), CheckpointError, "has no tensor 'model.layers.0.self_attn.q_proj.weight'"),
        (lambda t: t.pop("lm_head.weight"), CheckpointError, "has no tensor 'lm_head.weight'"),
    ],
)
def test_weights_that_do_not_fit_the_plan_are_refused(
    release: Path, change: Callable[[dict[str, torch.Tensor]], object], error: type[LoramError], message: str
) -> None:
    spoil_weights(release, change)

    with pytest.raises(error, match=message):
        open_release(release)


def state_with(tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    """Change keys of q_proj's quantization state; None drops one."""
    name = f"{Q0}.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[name].numpy().tobytes()) | changes
    text = json.dumps({key: value for key, value in state.items() if value is not None})
    tensors[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)


PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "spoil",
    [lambda x: x[:-1], lambda x: torch.cat([x, x]), lambda x: x.to(torch.float64), lambda x: x[None], lambda x: None],
    ids=["shorter", "longer", "wider", "another axis", "missing"],
)
def test_parts_of_a_packed_weight_that_do_not_fit_the_plan_are_refused(
    nf4_release: Path, part: str, spoil: Callable[[torch.Tensor], torch.Tensor | None]
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        spoilt = spoil(tensors.pop(Q0 + part))
        if spoilt is not None:
            tensors[Q0 + part] = spoilt

    spoil_weights(nf4_release, change)

    with pytest.raises((PlanMismatchError, CheckpointError), match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        open_release(nf4_release)


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_type": "fp4"},
        {"blocksize": 4096},
        {"blocksize": 0},
        {"nested_blocksize": 64},
        {"nested_dtype": "float16"},
        {"shape": [16, 24]},
        {"shape": [24, 17]},
        {"shape": [24, 1600000]},
        {"shape": []},
        {"dtype": "float64"},
        {"dtype": "__class__"},
        {"nested_offset": "0"},
        {"nested_offset": None},
        {"quant_type": None},
        {"shape": None},
        {"surprise": 1},
    ],
)
def test_a_quantization_state_that_is_not_the_plans_is_refused(nf4_release: Path, changes: dict[str, Any]) -> None:
    spoil_weights(nf4_release, lambda tensors: state_with(tensors, **changes))

    with pytest.raises((PlanMismatchError, VerificationError), match=r"quantization state of 'model\.layers\.0"):
        open_release(nf4_release)


@pytest.mark.parametrize(
    "state",
    [b"", b"[]", b"{", b"\xff" * 10, b'{"shape": 1, "shape": 2}', b'{"nested_offset": NaN}', b"{" + b" " * 5000 + b"}"],
)
def test_a_quantization_state_that_is_no_small_json_is_refused(nf4_release: Path, state: bytes) -> None:
    tensor = torch.tensor(list(state), dtype=torch.uint8)
    spoil_weights(nf4_release, lambda t: t.update({f"{Q0}.quant_state.bitsandbytes__nf4": tensor}))

    with pytest.raises(VerificationError, match=r"q_proj\.weight\.quant_state"):
        open_release(nf4_release)


def test_a_packed_weight_without_its_quantization_state_is_refused(nf4_release: Path) -> None:
    spoil_weights(nf4_release, lambda tensors: tensors.pop(f"{Q0}.quant_state.bitsandbytes__nf4"))

    with pytest.raises(VerificationError, match="is missing, or not the small piece of JSON"):
        open_release(nf4_release)


def test_a_tensor_in_two_weight_files_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path / "sharded", nf4=False, max_shard_bytes=4000)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    reseal(folder)

    with pytest.raises(VerificationError, match="is in two shards"):
        open_release(folder)


def test_a_release_may_prune_nothing(tmp_path: Path) -> None:
    whole = Plan(ARCHITECTURE, {})
    config = release_config(BASE_CONFIG)
    with write_release(
        tmp_path / "out", manifest=manifest_of(whole, pruning_ratio=0), plan=whole, config=config
    ) as folder:
        writer = ShardWriter(folder)
        for name, shape in ARCHITECTURE.tensor_shapes().items():
            writer.add(name, torch.zeros(shape))
        writer.finish()

    assert verify(tmp_path / "out").plan.layers == (ARCHITECTURE.whole_layer,) * 3


def test_the_manifest_given_is_completed_not_changed(tmp_path: Path) -> None:
    given_manifest = manifest_of(PLAN)

    build(tmp_path / "out", nf4=False)
    opened = open_metadata(tmp_path / "out")

    assert given_manifest.files == {}
    assert replace(opened.manifest, files={}, tools={}) == given_manifest


# -- what verify looks at besides -------------------------------------------------------------------------------------


def test_code_tables_are_those_of_bitsandbytes() -> None:
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    assert np.array_equal(nf4_table(), get_4bit_type("nf4", device="cpu").numpy())
    # torch divides [0.1, 1] with other rounding; half a part in ten million is one unit in the last place
    np.testing.assert_allclose(dynamic_table(), create_dynamic_map().numpy(), rtol=2e-7, atol=0)
    assert (len(set(nf4_table().tolist())), len(set(dynamic_table().tolist()))) == (16, 256)


def test_verify_hashes_every_listed_file_with_what_it_is_given(sound: Path) -> None:
    hashed: list[str] = []

    def sha256(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    release = verify(sound, sha256=sha256)

    assert sorted(hashed) == sorted(release.manifest.files)


def test_numbers_are_not_looked_at_again_where_a_hash_is_remembered(release: Path) -> None:
    spoil_weights(release, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))

    verify(release, sha256=sha256_of)  # stands for a hash that is remembered since the numbers were looked at
    with pytest.raises(VerificationError, match=r"'model\.norm\.weight' in .* holds NaN"):
        verify(release)


def test_a_newer_format_is_named_also_where_it_has_other_files(release: Path) -> None:
    values = json.loads((release / MANIFEST).read_text())
    (release / MANIFEST).write_text(json.dumps(values | {"format": 3}))
    (release / MASK_INDEX).unlink()

    with pytest.raises(IncompatibleError, match="of format 3; this loram-hub reads up to format 2"):
        verify(release)


def test_an_unknown_family_is_refused_without_torch(release: Path) -> None:
    config = json.loads((release / CONFIG).read_text()) | {"model_type": "loram_gpt2"}
    (release / CONFIG).write_text(json.dumps(config))
    reseal(release)
    code = (
        "import sys; from loram_hub.release import verify\n"
        "try: verify(sys.argv[1])\n"
        "except ValueError as err: print(err, {'torch', 'transformers'} & set(sys.modules))"
    )

    run = subprocess.run(
        [sys.executable, "-c", code, str(release)], capture_output=True, text=True, check=True, timeout=60
    )

    assert "'gpt2' is not supported" in run.stdout
    assert run.stdout.rstrip().endswith("set()")


def test_tensors_are_counted_over_all_shards(release: Path) -> None:
    header = {f"x{number}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(1000)}
    for shard in range(1, 5):
        text = json.dumps({f"{shard}{name}": entry for name, entry in header.items()}).encode()
        (release / f"model-{shard:05d}-of-00004.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    weight_map = {f"{shard}x0": f"model-{shard:05d}-of-00004.safetensors" for shard in range(1, 5)}
    (release / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (release / SINGLE_FILE).unlink()
    reseal(release)

    with pytest.raises(VerificationError, match="holds 1,000 tensors or more; at most"):
        verify(release)


def test_messages_are_one_printable_line() -> None:
    err = VerificationError("holds \x1b]0;title\x07\nIntact: \u202e and \ud800")

    assert str(err) == r"holds \x1b]0;title\x07 Intact: \u202e and \ud800"
    assert str(err).isprintable()
