"""Masks of single weights: every pattern comes back as it went in, in the stated bytes; nothing else is believed."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from loram_hub.errors import CheckpointError, InvalidRequestError, LoramError, PlanMismatchError, VerificationError
from loram_hub.masks import (
    UNSTRUCTURED,
    MaskFile,
    MaskWriter,
    Pattern,
    decode_mask,
    encode_mask,
    parse_pattern,
    row_bytes,
)

PATTERNS = ("unstructured", "1:2", "1:4", "2:4", "3:4", "4:8", "5:8", "8:16", "3:7", "5:9", "16:32", "31:32")
SHAPES: Mapping[str, tuple[int, int]] = {"layers.10.b.weight": (5, 56), "layers.2.a.weight": (3, 112)}
MASK = "layers.2.a.weight.mask"


def random_mask(rows: int, columns: int, pattern: Pattern, *, seed: int = 0) -> npt.NDArray[np.bool_]:
    """A mask of a pattern at random, by sorting random numbers within each group."""
    rng = np.random.default_rng(seed)
    if pattern.is_unstructured:
        return rng.random((rows, columns)) < 0.45
    n, m = pattern.group
    order = rng.random((rows, columns // m, m)).argsort(axis=2).argsort(axis=2)
    return (order < n).reshape(rows, columns)


def write_masks(path: Path, pattern: Pattern = UNSTRUCTURED, *, seed: int = 0) -> dict[str, npt.NDArray[np.bool_]]:
    masks = {name: random_mask(*shape, pattern, seed=seed + i) for i, (name, shape) in enumerate(SHAPES.items())}
    with MaskWriter(path, SHAPES, pattern) as writer:
        for name, mask in masks.items():
            writer.add(name, mask)
    return masks


def by_hand(mask_row: npt.NDArray[np.bool_], pattern: Pattern) -> bytes:
    """The bytes of docs/format.md as a text of zeros and ones: the rank of each group among all, in its bits."""
    n, m = pattern.group
    # Sorted by their last kept position, then the one before: the order of the combinatorial number system.
    ranks = {kept: rank for rank, kept in enumerate(sorted(itertools.combinations(range(m), n), key=lambda c: c[::-1]))}
    width = math.ceil(math.log2(len(ranks)))
    text = "".join(f"{ranks[tuple(np.flatnonzero(group).tolist())]:0{width}b}" for group in mask_row.reshape(-1, m))
    text = text.ljust(-(-len(text) // 8) * 8, "0")
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


@given(
    text=st.sampled_from(PATTERNS),
    rows=st.integers(1, 7),
    groups=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_mask_comes_back_as_it_was(text: str, rows: int, groups: int, seed: int) -> None:
    pattern = parse_pattern(text)
    columns = groups * (pattern.of or 1)
    mask = random_mask(rows, columns, pattern, seed=seed)

    encoded = encode_mask(mask, pattern)

    assert encoded.shape == (rows, row_bytes(columns, pattern))
    assert np.array_equal(decode_mask(encoded, columns, pattern), mask)
    assert np.array_equal(decode_mask(encoded[-1:], columns, pattern), mask[-1:])


@given(text=st.sampled_from(PATTERNS), groups=st.integers(1, 9), data=st.data())
def test_every_mask_has_one_spelling(text: str, groups: int, data: st.DataObject) -> None:
    """Whatever bytes are taken for a mask, they are the ones that it is written as: there is room for nothing else."""
    pattern = parse_pattern(text)
    columns = groups * (pattern.of or 5)
    length = row_bytes(columns, pattern)
    row = np.frombuffer(data.draw(st.binary(min_size=length, max_size=length)), dtype=np.uint8)[None]

    try:
        mask = decode_mask(row, columns, pattern)
    except VerificationError:
        return

    assert np.array_equal(encode_mask(mask, pattern), row)


@pytest.mark.parametrize("text", ["1:4", "2:4", "4:8", "3:7", "5:9"])
def test_codes_are_ranks_in_the_combinatorial_number_system(text: str) -> None:
    pattern = parse_pattern(text)
    mask = random_mask(4, 33 * pattern.group[1], pattern)

    encoded = encode_mask(mask, pattern)

    assert [row.tobytes() for row in encoded] == [by_hand(row, pattern) for row in mask]


def test_all_masks_of_a_group_have_codes_of_their_own() -> None:
    pattern = parse_pattern("4:8")
    kept = np.zeros((70, 8), dtype=bool)
    for row, positions in enumerate(itertools.combinations(range(8), 4)):
        kept[row, list(positions)] = True
    mask = np.tile(kept, (1, 8))  # eight codes of 7 bits in 7 bytes, where a bitmap takes 8

    encoded = encode_mask(mask, pattern)

    assert len({row.tobytes() for row in encoded}) == 70
    assert np.array_equal(decode_mask(encoded, 64, pattern), mask)


@pytest.mark.parametrize(
    ("text", "columns", "nbytes"),
    [
        ("unstructured", 64, 8),
        ("unstructured", 65, 9),
        ("2:4", 64, 6),  # 16 codes of 3 bits
        ("4:8", 64, 7),  # 8 codes of 7 bits
        ("4:8", 56, 7),  # 49 bits in 7 bytes: as many as a bitmap takes, so it is one
        ("8:16", 64, 7),  # 4 codes of 14 bits
        ("1:4", 64, 4),  # 16 codes of 2 bits
        ("3:7", 63, 7),  # 9 codes of 6 bits
        ("16:32", 64, 8),  # 60 bits: a bitmap
        ("1:32", 96, 2),  # 3 codes of 5 bits
    ],
)
def test_a_row_takes_the_smaller_of_bitmap_and_codes(text: str, columns: int, nbytes: int) -> None:
    pattern = parse_pattern(text)

    assert row_bytes(columns, pattern) == nbytes
    assert encode_mask(random_mask(3, columns, pattern), pattern).shape == (3, nbytes)


def test_a_bitmap_has_the_first_weight_in_the_highest_bit() -> None:
    mask = np.array([[True, False, False, False, False, False, False, False, True, False]])

    assert encode_mask(mask, UNSTRUCTURED).tolist() == [[0b10000000, 0b10000000]]


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:2", "10:16", "31:32", "unstructured"])
def test_a_pattern_reads_what_it_writes(text: str) -> None:
    assert str(parse_pattern(text)) == text
    assert parse_pattern(text).is_unstructured == (text == "unstructured")


@pytest.mark.parametrize(
    "text",
    ["", "4", "0:4", "4:4", "5:4", "2:33", "04:8", "4:8 ", "4 : 8", "-1:4", "٤:٨", "1.5:4", "Unstructured", "2:4:8"],
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="pattern"):
        parse_pattern(text)


def test_half_a_pattern_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="pattern"):
        Pattern(kept=4)


def test_columns_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="groups of 8 do not divide"):
        encode_mask(np.ones((2, 12), dtype=bool), parse_pattern("4:8"))


@pytest.mark.parametrize("columns", [56, 64], ids=["bitmap", "codes"])
def test_a_mask_that_breaks_its_pattern_is_not_written(columns: int) -> None:
    pattern = parse_pattern("4:8")
    mask = random_mask(3, columns, pattern)
    mask[1] = np.roll(mask[1], 1)
    mask[2, :8] = [True, True, True, True, True, False, False, False]
    mask[1] = random_mask(1, columns, pattern)[0]

    with pytest.raises(InvalidRequestError, match="Row 2 of a mask does not keep 4:8"):
        encode_mask(mask, pattern)


def test_large_masks_are_coded_piece_by_piece() -> None:
    pattern = parse_pattern("4:8")
    mask = random_mask(300, 8192, pattern)

    encoded = encode_mask(mask, pattern)

    assert np.array_equal(decode_mask(encoded, 8192, pattern), mask)
    assert encoded[257].tobytes() == by_hand(mask[257], pattern)


@pytest.mark.parametrize(
    ("text", "columns", "row", "why"),
    [
        ("2:4", 64, [0b111_000_00] + [0] * 5, "has the code 7"),
        ("4:8", 64, [0b1000110_0] + [0] * 6, "has the code 70"),
        ("8:16", 64, [0xFF] * 7, "has the code 16383"),
        ("3:7", 63, [0] * 6 + [1], "behind the end of a row"),
        ("unstructured", 63, [0] * 7 + [1], "behind the end of a row"),
        ("4:8", 56, [0b11111000] + [0b11110000] * 6, "does not keep 4:8"),
        ("4:8", 64, [0] * 8, "rows of 7 bytes"),
    ],
)
def test_bits_that_no_mask_has_are_refused(text: str, columns: int, row: list[int], why: str) -> None:
    with pytest.raises(VerificationError, match=why):
        decode_mask(np.array([row], dtype=np.uint8), columns, parse_pattern(text))


@pytest.mark.parametrize("text", ["unstructured", "4:8", "3:7"])
def test_a_mask_file_gives_back_masks_rows_and_counts(tmp_path: Path, text: str) -> None:
    pattern = parse_pattern(text)
    masks = write_masks(tmp_path / "masks.safetensors", pattern)

    found = MaskFile(tmp_path / "masks.safetensors", SHAPES, pattern)

    assert found.names == tuple(sorted(SHAPES))
    for name, mask in masks.items():
        assert np.array_equal(found.read(name), mask)
        assert np.array_equal(found.read_rows(name, 1, 3), mask[1:3])
        assert found.kept(name) == mask.sum()


def test_the_bytes_of_a_mask_file_do_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    masks = write_masks(tmp_path / "one")
    with MaskWriter(tmp_path / "other", dict(reversed(SHAPES.items())), UNSTRUCTURED) as writer:
        for name in reversed(masks):
            writer.add(name, masks[name])

    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_safetensors_itself_reads_a_mask_file(tmp_path: Path) -> None:
    masks = write_masks(tmp_path / "masks.safetensors")

    found = load_file(tmp_path / "masks.safetensors")

    assert set(found) == {f"{name}.mask" for name in masks}
    for name, mask in masks.items():
        bits = np.unpackbits(found[f"{name}.mask"], axis=1)
        assert np.array_equal(bits[:, : mask.shape[1]], mask)


def test_an_incomplete_mask_file_is_refused_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"

    refused = pytest.raises(InvalidRequestError, match=r"lacks 2 masks, first that of 'layers\.10\.b\.weight'")
    with refused, MaskWriter(path, SHAPES, UNSTRUCTURED):
        assert path.exists()

    assert not path.exists()


def test_a_mask_is_written_once_and_in_its_shape(tmp_path: Path) -> None:
    masks = {name: np.ones(shape, dtype=bool) for name, shape in SHAPES.items()}
    name, other = masks

    with MaskWriter(tmp_path / "masks", SHAPES, UNSTRUCTURED) as writer:
        with pytest.raises(InvalidRequestError, match="is no projection"):
            writer.add("layers.3.a.weight", masks[name])
        with pytest.raises(InvalidRequestError, match=r"its weight is \(5, 56\)"):
            writer.add(name, masks[other])
        writer.add(name, masks[name])
        with pytest.raises(InvalidRequestError, match="has its mask already"):
            writer.add(name, masks[name])
        writer.add(other, masks[other])

    assert MaskFile(tmp_path / "masks", SHAPES, UNSTRUCTURED).kept(name) == 5 * 56


def test_a_mask_file_that_fails_half_way_is_removed(tmp_path: Path) -> None:
    def fail() -> None:
        with MaskWriter(tmp_path / "masks", SHAPES, UNSTRUCTURED) as writer:
            writer.add("layers.2.a.weight", np.ones((3, 112), dtype=bool))
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fail()

    assert not (tmp_path / "masks").exists()


def test_masks_that_are_asked_for_wrongly_are_refused(tmp_path: Path) -> None:
    write_masks(tmp_path / "masks")
    found = MaskFile(tmp_path / "masks", SHAPES, UNSTRUCTURED)

    with pytest.raises(InvalidRequestError, match="no mask of 'norm'"):
        found.read_rows("norm", 0, 1)
    with pytest.raises(InvalidRequestError, match="rows 0 to 5"):
        found.read_rows("layers.10.b.weight", 3, 6)


def _saved(path: Path, change: Any) -> Path:
    write_masks(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "kind", "why"),
    [
        (lambda t: t.pop(MASK), PlanMismatchError, r"'layers\.2\.a\.weight\.mask' is missing"),
        (lambda t: t.update(more=np.zeros(1, np.uint8)), PlanMismatchError, "holds 'more'"),
        (lambda t: t.update({MASK: np.zeros((3, 15), np.uint8)}), PlanMismatchError, r"U8 \(3, 15\)"),
        (lambda t: t.update({MASK: np.zeros((3, 14), np.int8)}), PlanMismatchError, "is I8"),
    ],
    ids=["missing", "foreign", "longer", "signed"],
)  # fmt: skip
def test_a_mask_file_with_other_tensors_is_refused(
    tmp_path: Path, change: Any, kind: type[LoramError], why: str
) -> None:
    path = _saved(tmp_path / "masks.safetensors", change)

    with pytest.raises(kind, match=why) as caught:
        MaskFile(path, SHAPES, UNSTRUCTURED)
    assert str(path) in str(caught.value)


def test_a_mask_file_of_another_pattern_is_refused(tmp_path: Path) -> None:
    write_masks(tmp_path / "masks", parse_pattern("2:4"))

    with pytest.raises(PlanMismatchError, match=r"with the pattern unstructured is U8 \(5, 7\)"):
        MaskFile(tmp_path / "masks", SHAPES, UNSTRUCTURED)
    with pytest.raises(VerificationError, match=r"pattern 5:9.*groups of 9 do not divide"):
        MaskFile(tmp_path / "masks", SHAPES, parse_pattern("5:9"))


def test_a_torn_mask_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks"
    write_masks(path)
    data = path.read_bytes()

    for kept in (0, 4, 8, 100, len(data) - 1):
        path.write_bytes(data[:kept])
        with pytest.raises(VerificationError, match=str(path)):
            MaskFile(path, SHAPES, UNSTRUCTURED)
    path.write_bytes(data + b"\0")
    with pytest.raises(VerificationError, match="the file has"):
        MaskFile(path, SHAPES, UNSTRUCTURED)
    path.unlink()
    with pytest.raises(CheckpointError, match="masks of its weights are not here"):
        MaskFile(path, SHAPES, UNSTRUCTURED)


def test_a_header_that_leaves_a_hole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks"
    write_masks(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for entry in header.values():
        entry["data_offsets"] = [offset + 1 for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" + data[8 + length :])

    with pytest.raises(VerificationError, match="a hole lies before"):
        MaskFile(path, SHAPES, UNSTRUCTURED)
