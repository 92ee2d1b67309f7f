"""SparseGPT, Wanda and magnitude against plain float64 references, streamed runs against whole models, and releases."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import HEADS, MODEL_TYPES, save_base, save_tokenizer, tiny_config
from filelock import FileLock, Timeout
from hypothesis import given, settings
from hypothesis import strategies as st
from killed import bytes_of
from torch import nn
from transformers import AutoModelForCausalLM

from loram_hub.architecture import architecture_of
from loram_hub.checkpoint import Checkpoint
from loram_hub.errors import InvalidRequestError, ResourceError, VerificationError
from loram_hub.inspection import verify
from loram_hub.release import Release
from loram_hub.sparsification import SparsitySettings, asked_counts, check_sparsify, sparsify
from loram_hub.sparsification import layers as streamed_layers
from loram_hub.sparsification.counts import kept_of, projection_shapes
from loram_hub.sparsification.finished import only_process, work_folder
from loram_hub.sparsification.matrices import SparseMatrix, prune_matrices
from loram_hub.sparsification.selection import keep_in_groups, keep_in_rows, keep_of_all
from loram_hub.sparsification.statistics import Hessian, InputNorms, collected

SAMPLES, TOKENS = 6, 20
ROWS, COLUMNS = 37, 48
PATTERNS = ("2:4", "4:8", "1:4", "3:8")

Plain = tuple[torch.Tensor, torch.Tensor]


def plain_sparsegpt(
    weight: torch.Tensor, inputs: torch.Tensor, asked: SparsitySettings, *, as_published: bool = False
) -> Plain:
    """Optimal brain surgeon, a column at a time, in float64: every inverse Hessian is worked out anew.

    `inputs` (samples, tokens, in_features). As published a block loses all that is not above the score with the index
    int(n * sparsity) in their order, instead of as many as the whole matrix owes up to there.
    """
    hessian = 2 / len(inputs) * sum(x.double().T @ x.double() for x in inputs)
    weight, diagonal = weight.double().clone(), hessian.diagonal()
    weight[:, diagonal == 0] = 0
    diagonal[diagonal == 0] = 1
    diagonal += asked.dampening * diagonal.mean()
    kept = torch.ones_like(weight, dtype=torch.bool)
    rows, columns = weight.shape
    group = asked.mask_pattern.of
    step = group or asked.block_size
    for column in range(columns):
        if column % step == 0:
            stop = min(column + step, columns)
            costs = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(column, stop)])
            scores = weight[:, column:stop] ** 2 / costs
            if as_published:
                threshold = scores.flatten().sort().values[int(scores.numel() * asked.removed_share)]
                kept[:, column:stop] = scores > threshold
            elif group is None:
                assert asked.sparsity is not None
                count = int(rows * stop * asked.sparsity + 1e-9) - int(rows * column * asked.sparsity + 1e-9)
                lowest = scores.flatten().argsort()[:count]
                kept[:, column:stop] = (
                    torch.ones(scores.numel(), dtype=torch.bool).scatter(0, lowest, False).view(rows, -1)
                )
            else:
                lowest = scores.argsort(dim=1)[:, : group - (asked.mask_pattern.kept or 0)]
                kept[:, column:stop] = torch.ones_like(scores, dtype=torch.bool).scatter(1, lowest, False)
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = torch.where(kept[:, column], 0, weight[:, column]) / inverse[0, 0]
        weight[:, column:] -= torch.outer(error, inverse[0])
        weight[~kept[:, column], column] = 0
    return weight, kept


def plain_wanda(weight: torch.Tensor, inputs: torch.Tensor, asked: SparsitySettings) -> Plain:
    scores = weight.abs() * inputs.flatten(0, -2).norm(dim=0)
    of, keeps = asked.mask_pattern.of or weight.shape[1], asked.mask_pattern.kept
    keeps = keeps or of - int(of * asked.removed_share)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for start in range(0, weight.shape[1], of):
        best = scores[:, start : start + of].topk(keeps, dim=1).indices + start
        kept.scatter_(1, best, True)
    return weight * kept, kept


def plain_magnitude(weight: torch.Tensor, _: torch.Tensor, asked: SparsitySettings) -> Plain:
    of, keeps = asked.mask_pattern.of, asked.mask_pattern.kept
    if of is not None:
        groups = weight.abs().view(len(weight), -1, of)
        kept = (groups >= groups.topk(keeps or 0).values[..., -1:]).view_as(weight)
    else:
        kept = weight.abs() > weight.abs().flatten().sort().values[int(weight.numel() * asked.removed_share) - 1]
    return weight * kept, kept


PLAIN: Mapping[str, Callable[[torch.Tensor, torch.Tensor, SparsitySettings], Plain]] = {
    "sparsegpt": plain_sparsegpt,
    "wanda": plain_wanda,
    "magnitude": plain_magnitude,
}


def correlated_inputs(samples: int = 3, tokens: int = 40, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(samples, tokens, 12, generator=generator) @ torch.randn(12, COLUMNS, generator=generator)
    return few + torch.randn(samples, tokens, COLUMNS, generator=generator)


def few_inputs() -> torch.Tensor:
    """Four tokens: a Hessian of rank 4, which rounding makes indefinite."""
    return torch.randn(1, 4, COLUMNS, generator=torch.Generator().manual_seed(0))


def matrix(*, seed: int = 1) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def pruned(weight: torch.Tensor, inputs: torch.Tensor, asked: SparsitySettings) -> SparseMatrix:
    kind = {"sparsegpt": Hessian, "wanda": InputNorms, "magnitude": None}[asked.method]
    statistic = None if kind is None else kind(weight.shape[1], weight.device)
    for batch in inputs.split(2):
        if statistic is not None:
            statistic.add(batch)
    return dict(prune_matrices({"w": weight}, statistic, asked))["w"]


def assert_same(found: SparseMatrix, expected: Plain) -> None:
    weight, kept = expected
    assert torch.equal(found.mask_OI, kept)
    assert found.weight_OI.dtype == torch.float32
    assert float((found.weight_OI - weight).norm() / weight.norm()) < 1e-4
    assert not found.weight_OI[~found.mask_OI].any()


@pytest.mark.parametrize("block_size", [COLUMNS, 16, 7])
def test_unstructured_sparsegpt_equals_the_plain_surgeon(block_size: int) -> None:
    asked = SparsitySettings(sparsity=0.55, block_size=block_size)
    weight, inputs = matrix(), correlated_inputs()

    assert_same(pruned(weight, inputs, asked), plain_sparsegpt(weight, inputs, asked))


@pytest.mark.parametrize("block_size", [COLUMNS, 16])
def test_unstructured_sparsegpt_equals_the_published_rule_with_the_one_weight_more_that_it_takes_per_block(
    block_size: int,
) -> None:
    weight, inputs, in_block = matrix(), correlated_inputs(), ROWS * block_size
    published = plain_sparsegpt(
        weight, inputs, SparsitySettings(sparsity=0.55, block_size=block_size), as_published=True
    )
    removed = int(in_block * 0.55) + 1
    asked = SparsitySettings(sparsity=(removed + 0.1) / in_block, block_size=block_size)

    assert int((~published[1]).sum()) == removed * COLUMNS // block_size
    assert_same(pruned(weight, inputs, asked), published)


def test_asked_for_the_same_sparsity_the_published_rule_removes_one_weight_more() -> None:
    asked = SparsitySettings(sparsity=0.55, block_size=COLUMNS)
    weight, inputs = matrix(), correlated_inputs()

    found = pruned(weight, inputs, asked)

    expected, kept = plain_sparsegpt(weight, inputs, asked, as_published=True)
    assert int((found.mask_OI & ~kept).sum()) == 1
    assert not (kept & ~found.mask_OI).any()
    row = int((found.mask_OI & ~kept).any(dim=1).nonzero())  # the others are those of the published rule
    others = [idx for idx in range(ROWS) if idx != row]
    assert_same(SparseMatrix(found.weight_OI[others], found.mask_OI[others]), (expected[others], kept[others]))


@pytest.mark.parametrize("block_size", [128, 13])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_with_a_pattern_equals_the_plain_surgeon(pattern: str, block_size: int) -> None:
    asked = SparsitySettings(pattern=pattern, block_size=block_size)
    weight, inputs = matrix(), correlated_inputs()

    assert_same(pruned(weight, inputs, asked), plain_sparsegpt(weight, inputs, asked))


def test_sparsegpt_has_enough_digits_with_fewer_tokens_than_columns() -> None:
    asked = SparsitySettings(sparsity=0.5)
    weight, inputs = matrix(), correlated_inputs(2, 9)

    assert_same(pruned(weight, inputs, asked), plain_sparsegpt(weight, inputs, asked))


@pytest.mark.parametrize("asked", [SparsitySettings(sparsity=0.3), SparsitySettings(pattern="2:4")], ids=str)
def test_weights_of_inputs_that_are_always_zero_become_zero(asked: SparsitySettings) -> None:
    weight, inputs = matrix(), correlated_inputs()
    inputs[..., [3, 30]] = 0

    found = pruned(weight, inputs, asked)

    assert_same(found, plain_sparsegpt(weight, inputs, asked))
    assert not found.weight_OI[:, [3, 30]].any()


@pytest.mark.parametrize("pattern", [None, *PATTERNS])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_wanda_and_magnitude_equal_the_plain_choice_and_leave_kept_weights_alone(
    method: str, pattern: str | None
) -> None:
    asked = SparsitySettings(method=method, pattern=pattern, sparsity=0.55 if pattern is None else None)
    weight, inputs = matrix(), correlated_inputs()

    found = pruned(weight, inputs, asked)

    expected, kept = PLAIN[method](weight, inputs, asked)
    assert torch.equal(found.mask_OI, kept)
    assert torch.equal(found.weight_OI, expected)


@pytest.mark.parametrize("share", [{"sparsity": 0.6}, {"pattern": "2:4"}], ids=str)
def test_sparsegpt_changes_the_outputs_least(share: dict[str, Any]) -> None:
    weight, inputs = matrix(), correlated_inputs()

    def error(method: str) -> float:
        found = pruned(weight, inputs, SparsitySettings(method=method, **share))
        return float((inputs @ (found.weight_OI - weight).T).norm())

    assert error("sparsegpt") < 0.75 * error("wanda")
    assert error("sparsegpt") < 0.75 * error("magnitude")


def test_the_hessian_is_the_same_in_batches_of_any_size() -> None:
    inputs = correlated_inputs(7)
    hessians = [Hessian(COLUMNS, inputs.device) for _ in range(3)]

    for hessian, size in zip(hessians, (1, 3, 7), strict=True):
        for batch in inputs.split(size):
            hessian.add(batch)

    expected = 2 / 7 * inputs.flatten(0, 1).double().T @ inputs.flatten(0, 1).double()
    for hessian in hessians:
        torch.testing.assert_close(hessian.matrix_II.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_matrices_with_the_same_inputs_share_a_hessian_and_are_pruned_each_as_if_alone() -> None:
    layer = nn.ModuleDict({name: nn.Linear(COLUMNS, 8, bias=False) for name in ("q", "k", "o")})
    inputs = correlated_inputs()

    with collected(layer, ["q", "k", "o"], Hessian) as found:
        for batch in inputs.split(2):
            layer["q"](batch)
            layer["k"](batch)
            layer["o"](batch + 1)

    assert found["q"] is found["k"]
    assert found["q"] is not found["o"]
    expected = 2 / 3 * inputs.flatten(0, 1).T @ inputs.flatten(0, 1)
    torch.testing.assert_close(found["q"].matrix_II, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
    asked = SparsitySettings(sparsity=0.5)
    weights = {name: layer[name].weight.detach() for name in ("q", "k")}
    for name, result in prune_matrices(weights, found["q"], asked):
        assert_same(result, plain_sparsegpt(weights[name], inputs, asked))


def test_a_hessian_that_cannot_be_decomposed_is_dampened_more(caplog: pytest.LogCaptureFixture) -> None:
    inputs = few_inputs()
    weight, asked = matrix(), SparsitySettings(sparsity=0.5, dampening=1e-7)

    with caplog.at_level(logging.WARNING):
        found = pruned(weight, inputs, asked)

    assert "dampening of 1e-06" in caplog.text
    assert int(found.mask_OI.sum()) == kept_of((ROWS, COLUMNS), asked)
    assert not torch.equal(found.weight_OI, weight * found.mask_OI)


@pytest.mark.parametrize("share", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_a_hessian_that_no_dampening_helps_leaves_the_matrix_to_magnitude_and_says_so(
    share: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    weight, inputs = matrix(), few_inputs()

    with caplog.at_level(logging.WARNING):
        found = pruned(weight, inputs, SparsitySettings(dampening=1e-12, **share))

    expected = pruned(weight, inputs, SparsitySettings(method="magnitude", **share))
    assert torch.equal(found.weight_OI, expected.weight_OI)
    assert "inputs of w cannot be decomposed" in caplog.text


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_activations_that_are_not_finite_are_refused(method: str) -> None:
    inputs = correlated_inputs()
    inputs[1, 2, 3] = float("inf")

    with pytest.raises(VerificationError, match="Activations at w are not finite"):
        pruned(matrix(), inputs, SparsitySettings(method=method, sparsity=0.5))


def test_equal_scores_are_settled_by_index() -> None:
    scores = torch.tensor([[1.0, 1, 2, 1], [1, 3, 1, 1]])

    assert keep_of_all(scores, 5).tolist() == [[True, False, True, False], [False, True, False, False]]
    assert keep_in_rows(scores, 0.5).tolist() == [[True, False, True, False], [True, True, False, False]]
    pattern = SparsitySettings(pattern="1:2").mask_pattern
    assert keep_in_groups(scores, pattern).tolist() == [[True, False, True, False], [False, True, True, False]]


@given(data=st.data())
@settings(max_examples=60)
def test_exactly_as_many_weights_are_kept_as_are_counted_before(data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(["sparsegpt", "wanda", "magnitude"]))
    rows, groups = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    of = data.draw(st.integers(2, 8))
    if data.draw(st.booleans()):
        share: dict[str, Any] = {"pattern": f"{data.draw(st.integers(1, of - 1))}:{of}"}
    else:
        share = {"sparsity": data.draw(st.floats(0.01, 0.99))}
    asked = SparsitySettings(method=method, block_size=data.draw(st.integers(1, 20)), **share)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    coarse = data.draw(st.booleans())  # many equal scores
    weight = torch.randn(rows, groups * of, generator=generator)
    weight = weight.round() if coarse else weight
    inputs = torch.randn(2, 5, groups * of, generator=generator)

    found = pruned(weight, inputs, asked)

    assert int(found.mask_OI.sum()) == kept_of((rows, groups * of), asked)
    assert not found.weight_OI[~found.mask_OI].any()
    if asked.pattern is not None:
        kept_in_groups = found.mask_OI.view(rows, groups, of).sum(2)
        assert set(kept_in_groups.flatten().tolist()) == {asked.mask_pattern.kept}


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "random"}, {"sparsity": None}, {"pattern": "4:8"}, {"sparsity": 0.0}, {"sparsity": 1.0},
        {"sparsity": float("nan")}, {"sparsity": True}, {"sparsity": "0.5"}, {"sparsity": None, "pattern": "8:4"},
        {"sparsity": None, "pattern": "unstructured"}, {"sparsity": None, "pattern": 48}, {"dampening": 0},
        {"dampening": float("inf")}, {"block_size": 0}, {"samples": 0}, {"tokens": 1}, {"tokens": 8.0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(reversed(wrong))):
        SparsitySettings(**{"sparsity": 0.5, **wrong})


@pytest.mark.parametrize(
    ("share", "parameters"), [({"pattern": "4:8"}, 6_671_979_520), ({"sparsity": 0.55}, 6_037_591_040)]
)
def test_the_paper_s_thirteen_billion_parameters_are_counted(share: dict[str, Any], parameters: int) -> None:
    llama_2_13b = architecture_of(
        {
            "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
            "num_attention_heads": 40, "vocab_size": 32000, "tie_word_embeddings": False,
        }
    )  # fmt: skip

    counts = asked_counts(llama_2_13b, SparsitySettings(**share))

    assert counts.pruned_parameters == parameters
    assert counts.original_parameters == 13_015_864_320
    assert counts.kept_weights == parameters - (13_015_864_320 - counts.prunable_weights)
    assert counts.bf16_bytes == 2 * 13_015_864_320
    assert counts.mask_bytes == counts.prunable_weights // 8 * (7 if "pattern" in share else 8) // 8


# Whole runs.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("sparsify") / "base", tiny_config(intermediate_size=36))
    save_tokenizer(folder)
    return folder


def calibration(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 53, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(seed))


def watch(module: nn.Module, seen: list[torch.Tensor]) -> Any:
    """Keep what a module is given; returns the handle that ends it."""
    return module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))


def plain_run(folder: Path, ids: torch.Tensor, asked: SparsitySettings) -> dict[str, Plain]:
    """Prune a model that is in memory whole, layer by layer; each layer's inputs come from running the whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    results: dict[str, Plain] = {}
    for number, layer in enumerate(model.model.layers):
        seen: dict[str, list[torch.Tensor]] = {}
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        handles = [watch(module, seen.setdefault(name, [])) for name, module in linears.items()]
        with torch.no_grad():
            for sample in ids.split(1):
                model(input_ids=sample, use_cache=False)
        for handle in handles:
            handle.remove()
        for name, module in linears.items():
            found = PLAIN[asked.method](module.weight.detach(), torch.cat(seen[name]), asked)
            results[f"model.layers.{number}.{name}.weight"] = found
            module.weight.data.copy_(found[0])
    return results


