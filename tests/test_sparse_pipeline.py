"""A sparse release by its recipe: what it may say, what is made of it, what a cut leaves, what it is told to take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import close_session, constants
from pipeline_materials import content_of, save_texts, save_tiny_base, tiny_recipe

from loram_hub import AutoLoramModel
from loram_hub.architecture import architecture_of
from loram_hub.checkpoint import read_config
from loram_hub.errors import InvalidRequestError
from loram_hub.estimation import Cost, Hardware
from loram_hub.manifest import Sparsification
from loram_hub.masks import WEIGHT_MASKS
from loram_hub.pipeline import Published, check_publish, publish, recipe_from
from loram_hub.pipeline.preview import sparse_counts_of, stage_costs
from loram_hub.release import Release, verify
from loram_hub.sparsification.finished import FinishedLayers, work_folder

TOKEN, NAME = "hf_alice_write", "org/Tiny-LoRAM-Semi"
LEAST: dict[str, Any] = {"base": "org/base", "repo_id": "org/release"}


def sparse_recipe(folder: Path, prune: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return a recipe for the base and the texts in a folder."""
    recipe = tiny_recipe(folder, **changes)
    calibration = str(folder / "texts.jsonl")
    recipe["prune"] = {"calibration": calibration, **(prune or {"method": "sparsegpt", "pattern": "2:4"})}
    if recipe["prune"]["method"] in ("sparsegpt", "wanda"):
        recipe["prune"] |= {"samples": 8, "tokens": 16}
    return recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, texts and a work folder that is finished but for the push."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_tiny_base(folder / "base", intermediate_size=36)
    save_texts(folder / "texts.jsonl")
    publish(recipe_from(sparse_recipe(folder, repo_id=NAME)), work_dir=folder / "work")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it; what only the outside of the work folder holds is shared."""
    shutil.copytree(made / "work", tmp_path / "work")
    for name in ("base", "texts.jsonl"):
        os.symlink(made / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that this very process talks to."""
    with HubServer(tmp_path / "hub") as server:
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address.replace(constants.ENDPOINT, server.url))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        close_session()  # one that an earlier test opened
        yield server
        close_session()


def run(place: Path, recipe: dict[str, Any], **options: Any) -> Published:
    return publish(recipe_from(recipe), work_dir=place / "work", **options)


def stages_made(published: Published) -> list[str]:
    return [stage.name for stage in published.stages if stage.made]


