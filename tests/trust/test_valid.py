"""No false alarm: what the toolkit and stock libraries make, in every family and form, passes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    MODEL_TYPES,
    SEVEN,
    projections,
    random_factors,
    save_adapter,
    save_base,
    save_tokenizer,
    tiny_config,
)
from trust.subjects import save_peft_adapter, shard

from loram_hub.auto import AutoLoramModel
from loram_hub.checkpoint import CONFIG
from loram_hub.errors import VerificationError
from loram_hub.hub import source_of
from loram_hub.inspection import Verified, verify
from loram_hub.manifest import MANIFEST
from loram_hub.pruning import prune
from loram_hub.quantization import quantize
from loram_hub.recovery import recover
from loram_hub.release import open_release

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

LEAST_VALID = 30
CALIBRATION = torch.arange(3, 51).reshape(4, 12)
DTYPES = ("bfloat16", "float16", "float32")
FAMILIES = [(family, nf4) for family in MODEL_TYPES for nf4 in (False, True)]
SHAPES: dict[str, dict[str, Any]] = {
    "ratio 0.2": {"pruning_ratio": 0.2},
    "ratio 0.65": {"pruning_ratio": 0.65},
    "ratio 0": {"pruning_ratio": 0},
    "all layers": {"keep_first": 0, "keep_last": 0},
    "rounded": {"round_to": 8},
    "magnitude": {"importance": "magnitude:l1"},
    "taylor": {"importance": "taylor", "calibration": CALIBRATION},
    "taylor, straight to NF4": {"importance": "taylor:vectorize", "calibration": CALIBRATION, "quantize": True},
}
STRUCTURE: dict[str, Any] = {"importance": "random", "pruning_ratio": 0.4, "keep_first": 1, "keep_last": 1}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes base models, each once."""
    root = tmp_path_factory.mktemp("bases")

    def base(family: str = "llama", dtype: str = "bfloat16", **changes: Any) -> Path:
        folder = root / "-".join([family, dtype, *map(str, changes.values())])
        if not folder.exists():
            save_tokenizer(save_base(folder, tiny_config(family, **changes), dtype=dtype))
        return folder

    return base


def assert_sound(folder: Path, kind: str, **options: Any) -> Verified:
    found = verify(folder, **options)

    assert found.kind == kind
    assert found.files == sum(path.is_file() for path in folder.rglob("*"))
    assert found.nbytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert found.checked
    return found


@pytest.mark.parametrize(("family", "nf4"), FAMILIES)
def test_every_family_passes(bases: Callable[..., Path], family: str, nf4: bool, tmp_path: Path) -> None:
    base = bases(family)
    prune(base, tmp_path / "release", quantize=nf4, **STRUCTURE)

    assert_sound(tmp_path / "release", "release", base=base)
    if not nf4:
        found = assert_sound(tmp_path / "release", "release", full=True, base=base)
        assert "bytes of kept weights, bit by bit" in found.checked[-1]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_ratio_and_method_passes(bases: Callable[..., Path], shape: str, tmp_path: Path) -> None:
    prune(bases(), tmp_path / "release", **{**STRUCTURE, **SHAPES[shape]})

    assert_sound(tmp_path / "release", "release", base=bases())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nf4", [False, True])