def assert_equals_plain_run(release: Release, folder: Path, ids: torch.Tensor, asked: SparsitySettings) -> None:
    expected = plain_run(folder, ids, asked)
    masks = release.weight_masks
    assert masks is not None
    with Checkpoint(release.folder) as found, Checkpoint(folder) as original:
        assert set(expected) == set(projection_shapes(release.architecture)) == set(masks.names)
        for name, (weight, kept) in expected.items():
            mask = torch.from_numpy(masks.read(name))
            assert_same(SparseMatrix(found.read(name), mask), (weight, kept))
        others = set(original.tensors) - set(expected)
        assert set(found.tensors) == set(original.tensors)
        for name in others:
            assert torch.equal(found.read(name), original.read(name))


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_streamed_run_equals_the_plain_one_in_every_family(tmp_path: Path, family: str) -> None:
    folder = save_base(tmp_path / "base", tiny_config(family, layers=2))
    asked = SparsitySettings(sparsity=0.55, block_size=16)

    release = sparsify(folder, tmp_path / "out", settings=asked, calibration=calibration())

    assert_equals_plain_run(release, folder, calibration(), asked)


@pytest.mark.parametrize("attention", HEADS)
def test_a_streamed_run_with_a_pattern_equals_the_plain_one(tmp_path: Path, attention: str) -> None:
    config = tiny_config(attention=attention, intermediate_size=36, head_dim=8, tie_word_embeddings=attention == "mqa")
    folder = save_base(tmp_path / "base", config)
    asked = SparsitySettings(pattern="2:4")

    release = sparsify(folder, tmp_path / "out", settings=asked, calibration=calibration())

    assert_equals_plain_run(release, folder, calibration(), asked)


