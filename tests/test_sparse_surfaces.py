"""Sparse releases wherever they are shown: counts, estimates, info, cards, pushes, evaluations, the command line."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from base_configs import BASES
from builders import (
    projections,
    random_factors,
    save_adapter,
    save_base,
    save_tokenizer,
    sparse_config,
    sparse_release,
)
from click.testing import CliRunner
from hub_client import python
from hub_server import HubServer
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.numpy import load_file

from loram_hub.architecture import architecture_of
from loram_hub.cards import make_card
from loram_hub.cli import main
from loram_hub.errors import InvalidRequestError
from loram_hub.estimation import SparseCounts, TrainingShape, sparse_counts, training_memory
from loram_hub.files import dump_json
from loram_hub.fitting import estimate_memory, fit_text
from loram_hub.inspection import count_parameters, info, verify
from loram_hub.masks import WEIGHT_MASKS, parse_pattern
from loram_hub.plan import Plan, PruningSettings, parameter_counts, planned_sizes
from loram_hub.pushing.contents import release_content
from loram_hub.recovery import recover
from loram_hub.release import open_metadata

LLAMA_2_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 32000,
}
DOCS = Path(__file__).parents[1] / "docs"
TEXT = " ".join(f"w{4 + 7 * number % 49}" for number in range(40))
LAYERS = 8
"""Enough for a structured release with four layers whole at the start and two at the end."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(dump_json(LLAMA_2_13B), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "base"
    return save_tokenizer(save_base(folder, sparse_config(layers=LAYERS), dtype="bfloat16"))


