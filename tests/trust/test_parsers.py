"""Generated mask indexes and manifests: what is sound comes back as it was, all else ends in an error.

An error is one of loram-hub's own, with a printable message; any other exception fails the test.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from builders import random_plan, save_metadata_release, tiny_architecture, tiny_config
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from loram_hub.architecture import Architecture
from loram_hub.errors import LoramError
from loram_hub.manifest import MANIFEST, BaseModel, FileEntry, Manifest, Pruning, Sparsification, read_manifest
from loram_hub.plan import Plan
from loram_hub.release import MASK_INDEX, read_mask_index, write_mask_index
from loram_hub.release.configuration import check_config, check_keys
from loram_hub.seals import SEAL, seal
from loram_hub.tensors import read_headers

T = TypeVar("T")

EXAMPLES = 500  # of each of eight kinds
ARCHITECTURE = tiny_architecture()
quick = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

NAMES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            f"model.layers.{layer}.{space}"
            for layer in (0, 1, 3, 4, 10**7)
            for space in ("self_attn.kv_heads", "mlp.channels")
        ]
    ),
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
HASHES = st.text("0123456789abcdef", min_size=64, max_size=64)
COUNTS = st.integers(0, 10**12)
PRINTABLE = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/\\"), min_size=1, max_size=30
)
PLAIN = st.text("abcdefghij_-0123456789", min_size=1, max_size=12)
BASE = BaseModel(id="base", commit=None, config_sha256="0" * 64, parameters=2)
STRUCTURED = Manifest(
    base=BASE,
    pruning=Pruning(
        method="structured", importance="random", pruning_ratio=0.5, keep_first=1, keep_last=1, round_to=None, seed=0,
        calibration=None, plan_sha256="0" * 64,
    ),
    parameters=1,
)  # fmt: skip
SPARSE = replace(
    STRUCTURED,
    pruning=Sparsification(
        method="wanda", pattern="4:8", sparsity=0.5, kept_weights=1, dampening=None, block_size=None, seed=0,
        calibration=None, plan_sha256="0" * 64,
    ),
)  # fmt: skip
MANIFESTS = st.builds(
    Manifest,
    base=st.builds(
        BaseModel,
        id=PLAIN,
        commit=st.none() | HASHES.map(lambda text: text[:40]),
        config_sha256=HASHES,
        parameters=COUNTS,
    ),
    pruning=st.builds(
        Pruning,
        method=st.just("structured"),
        importance=PRINTABLE,
        pruning_ratio=st.floats(0, 0.99),
        keep_first=COUNTS,
        keep_last=COUNTS,
        round_to=st.none() | COUNTS,
        seed=COUNTS,
        calibration=st.none() | st.dictionaries(PLAIN, COUNTS, max_size=3),
        plan_sha256=HASHES,
    ),
    parameters=COUNTS,
    alignment=st.none() | st.dictionaries(PLAIN, st.floats(0, 1) | st.lists(PLAIN, max_size=2), max_size=3),
    quantization=st.none() | st.just({"type": "nf4", "block": 64, "double_quant": True, "dtype": "bfloat16"}),
    recipe=st.dictionaries(PLAIN, PLAIN | COUNTS | st.dictionaries(PLAIN, st.booleans(), max_size=2), max_size=3),
    tools=st.dictionaries(PLAIN, PLAIN, max_size=3),
    files=st.dictionaries(PLAIN, st.builds(FileEntry, sha256=HASHES, size=COUNTS), max_size=4),
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose files each example writes anew."""
    return tmp_path_factory.mktemp("parsers")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    """Mask indexes and manifest of a sound release, to be altered."""
    folder = tmp_path_factory.mktemp("sound") / "release"
    save_metadata_release(folder, tiny_config(), random_plan(ARCHITECTURE))
    return (folder / MASK_INDEX).read_bytes(), json.loads((folder / MANIFEST).read_text())


def outcome(function: Callable[..., T], *arguments: Any, **options: Any) -> T | None:
    """Call a parser; None if it refuses its input in the way it may."""
    refusal: LoramError | None = None
    try:
        return function(*arguments, **options)
    except LoramError as err:
        refusal = err
    assert str(refusal).isprintable()
    return None


def assert_in_bounds(plan: Plan, architecture: Architecture) -> None:
    for layer, spaces in plan.kept.items():
        assert 0 <= layer < architecture.num_hidden_layers
        for space, limit in (
            ("kv_heads", architecture.num_key_value_heads),
            ("channels", architecture.intermediate_size),
        ):
            kept = spaces[space]  # type: ignore[index]
            assert kept.dtype == np.int32
            assert sorted(set(kept.tolist())) == kept.tolist()
            assert 0 <= kept[0] <= kept[-1] < limit


@quick
@given(seed=st.integers(0, 2**32 - 1), layers=st.sets(st.integers(0, ARCHITECTURE.num_hidden_layers - 1)))
def test_a_generated_plan_comes_back_as_it_was_written(scratch: Path, seed: int, layers: set[int]) -> None:
    plan = random_plan(ARCHITECTURE, seed=seed, layers=sorted(layers))

    write_mask_index(scratch / MASK_INDEX, plan)
    found = read_mask_index(scratch / MASK_INDEX, ARCHITECTURE)

    assert found.digest == plan.digest
    assert found.layers == plan.layers
    assert set(found.kept) == layers


