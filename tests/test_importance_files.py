"""Scores in a file: what was scored, good for any other ratio, and closed to what is damaged or of another base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import save_base, tiny_config
from click.testing import CliRunner
from pipeline_materials import content_of, save_texts, save_tiny_base, tiny_recipe
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from loram_hub.architecture import architecture_of
from loram_hub.checkpoint import Checkpoint
from loram_hub.cli import main
from loram_hub.errors import CheckpointError, IncompatibleError, InvalidRequestError, LoramError, VerificationError
from loram_hub.importance import StoredScores, importance_scores, parse_importance, read_scores, write_scores
from loram_hub.pipeline import publish, recipe_from
from loram_hub.pruning import check_prune, prune
from loram_hub.release import open_release

IDS = torch.randint(3, 53, (4, 24), generator=torch.Generator().manual_seed(1))
LAYERS: dict[str, Any] = {"keep_first": 1, "keep_last": 1}
STORED = StoredScores(
    scores={
        layer: {"kv_heads": np.arange(3, dtype=np.float32) + layer, "channels": np.ones(37, dtype=np.float32)}
        for layer in (2, 1)
    },
    importance="taylor:param_first",
    seed=7,
    base_id="org/base",
    base_commit="0123456789abcdef0123456789abcdef01234567",
    base_config_sha256="a" * 64,
    calibration={"samples": 4, "tokens": 24, "sha256": "b" * 64},
)
KV_HEADS, CHANNELS = "model.layers.1.self_attn.kv_heads", "model.layers.1.mlp.channels"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("importance") / "base", tiny_config())


@pytest.fixture(scope="module")
def scored(base: Path) -> Path:
    """The file that pruning by 0.6 leaves behind."""
    file = base.parent / "scores.safetensors"
    prune(base, base.parent / "release", pruning_ratio=0.6, calibration=IDS, importance_out=file, **LAYERS)
    return file


def test_the_file_holds_the_scores_and_where_they_come_from(base: Path, scored: Path) -> None:
    found = read_scores(scored)

    architecture = architecture_of(tiny_config())
    with Checkpoint(base) as checkpoint:
        expected = importance_scores(
            checkpoint, architecture, (1, 2), importance=parse_importance("taylor"), calibration=IDS
        )
    assert list(found.scores) == [1, 2]
    for layer in (1, 2):
        for space, values in expected[layer].items():
            np.testing.assert_allclose(found.scores[layer][space], values, rtol=1e-5)
            assert found.scores[layer][space].dtype == np.float32
    assert (found.importance, found.seed, found.base_id, found.base_commit) == ("taylor:param_first", 0, "base", None)
    assert found.base_config_sha256 == hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    ids = hashlib.sha256(IDS.numpy().astype("<i8").tobytes()).hexdigest()
    assert found.calibration == {"samples": 4, "tokens": 24, "sha256": ids}


def test_what_the_release_keeps_has_the_highest_scores_in_the_file(base: Path, scored: Path) -> None:
    found, plan = read_scores(scored), open_release(base.parent / "release").plan

    for layer, spaces in plan.kept.items():
        for space, kept in spaces.items():
            values = found.scores[layer][space]
            dropped = np.setdiff1d(np.arange(values.size), kept)
            assert dropped.size
            assert values[kept].min() >= values[dropped].max()


@pytest.mark.parametrize(
    ("importance", "options"),
    [("taylor:vectorize", {"calibration": IDS}), ("random", {"seed": 5}), ("magnitude:l1", {})],
    ids=["taylor", "random", "magnitude"],
)
def test_another_ratio_from_the_file_is_the_release_that_scoring_anew_gives(
    base: Path, tmp_path: Path, importance: str, options: dict[str, Any]
) -> None:
    file = tmp_path / "scores.safetensors"
    prune(base, tmp_path / "first", pruning_ratio=0.7, importance=importance, importance_out=file, **LAYERS, **options)

    prune(base, tmp_path / "anew", pruning_ratio=0.4, importance=importance, **LAYERS, **options)
    prune(base, tmp_path / "reused", pruning_ratio=0.4, importance=f"file:{file}", **LAYERS)

    assert content_of(tmp_path / "reused") == content_of(tmp_path / "anew")
    assert content_of(tmp_path / "reused") != content_of(tmp_path / "first")


def test_equal_scores_give_equal_bytes(tmp_path: Path) -> None:
    write_scores(tmp_path / "one", STORED)
    write_scores(tmp_path / "two", replace(STORED, scores=dict(sorted(STORED.scores.items()))))

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_scores_come_back_as_they_were_written(tmp_path: Path) -> None:
    write_scores(tmp_path / "new folder" / "scores", STORED)

    found = read_scores(tmp_path / "new folder" / "scores")

    for name in ("importance", "seed", "base_id", "base_commit", "base_config_sha256", "calibration"):
        assert getattr(found, name) == getattr(STORED, name)
    assert list(found.scores) == [1, 2]
    for layer, spaces in found.scores.items():
        for space, values in spaces.items():
            np.testing.assert_array_equal(values, STORED.scores[layer][space])


Header = dict[str, Any]


def rewritten(file: Path, change: Callable[[dict[str, Any], Header], None]) -> Path:
    """Change tensors and header, and put in the hash that then belongs there, as a forger would."""
    with safe_open(file, framework="np") as opened:
        header = json.loads(opened.metadata()["loram_importance"])
    tensors = dict(load_file(file))
    del header["sha256"]
    change(tensors, header)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].shape};".encode() + tensors[name].tobytes())
    header = {"sha256": digest.hexdigest(), **header}
    save_file(tensors, file, metadata={"loram_importance": json.dumps(header)})
    return file


def replaced(name: str, values: Any) -> Callable[[dict[str, Any], Header], None]:
    def change(tensors: dict[str, Any], _: Header) -> None:
        tensors[name] = values

    return change


def headed(**fields: Any) -> Callable[[dict[str, Any], Header], None]:
    return lambda _, header: header.update(fields)


def test_a_forged_file_is_as_good_as_its_content(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores", STORED)

    assert read_scores(rewritten(tmp_path / "scores", headed(seed=8))).seed == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(KV_HEADS, np.array([1, np.nan, 2], dtype=np.float32)), "NaN or infinite"),
        (replaced(CHANNELS, np.full(37, np.inf, dtype=np.float32)), "NaN or infinite"),
        (replaced(CHANNELS, np.ones(37, dtype=np.float64)), "no list of scores"),
        (replaced(CHANNELS, np.ones((37, 1), dtype=np.float32)), "no list of scores"),
        (replaced(CHANNELS, np.ones(0, dtype=np.float32)), "no list of scores"),
        (replaced("model.layers.01.mlp.channels", np.ones(37, dtype=np.float32)), "no list of scores"),
        (replaced("model.layers.3.mlp.channels", np.ones(37, dtype=np.float32)), "layer 3 for ..channels.. alone"),
        (lambda tensors, _: tensors.clear(), "of no layer"),
        (headed(importance="taylor"), "no loram-hub writes"),
        (headed(importance="file:other"), "no loram-hub writes"),
        (headed(seed=-1), "no loram-hub writes"),
        (headed(seed=True), "no loram-hub writes"),
        (headed(base=None), "no loram-hub writes"),
        (headed(base={"id": "a\nb", "commit": None, "config_sha256": "a" * 64}), "no loram-hub writes"),
        (headed(base={"id": "a", "commit": "main", "config_sha256": "a" * 64}), "no loram-hub writes"),
        (headed(calibration={"samples": 4, "tokens": 24, "sha256": "b" * 64, "dataset": "x"}), "no loram-hub writes"),
        (headed(calibration={"samples": 0, "tokens": 24, "sha256": "b" * 64}), "no loram-hub writes"),
        (headed(more=1), "no loram-hub writes"),
    ],
    ids=[
        "nan", "infinity", "float64", "two axes", "empty", "leading zero", "half a layer", "no layer", "short method",
        "method file", "negative seed", "seed true", "no base", "id of two lines", "commit a branch", "dataset",
        "no samples", "unknown field",
    ],
)  # fmt: skip
def test_what_is_no_file_of_scores_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any], Header], None], message: str
) -> None:
    write_scores(tmp_path / "scores", STORED)

    with pytest.raises(VerificationError, match=message):
        read_scores(rewritten(tmp_path / "scores", change))


def test_a_newer_format_is_refused_with_advice(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores", STORED)

    with pytest.raises(IncompatibleError, match="Upgrade loram-hub"):
        read_scores(rewritten(tmp_path / "scores", headed(format=2)))


def test_a_flipped_bit_anywhere_in_the_scores_is_found(tmp_path: Path) -> None:
    file = tmp_path / "scores"
    write_scores(file, STORED)
    whole = file.read_bytes()

    for position in range(len(whole) - 4 * 2 * (3 + 37), len(whole), 29):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(VerificationError):
            read_scores(file)
    file.write_bytes(whole[:-1])
    with pytest.raises(VerificationError, match="not a sound safetensors file"):
        read_scores(file)


def test_other_files_are_no_scores(base: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="holds no importance scores"):
        read_scores(base / "model.safetensors")
    with pytest.raises(CheckpointError, match="no file"):
        read_scores(tmp_path / "nothing")


def test_scores_of_another_base_are_refused(base: Path, scored: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", tiny_config(rms_norm_eps=1e-4))

    with pytest.raises(IncompatibleError, match="Give the base that was scored"):
        prune(other, tmp_path / "out", importance=f"file:{scored}", pruning_ratio=0.4, **LAYERS)
    with pytest.raises(IncompatibleError, match="at commit 0123"):
        STORED.check_base(commit="f" * 40, config_sha256="a" * 64, source="scores")
    STORED.check_base(commit=None, config_sha256="a" * 64, source="scores")
    assert not (tmp_path / "out").exists()


def test_layers_without_scores_cannot_be_pruned(base: Path, scored: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="layer 0 is to be pruned too"):
        check_prune(base, tmp_path, importance=f"file:{scored}", pruning_ratio=0.4, keep_first=0, keep_last=2)

    counts = check_prune(base, tmp_path, importance=f"file:{scored}", pruning_ratio=0.4, keep_first=2, keep_last=1)
    assert [layer.channels for layer in counts.kept] == [37, 37, 22, 37]


def test_scores_from_a_file_want_no_calibration(base: Path, scored: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no calibration is needed"):
        check_prune(base, tmp_path, importance=f"file:{scored}", calibration=IDS, pruning_ratio=0.4, **LAYERS)


def test_scores_are_written_only_where_nothing_is_lost(base: Path, scored: Path, tmp_path: Path) -> None:
    def check(file: Path, **options: Any) -> None:
        check_prune(
            base, tmp_path / "out", importance="random", pruning_ratio=0.4, importance_out=file, **LAYERS, **options
        )

    (tmp_path / "text").write_text("")
    before = content_of(tmp_path)
    for file, message in (
        (scored, "already exists"),
        (tmp_path, "is a folder"),
        (tmp_path / "out" / "scores", "overlap"),
        (base / "scores", "overlap"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            check(file)
    with pytest.raises(LoramError, match="cannot be created"):
        check(tmp_path / "text" / "scores")
    check(scored, overwrite=True)
    check(tmp_path / "new" / "scores")
    assert content_of(tmp_path) == before


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base and texts to publish from."""
    save_tiny_base(tmp_path / "base")
    save_texts(tmp_path / "texts.jsonl")
    return tmp_path


