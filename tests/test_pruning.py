"""From a base model to a release: what is kept, bit for bit; what it computes; what is refused, leaving no trace."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import save_base, save_tokenizer, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loram_hub.architecture import FAMILIES, Architecture, architecture_of
from loram_hub.auto import AutoLoramModel
from loram_hub.errors import CheckpointError, InvalidRequestError, LoramError, UnsupportedModelError
from loram_hub.plan import Plan, PruningSettings, planned_sizes
from loram_hub.pruning import prune
from loram_hub.release import verify

IDS = torch.randint(3, 53, (4, 24), generator=torch.Generator().manual_seed(1))
STRUCTURE = {"pruning_ratio": 0.6, "keep_first": 1, "keep_last": 1}


def base_model(folder: Path, family: str = "llama", *, dtype: str = "float32", **changes: Any) -> Path:
    sliding = {"sliding_window": 8} if family.startswith("gemma") else {}
    return save_tokenizer(save_base(folder, tiny_config(family, **{"layers": 3, **sliding, **changes}), dtype=dtype))


def positions(groups: np.ndarray, rows: int) -> list[int]:
    return [int(group) * rows + offset for group in groups for offset in range(rows)]


def kept_lines(plan: Plan, layer: int) -> dict[str, list[int]]:
    """Kept rows of q, of k and v, and kept channels, from the kept groups by plain loops."""
    a, kept = plan.architecture, plan.kept[layer]
    queries = a.num_attention_heads // a.num_key_value_heads * a.head_dim
    return {
        "query": positions(kept["kv_heads"], queries),
        "key_value": positions(kept["kv_heads"], a.head_dim),
        "channel": positions(kept["channels"], 1),
    }


def sliced_by_hand(plan: Plan, name: str, weight: torch.Tensor) -> torch.Tensor:
    parts = name.split(".")
    if parts[1] != "layers" or int(parts[2]) not in plan.kept:
        return weight
    a, lines, module = plan.architecture, kept_lines(plan, int(parts[2])), parts[4]
    q_size, kv_size = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    if module == "qkv_proj":
        q, k, v = weight.split([q_size, kv_size, kv_size])
        return torch.cat([q[lines["query"]], k[lines["key_value"]], v[lines["key_value"]]])
    if module == "gate_up_proj":
        return torch.cat([half[lines["channel"]] for half in weight.chunk(2)])
    columns = {"o_proj": "query", "down_proj": "channel"}
    if module in columns:
        return weight[:, lines[columns[module]]] if weight.ndim == 2 else weight
    rows = {
        "q_proj": "query",
        "k_proj": "key_value",
        "v_proj": "key_value",
        "gate_proj": "channel",
        "up_proj": "channel",
    }
    over_all_heads = {"q_norm": ("query", q_size), "k_norm": ("key_value", kv_size)}  # OLMo 2; else they span one head
    if module in over_all_heads and weight.numel() == over_all_heads[module][1]:
        return weight[lines[over_all_heads[module][0]]]
    return weight[lines[rows[module]]] if module in rows else weight


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_weights_are_the_bases_own_bits(tmp_path: Path, family: str, dtype: str) -> None:
    base = base_model(tmp_path / "base", family, dtype=dtype)

    release = prune(base, tmp_path / "out", importance="taylor", calibration=IDS, **STRUCTURE)

    assert set(release.plan.kept) == {1}
    originals, pruned = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(pruned) == set(originals)
    for name, weight in originals.items():
        expected = sliced_by_hand(release.plan, name, weight)
        assert pruned[name].dtype == getattr(torch, dtype)
        assert torch.equal(pruned[name], expected), name
    assert (
        pruned["model.layers.1.self_attn.o_proj.weight"].shape
        != originals["model.layers.1.self_attn.o_proj.weight"].shape
    )


def zero_pruned_(model: torch.nn.Module, plan: Plan) -> None:
    """Zero every pruned row and column of a whole model in place."""
    for name, parameter in model.named_parameters():
        kept = sliced_by_hand(plan, name, torch.arange(parameter.numel()).view(parameter.shape))
        mask = torch.zeros(parameter.numel(), dtype=torch.bool)
        mask[kept.reshape(-1)] = True
        parameter.data.mul_(mask.view(parameter.shape))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"olmo2"}))
@pytest.mark.parametrize("biases", [False, True])
def test_the_pruned_model_computes_what_the_zero_masked_base_does(tmp_path: Path, family: str, biases: bool) -> None:
    flags = {"attention_bias": True, "mlp_bias": True} if biases else {}
    base = base_model(tmp_path / "base", family, **flags)
    release = prune(base, tmp_path / "out", importance="magnitude", **STRUCTURE)
    masked = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    zero_pruned_(masked, release.plan)

    with torch.no_grad():
        expected = masked(IDS).logits
        found = AutoLoramModel.from_pretrained(tmp_path / "out", dtype=torch.float32)(IDS).logits

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_olmo2_computes_what_the_base_does_with_norms_over_the_kept_heads(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "olmo2")
    release = prune(base, tmp_path / "out", importance="magnitude", **STRUCTURE)
    masked = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    zero_pruned_(masked, release.plan)
    # The mean of squares runs over the kept heads alone: the whole model's norm, scaled by sqrt(kept / all).
    share = release.plan.layers[1].kv_heads / release.architecture.num_key_value_heads
    attention = masked.model.layers[1].self_attn
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.data *= share**0.5
        norm.variance_epsilon *= share

    with torch.no_grad():
        expected = masked(IDS).logits
        found = AutoLoramModel.from_pretrained(tmp_path / "out", dtype=torch.float32)(IDS).logits

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_pruning_nothing_gives_the_base_model(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama")

    prune(base, tmp_path / "out", pruning_ratio=0.0, importance="random", keep_first=0, keep_last=0)

    originals, pruned = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(pruned[name], weight) for name, weight in originals.items())


def test_the_same_call_gives_the_same_bytes_and_another_seed_another_plan(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama")

    first, again, other = (
        prune(base, tmp_path / name, importance="random", seed=seed, **STRUCTURE)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )

    for name in sorted(path.name for path in (tmp_path / "first").iterdir()):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert first.plan.digest == again.plan.digest != other.plan.digest


def test_kept_channels_are_the_most_important_and_rounded_when_asked(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama", intermediate_size=70)
    architecture = architecture_of(json.loads((base / "config.json").read_text()))

    release = prune(base, tmp_path / "out", importance="magnitude:l1", round_to=16, **STRUCTURE)

    weights = load_file(base / "model.safetensors")
    of = "model.layers.1.mlp.{}_proj.weight".format
    importance = weights[of("gate")].abs().sum(1) + weights[of("up")].abs().sum(1) + weights[of("down")].abs().sum(0)
    best = sorted(importance.topk(32).indices.tolist())
    assert planned_sizes(architecture, PruningSettings(**STRUCTURE))[1].channels == 28
    assert release.plan.kept[1]["channels"].tolist() == best


def test_a_release_is_whole_and_tells_where_it_comes_from(tmp_path: Path) -> None:
    base = base_model(tmp_path / "some-model", "llama")
    (base / "LICENSE").write_text("do as you like\n")
    (base / "modeling_custom.py").write_text("raise SystemExit\n")

    release = prune(base, tmp_path / "out", importance="taylor:vectorize", calibration=IDS, **STRUCTURE)

    verify(tmp_path / "out")
    manifest = release.manifest
    assert manifest.base.id == "some-model"
    assert manifest.pruning.importance == "taylor:vectorize"
    assert manifest.pruning.calibration is not None
    assert manifest.pruning.calibration["tokens"] == IDS.shape[1]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert manifest.parameters == sum(tensor.numel() for tensor in tensors.values())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "tokenizer.json", "tokenizer_config.json"} <= names
    assert "modeling_custom.py" not in names
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "out").glob("*.json"))


def test_shards_of_the_base_are_read_and_a_tied_head_that_is_stored_anyway_is_left_out(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, base / file)
    (base / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    prune(base, tmp_path / "out", importance="random", **STRUCTURE)

    found = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert found == set(names) - {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}


# --- what is refused, and that nothing is left behind


def refused(error: type[LoramError], match: str, base: Path, out: Path, **options: object) -> None:
    beside = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(error, match=match):
        prune(base, out, **{"importance": "random", **STRUCTURE, **options})
    assert sorted(path.name for path in out.parent.iterdir()) == beside


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, float("nan")])
def test_a_ratio_outside_its_range_is_refused(tmp_path: Path, ratio: float) -> None:
    refused(InvalidRequestError, r"\[0, 1\)", base_model(tmp_path / "base"), tmp_path / "out", pruning_ratio=ratio)


def test_a_ratio_that_empties_a_layer_is_refused(tmp_path: Path) -> None:
    refused(InvalidRequestError, "at least one", base_model(tmp_path / "base"), tmp_path / "out", pruning_ratio=0.999)


def test_an_impossible_ratio_fails_before_calibration_is_looked_at(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")

    refused(InvalidRequestError, "at least one", base, tmp_path / "out", pruning_ratio=0.999, importance="taylor")


def test_keeping_every_layer_whole_is_refused(tmp_path: Path) -> None:
    refused(InvalidRequestError, "none of the 3 layers", base_model(tmp_path / "base"), tmp_path / "out", keep_first=3)


def test_taylor_without_calibration_is_refused(tmp_path: Path) -> None:
    refused(InvalidRequestError, "calibration", base_model(tmp_path / "base"), tmp_path / "out", importance="taylor")


def test_too_few_calibration_texts_are_refused(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")

    refused(InvalidRequestError, "tokens", base, tmp_path / "out", importance="taylor", calibration=["w5 w6 w7"])


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    refused(CheckpointError, r"no config\.json", tmp_path / "empty", tmp_path / "out")


def test_a_config_without_weights_is_refused(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    (base / "model.safetensors").unlink()

    refused(CheckpointError, "no weights", base, tmp_path / "out")


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-100])

    refused(LoramError, r"model\.safetensors", base, tmp_path / "out")


def test_a_module_that_breaks_the_pattern_is_named(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "model.layers.1.mlp.router.weight": torch.ones(4, 24)}, base / "model.safetensors")

    refused(UnsupportedModelError, r"model\.layers\.1\.mlp\.router", base, tmp_path / "out")


def test_a_base_that_is_quantized_itself_is_refused(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))

    refused(UnsupportedModelError, "gptq", base, tmp_path / "out")


def test_a_release_is_not_written_over_its_own_base(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    before = (base / "model.safetensors").read_bytes()

    for out in (base, base / "inside", tmp_path):
        refused(InvalidRequestError, "overlap|mount", base, out, overwrite=True)

    assert (base / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "wrong",
    [{"seed": -1}, {"device": "nodev"}, {"keep_first": True}, {"round_to": 2.5}, {"pruning_ratio": "0.5"}],
    ids=str,
)
def test_arguments_of_the_wrong_kind_are_refused_before_anything_is_read(tmp_path: Path, wrong: dict[str, Any]) -> None:
    refused(InvalidRequestError, next(iter(wrong)), base_model(tmp_path / "base"), tmp_path / "out", **wrong)


def test_calibration_of_floats_is_refused_and_a_base_without_tokenizer_told_apart(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    floats = np.full((2, 8), 1.7)

    refused(InvalidRequestError, "whole numbers", base, tmp_path / "out", importance="taylor", calibration=floats)
    for path in base.glob("tokenizer*"):
        path.unlink()
    refused(CheckpointError, "tokenizer", base, tmp_path / "out", importance="taylor", calibration=["w5 " * 9999])


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")

    refused(InvalidRequestError, "already exists", base, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"

    prune(base, tmp_path / "out", importance="random", overwrite=True, **STRUCTURE)
    assert not (tmp_path / "out" / "mine.txt").exists()
    verify(tmp_path / "out")


# --- the real command, really interrupted


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "loram_hub", *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_prune_leaves_nothing_half_written_and_can_be_repeated(
    tmp_path: Path, sent: signal.Signals, expected: int
) -> None:
    base = base_model(tmp_path / "base", hidden_size=252, intermediate_size=4096, layers=8, dtype="bfloat16")
    arguments = command(
        "prune", base, tmp_path / "out", "--importance", "random", "--quantize", "--pruning-ratio", "0.1"
    )
    process = subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "0"},
        # what runs in the background of a shell ignores Ctrl-C, and its children with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    partial = tmp_path / ".out.partial"
    deadline = time.monotonic() + 120
    while not list(partial.glob(".shard-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)

    process.send_signal(sent)
    _, talk = process.communicate(timeout=60)

    assert process.returncode == expected, talk.decode()
    assert not (tmp_path / "out").exists()
    if sent == signal.SIGINT:
        assert "Interrupted" in talk.decode()
        assert "Traceback" not in talk.decode()
        assert not partial.exists()
    again = subprocess.run(arguments, capture_output=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    verify(tmp_path / "out")


def test_a_full_disk_is_one_message_exit_code_6_and_nothing_half_written(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", hidden_size=252, intermediate_size=1024, layers=4)

    def no_file_beyond_a_megabyte() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with EFBIG instead of ending the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    run = subprocess.run(
        command("prune", base, tmp_path / "out", "--importance", "random", "--keep-first", "1", "--keep-last", "1"),
        capture_output=True,
        timeout=120,
        check=False,
        preexec_fn=no_file_beyond_a_megabyte,
    )

    assert run.returncode == 6, run.stderr.decode()
    assert "Traceback" not in run.stderr.decode()
    assert "space" in run.stderr.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_the_architecture_of_a_release_is_the_bases(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "qwen3")
    expected: Architecture = architecture_of(json.loads((base / "config.json").read_text()))

    release = prune(base, tmp_path / "out", importance="random", **STRUCTURE)

    assert release.architecture == expected
