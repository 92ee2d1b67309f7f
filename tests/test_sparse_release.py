"""Sparse releases on disk: they open as the base with zeros, and none passes whose masks, weights and claims differ."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import hub_client
import numpy as np
import pytest
import torch
from builders import MODEL_TYPES, magnitude_mask, save_base, save_tokenizer, sparse_config, sparse_release
from hub_server import HubServer
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trust.subjects import write_manifest

from loram_hub.auto import AutoLoramModel
from loram_hub.checkpoint import CONFIG, SINGLE_FILE, index_tensors
from loram_hub.errors import (
    CheckpointError,
    IncompatibleError,
    InvalidRequestError,
    LoramError,
    PlanMismatchError,
    VerificationError,
)
from loram_hub.hub import METADATA_FILES, fetch_release
from loram_hub.hub.fetching import is_fetched
from loram_hub.manifest import MANIFEST, Sparsification, file_entries
from loram_hub.masks import UNSTRUCTURED, WEIGHT_MASKS, MaskFile, MaskWriter, parse_pattern
from loram_hub.plan import Plan
from loram_hub.pruning import prune
from loram_hub.quantization import nf4_tensors, quantize, quantized_tensors
from loram_hub.release import (
    MASK_INDEX,
    Release,
    check_base_config,
    compare_weights,
    open_metadata,
    open_release,
    projection_shapes,
    refuse_incomparable,
    release_config,
    verify,
    write_release,
)
from loram_hub.release.zeros import check_zeros, nonzero_rows

GATE, UP = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"  # 24 columns: bitmaps
DOWN = "model.layers.1.mlp.down_proj.weight"  # 40 columns: 2:4 has codes, 10 of 3 bits in 4 bytes
RELEASES = ("unstructured", "2:4", "nf4", "structured")
ALL = slice(None)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and sound releases of it, to be looked at only."""
    folder = tmp_path_factory.mktemp("sparse")
    base = save_tokenizer(save_base(folder / "base", sparse_config(), dtype="bfloat16"))
    sparse_release(folder / "unstructured", base, sparsity=0.55)
    sparse_release(folder / "2:4", base, pattern="2:4")
    sparse_release(folder / "nf4", base, pattern="2:4", nf4=True)
    prune(base, folder / "structured", importance="random", pruning_ratio=0.4, keep_first=0, keep_last=1)
    return folder


def copy_of(sound: Path, name: str, target: Path) -> Path:
    return Path(shutil.copytree(sound / name, target / "copy"))