def assert_zeros(release: Release, model: torch.nn.Module) -> None:
    masks = release.weight_masks
    assert masks is not None
    assert len(masks.names) == 6 * 7
    for name in masks.names:
        kept = torch.from_numpy(masks.read(name))
        assert not model.get_parameter(name)[~kept].any(), name
        assert torch.equal(kept.unflatten(1, (-1, 4)).sum(-1), torch.full((len(kept), kept.shape[1] // 4), 2)), name


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"method": "sparsegpt", "pattern": "4:8", "pruning_ratio": 0.5}, "prune: pruning_ratio is given, and method"),
        ({"method": "wanda", "sparsity": 0.5, "keep_first": 4}, "prune: keep_first is given, and method is wanda"),
        ({"method": "magnitude", "sparsity": 0.5, "importance": "random"}, "prune: importance is given, and method"),
        ({"pruning_ratio": 0.5, "sparsity": 0.5}, "prune: sparsity is given, and method is structured"),
        ({"pruning_ratio": 0.5, "pattern": "4:8"}, "prune: pattern is given, and method is structured"),
        ({"method": "wanda", "sparsity": 0.5, "dampening": 0.1}, "belongs to sparsegpt; wanda has sparsity, pattern"),
        ({"method": "magnitude", "sparsity": 0.5, "samples": 8}, "belongs to sparsegpt or wanda; magnitude has"),
        ({"method": "sparsegpt"}, "one of the two; found neither"),
        ({"method": "sparsegpt", "sparsity": 0.5, "pattern": "4:8"}, "one of the two; found 0.5 and 4:8"),
        ({"method": "sparsegpt", "pattern": "8:4"}, "prune: The pattern 8:4 keeps 8 of 4"),
        ({"method": "sparsegpt", "pattern": 248}, "prune.pattern is 248 (a number); a text is needed"),
        ({"method": "sparsegpt", "sparsity": 1.0}, "prune: sparsity is 1.0"),
        ({"method": "sparse", "sparsity": 0.5}, "choose one of structured, sparsegpt, wanda, magnitude"),
        ({"method": "wanda", "sparsity": 0.5}, "prune.calibration is missing"),
        ({"method": "sparsegpt", "sparsity": 0.5}, "prune.calibration is missing"),
        ({"method": "sparsegpt", "sparsity": 0.5, "calibration": "org/texts", "ratio": 1}, "is no key of a recipe"),
        ({}, "prune.pruning_ratio is missing. Share removed"),
    ],
    ids=str,
)
def test_a_recipe_says_what_its_method_needs_and_nothing_else(prune: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        recipe_from(LEAST | {"prune": prune})

    assert message in str(caught.value)


def test_a_refit_is_refused_with_the_recipe() -> None:
    prune = {"method": "wanda", "sparsity": 0.5, "calibration": "org/texts"}
    with pytest.raises(InvalidRequestError, match=r"section refit, and prune.method is wanda.*sparsegpt solves"):
        recipe_from(LEAST | {"prune": prune, "refit": {}})


def test_magnitude_needs_no_texts_and_settings_have_their_defaults() -> None:
    settings = recipe_from(LEAST | {"prune": {"method": "magnitude", "sparsity": 0.5}}).prune.sparsity_settings
    assert (settings.method, settings.sparsity, settings.pattern) == ("magnitude", 0.5, None)

    prune = {"method": "sparsegpt", "pattern": "4:8", "calibration": "org/texts", "block_size": 64}
    settings = recipe_from(LEAST | {"prune": prune}).prune.sparsity_settings
    assert (settings.dampening, settings.block_size, settings.samples, settings.tokens) == (0.01, 64, 128, 2048)


def test_all_stages_make_a_release_that_verifies_and_keeps_its_zeros(made: Path) -> None:
    work = made / "work"

    aligned, quantized = (
        verify(work / name, ignored=lambda name: name.endswith((".md", ".png"))) for name in ("aligned", "quantized")
    )

    assert quantized.is_quantized
    pruning = quantized.manifest.pruning
    assert isinstance(pruning, Sparsification)
    assert (pruning.method, pruning.pattern, pruning.sparsity) == ("sparsegpt", "2:4", 0.5)
    assert aligned.manifest.alignment is not None
    assert aligned.manifest.alignment["tokens"] == 4 * 4 * 16
    assert_zeros(aligned, AutoLoramModel.from_pretrained(aligned.folder))
    masks = {(work / name / WEIGHT_MASKS).read_bytes() for name in ("pruned", "aligned", "quantized")}
    assert len(masks) == 1
    assert "license: mit" in (work / "quantized" / "README.md").read_text()


def test_what_was_pushed_opens_from_the_hub(place: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = sparse_recipe(place, repo_id=NAME, push={"tag": "v1", "private": False})

    published = run(place, recipe, token=TOKEN)

    assert stages_made(published) == ["push"]
    assert {WEIGHT_MASKS, "mask_index.safetensors", "README.md"} <= set(hub.repo(NAME).files())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "cache"))
    model = AutoLoramModel.from_pretrained(NAME, token=TOKEN)
    assert model.loram.is_sparse
    here = AutoLoramModel.from_pretrained(place / "work" / "quantized")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, here(ids).logits)
    assert stages_made(run(place, recipe, token=TOKEN)) == []


