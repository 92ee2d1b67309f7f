"""Safetensors headers and numbers, read without the safetensors package and compared with it."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loram_hub.errors import CheckpointError, VerificationError
from loram_hub.tensors import is_finite, item_bytes, read_array, read_headers, read_rows, sha256_of_finite

TENSORS = {
    "matrix": torch.arange(35, dtype=torch.float32).reshape(5, 7),
    "half": torch.randn(3, 2).half(),
    "brain": torch.randn(4, 3).bfloat16(),
    "codes": torch.arange(9).to(torch.uint8),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_headers_are_those_that_safetensors_reads(file: Path) -> None:
    found = read_headers(file)

    with safe_open(file, framework="pt") as stock:
        assert set(found) == set(stock.keys()) == set(TENSORS)
        for name, info in found.items():
            view = stock.get_slice(name)
            assert (info.dtype, list(info.shape)) == (view.get_dtype(), view.get_shape())
            assert info.nbytes == TENSORS[name].nbytes


def test_tensors_and_rows_are_those_that_safetensors_reads(file: Path) -> None:
    infos = read_headers(file)

    for name, tensor in load_file(file).items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()
        assert read_array(infos[name]).tobytes() == raw
        assert read_array(infos[name]).shape == tuple(tensor.shape)
    np.testing.assert_array_equal(read_rows(infos["matrix"], 1, 4), TENSORS["matrix"][1:4].numpy())


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error(file: Path) -> None:
    infos = read_headers(file)
    file.write_bytes(file.read_bytes()[:-40])

    with pytest.raises(CheckpointError, match="ends within a tensor"):
        [read_array(info) for info in infos.values()]


def test_the_hash_is_the_files(file: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("NaN")
    large = {"a": torch.zeros(700_001, dtype=torch.bfloat16), "b": torch.ones(900_000), "c": torch.ones(3)}
    save_file(large, tmp_path / "large.safetensors")  # its tensors do not end where pieces do

    for path in (file, tmp_path / "text", tmp_path / "large.safetensors"):
        assert sha256_of_finite(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), -float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 524_287, 524_288, 1_099_999])
def test_a_number_that_is_none_is_found_wherever_it_is(
    tmp_path: Path, number: float, dtype: torch.dtype, place: int
) -> None:
    tensors = {name: torch.ones(1_100_000, dtype=dtype) for name in ("first", "second", "third")}
    tensors["second"][place] = number
    save_file(tensors, tmp_path / "x.safetensors")

    with pytest.raises(VerificationError, match=r"Tensor 'second' in .* holds NaN or infinity"):
        sha256_of_finite(tmp_path / "x.safetensors")


def test_bytes_that_would_be_no_number_are_allowed_where_there_are_none(tmp_path: Path) -> None:
    save_file({"codes": torch.full((4096,), 255, dtype=torch.uint8)}, tmp_path / "x.safetensors")

    assert len(sha256_of_finite(tmp_path / "x.safetensors")) == 64


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=20), st.sampled_from(["BF16", "F16"]))
def test_finite_is_what_torch_calls_finite(bits: list[int], code: str) -> None:
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[code]
    data = np.array(bits, dtype=np.uint16)

    expected = bool(torch.isfinite(torch.from_numpy(data.view(np.int16)).view(dtype)).all())

    assert is_finite(data.tobytes(), code) == expected
    assert math.prod((len(bits), item_bytes(code))) == data.nbytes