@pytest.mark.parametrize("share", [{"sparsity": 0.5}, {"pattern": "1:4"}], ids=str)
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_wanda_and_magnitude_run_like_the_plain_ones(
    tmp_path: Path, base: Path, method: str, share: dict[str, Any]
) -> None:
    asked = SparsitySettings(method=method, **share)
    ids = calibration() if asked.needs_calibration else None

    release = sparsify(base, tmp_path / "out", settings=asked, calibration=ids)

    assert_equals_plain_run(release, base, calibration(), asked)


def test_the_release_says_how_it_was_made_and_what_it_keeps(tmp_path: Path, base: Path) -> None:
    asked = SparsitySettings(pattern="1:4", block_size=10, dampening=0.02)
    planned = check_sparsify(base, tmp_path / "out", settings=asked, calibration=calibration())
    assert list(tmp_path.iterdir()) == []

    release = sparsify(base, tmp_path / "out", settings=asked, calibration=calibration(), seed=5)

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    made = release.manifest.pruning
    assert release.is_sparse
    assert (made.method, made.pattern, made.sparsity) == ("sparsegpt", "1:4", 0.75)
    assert (made.dampening, made.block_size, made.seed) == (0.02, 12, 5)
    assert made.kept_weights == planned.kept_weights == planned.prunable_weights // 4
    assert verify(release.folder).kind == "release"
    assert made.calibration is not None
    assert (made.calibration["samples"], made.calibration["tokens"]) == (SAMPLES, TOKENS)
    assert release.manifest.parameters == planned.pruned_parameters
    assert release.manifest.recipe["sparsify"] == {
        "base": release.manifest.base.id, "revision": None, "method": "sparsegpt", "sparsity": None, "pattern": "1:4",
        "seed": 5, "calibration": "token ids", "dampening": 0.02, "block_size": 10,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["file", "list"])