@quick
@given(data=st.data())
def test_altered_bytes_of_mask_indexes_give_a_plan_in_bounds_or_an_error(
    scratch: Path, sound: tuple[bytes, dict[str, Any]], data: st.DataObject
) -> None:
    content = bytearray(sound[0])
    for _ in range(data.draw(st.integers(1, 4))):
        first = data.draw(st.integers(0, max(0, len(content) - 1)))
        length = data.draw(st.integers(0, 16))
        content[first : first + length] = data.draw(st.binary(max_size=16))
    (scratch / MASK_INDEX).write_bytes(content)

    plan = outcome(read_mask_index, scratch / MASK_INDEX, ARCHITECTURE)

    if plan is not None:
        assert_in_bounds(plan, ARCHITECTURE)


@quick
@given(
    arrays=st.dictionaries(
        NAMES.filter(lambda name: name != "__metadata__" and "\x00" not in name),
        st.lists(st.integers(-2, 40), max_size=8).flatmap(
            lambda values: st.sampled_from(["<i4", "<i8", "u1", "<f4", "?"]).map(
                lambda dtype: np.array(values).astype(dtype)
            )
        ),
        max_size=5,
    )
)
def test_generated_arrays_give_a_plan_in_bounds_or_an_error(scratch: Path, arrays: dict[str, Any]) -> None:
    (scratch / MASK_INDEX).write_bytes(save(arrays))

    plan = outcome(read_mask_index, scratch / MASK_INDEX, ARCHITECTURE)

    if plan is not None:
        assert_in_bounds(plan, ARCHITECTURE)


@quick
@given(
    header=st.dictionaries(
        NAMES,
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["I32", "F32", "BOOL", "F4"]) | JSON,
                "shape": st.lists(st.integers(-1, 2**40), max_size=3) | JSON,
                "data_offsets": st.lists(st.integers(-1, 2**40), min_size=2, max_size=2) | JSON,
            }
        ),
        max_size=4,
    ),
    body=st.binary(max_size=64),
    length=st.none() | st.integers(0, 2**64 - 1),
)
@example(header={}, body=b"", length=2**64 - 1)
def test_generated_headers_are_read_or_refused(
    scratch: Path, header: dict[str, Any], body: bytes, length: int | None
) -> None:
    text = json.dumps(header).encode()
    path = scratch / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)

    found = outcome(read_headers, path)

    assert found is None or sum(info.nbytes for info in found.values()) == len(body)


@quick
@given(manifest=MANIFESTS)
def test_a_generated_manifest_comes_back_as_it_was_written(scratch: Path, manifest: Manifest) -> None:
    (scratch / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")

    assert read_manifest(scratch) == manifest


@quick
@given(data=st.data())
def test_altered_values_of_a_manifest_are_read_or_refused(
    scratch: Path, sound: tuple[bytes, dict[str, Any]], data: st.DataObject
) -> None:
    values = json.loads(json.dumps(sound[1]))
    for _ in range(data.draw(st.integers(1, 3))):
        section = data.draw(st.sampled_from(sorted(values)))
        target = values[section] if isinstance(values[section], dict) and data.draw(st.booleans()) else values
        key = data.draw(st.sampled_from(sorted(target)) if target else st.text(max_size=5))
        if data.draw(st.booleans()):
            target[key] = data.draw(JSON)
        else:
            target.pop(key, None)
        if not values:
            break
    (scratch / MANIFEST).write_text(seal({key: value for key, value in values.items() if key != SEAL}))

    found = outcome(read_manifest, scratch)

    assert found is None or json.loads(found.to_json()) == json.loads((scratch / MANIFEST).read_text())


@quick
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@example(content=b'{"a":' * 100_000)
@example(content=b'{"format": ' + b"1" * 5000 + b"}")
@example(content=b'{"format": 1, "x": "\\ud800"}')
def test_arbitrary_bytes_are_no_manifest(scratch: Path, content: bytes) -> None:
    (scratch / MANIFEST).write_bytes(content)

    with pytest.raises(LoramError) as caught:
        read_manifest(scratch)
    assert str(caught.value).isprintable()


@quick
@given(
    values=st.dictionaries(
        st.sampled_from(["model_type", "loram", "quantization_config", "rope_parameters", "x"]) | st.text(max_size=5),
        JSON,
        max_size=5,
    ),
    manifest=st.sampled_from([STRUCTURED, SPARSE]),
    quantization=st.none() | st.just({"dtype": "bfloat16"}),
)
@example(values={"loram": {"format": 1}}, manifest=STRUCTURED, quantization=None)
@example(values={"loram": {"format": 1}}, manifest=SPARSE, quantization=None)
@example(values={"loram": {"format": 2}}, manifest=SPARSE, quantization=None)
@example(values={"loram": {"format": 1.0}}, manifest=STRUCTURED, quantization=None)
@example(
    values={"loram": {"format": 1}, "x": "\x1b", "y": {"attn_implementation": {}}},
    manifest=STRUCTURED,
    quantization=None,
)
def test_generated_configs_are_passed_or_refused(
    values: dict[str, Any], manifest: Manifest, quantization: dict[str, Any] | None
) -> None:
    def check() -> bool:
        check_keys(values, source="config.json")
        check_config(values, replace(manifest, quantization=quantization), source="config.json")
        return True

    passed = outcome(check) is True

    assert not passed or (values["loram"] == {"format": manifest.format} and quantization is None)


def test_there_are_as_many_examples_as_were_promised() -> None:
    about_indexes_and_manifests = 7
    assert about_indexes_and_manifests * EXAMPLES >= 2000