def manifest_values(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return values


def reseal(folder: Path, **pruning: Any) -> None:
    """Give an altered sparse release a manifest that fits it, as whoever publishes it can."""
    values = manifest_values(folder)
    values["files"] = {name: {"sha256": e.sha256, "size": e.size} for name, e in file_entries(folder).items()}
    masks = values["files"].get(WEIGHT_MASKS, {"sha256": ""})["sha256"]
    digest = hashlib.sha256(f"weight masks;{masks}".encode()).hexdigest()
    values["pruning"] |= {"plan_sha256": digest} | pruning
    write_manifest(folder, values)


# ---- what a sound release is ----


@pytest.mark.parametrize("name", RELEASES[:3])
def test_a_sound_sparse_release_passes(sound: Path, name: str) -> None:
    release = verify(sound / name)

    manifest, masks = release.manifest, release.weight_masks
    assert release.is_sparse
    assert masks is not None
    assert manifest.format == manifest_values(sound / name)["format"] == 2
    assert json.loads((sound / name / CONFIG).read_text())["loram"] == {"format": 2}
    assert release.plan.kept == {}
    assert release.plan.masks_sha256 == hashlib.sha256((sound / name / WEIGHT_MASKS).read_bytes()).hexdigest()
    assert manifest.pruning.plan_sha256 == release.plan.digest
    kept = sum(int(masks.read(each).sum()) for each in masks.names)
    assert manifest.pruning.kept_weights == kept  # type: ignore[union-attr]  # a sparse one's
    prunable = sum(rows * columns for rows, columns in projection_shapes(release.plan).values())
    assert manifest.parameters == manifest.base.parameters - prunable + kept
    assert load_arrays(sound / name / MASK_INDEX) == {}


def test_a_structured_release_is_as_it_was(sound: Path) -> None:
    release = verify(sound / "structured")

    assert not release.is_sparse
    assert release.weight_masks is None
    assert manifest_values(sound / "structured")["format"] == 1
    assert json.loads((sound / "structured" / CONFIG).read_text())["loram"] == {"format": 1}


def test_masks_take_the_bytes_that_the_format_states(sound: Path) -> None:
    architecture = open_release(sound / "2:4").architecture
    shapes = projection_shapes(Plan(architecture, {})).values()
    # 24 columns: 18 bits of codes take the 3 bytes of a bitmap. 40: 30 bits. 48: 36 bits.
    row = {"unstructured": {24: 3, 40: 5, 48: 6}, "2:4": {24: 3, 40: 4, 48: 5}}

    for name, bytes_of in row.items():
        data = (sound / name / WEIGHT_MASKS).read_bytes()
        expected = sum(rows * bytes_of[columns] for rows, columns in shapes)
        assert len(data) - 8 - int.from_bytes(data[:8], "little") == expected


def test_recovery_needs_neither_masks_nor_weights(sound: Path, tmp_path: Path) -> None:
    for name in METADATA_FILES:
        shutil.copyfile(sound / "2:4" / name, tmp_path / name)

    release = open_metadata(tmp_path)

    assert release.plan.digest == open_release(sound / "2:4").plan.digest
    with pytest.raises(CheckpointError, match=f"no {WEIGHT_MASKS}"):
        _ = release.weight_masks
    assert is_fetched(WEIGHT_MASKS)  # with the weights, that is


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_family_computes_what_the_base_computes_with_zeros(tmp_path: Path, family: str) -> None:
    base = save_base(tmp_path / "base", sparse_config(family))
    sparse_release(tmp_path / "sparse", base, pattern="4:8")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name in projection_shapes(open_release(tmp_path / "sparse").plan):
            weight = plain.get_parameter(name)
            groups = weight.view(-1, 8)
            largest = groups.abs().topk(4, dim=1).indices
            groups.mul_(torch.zeros_like(groups).scatter_(1, largest, 1.0))
            assert weight.count_nonzero() == weight.numel() // 2
    ids = torch.arange(3, 23).view(2, 10)

    model = AutoLoramModel.from_pretrained(tmp_path / "sparse", dtype="float32")

    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-6, atol=1e-6)


# ---- NF4 ----


def with_rows_that_vanish(folder: Path) -> Path:
    """A base in which magnitude pruning removes whole rows: blocks of 64 without a weight."""
    base = save_base(folder, sparse_config("phi3", hidden_size=48, intermediate_size=64), dtype="bfloat16")
    tensors = load_file(base / SINGLE_FILE)
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor[1:6] *= 1e-4
    save_file(tensors, base / SINGLE_FILE, metadata={"format": "pt"})
    return base


def test_nf4_of_a_sparse_release_is_exactly_zero_where_it_is_pruned(tmp_path: Path) -> None:
    base = with_rows_that_vanish(tmp_path / "base")
    sparse = open_release(sparse_release(tmp_path / "sparse", base, sparsity=0.55))
    masks = sparse.weight_masks
    assert masks is not None

    quantized = quantize(tmp_path / "sparse", tmp_path / "nf4")

    assert (tmp_path / "nf4" / WEIGHT_MASKS).read_bytes() == (tmp_path / "sparse" / WEIGHT_MASKS).read_bytes()
    assert quantized.plan.digest == sparse.plan.digest
    verify(tmp_path / "nf4")
    model = AutoLoramModel.from_pretrained(tmp_path / "nf4", dtype="float32")
    for name in masks.names:
        kept = masks.read(name)
        assert not kept[1:3].any()  # more than a block of nothing
        weight = model.get_parameter(name)
        values = bnb.dequantize_4bit(weight.data, weight.quant_state).float().numpy()
        assert not values[~kept].any(), name
        assert values[kept].any(), name


