"""NF4 releases hold bitsandbytes' own bytes, whichever way they were made."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from builders import save_base, save_tokenizer, tiny_config
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from loram_hub.architecture import FAMILIES
from loram_hub.auto import AutoLoramModel
from loram_hub.errors import InvalidRequestError
from loram_hub.plan import nf4_bytes
from loram_hub.pruning import prune
from loram_hub.quantization import quantize
from loram_hub.release import verify

STRUCTURE = {"pruning_ratio": 0.6, "keep_first": 1, "keep_last": 1, "importance": "random"}
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


def base_model(folder: Path, family: str = "llama", *, dtype: str = "bfloat16", **changes: object) -> Path:
    return save_tokenizer(save_base(folder, tiny_config(family, layers=3, **changes), dtype=dtype))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_are_those_transformers_writes_when_it_quantizes_with_bitsandbytes(
    tmp_path: Path, family: str
) -> None:
    base = base_model(tmp_path / "base", family)
    prune(base, tmp_path / "bf16", **STRUCTURE)

    quantize(tmp_path / "bf16", tmp_path / "nf4")

    AutoLoramModel.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16, quantization_config=NF4).save_pretrained(
        tmp_path / "theirs"
    )
    assert_same_bytes(weights(tmp_path / "nf4"), weights(tmp_path / "theirs"))
    verify(tmp_path / "nf4")
    verify(tmp_path / "theirs")


def test_pruning_straight_to_nf4_gives_the_same_files_as_quantizing_afterwards(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    prune(base, tmp_path / "bf16", **STRUCTURE)

    afterwards = quantize(tmp_path / "bf16", tmp_path / "afterwards")
    straight = prune(base, tmp_path / "straight", quantize=True, **STRUCTURE)

    assert_same_bytes(weights(tmp_path / "straight"), weights(tmp_path / "afterwards"))
    assert straight.manifest.quantization == afterwards.manifest.quantization
    for name in ("config.json", "mask_index.safetensors", "tokenizer.json"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "afterwards" / name).read_bytes()


@pytest.mark.parametrize(
    ("stored", "expected"), [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16")]
)
def test_the_rest_is_stored_in_16_bit_and_weights_are_rounded_once_before_nf4(
    tmp_path: Path, stored: str, expected: str
) -> None:
    base = base_model(tmp_path / "base", dtype=stored)
    prune(base, tmp_path / "pruned", **STRUCTURE)

    release = prune(base, tmp_path / "nf4", quantize=True, **STRUCTURE)

    found, pruned = weights(tmp_path / "nf4"), weights(tmp_path / "pruned")
    dtype = getattr(torch, expected)
    assert release.manifest.quantization is not None
    assert release.manifest.quantization["dtype"] == expected
    assert found["model.embed_tokens.weight"].dtype == found["model.norm.weight"].dtype == dtype
    name = "model.layers.1.mlp.down_proj.weight"
    packed, state = bnb.quantize_4bit(pruned[name].to(dtype), quant_type="nf4", compress_statistics=True, blocksize=64)
    assert torch.equal(found[name], packed)
    for key, value in state.as_dict(packed=True).items():
        assert torch.equal(found[f"{name}.{key}"], value), key


def test_counted_bytes_are_the_bytes_of_codes_and_scales(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", intermediate_size=1031)

    prune(base, tmp_path / "nf4", quantize=True, **STRUCTURE)

    found = weights(tmp_path / "nf4")
    for module, shape in {"mlp.up_proj": (412, 24), "mlp.down_proj": (24, 412), "self_attn.k_proj": (20, 24)}.items():
        name = f"model.layers.1.{module}.weight"
        stored = (found[name], found[f"{name}.absmax"], found[f"{name}.nested_absmax"])
        assert sum(t.numel() * t.element_size() for t in stored) == nf4_bytes(shape[0] * shape[1])


def test_a_quantized_release_is_not_quantized_again(tmp_path: Path) -> None:
    prune(base_model(tmp_path / "base"), tmp_path / "nf4", quantize=True, **STRUCTURE)

    with pytest.raises(InvalidRequestError, match="already"):
        quantize(tmp_path / "nf4", tmp_path / "again")

    assert not (tmp_path / "again").exists()