def test_publishing_leaves_the_scores_of_its_plan_in_the_work_folder(place: Path) -> None:
    file = place / "work" / "importance.safetensors"

    def run(**changes: Any) -> list[str]:
        recipe = tiny_recipe(place)
        recipe["prune"] = {**recipe["prune"], **changes}
        done = publish(recipe_from(recipe), work_dir=place / "work", until="prune")
        return [stage.name for stage in done.stages if stage.made]

    assert run() == ["prune"]
    first = file.read_bytes()
    found, manifest = read_scores(file), open_release(place / "work" / "pruned").manifest
    assert (found.importance, found.calibration) == (manifest.pruning.importance, manifest.pruning.calibration)
    assert found.base_config_sha256 == manifest.base.config_sha256
    assert "importance.safetensors" not in manifest.files

    assert run() == []
    file.unlink()  # as in a work folder of an older version
    assert run() == []
    assert not file.exists()
    assert run(pruning_ratio=0.6) == ["prune"]
    assert file.read_bytes() == first  # of other groups, the same scores
    assert run(pruning_ratio=0.6, importance="magnitude") == ["prune"]
    assert read_scores(file).importance == "magnitude:l2"


def test_scores_of_an_earlier_plan_do_not_stay_beside_a_sparse_release(place: Path) -> None:
    recipe = tiny_recipe(place, prune={"method": "magnitude", "sparsity": 0.5})
    (place / "work").mkdir()
    write_scores(place / "work" / "importance.safetensors", STORED)

    publish(recipe_from(recipe), work_dir=place / "work", until="prune")

    assert open_release(place / "work" / "pruned").is_sparse
    assert not (place / "work" / "importance.safetensors").exists()