@pytest.mark.parametrize("shape", [(3, 5), (4, 64)], ids=["odd", "even"])
def test_codes_at_pruned_positions_become_that_of_zero_and_no_other_changes(
    sound: Path, shape: tuple[int, int]
) -> None:
    architecture = open_release(sound / "2:4").architecture
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5

    parts = quantized_tensors(architecture, GATE, weight, torch.bfloat16, mask)

    before = nf4_tensors(GATE, weight)

    def codes(packed: torch.Tensor) -> list[int]:
        return [half for byte in packed.flatten().tolist() for half in (byte >> 4, byte & 15)]

    kept = [*mask.flatten().tolist(), True][: 2 * before[GATE].numel()]
    expected = [code if keep else 7 for code, keep in zip(codes(before[GATE]), kept, strict=True)]
    assert codes(parts[GATE]) == expected
    assert {n: t.tolist() for n, t in parts.items() if n != GATE} == {
        n: t.tolist() for n, t in before.items() if n != GATE
    }


def test_codes_are_read_in_the_order_that_bitsandbytes_has(tmp_path: Path) -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[weight.abs() < 0.5] = 0
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    (tmp_path / CONFIG).write_text("{}")
    save_file({"w": packed}, tmp_path / SINGLE_FILE)

    found = nonzero_rows(index_tensors(tmp_path)["w"], 1, 5, 5)

    assert np.array_equal(found, bnb.dequantize_4bit(packed, state).float().numpy()[1:5] != 0)
    assert 0 < found.sum() < found.size


# ---- saving ----


@pytest.mark.parametrize("name", ["unstructured", "nf4"])
def test_a_sparse_model_is_saved_with_its_masks(sound: Path, tmp_path: Path, name: str) -> None:
    dtype = torch.float32 if name == "unstructured" else torch.bfloat16
    model = AutoLoramModel.from_pretrained(copy_of(sound, name, tmp_path), dtype=dtype)
    if name == "unstructured":
        with torch.no_grad():
            model.get_parameter(GATE).mul_(2)  # trained, zeros kept

    for target in (tmp_path / "saved", tmp_path / "copy"):  # elsewhere, and in place
        model.save_pretrained(target)

        saved = verify(target)
        assert saved.was_saved
        assert saved.plan.digest == open_metadata(sound / name).plan.digest
        assert json.loads((target / CONFIG).read_text())["loram"] == {"format": 2}
    again = AutoLoramModel.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert torch.equal(again.get_parameter(GATE), model.get_parameter(GATE))


@pytest.mark.parametrize("given", [False, True], ids=["its own weights", "a state dict"])
def test_a_sparse_model_whose_zeros_were_trained_is_not_saved(sound: Path, tmp_path: Path, given: bool) -> None:
    model = AutoLoramModel.from_pretrained(sound / "2:4", dtype="float32")
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained[UP] += 0.01
    if not given:
        model.load_state_dict(trained)

    with pytest.raises(VerificationError, match=f"'{UP}' is not zero where the masks"):
        model.save_pretrained(tmp_path / "saved", **({"state_dict": trained} if given else {}))

    assert not (tmp_path / "saved").exists()


def test_nf4_codes_that_are_not_of_zero_are_not_saved(sound: Path, tmp_path: Path) -> None:
    model = AutoLoramModel.from_pretrained(sound / "nf4", dtype="bfloat16")
    model.get_parameter(UP).data ^= 1

    with pytest.raises(VerificationError, match="not zero where the masks"):
        model.save_pretrained(tmp_path / "saved")


# ---- writing ----