def test_every_type_passes_also_quantized_afterwards(
    bases: Callable[..., Path], dtype: str, nf4: bool, tmp_path: Path
) -> None:
    base = bases(dtype=dtype)
    prune(base, tmp_path / "release", **STRUCTURE)
    folder = tmp_path / "release"
    if nf4:
        folder = quantize(folder, tmp_path / "nf4").folder

    assert_sound(folder, "release", full=not nf4, base=base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nf4", [False, True])
def test_what_save_pretrained_writes_passes(
    bases: Callable[..., Path], dtype: torch.dtype, nf4: bool, tmp_path: Path
) -> None:
    release = prune(bases(), tmp_path / "release", quantize=nf4, **STRUCTURE)
    model = AutoLoramModel.from_pretrained(release.folder, dtype=dtype)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20kB")

    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    assert_sound(tmp_path / "saved", "release")


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention": "mha"}, {"attention": "mqa"}])
def test_tied_embeddings_and_other_attention_pass(
    bases: Callable[..., Path], changes: dict[str, Any], tmp_path: Path
) -> None:
    base = bases(**changes)
    prune(base, tmp_path / "release", **STRUCTURE | ({"pruning_ratio": 0} if "attention" in changes else {}))

    assert_sound(tmp_path / "release", "release", full=True, base=base)


def test_a_sharded_release_passes(bases: Callable[..., Path], tmp_path: Path) -> None:
    prune(bases(), tmp_path / "release", **STRUCTURE)
    shard(tmp_path / "release", max_shard_bytes=12_000)

    assert_sound(tmp_path / "release", "release", full=True, base=bases())


def test_cards_pictures_and_what_git_and_the_hub_keep_may_lie_beside(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    prune(bases(), tmp_path / "release", **STRUCTURE)
    listed = verify(tmp_path / "release").files
    for name in (
        "README.md", "LICENSE.txt", "Notice", "USE_POLICY.md", ".gitattributes", ".gitignore", ".DS_Store",
        "pictures/kept.png", ".eval_results/loss.yaml", ".git/hooks/x.py", ".cache/huggingface/download/model.bin",
    ):  # fmt: skip
        (tmp_path / "release" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "release" / name).write_text("anything")

    assert verify(tmp_path / "release").files == listed


def test_what_a_release_may_not_say_is_left_out_when_it_is_pruned(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases(), tmp_path / "base")
    for name, changes in {
        "config.json": {"num_labels": 2, "num_experts_x": 7, "trust_remote_code": False, "_name_or_path": "/home/me"},
        "generation_config.json": {"trust_remote_code": True, "custom_x": {"a": 1}, "eos_token_id": 999, "top_k": 5},
        "tokenizer_config.json": {"x": {"trust_remote_code": False}, "gguf_file": None, "max_len": 10**30},
    }.items():
        values = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(values | changes))
    for name in ("LICENSE.TXT", "LICENSE.txt"):
        (base / name).write_text("Do what you like.\n")

    prune(base, tmp_path / "release", **STRUCTURE)

    assert_sound(tmp_path / "release", "release", full=True, base=base)
    generation = json.loads((tmp_path / "release" / "generation_config.json").read_text())
    assert generation["top_k"] == 5
    assert not {"trust_remote_code", "custom_x", "eos_token_id"} & set(generation)
    assert json.loads((tmp_path / "release" / "tokenizer_config.json").read_text())["max_len"] == 10**30


def test_a_base_that_no_release_can_come_of_leaves_nothing_behind(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases(), tmp_path / "base")
    values = json.loads((base / CONFIG).read_text())
    (base / CONFIG).write_text(json.dumps(values | {"hidden_act": "unheard of"}))

    with pytest.raises(VerificationError, match="'unheard of' for hidden_act"):
        prune(base, tmp_path / "release", **STRUCTURE)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


REAL_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "eos_token_id": [1, 2], "pretraining_tp": 1, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0",
    },
    "qwen2": {
        "max_window_layers": 21, "sliding_window": 131072, "use_sliding_window": False, "use_mrope": False,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "phi3": {
        "embd_pdrop": 0.0, "resid_pdrop": 0.0, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False,
        "rope_scaling": {"long_factor": [1.0] * 5, "short_factor": [1.0] * 5, "type": "longrope"},
        "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64,
    },
    "gemma2": {
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid",
        "query_pre_attn_scalar": 224, "sliding_window_size": 4096, "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {"rope_local_base_freq": 10000, "sliding_window_pattern": 6, "rope_scaling": None},
}  # fmt: skip


@pytest.mark.parametrize("family", REAL_SETTINGS)
def test_settings_as_they_are_published_pass(bases: Callable[..., Path], family: str, tmp_path: Path) -> None:
    base = shutil.copytree(bases(family), tmp_path / "base")
    values = json.loads((base / CONFIG).read_text())
    values.pop("rope_parameters", None)
    (base / CONFIG).write_text(json.dumps(values | REAL_SETTINGS[family]))

    prune(base, tmp_path / "release", **STRUCTURE)

    assert_sound(tmp_path / "release", "release", full=True, base=base)
    written = json.loads((tmp_path / "release" / CONFIG).read_text())
    assert written.get("rope_scaling") == REAL_SETTINGS[family].get("rope_scaling")


@pytest.mark.parametrize("files", ["relative links", "absolute links", "copies"])
def test_a_snapshot_in_the_hub_cache_passes(bases: Callable[..., Path], files: str, tmp_path: Path) -> None:
    prune(bases(), tmp_path / "release", **STRUCTURE)
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted((tmp_path / "release").iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copy(path, snapshot / path.name if files == "copies" else blob)
        if files != "copies":
            target = blob if files == "absolute links" else os.path.relpath(blob, snapshot)
            (snapshot / path.name).symlink_to(target)
    (tmp_path / "by another name").symlink_to(snapshot)

    assert source_of(snapshot).id == "org/name"
    assert_sound(snapshot, "release", base=bases())
    verify(tmp_path / "by another name")


@pytest.mark.parametrize("dtype", DTYPES)
def test_recovered_adapters_pass(bases: Callable[..., Path], dtype: Any, tmp_path: Path) -> None:
    release = prune(bases(), tmp_path / "release", **STRUCTURE)
    factors = random_factors(projections(release.plan))
    trained = save_adapter(tmp_path / "trained", factors, targets=list(SEVEN), base=release.folder)
    recover(trained, tmp_path / "adapter", dtype=dtype)

    found = assert_sound(tmp_path / "adapter", "recovered adapter", base=bases())
    assert found.not_checked == ()
    assert any("not looked up" in gap for gap in verify(tmp_path / "adapter").not_checked)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_what_peft_saves_passes(bases: Callable[..., Path], family: str, tmp_path: Path) -> None:
    save_peft_adapter(tmp_path / "adapter", bases(family))

    assert_sound(tmp_path / "adapter", "PEFT adapter", base=bases(family))


def test_a_release_opens_as_cheaply_checked_where_it_verifies(bases: Callable[..., Path], tmp_path: Path) -> None:
    prune(bases(), tmp_path / "release", **STRUCTURE)

    assert open_release(tmp_path / "release").manifest == verify(tmp_path / "release").release.manifest  # type: ignore[union-attr]
    assert {MANIFEST, CONFIG} <= {path.name for path in (tmp_path / "release").iterdir()}


def test_there_are_as_many_valid_ones_as_were_promised() -> None:
    assert len(FAMILIES) + len(SHAPES) + 2 * len(DTYPES) >= LEAST_VALID  # and the others above