def test_the_recipe_names_the_texts_without_a_path_of_this_machine(tmp_path: Path, base: Path, kind: str) -> None:
    texts = [" ".join(f"w{4 + (number * step) % 49}" for number in range(30)) for step in range(1, 9)]
    path = tmp_path / "some texts.txt"
    path.write_text("\n".join(texts))
    asked = SparsitySettings(method="wanda", sparsity=0.5, samples=3, tokens=16)

    release = sparsify(base, tmp_path / "out", settings=asked, calibration=path if kind == "file" else texts)

    recipe = release.manifest.recipe["sparsify"]
    assert recipe["calibration"] == {"file": "some texts.txt", "list": "8 texts"}[kind]
    assert (recipe["samples"], recipe["tokens"]) == (3, 16)


def test_two_runs_give_the_same_bytes(tmp_path: Path, base: Path) -> None:
    for name in ("one", "two"):
        sparsify(base, tmp_path / name, settings=SparsitySettings(sparsity=0.5), calibration=calibration())

    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_sixteen_bit_weights_stay_so_and_wanda_keeps_their_bits(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", tiny_config(layers=2), dtype="bfloat16")
    asked = SparsitySettings(method="wanda", sparsity=0.5)

    release = sparsify(folder, tmp_path / "out", settings=asked, calibration=calibration())

    masks = release.weight_masks
    assert masks is not None
    with Checkpoint(release.folder) as found, Checkpoint(folder) as original:
        for name in masks.names:
            kept = torch.from_numpy(masks.read(name))
            assert found.read(name).dtype == torch.bfloat16
            assert torch.equal(found.read(name), original.read(name) * kept)


def test_nf4_at_once_equals_nf4_afterwards(tmp_path: Path, base: Path) -> None:
    from loram_hub.quantization import quantize

    asked = SparsitySettings(pattern="2:4")
    sparsify(base, tmp_path / "plain", settings=asked, calibration=calibration())

    direct = sparsify(base, tmp_path / "direct", settings=asked, calibration=calibration(), quantize=True)

    later = quantize(tmp_path / "plain", tmp_path / "later")
    assert direct.is_quantized
    assert bytes_of(direct.folder, but=["loram.json"]) == bytes_of(later.folder, but=["loram.json"])
    assert direct.manifest == later.manifest


def test_texts_are_cut_to_the_model_s_context(tmp_path: Path, base: Path) -> None:
    texts = [" ".join(f"w{4 + (number * step) % 49}" for number in range(90)) for step in range(1, 9)]
    asked = SparsitySettings(method="wanda", sparsity=0.5, samples=3, tokens=2048)

    release = sparsify(base, tmp_path / "out", settings=asked, calibration=texts)

    assert release.manifest.pruning.calibration is not None
    assert release.manifest.pruning.calibration["tokens"] == 64


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (None, "needs calibration"),
        (["w4 w5 w6"], "have 4 tokens"),
        (torch.full((2, 8), 53), "vocabulary has 53"),
        (torch.full((2, 8), -1), "token ids from -1"),
        (torch.zeros(2, 65, dtype=torch.int64), "positions for 64"),
        (torch.zeros(2, 1, dtype=torch.int64), "at least 1 sample of 2 tokens"),
        (torch.zeros(0, 8, dtype=torch.int64), "at least 1 sample of 2 tokens"),
        (torch.zeros(2, 8), "whole numbers"),
    ],
    ids=["none", "short", "beyond", "negative", "long", "one", "empty", "floats"],
)
@pytest.mark.parametrize("run", [sparsify, check_sparsify])
def test_calibration_that_is_none_is_refused_before_any_work(
    tmp_path: Path, base: Path, run: Callable[..., object], given: object, why: str
) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        run(base, tmp_path / "out", settings=SparsitySettings(sparsity=0.5), calibration=given)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run", [sparsify, check_sparsify])
@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (SparsitySettings(pattern="4:8"), "o_proj.weight has 60 input"),
        (SparsitySettings(sparsity=1e-9), "keeps 1,440 of"),
    ],
    ids=["pattern", "sparsity"],
)  # fmt: skip
def test_what_the_matrices_cannot_be_pruned_to_is_refused_before_any_work(
    tmp_path: Path, base: Path, run: Callable[..., object], asked: SparsitySettings, why: str
) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        run(base, tmp_path / "out", settings=asked, calibration=calibration())

    assert list(tmp_path.iterdir()) == []


