"""Streamed safetensors against what the stock readers make of them; folders that are no sound checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loram_hub.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    ShardWriter,
    copy_companions,
    read_config,
    read_headers,
    weight_files,
)
from loram_hub.errors import CheckpointError, VerificationError

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MEGABYTE = 2**20


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=27,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint in several shards, written by transformers."""
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="8kB")
    return tmp_path / "model"


def write(folder: Path, tensors: dict[str, torch.Tensor], **options: Any) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, **options)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.finish()


def read_back(files: list[Path]) -> dict[str, torch.Tensor]:
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def header_of(file: Path) -> tuple[int, dict[str, Any]]:
    """Read a safetensors header by hand: where the data begins, and the entries."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__")
    return 8 + length, entries


def assert_aligned(file: Path) -> None:
    start, entries = header_of(file)
    assert entries
    for name, entry in entries.items():
        first = start + entry["data_offsets"][0]
        assert first % ITEM_BYTES[entry["dtype"]] == 0, f"{name} lies at {first}"


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


# -- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_is_read_back_by_the_stock_reader(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = {"scalar": (), "one": (1,), "odd": (3, 5), "cube": (2, 3, 4), "empty": (0, 7)}
    tensors = {name: (torch.randn(shape) * 100).to(dtype) for name, shape in shapes.items()}

    files = write(tmp_path, tensors)

    assert [file.name for file in files] == [SINGLE_FILE]
    assert_same(read_back(files), tensors)
    assert_aligned(files[0])


@given(
    sizes=st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 40)), min_size=1, max_size=12),
    large=st.lists(st.integers(MEGABYTE - 9, MEGABYTE + 9), max_size=2),
    max_shard_bytes=st.sampled_from([1, 64, 500, MEGABYTE, 10**9]),
)
def test_any_order_of_sizes_keeps_every_tensor_aligned_and_equal(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[tuple[torch.dtype, int]],
    large: list[int],
    max_shard_bytes: int,
) -> None:
    tensors = {f"small.{i}": torch.arange(count).to(dtype) for i, (dtype, count) in enumerate(sizes)}
    tensors |= {f"large.{i}": torch.arange(count).to(torch.uint8) for i, count in enumerate(large)}

    files = write(tmp_path_factory.mktemp("any"), tensors, max_shard_bytes=max_shard_bytes)

    assert_same(read_back(files), tensors)
    for file in files:
        assert_aligned(file)
        data = sum(tensor.nbytes for tensor in load_file(file).values())
        assert data <= max_shard_bytes or len(load_file(file)) == 1


def test_large_odd_sized_tensors_between_wide_ones_stay_aligned(tmp_path: Path) -> None:
    """NF4 weights are uint8 of any length; streamed as they come they would push every later bf16 off its place."""
    tensors = {
        "a.nf4": torch.arange(MEGABYTE + 3).to(torch.uint8),
        "b.bf16": torch.randn(MEGABYTE, dtype=torch.bfloat16),
        "c.nf4": torch.arange(MEGABYTE + 1).to(torch.uint8),
        "d.fp32": torch.randn(MEGABYTE),
        "e.absmax": torch.randn(3),
    }

    (file,) = write(tmp_path, tensors)

    assert_same(read_back([file]), tensors)
    assert_aligned(file)


def test_tensors_that_are_not_contiguous_are_stored_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"transposed": base.T, "columns": base[:, 1::2], "expanded": torch.ones(1, 5).expand(3, 5)}

    files = write(tmp_path, tensors)

    assert_same(read_back(files), tensors)


def test_a_tensor_may_change_after_it_was_added(tmp_path: Path) -> None:
    """Callers reuse one buffer for tensor after tensor."""
    writer = ShardWriter(tmp_path)
    buffer = torch.ones(5)
    writer.add("first", buffer)
    buffer.fill_(2)
    writer.add("second", buffer)

    files = writer.finish()

    assert_same(read_back(files), {"first": torch.ones(5), "second": torch.full((5,), 2.0)})


def test_more_tensors_than_a_header_has_room_for_start_another_shard(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.{'long_name.' * 20}weight" for i in range(1500)]
    tensors = {name: torch.tensor([i]) for i, name in enumerate(names)}

    files = write(tmp_path, tensors)

    assert len(files) == 2
    assert_same(read_back(files), tensors)


def test_several_shards_have_the_names_and_index_of_transformers(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), i, dtype=torch.float32) for i in range(5)}

    files = write(tmp_path, tensors, max_shard_bytes=80)

    assert [f.name for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([INDEX_FILE, *(f.name for f in files)])
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"] == {f"t{i}": files[i // 2].name for i in range(5)}


def test_a_shard_holds_exactly_as_many_bytes_as_it_may(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.zeros(10) for i in range(4)}

    assert len(write(tmp_path / "exact", tensors, max_shard_bytes=80)) == 2
    assert len(write(tmp_path / "a byte less", tensors, max_shard_bytes=79)) == 4


@pytest.mark.parametrize("max_shard_bytes", [10**9, 6000])
def test_transformers_opens_what_was_written(tmp_path: Path, max_shard_bytes: int) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    tensors = dict(model.state_dict())

    files = write(tmp_path, tensors, max_shard_bytes=max_shard_bytes)

    assert (len(files) == 1) == (max_shard_bytes == 10**9)
    reopened, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same(dict(reopened.state_dict()), tensors)


def test_a_dtype_without_a_code_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'w' is torch\.float8_e4m3fn"):
        ShardWriter(tmp_path).add("w", torch.zeros(3, dtype=torch.float8_e4m3fn))

    assert list(tmp_path.iterdir()) == []


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_sharded_checkpoint_is_read_tensor_by_tensor(folder: Path) -> None:
    expected = dict(tiny_model().state_dict())

    with Checkpoint(folder) as checkpoint:
        found = {name: checkpoint.read(name) for name in checkpoint.tensors}

    assert_same(found, expected)
    assert len(weight_files(folder)) > 3
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.config["model_type"] == "llama"


def test_a_single_file_counts_before_an_index_as_it_does_in_transformers(folder: Path) -> None:
    other = {name: torch.zeros_like(tensor) for name, tensor in tiny_model().state_dict().items()}
    save_file(other, folder / SINGLE_FILE, metadata={"format": "pt"})

    with Checkpoint(folder) as checkpoint:
        found = {name: checkpoint.read(name) for name in checkpoint.tensors}

    assert_same(found, other)
    assert_same(dict(AutoModelForCausalLM.from_pretrained(folder).state_dict()), other)


def test_headers_are_read_without_data(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros((), dtype=torch.int64)}, tmp_path / "x")

    infos = read_headers(tmp_path / "x")

    assert {name: (info.dtype, info.shape, info.nbytes) for name, info in infos.items()} == {
        "a": ("BF16", (3, 5), 30),
        "b": ("I64", (), 8),
    }


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=r"'no\.such\.tensor' is not in"):
        checkpoint.read("no.such.tensor")


def test_a_folder_that_is_missing_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        Checkpoint(tmp_path / "absent")


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json\.$"):
        read_config(tmp_path)


def test_an_adapter_is_recognized_when_given_as_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")

    with pytest.raises(CheckpointError, match="looks like a PEFT adapter"):
        read_config(tmp_path)


def test_a_config_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(CheckpointError, match="has a config but no weights"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unopened(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")

    with pytest.raises(CheckpointError, match=f"as a pickle \\({name}\\), which can run code"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named_with_its_count(folder: Path) -> None:
    gone = weight_files(folder)[1]
    total = len(weight_files(folder))
    gone.unlink()

    with pytest.raises(CheckpointError, match=f"lacks 1 of {total} shards, first {gone.name}"):
        Checkpoint(folder)


@pytest.mark.parametrize("cut", [0, 7, 8, 50, -1, -100])
def test_a_torn_shard_is_named(folder: Path, cut: int) -> None:
    torn = weight_files(folder)[0]
    torn.write_bytes(torn.read_bytes()[:cut])

    with pytest.raises(VerificationError, match=f"{torn.name} is not a sound safetensors file"):
        Checkpoint(folder)


def test_a_shard_torn_after_it_was_indexed_is_named(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        name, info = next(iter(checkpoint.tensors.items()))
        info.file.write_bytes(info.file.read_bytes()[:-1])

        with pytest.raises(CheckpointError, match=f"Tensor '{name}' cannot be read"):
            checkpoint.read(name)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"w": "../outside.safetensors"},
        {"w": "/etc/hostname.safetensors"},
        {"w": "sub/inside.safetensors"},
        {"w": "pytorch_model.bin"},
        {"w": 3},
        {"w": None},
        {"w": ""},
        {},
        [],
        None,
    ],
)
def test_an_index_that_points_elsewhere_is_refused(folder: Path, weight_map: Any) -> None:
    save_file({"w": torch.zeros(1)}, folder.parent / "outside.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))

    with pytest.raises(VerificationError, match=INDEX_FILE):
        Checkpoint(folder)


def test_an_index_that_disagrees_with_the_shards_is_refused(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(n for n in names if n != index["weight_map"]["model.norm.weight"])
    (folder / INDEX_FILE).write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match=r"places 'model\.norm\.weight' in .*, which does not hold it"):
        Checkpoint(folder)


def test_an_index_that_promises_more_than_the_shards_hold_is_refused(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["extra.weight"] = index["weight_map"]["model.norm.weight"]
    (folder / INDEX_FILE).write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match=r"places 'extra\.weight'"):
        Checkpoint(folder)


def test_one_tensor_in_two_shards_is_refused(folder: Path) -> None:
    first, second = weight_files(folder)[:2]
    save_file(load_file(first) | load_file(second), second, metadata={"format": "pt"})

    with pytest.raises(VerificationError, match="is in two shards"):
        Checkpoint(folder)


def test_companions_travel_and_code_does_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    travels = {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
        "NOTICE.txt",
    }
    stays = {"config.json", "model.safetensors", "modeling_custom.py", "tokenizer.py", "tokenizer.bin", "optimizer.pt"}
    for name in travels | stays:
        (source / name).write_text(name)

    copy_companions(source, target)

    assert {path.name: path.read_text() for path in target.iterdir()} == {name: name for name in travels}


def test_what_a_release_may_not_hold_is_not_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    settings = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("LICENSE", "LICENSE (copy).txt", "LICENSE\u202etxt", "LICENSE:1", "tokenizer.py", "tokenizer.json"):
        (source / name).write_text("{}")

    copy_companions(source, target)

    copied = {"LICENSE", "LICENSE (copy).txt", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in target.iterdir()} == copied
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"tokenizer_class": "T"}
    assert "LICENSE:1" in caplog.text
    assert "auto_map" in caplog.text