def test_a_recipe_names_a_method_and_no_file(place: Path) -> None:
    recipe = tiny_recipe(place)
    recipe["prune"] = {"pruning_ratio": 0.4, "keep_first": 1, "keep_last": 1, "importance": "file:scores.safetensors"}

    with pytest.raises(InvalidRequestError, match="is unknown; choose one of random"):
        recipe_from(recipe)


def test_the_command_keeps_scores_and_takes_them_for_another_ratio(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    scores = tmp_path / "scores.safetensors"
    common = ["--keep-first", "1", "--keep-last", "1", "--importance"]
    loram = CliRunner()
    first = ["prune", str(base), str(tmp_path / "a"), *common, "random", "--importance-out", str(scores)]
    assert loram.invoke(main, first).exit_code == 0
    for name, importance in (("b", f"file:{scores}"), ("c", "random")):
        arguments = ["prune", str(base), str(tmp_path / name), *common, importance, "--pruning-ratio", "0.5"]
        assert loram.invoke(main, arguments).exit_code == 0
    assert content_of(tmp_path / "b") == content_of(tmp_path / "c")
    sparse = ["prune", str(base), str(tmp_path / "d"), "--method", "magnitude", "--pattern", "4:8"]
    refused = loram.invoke(main, [*sparse, "--importance-out", str(tmp_path / "e.safetensors")])
    assert refused.exit_code == 2
    assert "--importance-out" in refused.output