def test_settings_of_another_type_are_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InvalidRequestError, match="settings is a dict; give SparsitySettings"):
        sparsify(base, tmp_path / "out", settings={"pattern": "4:8"}, calibration=calibration())  # type: ignore[arg-type]


def test_what_sparsegpt_did_otherwise_than_asked_is_in_the_recipe(tmp_path: Path, base: Path) -> None:
    asked = SparsitySettings(sparsity=0.5, dampening=1e-9)
    few = calibration()[:1, :28]  # enough for 24 inputs, too few for 36 and 60

    release = sparsify(base, tmp_path / "out", settings=asked, calibration=few)

    exceptions = release.manifest.recipe["sparsify"]["exceptions"]
    wide = {name for name in release.plan.tensor_shapes() if name.endswith(("o_proj.weight", "down_proj.weight"))}
    assert wide <= set(exceptions)
    assert all(value == "magnitude" or value > asked.dampening for value in exceptions.values())


def test_a_release_on_which_sparsegpt_did_nothing_is_not_called_one_of_it(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InvalidRequestError, match="decompose the inputs of no matrix"):
        sparsify(
            base, tmp_path / "out", settings=SparsitySettings(sparsity=0.5, dampening=1e-30),
            calibration=calibration()[:1, :2],
        )  # fmt: skip

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_a_base_with_numbers_that_are_none_is_refused(tmp_path: Path, base: Path, method: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.up_proj"):
        sparsify(
            folder, tmp_path / "out", settings=SparsitySettings(method=method, sparsity=0.5), calibration=calibration()
        )  # fmt: skip

    assert not (tmp_path / "out").exists()


# Runs that were stopped.


class Stopped(Exception):
    """What a test stops a run with."""


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    prune = streamed_layers._prune_

    def stop(number: int) -> None:
        def stopping(module: nn.Module, statistics: Any, layer: int, *others: Any) -> streamed_layers.Pruned:
            if layer == number:
                raise Stopped
            return prune(module, statistics, layer, *others)

        monkeypatch.setattr(streamed_layers, "_prune_", stopping)

    return stop


ASKED = SparsitySettings(sparsity=0.5)


def test_a_stopped_run_goes_on_and_ends_with_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, base: Path, stop_at: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    sparsify(base, tmp_path / "undisturbed", settings=ASKED, calibration=calibration())
    for number in (2, 3):
        stop_at(number)
        with pytest.raises(Stopped):
            sparsify(base, tmp_path / "out", settings=ASKED, calibration=calibration())
        assert not (tmp_path / "out").exists()
    files = {path: path.stat().st_mtime_ns for path in work_folder(tmp_path / "out").iterdir()}
    stop_at(2)  # a layer that is finished by now

    with caplog.at_level(logging.INFO):
        sparsify(base, tmp_path / "out", settings=ASKED, calibration=calibration())

    assert len([path for path in files if path.suffix == ".safetensors"]) == 3
    assert "after 3 layers that were finished before" in caplog.text
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")
    assert not work_folder(tmp_path / "out").exists()


@pytest.mark.parametrize(
    "other",
    [
        {"settings": SparsitySettings(sparsity=0.6)}, {"calibration": calibration(1)}, {"seed": 1},
        {"settings": SparsitySettings(method="wanda", sparsity=0.5)},
    ],
    ids=["sparsity", "calibration", "seed", "method"],
)  # fmt: skip
def test_layers_of_another_run_are_not_taken_up(
    tmp_path: Path,
    base: Path,
    stop_at: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
    other: dict[str, Any],
) -> None:
    stop_at(2)
    with pytest.raises(Stopped):
        sparsify(base, tmp_path / "out", settings=ASKED, calibration=calibration())
    stop_at(-1)
    arguments = {"settings": ASKED, "calibration": calibration(), **other}
    sparsify(base, tmp_path / "undisturbed", **arguments)

    with caplog.at_level(logging.WARNING):
        sparsify(base, tmp_path / "out", **arguments)

    assert "of another run" in caplog.text
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


def test_layers_of_a_base_that_has_changed_are_not_taken_up(
    tmp_path: Path, base: Path, stop_at: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    stop_at(2)
    with pytest.raises(Stopped):
        sparsify(folder, tmp_path / "out", settings=ASKED, calibration=calibration())
    stop_at(-1)
    save_base(folder, tiny_config(intermediate_size=36), seed=9)

    with caplog.at_level(logging.WARNING):
        release = sparsify(folder, tmp_path / "out", settings=ASKED, calibration=calibration())

    assert "of another run" in caplog.text
    assert_equals_plain_run(release, folder, calibration(), ASKED)


def test_a_damaged_layer_is_pruned_anew(
    tmp_path: Path, base: Path, stop_at: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    sparsify(base, tmp_path / "undisturbed", settings=ASKED, calibration=calibration())
    stop_at(3)
    with pytest.raises(Stopped):
        sparsify(base, tmp_path / "out", settings=ASKED, calibration=calibration())
    stop_at(-1)
    damaged = work_folder(tmp_path / "out") / "layer-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)

    with caplog.at_level(logging.WARNING):
        sparsify(base, tmp_path / "out", settings=ASKED, calibration=calibration())

    assert "layer-00001.safetensors is damaged" in caplog.text
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


def test_two_processes_do_not_make_one_release(tmp_path: Path, base: Path) -> None:
    with FileLock(tmp_path / ".out.sparsifying.lock"), pytest.raises(ResourceError, match="Another process"):
        sparsify(base, tmp_path / "out", settings=ASKED, calibration=calibration())


@pytest.mark.parametrize("kind", [PermissionError, Timeout])
def test_errors_of_the_work_are_not_taken_for_those_of_the_lock(tmp_path: Path, kind: type[OSError]) -> None:
    with pytest.raises(kind, match="another file"), only_process(tmp_path / "new" / "out"):
        raise kind("another file")

    with (
        only_process(tmp_path / "new" / "out"),
        pytest.raises(ResourceError, match="Another process"),
        only_process(tmp_path / "new" / "out"),
    ):
        pass
    assert list((tmp_path / "new").iterdir()) == []


def test_layers_of_another_number_of_threads_are_taken_up_with_a_warning(
    tmp_path: Path, base: Path, stop_at: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    threads = torch.get_num_threads()
    stop_at(2)
    with pytest.raises(Stopped):
        sparsify(base, tmp_path / "out", settings=ASKED, calibration=calibration())
    stop_at(-1)

    try:
        torch.set_num_threads(threads + 1)
        with caplog.at_level(logging.INFO):
            release = sparsify(base, tmp_path / "out", settings=ASKED, calibration=calibration())
    finally:
        torch.set_num_threads(threads)

    assert "after 2 layers that were finished before" in caplog.text
    assert f"finished with {threads} threads, and the others will be with {threads + 1}" in caplog.text
    assert_equals_plain_run(release, base, calibration(), ASKED)


def test_a_disk_without_room_is_told_before_any_work(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))

    with pytest.raises(ResourceError, match="are needed"):
        sparsify(base, tmp_path / "out", settings=ASKED, calibration=calibration())

    assert list(tmp_path.iterdir()) == []