def write_again(sound: Path, target: Path, plan: Plan, *, masks: Path | None) -> None:
    source = open_release(sound / "2:4")
    config = release_config(json.loads((sound / "base" / CONFIG).read_text()))
    with write_release(target, manifest=source.manifest, plan=plan, config=config) as folder:
        shutil.copyfile(source.folder / SINGLE_FILE, folder / SINGLE_FILE)
        if masks is not None:
            shutil.copyfile(masks, folder / WEIGHT_MASKS)


def test_a_sparse_release_is_not_written_without_masks(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is written with its masks"):
        write_again(sound, tmp_path / "out", open_release(sound / "2:4").plan, masks=None)

    assert not (tmp_path / "out").exists()


def test_a_sparse_release_is_not_written_with_other_masks_than_its_plan_names(sound: Path, tmp_path: Path) -> None:
    other = sparse_release(tmp_path / "other", sound / "base", pattern="2:4", method="wanda")
    flipped = data_of(other, WEIGHT_MASKS, lambda data: data[:-1] + bytes([data[-1] ^ 4]))

    with pytest.raises(PlanMismatchError, match="does not hold the masks that the plan names"):
        write_again(sound, tmp_path / "out", open_release(sound / "2:4").plan, masks=flipped)

    assert not (tmp_path / "out").exists()


def test_a_release_is_the_same_bytes_whenever_it_is_written(sound: Path, tmp_path: Path) -> None:
    sparse_release(tmp_path / "again", sound / "base", pattern="2:4")

    for path in sorted((sound / "2:4").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


# ---- the base ----


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_kept_weights_are_compared_with_the_base(sound: Path, tmp_path: Path, method: str) -> None:
    release = verify(sparse_release(tmp_path / "sparse", sound / "base", pattern="2:4", method=method))

    check_base_config(release, sound / "base" / CONFIG)
    nbytes = compare_weights(release, sound / "base")

    assert nbytes == sum(info.nbytes for info in index_tensors(release.folder).values())


@pytest.mark.parametrize("what", ["a kept weight", "a pruned weight", "a norm"])
def test_a_weight_that_is_not_the_bases_is_found(sound: Path, tmp_path: Path, what: str) -> None:
    folder = copy_of(sound, "2:4", tmp_path)
    masks = open_release(folder).weight_masks
    assert masks is not None
    kept = torch.from_numpy(masks.read(GATE))
    tensors = load_file(folder / SINGLE_FILE)
    name = "model.norm.weight" if what == "a norm" else GATE
    index = (0,) if what == "a norm" else tuple((kept if what == "a kept weight" else ~kept).nonzero()[5].tolist())
    tensors[name][index] += 0.25
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    reseal(folder)

    with pytest.raises(VerificationError, match=f"'{name}' of .* is not what"):
        compare_weights(open_release(folder), sound / "base")


def test_what_sparsegpt_made_cannot_be_compared(sound: Path, tmp_path: Path) -> None:
    release = verify(sparse_release(tmp_path / "sparse", sound / "base", pattern="2:4", method="sparsegpt"))

    with pytest.raises(InvalidRequestError, match="SparseGPT, which changes the weights that it keeps"):
        refuse_incomparable(release)


# ---- checks that are remembered ----


def test_weights_and_masks_are_compared_once_for_the_same_content(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loram_hub.release.verification as verification

    compared: list[Path] = []
    check = verification.check_zeros

    def count(folder: Path, *rest: Any) -> None:
        compared.append(folder)
        check(folder, *rest)

    monkeypatch.setattr(verification, "check_zeros", count)
    folder = copy_of(sound, "unstructured", tmp_path)
    tensors = load_file(folder / SINGLE_FILE)
    tensors["model.norm.weight"][0] = 3.25  # a content of its own, which no other test has compared
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    reseal(folder)

    fetch_release(folder)
    fetch_release(folder)
    assert len(compared) == 1
    fetch_release(folder, remember=False)
    assert len(compared) == 2


@pytest.mark.parametrize("what", ["weights", "masks"])
def test_a_change_that_was_sealed_is_found_after_a_load_that_passed(sound: Path, tmp_path: Path, what: str) -> None:
    folder = copy_of(sound, "unstructured", tmp_path)
    fetch_release(folder)
    (remove_weight if what == "masks" else revive_weight)(folder)
    reseal(folder)

    for _ in range(2):  # what failed is not remembered as passed
        with pytest.raises(VerificationError, match="is not zero in row"):
            fetch_release(folder)


# ---- the Hub ----

FETCH = """
from loram_hub.hub import METADATA_FILES, fetch_release, resolve
from loram_hub.release import open_metadata
folder = resolve("org/sparse", files=METADATA_FILES).folder
described, digest = sorted(path.name for path in folder.iterdir()), open_metadata(folder).plan.digest
source, release = fetch_release("org/sparse")
masks = release.weight_masks
kept = sum(map(masks.kept, masks.names))
damaged = masks.path.resolve()
damaged.write_bytes(bytes(damaged.stat().st_size))
again = fetch_release("org/sparse")[1]
print(json.dumps([described, digest == again.plan.digest, kept == again.manifest.pruning.kept_weights]))
"""


def test_masks_come_with_the_weights_alone_and_are_fetched_anew_if_damaged(sound: Path, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("org/sparse", sound / "unstructured")

        described, same_plan, same_count = hub_client.python(hub, tmp_path / "home", FETCH)

    assert described == ["config.json", MANIFEST, MASK_INDEX]
    assert same_plan
    assert same_count


# ---- what must not pass ----


def data_of(folder: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    return folder / name


def arrays_of(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    arrays = {name: array.copy() for name, array in load_arrays(folder / WEIGHT_MASKS).items()}
    change(arrays)
    save_arrays(arrays, folder / WEIGHT_MASKS)


def bits_of(folder: Path, name: str, change: Callable[[Any, Any], object]) -> None:
    """Change the bits of a mask that is a bitmap, seeing which weights of the matrix are not zero."""
    nonzero = (load_file(folder / SINGLE_FILE)[name] != 0).numpy()

    def alter(arrays: dict[str, Any]) -> None:
        bits = np.unpackbits(arrays[f"{name}.mask"], axis=1)
        change(bits, nonzero)
        arrays[f"{name}.mask"] = np.packbits(bits, axis=1)

    arrays_of(folder, alter)


def first_of(where: Any) -> tuple[int, int]:
    row, column = np.argwhere(where)[7]
    return int(row), int(column)


def remove_weight(folder: Path) -> None:
    bits_of(folder, GATE, lambda bits, nonzero: bits.__setitem__(first_of(nonzero), 0))


def keep_zero(folder: Path) -> None:
    bits_of(folder, GATE, lambda bits, nonzero: bits.__setitem__(first_of(~nonzero), 1))


def revive_weight(folder: Path) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    tensors[GATE][first_of((tensors[GATE] == 0).numpy())] = 1e-30
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def revive_code(folder: Path) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    codes = tensors[GATE].flatten()
    at = (codes & 15 == 7).nonzero()[3]
    codes[at] = codes[at] & 0xF0 | 8
    tensors[GATE] = codes.reshape(tensors[GATE].shape)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def exchange(one: str, other: str) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[f"{one}.mask"], arrays[f"{other}.mask"] = arrays[f"{other}.mask"], arrays[f"{one}.mask"]

    return change


def foreign_masks(folder: Path) -> None:
    rng = np.random.default_rng(5)

    def change(arrays: dict[str, Any]) -> None:
        for name, packed in arrays.items():
            columns = {3: 24, 5: 40, 6: 48}[packed.shape[1]]
            mask = magnitude_mask(rng.random((len(packed), columns)), UNSTRUCTURED, 0.55)
            arrays[name] = np.packbits(mask, axis=1)

    arrays_of(folder, change)


def padded(folder: Path) -> None:
    arrays_of(folder, lambda arrays: arrays[f"{DOWN}.mask"].__setitem__((ALL, -1), 1))


def beyond_codes(folder: Path) -> None:
    arrays_of(folder, lambda arrays: arrays[f"{DOWN}.mask"].__setitem__((0, 0), 0xFF))


def one_group(folder: Path) -> None:
    """Have the mask index of a sparse release remove channels."""
    kept = np.array([0, 1], dtype=np.int32)
    arrays = {"model.layers.0.self_attn.kv_heads": kept, "model.layers.0.mlp.channels": kept}
    save_arrays(arrays, folder / MASK_INDEX)


def manifest_with(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        values = manifest_values(folder)
        change(values)
        write_manifest(folder, values)

    return alter


def pruning_with(**changes: Any) -> Callable[[Path], None]:
    return manifest_with(lambda values: values["pruning"].update(changes))


def fewer_kept(values: dict[str, Any]) -> None:
    values["pruning"]["kept_weights"] -= 3
    values["parameters"] -= 3


def list_masks(folder: Path) -> None:
    shutil.copyfile(folder / MASK_INDEX, folder / WEIGHT_MASKS)
    values = manifest_values(folder)
    values["files"] = {name: {"sha256": e.sha256, "size": e.size} for name, e in file_entries(folder).items()}
    write_manifest(folder, values)


def old_mark(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"loram": {"format": 1}}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """One way of altering a sound release."""

    subject: str
    kind: str
    alter: Callable[[Path], object]
    error: type[LoramError]
    message: str
    """A regular expression that the error's message must match."""
    sealed: bool = True
    """Whether the manifest is made anew afterwards."""


def attack(
    subject: str, kind: str, alter: Callable[[Path], object], error: type[LoramError], message: str, **more: bool
) -> Attack:
    return Attack(subject=subject, kind=kind, alter=alter, error=error, message=message, **more)


def masks_with(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: arrays_of(folder, change)


def cut(folder: Path) -> None:
    data_of(folder, WEIGHT_MASKS, lambda data: data[:-1])


def flip(folder: Path) -> None:
    data_of(folder, WEIGHT_MASKS, lambda data: data[:-3] + bytes([data[-3] ^ 16]) + data[-2:])


ATTACKS = (
    attack("2:4", "masks cut", cut, VerificationError, rf"{WEIGHT_MASKS} has [\d,]+ bytes", sealed=False),
    attack("2:4", "bit flipped", flip, VerificationError, f"{WEIGHT_MASKS} was changed", sealed=False),
    attack(
        "2:4",
        "masks gone",
        lambda f: (f / WEIGHT_MASKS).unlink(),
        CheckpointError,
        f"lacks {WEIGHT_MASKS}",
        sealed=False,
    ),
    attack("2:4", "masks cut and sealed", cut, VerificationError, f"{WEIGHT_MASKS} is not a sound safetensors file"),
    attack(
        "2:4",
        "masks gone, sealed",
        lambda f: (f / WEIGHT_MASKS).unlink(),
        VerificationError,
        f"does not list {WEIGHT_MASKS}; a release that was pruned by magnitude has",
    ),
    attack(
        "unstructured", "kept weight claimed gone", remove_weight, VerificationError, f"{GATE}.* is not zero in row"
    ),
    attack(
        "unstructured",
        "zero claimed kept",
        keep_zero,
        PlanMismatchError,
        r"claims ([\d,]+) kept weights; weight_masks.safetensors keeps [\d,]+\.",
    ),
    attack("unstructured", "masks of another release", foreign_masks, VerificationError, "_proj.* is not zero in row"),
    attack("2:4", "masks exchanged", masks_with(exchange(GATE, UP)), VerificationError, f"{GATE}.* is not zero in row"),
    attack(
        "2:4",
        "masks exchanged between layers",
        masks_with(exchange(DOWN, DOWN.replace(".1.", ".0."))),
        VerificationError,
        "down_proj.* is not zero in row",
    ),
    attack("2:4", "group that keeps three", keep_zero, VerificationError, f"{GATE}.*does not keep 2:4 in every"),
    attack("2:4", "code out of range", beyond_codes, VerificationError, f"{DOWN}.* has the code 7; 2:4 has 6 codes"),
    attack("2:4", "padding set", padded, VerificationError, f"{DOWN}.*bit set behind the end of a row"),
    attack(
        "unstructured",
        "mask missing",
        masks_with(lambda arrays: arrays.pop(f"{UP}.mask")),
        PlanMismatchError,
        f"'{UP}.mask' is missing in .*{WEIGHT_MASKS}",
    ),
    attack(
        "unstructured",
        "mask of a norm",
        masks_with(lambda arrays: arrays.update({"model.norm.weight.mask": np.ones((1, 3), np.uint8)})),
        PlanMismatchError,
        "holds 'model.norm.weight.mask', which is no mask",
    ),
    attack(
        "unstructured",
        "mask transposed",
        masks_with(lambda arrays: arrays.update({f"{UP}.mask": arrays[f"{UP}.mask"].T.copy()})),
        PlanMismatchError,
        rf"'{UP}.mask' is U8 \(3, 40\)",
    ),
    attack("2:4", "weight at a pruned position", revive_weight, VerificationError, f"{GATE}.* is not zero in row"),
    attack("nf4", "code at a pruned position", revive_code, VerificationError, f"{GATE}.* is not zero in row"),
    attack(
        "unstructured",
        "fewer kept weights claimed",
        manifest_with(fewer_kept),
        PlanMismatchError,
        f"kept weights; {WEIGHT_MASKS} keeps",
        sealed=False,
    ),
    attack(
        "unstructured",
        "sparsity claimed",
        pruning_with(sparsity=0.7),
        PlanMismatchError,
        "claims a sparsity of 0.7, which leaves some",
        sealed=False,
    ),
    attack(
        "2:4",
        "parameters claimed",
        manifest_with(lambda values: values.update(parameters=values["parameters"] + 1)),
        PlanMismatchError,
        r"claims [\d,]+ parameters; with",
        sealed=False,
    ),
    attack(
        "2:4",
        "pattern claimed",
        pruning_with(pattern="4:8"),
        PlanMismatchError,
        r"o_proj.weight.mask' is U8 \(24, 5\) in .*the pattern 4:8 is U8 \(24, 6\)",
        sealed=False,
    ),
    attack(
        "2:4",
        "pattern that does not divide",
        pruning_with(pattern="5:10", sparsity=0.5),
        VerificationError,
        "the pattern 5:10.*groups of 10 do not divide",
        sealed=False,
    ),
    attack(
        "2:4",
        "digest of other masks",
        pruning_with(plan_sha256="0" * 64),
        VerificationError,
        f"{WEIGHT_MASKS} is not the plan",
        sealed=False,
    ),
    attack("2:4", "channel groups gone too", one_group, VerificationError, f"{MASK_INDEX} removes channel groups"),
    attack("2:4", "config of format 1", old_mark, VerificationError, "is of format 1, the manifest of format 2"),
    attack(
        "2:4",
        "format 1",
        manifest_with(lambda values: values.update(format=1)),
        VerificationError,
        "pruning.method 'magnitude'; format 1 has structured",
        sealed=False,
    ),
    attack(
        "structured",
        "format 2",
        manifest_with(lambda values: values.update(format=2)),
        VerificationError,
        "pruning.method 'structured'; format 2 has sparsegpt",
        sealed=False,
    ),
    attack(
        "2:4",
        "format 3",
        manifest_with(lambda values: values.update(format=3)),
        IncompatibleError,
        "is a release of format 3; this loram-hub reads up to format 2",
        sealed=False,
    ),
    attack(
        "structured",
        "masks beside a structured release",
        lambda folder: shutil.copyfile(folder / MASK_INDEX, folder / WEIGHT_MASKS),
        VerificationError,
        f"holds {WEIGHT_MASKS}, which its manifest does not list",
        sealed=False,
    ),
    attack(
        "structured",
        "masks of a structured release",
        list_masks,
        VerificationError,
        f"lists {WEIGHT_MASKS}; a release that was pruned by structured",
        sealed=False,
    ),
)


@pytest.mark.parametrize("each", ATTACKS, ids=lambda each: each.kind)
def test_an_altered_sparse_release_is_refused(sound: Path, tmp_path: Path, each: Attack) -> None:
    folder = copy_of(sound, each.subject, tmp_path)
    each.alter(folder)
    if each.sealed:
        reseal(folder)

    with pytest.raises(each.error, match=each.message):
        verify(folder)


@pytest.mark.parametrize("kind", ["mask missing", "masks cut and sealed", "pattern claimed", "channel groups gone too"])
def test_what_headers_tell_is_found_on_opening(sound: Path, tmp_path: Path, kind: str) -> None:
    each = next(each for each in ATTACKS if each.kind == kind)
    folder = copy_of(sound, each.subject, tmp_path)
    each.alter(folder)
    if each.sealed:
        reseal(folder)

    with pytest.raises(each.error, match=each.message):
        open_release(folder)


def test_weights_are_compared_with_masks_a_few_megabytes_at_a_time(tmp_path: Path) -> None:
    kept, pattern = np.tile([True, False] * 4, (4096, 512)), parse_pattern("4:8")
    with MaskWriter(tmp_path / WEIGHT_MASKS, {"w": kept.shape}, pattern) as writer:
        writer.add("w", kept)
    save_file({"w": torch.from_numpy(kept).bfloat16()}, tmp_path / SINGLE_FILE)
    masks, tensors = MaskFile(tmp_path / WEIGHT_MASKS, {"w": kept.shape}, pattern), index_tensors(tmp_path)
    pruning = Sparsification(
        method="magnitude",
        pattern="4:8",
        sparsity=0.5,
        kept_weights=kept.size // 2,
        dampening=None,
        block_size=None,
        seed=0,
        calibration=None,
        plan_sha256="",
    )

    tracemalloc.start()
    try:
        check_zeros(tmp_path, masks, tensors, pruning)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < tensors["w"].nbytes  # 32 MiB: neither it nor its mask was there as a whole


def test_what_thresholds_and_ties_leave_is_no_lie(sound: Path, tmp_path: Path) -> None:
    """Every method rounds in its own way: some row by row, some keep or remove all that tie."""
    release: Release = open_release(sound / "unstructured")
    kept = release.manifest.pruning.kept_weights  # type: ignore[union-attr]  # a sparse one's
    prunable = sum(rows * columns for rows, columns in projection_shapes(release.plan).values())
    folder = copy_of(sound, "unstructured", tmp_path)

    pruning_with(sparsity=1 - (kept + 0.0005 * prunable) / prunable)(folder)

    assert verify(folder).manifest.pruning.kept_weights == kept  # type: ignore[union-attr]

    rows = sum(rows for rows, _ in projection_shapes(release.plan).values())
    pruning_with(sparsity=1 - (kept + 0.001 * prunable + rows + 2) / prunable)(folder)
    with pytest.raises(PlanMismatchError, match="claims a sparsity"):
        verify(folder)


def test_a_check_of_the_zeros_is_remembered_by_all_that_it_depends_on(sound: Path, tmp_path: Path) -> None:
    """Weights and masks say little without their shapes, which the config gives."""
    folder, checked = copy_of(sound, "unstructured", tmp_path), []

    def remember(name: str, check: Callable[[], None]) -> None:
        check()
        checked.append(name)

    verify(folder, once=remember)
    verify(sound / "unstructured", once=remember)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"attention_dropout": 0.125}))
    reseal(folder)
    verify(folder, once=remember)

    assert checked[0] == checked[1] != checked[2]


def test_a_pattern_of_the_manifest_is_that_of_the_masks(sound: Path) -> None:
    masks = open_release(sound / "nf4").weight_masks

    assert masks is not None
    assert masks.pattern == parse_pattern("2:4")