@pytest.fixture(scope="module")
def releases(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sparse releases: SparseGPT's 4:8 in NF4, and half of the weights, wherever they lie, in 16 bit."""
    folder = tmp_path_factory.mktemp("releases")
    return {
        "4:8": sparse_release(folder / "semi", base, pattern="4:8", method="sparsegpt", nf4=True),
        "unstructured": sparse_release(folder / "unst", base, sparsity=0.55),
    }


def command(*arguments: str | Path, code: int = 0) -> Any:
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def zeros_of(release: Path) -> int:
    """Weights that the masks of a release remove, counted bit by bit where masks are bitmaps."""
    with safe_open(release / WEIGHT_MASKS, framework="numpy") as file:
        masks = {name.removesuffix(".mask"): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    plan = open_metadata(release).plan
    shapes = plan.tensor_shapes()
    kept = sum(int(np.unpackbits(bits, axis=1)[:, : shapes[name][1]].sum()) for name, bits in masks.items())
    return sum(math.prod(shapes[name]) for name in masks) - kept


@pytest.mark.parametrize(
    ("asked", "parameters", "reduction"),
    [({"pattern": "4:8"}, 6_671_979_520, 1.951), ({"sparsity": 0.55}, 6_037_591_040, 2.156)],
    ids=["LoRAM-Semi", "LoRAM-Unst"],
)
def test_the_papers_variants_of_llama_2_13b_have_these_parameters(
    config: Path, asked: dict[str, Any], parameters: int, reduction: float
) -> None:
    matrices = 40 * (4 * 5120 * 5120 + 3 * 5120 * 13824)  # of a whole model without grouped queries
    rest = 2 * 32000 * 5120 + (2 * 40 + 1) * 5120
    kept = matrices * 50 // 100 if "pattern" in asked else matrices * 45 // 100

    counts = count_parameters(config, **asked)

    assert isinstance(counts, SparseCounts)
    assert counts.pruned_parameters == parameters == rest + kept
    assert counts.original_parameters == rest + matrices == 13_015_864_320
    assert (counts.prunable_weights, counts.kept_weights) == (matrices, kept)
    assert counts.reduction == pytest.approx(reduction, abs=5e-4)
    assert counts.bf16_bytes == 2 * (rest + matrices)  # stored with its zeros
    on_command_line = json.loads(command("plan", config, *(f"--{k}={v}" for k, v in asked.items()), "--json").stdout)
    assert on_command_line == counts.to_dict()


@pytest.mark.parametrize(
    ("pattern", "bits"), [("4:8", 7 / 8), ("2:4", 3 / 4), ("1:4", 2 / 4), ("8:16", 14 / 16), (None, 1)]
)
def test_masks_take_as_many_bits_per_weight_as_their_codes(config: Path, pattern: str | None, bits: float) -> None:
    counts = count_parameters(config, pattern=pattern, sparsity=None if pattern else 0.5)

    assert isinstance(counts, SparseCounts)
    assert counts.mask_bytes == counts.prunable_weights * bits / 8
    assert counts.mask_bits == pytest.approx(bits)
    rest = counts.original_parameters - counts.prunable_weights
    assert counts.packed_bf16_bytes == 2 * (rest + counts.kept_weights) + counts.mask_bytes


def test_docs_state_the_sizes_that_are_counted(config: Path) -> None:
    page = (DOCS / "format.md").read_text(encoding="utf-8").partition("### Sizes\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    in_bits, in_gigabytes = (rows[start + 2 : start + 6] for start in (0, 6))
    asked: dict[str, dict[str, Any]] = {
        "2:4": {"pattern": "2:4"},
        "4:8": {"pattern": "4:8"},
        "unstructured, 55 % removed": {"sparsity": 0.55},
    }
    assert [row[0] for row in in_bits] == [row[0] for row in in_gigabytes] == ["none", *asked]

    for number, wanted in enumerate(asked.values(), start=1):
        counts = count_parameters(config, **wanted)
        rest, mask = 2 * (counts.original_parameters - counts.prunable_weights), counts.mask_bytes
        stored = [counts.bf16_bytes + mask, counts.packed_bf16_bytes, counts.nf4_bytes + mask, counts.packed_nf4_bytes]
        bits = [8 * mask / counts.prunable_weights, *(8 * (each - rest) / counts.prunable_weights for each in stored)]
        assert [float(cell) for cell in in_bits[number][1:]] == pytest.approx(bits, abs=5.1e-4)
        gigabytes = [each / 1e9 for each in (mask, *stored)]
        assert [float(cell) for cell in in_gigabytes[number][1:]] == pytest.approx(gigabytes, abs=5.1e-3)
        assert [*in_bits[0][1::2], in_bits[0][2]] == ["", "", "", "16"]
        whole = [float(in_bits[0][4]), float(in_gigabytes[0][2]), float(in_gigabytes[0][4])]
        nf4_bits = 8 * (counts.nf4_bytes - rest) / counts.prunable_weights
        assert whole == pytest.approx([nf4_bits, counts.bf16_bytes / 1e9, counts.nf4_bytes / 1e9], abs=5.1e-3)


def test_packed_nf4_is_what_is_stored_without_the_codes_of_zeros(releases: dict[str, Path]) -> None:
    """By the tensors of a release: all scales stay, so that unpacking gives the same bytes."""
    counts = info(releases["4:8"])
    tensors = {
        name: tensor.nbytes
        for name, tensor in _arrays(releases["4:8"] / "model.safetensors").items()
        if not name.endswith((".quant_map", ".nested_quant_map", ".bitsandbytes__nf4"))
    }

    assert counts["nf4_bytes"] == sum(tensors.values())
    removed = counts["prunable_weights"] - counts["kept_weights"]
    assert counts["packed_nf4_bytes"] == sum(tensors.values()) - removed // 2 + counts["mask_bytes"]


def _arrays(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file as load_tensors  # numpy has no bf16

    return load_tensors(path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["plan", "{base}", "--sparsity", "0.5", "--keep-first", "2"], "--keep-first"),
        (["plan", "{base}", "--sparsity", "0.5", "--pattern", "4:8"], "4:8"),
        (["plan", "{base}", "--sparsity", "1"], "sparsity is 1"),
        (["plan", "{base}", "--pattern", "8:4"], "8:4"),
        (["plan", "{base}", "--pattern", "2:32"], "self_attn.q_proj"),
        (["prune", "{base}", "{out}", "--sparsity", "0.5"], "--method sparsegpt"),
        (["prune", "{base}", "{out}", "--pattern", "4:8", "--dry-run"], "--method sparsegpt"),
        (["prune", "{base}", "{out}", "--method", "wanda", "--pattern", "4:8", "--pruning-ratio", "0.85"], "--pruning"),
        (["prune", "{base}", "{out}", "--method", "sparsegpt", "--sparsity", "0.5", "--importance", "random"], "--imp"),
        (["prune", "{base}", "{out}", "--method", "sparsegpt", "--round-to", "64", "--pattern", "2:4"], "--round-to"),
        (["prune", "{base}", "{out}", "--method", "sparsegpt"], "sparsity"),
        (["prune", "{base}", "{out}", "--samples", "4"], "--samples"),
        (["prune", "{base}", "{out}", "--method", "magnitude", "--sparsity", "0.5", "--pattern", "2:4"], "2:4"),
        (["estimate", "{release}", "--pruning-ratio", "0.5"], "is a release"),
        (["estimate", "{base}", "--pruning-ratio", "0.5", "--masked-lora"], "nothing to mask"),
    ],
)
def test_what_does_not_go_together_is_refused(
    base: Path, releases: dict[str, Path], tmp_path: Path, options: list[str], match: str
) -> None:
    names = {"base": base, "release": releases["4:8"], "out": tmp_path / "out"}

    done = command(*(option.format(**names) for option in options), "--json", code=2)

    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "InvalidRequestError"
    assert match in error["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("asked", [("--pattern", "4:8"), ("--sparsity", "0.55")], ids=["semi", "unst"])
def test_prune_makes_what_plan_and_dry_run_have_counted(base: Path, tmp_path: Path, asked: tuple[str, str]) -> None:
    arguments = ("prune", base, tmp_path / "release", "--method", "magnitude", *asked)

    dry = json.loads(command(*arguments, "--dry-run", "--json").stdout)
    assert not (tmp_path / "release").exists()
    made = json.loads(command(*arguments, "--quantize", "--json").stdout)

    planned = json.loads(command("plan", base, *asked, "--json").stdout)
    assert planned.items() <= dry.items()
    assert planned.items() <= made.items()
    assert made["pruning"]["method"] == "magnitude"
    assert made["quantization"]["type"] == "nf4"
    weights = zeros_of(tmp_path / "release") if asked[0] == "--sparsity" else made["prunable_weights"] // 2
    assert made["prunable_weights"] - made["kept_weights"] == weights
    assert f"Next: loram verify {tmp_path / 'release'}" in command("prune", *arguments[1:], "--overwrite").stderr


def test_calibration_and_rounding_by_row_are_what_was_asked(base: Path, tmp_path: Path) -> None:
    """Wanda removes the same number of weights from every row, so of rows of 24 it takes 13 for a share of 0.55."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text(f"{json.dumps({'text': TEXT})}\n" * 4, encoding="utf-8")
    arguments = ("prune", base, tmp_path / "release", "--method", "wanda", "--sparsity", "0.55", "--json")
    asked = (*arguments, "--calibration", texts, "--samples", "3", "--tokens", "16")

    dry = json.loads(command(*asked, "--dry-run").stdout)
    made = json.loads(command(*asked).stdout)

    release = open_metadata(tmp_path / "release")
    assert release.manifest.pruning.calibration is not None
    assert {"samples": 3, "tokens": 16}.items() <= release.manifest.pruning.calibration.items()
    shapes = projections(release.plan).values()
    kept = sum(rows * (columns - columns * 55 // 100) for rows, columns in shapes)
    assert made["kept_weights"] == dry["kept_weights"] == kept
    assert kept > count_parameters(base, sparsity=0.55).kept_weights  # by whole matrices, as the others round


def test_library_refuses_both_ways_of_pruning_at_once(config: Path) -> None:
    with pytest.raises(InvalidRequestError, match="keep_last"):
        count_parameters(config, pattern="4:8", keep_last=1)  # type: ignore[call-overload]  # what is tested


def test_a_manifest_that_keeps_more_weights_than_there_are_is_refused() -> None:
    architecture = architecture_of(sparse_config())

    for claimed in (0, 10**9):
        with pytest.raises(ValueError, match="kept weights"):
            sparse_counts(architecture, parse_pattern("4:8"), kept_weights=claimed)


def test_info_counts_the_weights_that_are_not_zero(releases: dict[str, Path]) -> None:
    found = info(releases["unstructured"])

    weights = load_file(releases["unstructured"] / "model.safetensors")
    zeros = zeros_of(releases["unstructured"])
    assert found["pruned_parameters"] == sum(tensor.size for tensor in weights.values()) - zeros
    assert found["pruned_parameters"] == open_metadata(releases["unstructured"]).manifest.parameters
    assert found["sparsity"] == pytest.approx(zeros / found["prunable_weights"]) == pytest.approx(0.55, abs=2e-3)
    with safe_open(releases["4:8"] / WEIGHT_MASKS, framework="numpy") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert info(releases["4:8"])["mask_bytes"] == stored
    shown = command("info", releases["4:8"]).stdout
    assert "sparsegpt, 4:8, sparsity 0.5" in shown
    assert re.search(r"kept in projections +[\d,]+ of [\d,]+ weights \(50.00%\), 4 of every 8 inputs", shown)
    assert "Zeros take memory" in shown


def test_verify_says_that_it_looked_for_the_zeros(releases: dict[str, Path]) -> None:
    semi = verify(releases["4:8"])

    assert "zeros: every weight that its mask removes" in semi.checked
    assert any(phrase.startswith("masks:") for phrase in semi.checked)
    assert not any("mask index" in phrase for phrase in semi.checked)
    assert any("SparseGPT" in phrase for phrase in semi.not_checked)
    assert not any("SparseGPT" in phrase for phrase in verify(releases["unstructured"]).not_checked)


@pytest.mark.parametrize("kind", ["4:8", "unstructured"])
def test_training_takes_what_the_base_takes_and_masks_come_on_top(
    base: Path, releases: dict[str, Path], kind: str
) -> None:
    quantized = kind == "4:8"

    plain, whole = estimate_memory(releases[kind]), estimate_memory(base, quantized=quantized)

    assert plain.breakdown == whole.breakdown
    masked = estimate_memory(releases[kind], shape=TrainingShape(masked_lora=True))
    shapes = projections(Plan(open_metadata(base_release := releases[kind]).architecture, {}))
    blocks = [-(-rows * -(-columns // 8) // 512) * 512 for rows, columns in shapes.values()]
    assert masked.breakdown.masks == sum(blocks)
    assert masked.breakdown.total > plain.breakdown.total
    assert masked.subject.is_sparse
    assert masked.to_dict()["sparse"] is True
    assert "masks of LoRA" in fit_text(masked)
    assert "it trains in what its base trains in" in fit_text(plain)
    shown = command("estimate", base_release, "--masked-lora").stdout
    assert "rank 8 (masked)" in shown


def test_on_the_hub_neither_weights_nor_masks_are_downloaded(releases: dict[str, Path], tmp_path: Path) -> None:
    code = """
from loram_hub import estimate_memory, info
fit = estimate_memory(sys.argv[1])
print(json.dumps({"fit": fit.to_dict(), "info": info(sys.argv[1]), "torch": "torch" in sys.modules}))
"""
    with HubServer(tmp_path / "hub") as hub:
        commit = hub.add_repo("alice/semi", releases["4:8"])
        found = python(hub, tmp_path / "home", code, "alice/semi")
        fetched = {path.name for path in (tmp_path / "home").rglob("*.safetensors")}

    assert fetched == {"mask_index.safetensors"}
    named = {"id": "alice/semi", "commit": commit}
    assert found["fit"] == json.loads(json.dumps(estimate_memory(releases["4:8"]).to_dict() | named))
    assert found["info"] == info(releases["4:8"]) | named
    assert found["torch"] is False


def test_masked_training_has_one_update_of_a_whole_matrix_in_memory() -> None:
    architecture = architecture_of(BASES["meta-llama/Llama-3.1-70B"][0])
    layers = [architecture.whole_layer] * architecture.num_hidden_layers
    largest = max(
        math.prod(architecture.shape(weight, architecture.whole_layer)) for weight in architecture.projections
    )

    for quantized in (True, False):
        one, plain = (
            training_memory(architecture, layers, TrainingShape(masked_lora=masked), quantized=quantized)
            for masked in (True, False)
        )
        extra = one.workspace - plain.workspace
        # The update in 16 bit, and the unpacked mask or, in NF4, the dequantized weight, which is there anyway.
        assert extra == pytest.approx(2 * largest if quantized else 3.5 * largest, rel=0.02)
        assert one.fragmentation < 2 * 3.5 * largest  # never two


def test_masked_lora_on_a_structured_release_is_refused() -> None:
    architecture = architecture_of(BASES["meta-llama/Llama-3.1-70B"][0])
    layers = planned_sizes(architecture, PruningSettings(pruning_ratio=0.85))

    with pytest.raises(InvalidRequestError, match="nothing to mask"):
        training_memory(architecture, layers, TrainingShape(masked_lora=True))


def test_no_ratio_but_a_structured_release_would_lower_it(releases: dict[str, Path]) -> None:
    shape = TrainingShape(masked_lora=True)
    fit = estimate_memory(releases["4:8"], gpu="1GB", shape=shape)

    assert fit.smallest_ratio is not None
    assert "plain LoRA, not masked" in [advice.change for advice in fit.advice]
    assert "pruning ratio of a structured release of its base" in fit_text(fit)


def test_the_card_states_sizes_and_that_zeros_save_no_memory(base: Path, releases: dict[str, Path]) -> None:
    card = make_card(releases["unstructured"], repo_id="org/Tiny-LoRAM-Unst", license="mit")

    text = card.text
    found, architecture = info(releases["unstructured"]), open_metadata(releases["unstructured"]).architecture
    assert "Training on this release takes as much memory as training on the base model" in text
    assert f"{found['kept_weights']:,} of {found['prunable_weights']:,} weights" in text
    counts = parameter_counts(architecture, planned_sizes(architecture, PruningSettings(pruning_ratio=0.65)))
    assert f"ratio 0.65 (computed) | {counts.pruned_parameters:,} |" in text
    masks = (releases["unstructured"] / WEIGHT_MASKS).stat().st_size
    assert f"{masks / 1024:,.2f} KiB of masks" in text
    assert "masks of this release, 1 bit per weight" in text
    assert "single weights were set to zero" in text
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert ["mask_lora_(trainer.model)" in block for block in blocks] == [False, True]
    for block in blocks:
        compile(block, "card", "exec")
    assert "KV heads" not in text
    assert not any(name.startswith("pictures/") for name in card.files)
    tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_the_card_of_sparsegpt_in_nf4_names_its_settings(releases: dict[str, Path]) -> None:
    text = make_card(releases["4:8"], repo_id="org/Tiny-LoRAM-Semi", license="mit").text

    assert (
        "made sparse (SparseGPT 4:8: 50.00% of the weights of its linear layers are zero) and quantized to NF4. A"
        in text
    )
    assert "dampening 0.01, blocks of 128 columns" in text
    assert "and others changed to make up for it" in text
    assert f"masks of this release, {info(releases['4:8'])['mask_bits']:.3g} bit per weight" in text
    for tag in ("- sparse\n", "- sparsegpt\n", "- 4-bit\n", "base_model_relation: quantized\n"):
        assert tag in text


def test_a_push_takes_the_masks_and_names_the_variant(releases: dict[str, Path]) -> None:
    content = release_content(releases["4:8"])

    assert content.message == "LoRAM release of org/base, SparseGPT 4:8"
    assert WEIGHT_MASKS in content.files
    assert content.left_out == ()


@pytest.fixture(scope="module")
def trained(releases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, as one that was trained masked on the unstructured release is recorded."""
    release = open_metadata(releases["unstructured"])
    folder = tmp_path_factory.mktemp("adapters") / "trained"
    save_adapter(folder, random_factors(projections(release.plan)), base=release.folder)
    (folder / "loram.json").write_text(dump_json({"plan_sha256": release.plan.digest, "masked": True}))
    return folder


def test_an_adapter_that_was_trained_masked_is_evaluated_masked(
    releases: dict[str, Path], trained: Path, tmp_path: Path
) -> None:
    """The reference: the stock model with W o M + s (B A) o M in place of every projection."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loram_hub.evaluation import evaluate
    from loram_hub.release import open_release

    table = evaluate([TEXT], release=releases["unstructured"], adapter=trained, dtype=torch.float32)

    release = open_release(releases["unstructured"])
    masks, factors = release.weight_masks, load_file(trained / "adapter_model.safetensors")
    assert masks is not None
    stock = AutoModelForCausalLM.from_config(_config(release.config), dtype=torch.float32)
    with safe_open(releases["unstructured"] / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    for name in masks.names:
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        update = 8 / 4 * factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]
        weights[name] += torch.from_numpy(update * masks.read(name))
    stock.load_state_dict(weights)
    ids = torch.tensor([AutoTokenizer.from_pretrained(releases["unstructured"])(TEXT)["input_ids"]])
    with torch.no_grad():
        logits = stock.eval()(ids).logits
    expected = functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert table.loss_of("pruned + adapter") == pytest.approx(expected, rel=1e-4)

    (trained / "loram.json").rename(tmp_path / "record")
    unmasked = evaluate([TEXT], release=releases["unstructured"], adapter=trained, dtype=torch.float32)
    (tmp_path / "record").rename(trained / "loram.json")
    assert unmasked.loss_of("pruned + adapter") != pytest.approx(expected, rel=1e-3)
    parameters = {row.model: row.parameters for row in table.rows}
    assert parameters["pruned"] == release.manifest.parameters
    assert parameters["pruned + adapter"] == release.manifest.parameters + sum(f.size for f in factors.values())
    make_card(releases["unstructured"], license="mit", evaluation=table.to_dict())  # the counts are the release's


def test_a_recovered_adapter_acts_unmasked_on_the_original_model(base: Path, trained: Path, tmp_path: Path) -> None:
    """The reference: the stock base with W + s B A in place of every projection."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loram_hub.evaluation import evaluate

    recovered = recover(trained, tmp_path / "recovered", dtype="float32").folder
    table = evaluate([TEXT], base=base, recovered=recovered, dtype=torch.float32)

    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights, factors = dict(stock.named_parameters()), load_file(trained / "adapter_model.safetensors")
    with torch.no_grad():
        for prefix in {name.split(".lora_")[0] for name in factors}:
            update = 8 / 4 * factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]
            weights[f"{prefix.removeprefix('base_model.model.')}.weight"].add_(torch.from_numpy(update))
        ids = torch.tensor([AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]])
        expected = functional.cross_entropy(stock.eval()(ids).logits[0, :-1], ids[0, 1:]).item()
    assert table.loss_of("base + recovered adapter") == pytest.approx(expected, rel=1e-4)


def _config(values: Any) -> Any:
    from transformers import AutoConfig

    from loram_hub.release import base_config_of

    config = {key: value for key, value in base_config_of(values).items() if key != "model_type"}
    return AutoConfig.for_model("llama", **config)


def test_which_revision_is_recorded_where_nothing_says_and_all_give_the_same(
    releases: dict[str, Path],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    adapter = Path(shutil.copytree(trained, tmp_path / "adapter", ignore=shutil.ignore_patterns("loram.json")))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "alice/sparse"}))
    repository = tmp_path / "cache" / "models--alice--sparse"
    commits = {name: digit * 40 for name, digit in (("4:8", "a"), ("unstructured", "b"))}

    def recovered(name: str) -> tuple[bool, str | None, str | None]:
        found = recover(adapter, tmp_path / name, dtype="float32")
        release = json.loads((tmp_path / name / "loram.json").read_text())["release"]
        return found.assumed, found.release_commit, release["commit"]

    one = commits["unstructured"]
    shutil.copytree(releases["unstructured"], repository / "snapshots" / one)
    assert recovered("one") == (False, one, one)  # its weights are here, and no others

    shutil.copytree(releases["4:8"], repository / "snapshots" / commits["4:8"])
    assert recovered("several") in [(True, commit, None) for commit in commits.values()]

    for commit in commits.values():
        (repository / "snapshots" / commit / "model.safetensors").unlink()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(one)
    assert recovered("latest") == (True, one, None)

    assert [each.message for each in caplog.records if each.levelno >= logging.WARNING] == []
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "several", "latest")]
    assert weights[0] == weights[1] == weights[2]
    assert verify(tmp_path / "several").kind == "recovered adapter"


def test_the_card_of_a_recovered_adapter_says_that_it_was_masked(trained: Path, tmp_path: Path) -> None:
    recovered = recover(trained, tmp_path / "recovered").folder

    text = make_card(recovered, license="mit").text
    assert "It was trained on a sparse release, masked" in text
    (trained / "loram.json").rename(tmp_path / "record")
    plain = recover(trained, tmp_path / "plain").folder
    (tmp_path / "record").rename(trained / "loram.json")
    assert "A sparse release loses none" in make_card(plain, license="mit").text