def test_only_what_changes_is_made_again(place: Path) -> None:
    before = content_of(place / "work")
    assert stages_made(run(place, sparse_recipe(place, repo_id=NAME))) == []
    assert content_of(place / "work") == before

    for prune, why in (
        ({"method": "sparsegpt", "pattern": "1:4"}, "pattern 2:4 -> 1:4"),
        ({"method": "wanda", "pattern": "2:4"}, "method sparsegpt -> wanda"),
        ({"method": "sparsegpt", "pattern": "2:4", "dampening": 0.1}, "dampening 0.01 -> 0.1"),
    ):
        preview = check_publish(recipe_from(sparse_recipe(place, prune, repo_id=NAME)), work_dir=place / "work")
        assert preview.rows[0].why == why
        assert all(row.is_to_do for row in preview.rows)
        assert preview.problems == ()
    structured = check_publish(recipe_from(tiny_recipe(place, repo_id=NAME)), work_dir=place / "work")
    assert "method sparsegpt -> not there" in structured.rows[0].why
    assert "pruning_ratio not there -> 0.4" in structured.rows[0].why


class Cut(BaseException):
    """Stands for whatever ends a process between two layers."""


def cut_after(layers: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have pruning end after so many layers; returns the layers that are finished from now on."""
    add, seen = FinishedLayers.add, list[int]()

    def counted(self: FinishedLayers, layer: int, matrices: Any) -> None:
        if len(seen) == layers:
            raise Cut
        add(self, layer, matrices)
        seen.append(layer)

    monkeypatch.setattr(FinishedLayers, "add", counted)
    return seen


def test_pruning_that_was_cut_off_goes_on_and_ends_with_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sparse_recipe(made, repo_id=NAME)
    with monkeypatch.context() as patched:
        cut_after(4, patched)
        with pytest.raises(Cut):
            run(tmp_path, recipe, until="prune")
    preview = check_publish(recipe_from(recipe), work_dir=tmp_path / "work", until="prune")
    assert preview.rows[0].why == "not made yet; goes on where it was cut off"

    with monkeypatch.context() as patched:
        finished = cut_after(6, patched)
        assert stages_made(run(tmp_path, recipe, until="prune")) == ["prune"]

    assert finished == [4, 5]
    assert content_of(tmp_path / "work" / "pruned") == content_of(made / "work" / "pruned")
    assert not work_folder(tmp_path / "work" / "pruned").exists()


def test_pruning_that_was_cut_off_is_dropped_for_other_settings(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        cut_after(2, patched)
        with pytest.raises(Cut):
            run(tmp_path, sparse_recipe(made), until="prune")
    left = work_folder(tmp_path / "work" / "pruned")
    assert left.exists()

    other = sparse_recipe(made, {"method": "wanda", "pattern": "2:4"})
    preview = check_publish(recipe_from(other), work_dir=tmp_path / "work", until="prune")
    assert "a half-done run of other settings is dropped (method sparsegpt -> wanda" in preview.rows[0].why
    run(tmp_path, tiny_recipe(made), until="prune")
    assert not left.exists()


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"method": "sparsegpt", "pattern": "2:4", "tokens": 65}, "prune.tokens is 65; the model has positions for 64"),
        ({"method": "wanda", "pattern": "2:4", "calibration": "nothing"}, "nothing"),
    ],
    ids=str,
)
def test_what_would_fail_late_is_found_by_a_dry_run(
    made: Path, tmp_path: Path, prune: dict[str, Any], message: str
) -> None:
    recipe = sparse_recipe(made, prune)
    recipe["prune"] |= prune
    if "calibration" in prune:
        (tmp_path / "nothing").mkdir()
        recipe["prune"]["calibration"] = str(tmp_path / "nothing")

    problems = check_publish(recipe_from(recipe), work_dir=tmp_path / "work").problems

    assert len(problems) == 1
    assert message in problems[0]
    assert not (tmp_path / "work").exists()


def test_a_pattern_that_does_not_divide_the_inputs_is_refused_by_the_name_of_a_matrix(
    made: Path, tmp_path: Path
) -> None:
    recipe = recipe_from(sparse_recipe(made, {"method": "sparsegpt", "pattern": "4:8"}))

    for call in (check_publish, publish):
        with pytest.raises(InvalidRequestError, match=r"o_proj.weight has 60 input features.*4:8, or a sparsity"):
            call(recipe, work_dir=tmp_path / "work")
    assert not (tmp_path / "work" / "pruned").exists()


def test_estimates_follow_from_sizes_and_calibration(made: Path) -> None:
    architecture = architecture_of(read_config(made / "base"))
    matrices = 6 * (24 * (60 + 2 * 30) + 60 * 24 + 2 * 24 * 36 + 36 * 24)

    def costs(**prune: Any) -> Any:
        return stage_costs(recipe_from(sparse_recipe(made, prune)), architecture)

    semi, wanda = costs(method="sparsegpt", pattern="2:4"), costs(method="wanda", pattern="2:4")
    least = costs(method="magnitude", pattern="2:4")
    masks = sum(
        rows * -(-columns * 3 // 32) * 6  # 3 bits for every 4 weights, rows end with a byte
        for rows, columns in ((60, 24), (30, 24), (30, 24), (24, 60), (36, 24), (36, 24), (24, 36))
    )
    assert semi["prune"].output_bytes == semi["download"].output_bytes + masks
    assert semi["prune"].scratch_bytes == 2 * matrices + 2 * masks
    assert semi["quantize"].output_bytes < semi["align"].output_bytes == semi["prune"].output_bytes
    tokens = 8 * 16
    layer = 2 * tokens * (2 * 24**2 + 60**2 + 36**2) + 2 / 3 * (2 * 24**3 + 60**3 + 36**3)
    layer += 24**2 * (120 + 72) + 60**2 * 24 + 36**2 * 24
    assert semi["prune"].fp32_flops == pytest.approx(6 * layer)
    assert semi["prune"].flops == wanda["prune"].flops > least["prune"].flops == 0
    assert wanda["prune"].fp32_flops == 0
    assert semi["prune"].memory_bytes > wanda["prune"].memory_bytes > least["prune"].memory_bytes
    structured = stage_costs(recipe_from(tiny_recipe(made)), architecture)
    assert structured["align"].memory_bytes < semi["align"].memory_bytes


def test_operations_in_fp32_take_the_time_of_fp32() -> None:
    cost = Cost(flops=2e12, fp32_flops=1e12)
    machine: dict[str, Any] = {"gpu": "a GPU", "memory_gib": 8, "tflops": 4, "utilization": 0.5}

    assert cost.seconds(Hardware(**machine)) == 3 / 4 / 0.5
    assert cost.seconds(Hardware(**machine, fp32_tflops=0.25)) == (2 / 4 + 1 / 0.25) / 0.5
    with pytest.raises(InvalidRequestError, match=r"fp32_tflops is 0; a number above 0"):
        Hardware(**machine, fp32_tflops=0)


def test_estimates_round_as_the_method_does(made: Path) -> None:
    """Wanda removes as many weights of every row: of 24 where 49 % are asked for, 11 and not 11.76."""
    architecture = architecture_of(read_config(made / "base"))

    def kept(method: str) -> int:
        recipe = recipe_from(sparse_recipe(made, {"method": method, "sparsity": 0.49}))
        return sparse_counts_of(recipe, architecture).kept_weights

    shapes = [(60, 24), (30, 24), (30, 24), (24, 60), (36, 24), (36, 24), (24, 36)]
    assert kept("wanda") == 6 * sum(rows * (columns - columns * 49 // 100) for rows, columns in shapes)
    assert kept("sparsegpt") == 6 * sum(rows * columns - rows * columns * 49 // 100 for rows, columns in shapes)
    assert kept("wanda") > kept("sparsegpt")
