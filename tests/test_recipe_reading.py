"""Recipes as people write them, mistakes included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from loram_hub.errors import InvalidRequestError
from loram_hub.pipeline import Recipe, read_recipe, recipe_from, recipe_schema
from loram_hub.recipes.fields import is_section, keys_of

LEAST: dict[str, Any] = {
    "base": "org/base",
    "repo_id": "org/release",
    "prune": {"pruning_ratio": 0.5, "importance": "random"},
}
TEXT = """\
base: org/base
repo_id: org/release
seed: 7
prune:
  pruning_ratio: 0.5
  importance: random
align:
  learning_rate: 1e-4
  steps: 200
"""


def written(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def with_changes(**changes: Any) -> dict[str, Any]:
    return LEAST | changes


def test_a_recipe_is_read_as_it_stands(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, TEXT))

    assert recipe.align is not None
    assert recipe.align.settings.learning_rate == 1e-4  # which YAML 1.1 takes for a text
    assert recipe.align.settings.steps == 200
    assert recipe.align_settings.seed == 7
    assert recipe.prune.structure.pruning_ratio == 0.5
    assert recipe.quantize is None
    assert recipe.name == "release"


def test_one_value_is_said_once_and_reaches_every_stage_that_needs_it() -> None:
    recipe = recipe_from(
        with_changes(
            seed=5,
            teach={"k": 8},
            align={"steps": 3, "warmup_steps": 0, "batch_size": 4, "sequence_length": 32, "distillation": 0.5},
        )
    )

    teaching = recipe.teaching_settings
    assert (teaching.k, teaching.sequences, teaching.sequence_length, teaching.seed) == (8, 12, 32, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align": {"step": 10}}, "'align.step' is no key of a recipe; did you mean 'align.steps'?"),
        ({"steps": 10}, "'steps' is no key of a recipe; did you mean 'align.steps'?"),
        ({"align": {"seed": 10}}, "'align.seed' is no key of a recipe; did you mean 'seed'?"),
        ({"teach": {"sequence_length": 9}}, "did you mean 'align.sequence_length'?"),
        ({"qantize": {}}, "did you mean 'quantize'?"),
        ({"zzz": 1}, "'zzz' is no key of a recipe. Here can stand: base, repo_id,"),
        ({"prune": {"pruning_ratio": "0.5"}}, "prune.pruning_ratio is '0.5' (text); a number is needed"),
        ({"prune": {"pruning_ratio": True}}, "prune.pruning_ratio is True (true or false); a number is needed"),
        ({"prune": {"pruning_ratio": 1.5, "importance": "random"}}, "prune: pruning_ratio is 1.5"),
        ({"prune": {"importance": "random"}}, "prune.pruning_ratio is missing. Share removed"),
        ({"prune": None}, "prune is empty"),
        ({"prune": 3}, "prune is 3 (a number); a section with keys is needed"),
        ({"prune": {"pruning_ratio": 0.5}}, "prune.calibration is missing: Taylor importance"),
        ({"refit": {}}, "prune.calibration is missing"),
        ({"align": {"steps": 10.0}}, "align.steps is 10.0 (a number); a whole number is needed"),
        ({"align": {"learning_rate": float("nan")}}, "align.learning_rate is nan"),
        ({"align": {"corpora": {"source": "x"}}}, "align.corpora is {'source': 'x'} (a section); a list is needed"),
        ({"align": {"corpora": []}}, "align: corpora is an empty list"),
        ({"align": {"corpora": [{"weight": 2}]}}, "align.corpora[0].source is missing"),
        (
            {"align": {"corpora": [{"source": "a/b", "weight": -1}]}},
            "align.corpora[0]: The corpus 'a/b' has the weight",
        ),
        ({"align": {"corpora": [{"source": "./none.jsonl"}]}}, "names './none.jsonl', which does not exist"),
        ({"align": {"precision": "fp16"}}, "align.precision is 'fp16' (text); choose one of auto, fp32, mixed, bf16"),
        ({"push": {"gated": True}}, "push.gated is True (true or false); choose one of auto, manual, false"),
        ({"push": {"tag": 1.0}}, 'push.tag is 1.0 (a number); a text is needed. Put it in quotes: "..."'),
        ({"align": {"distillation": 0.5}}, "there is no section teach; the one needs the other"),
        ({"teach": {}}, "align.distillation is 0, and there is a section teach"),
        ({"evaluate": {"data": "org/data", "limit": 0}}, "evaluate: limit is 0"),
        ({"hardware": {"gpu": "H100", "memory_gib": 80, "tflops": 0}}, "hardware: tflops is 0"),
        ({"repo_id": "release"}, "repo_id is 'release', which is no Hub id"),
        ({"repo_id": "org/a--b"}, "repo_id is 'org/a--b', which is no Hub id: Cannot have -- or .. in repo_id"),
        ({"repo_id": "org/a.git"}, "repo_id is 'org/a.git', which is no Hub id"),
        ({"prune": {"pruning_ratio": 0.5, "importance": "tayler"}}, "prune: Importance 'tayler' is unknown"),
        ({"base": "x" * 5000}, "which is neither a path nor a Hub id: File name too long."),
        ({"base": "~no-such-user/model"}, "base is '~no-such-user/model', which is neither a path nor a Hub id"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_no_recipe_can_say_is_an_error_with_its_place(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        recipe_from(with_changes(**changes))

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("steps", "step"), "line 9: 'align.step' is no key of a recipe; did you mean 'align.steps'?"),
        (TEXT.replace("200", "two"), "line 9: align.steps is 'two' (text)"),
        (TEXT + "push:\n", "line 10: push is empty. Write `push: {}` for the defaults, or leave the key out."),
        (TEXT + "quantize: null\n", "line 10: quantize is empty. Write `quantize: {}`"),
        (TEXT + "evaluate:\n", "line 10: evaluate is empty. Say data below it, or leave the key out."),
        (TEXT + "seed: 8\n", "line 10: 'seed' was given before"),
        (TEXT + "name: &a x\n", "line 10: anchors and aliases are not used"),
        ("a: &a [1]\nb: *a\n", "line 1: anchors and aliases are not used"),
        (TEXT + "name: !!python/object/apply:os.system [ls]\n", "line 10: the tag"),
        (TEXT + "revision: !!str 5\n", "line 10: the tag"),
        ("[" * 200 + "]" * 200, "line 1: more than 12 levels"),
        ("- base\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("base: [\n", "this is no valid YAML"),
        ("base: 'x\n", "this is no valid YAML"),
        ("? [a]\n: b\n", "line 1: a key must be a plain word"),
        ("--- \nbase: x\n---\nbase: y\n", "this is no valid YAML"),
        ("base: \x00\n", "this is no valid YAML"),
        ("<<: {base: x}\n", "'<<' is no key of a recipe"),
        ("#" * 300_000, "is larger than 256 KiB"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)

    with pytest.raises(InvalidRequestError) as caught:
        read_recipe(path)

    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_text_or_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"base: \xff\xfe")

    with pytest.raises(InvalidRequestError, match="not UTF-8"):
        read_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(InvalidRequestError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(InvalidRequestError, match="cannot be read: Is a directory"):
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    ("written_as", "value"),
    [("010", 10), ("1e-4", 1e-4), (".5", 0.5), ("0x10", "0x10"), ("1_000", "1_000"), ("1:30", "1:30"), ("off", "off")],
)
def test_numbers_are_what_they_look_like(tmp_path: Path, written_as: str, value: object) -> None:
    text = TEXT.replace("seed: 7\n", "").replace("learning_rate: 1e-4\n", f"learning_rate: {written_as}\n")

    if isinstance(value, float):
        recipe = read_recipe(written(tmp_path, text))
        assert recipe.align is not None
        assert recipe.align.settings.learning_rate == value
    else:
        with pytest.raises(InvalidRequestError, match="learning_rate"):  # 10 is too high, the others are no numbers
            read_recipe(written(tmp_path, text))


def test_paths_are_relative_to_the_recipe_and_hub_ids_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("{}")
    text = TEXT + "  corpora:\n    - source: texts.jsonl\n    - source: org/dataset\n      config: small\n"

    recipe = read_recipe(written(tmp_path, text))

    assert recipe.align is not None
    assert [corpus.source for corpus in recipe.align.corpora] == [str(tmp_path / "texts.jsonl"), "org/dataset"]
    assert recipe.base == "org/base"


def accepted(schema: Mapping[str, Any], value: object) -> bool:
    """Whether a value meets a schema, for the few words that the schema uses."""
    known = {"$schema", "title", "type", "additionalProperties", "properties", "required", "description", "default"}
    assert set(schema) <= known | {"enum", "anyOf", "items"}, set(schema)
    if "anyOf" in schema:
        return any(accepted(one, value) for one in schema["anyOf"])
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    kinds: dict[str, tuple[type, ...]] = {
        "string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float), "null": (type(None),),
        "object": (dict,), "array": (list,),
    }  # fmt: skip
    wanted = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(isinstance(value, kinds[one]) and (one == "boolean") == isinstance(value, bool) for one in wanted):
        return False
    if isinstance(value, dict):
        properties = schema["properties"]
        return set(schema.get("required", ())) <= set(value) <= set(properties) and all(
            accepted(properties[name], item) for name, item in value.items()
        )
    return all(accepted(schema["items"], item) for item in value) if isinstance(value, list) else True


RECIPES = sorted((Path(__file__).parents[1] / "publish").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_meets_the_schema(path: Path) -> None:
    values = yaml.safe_load(path.read_text())

    assert accepted(recipe_schema(), values)
    assert not accepted(recipe_schema(), values | {"nothing": 1})
    assert not accepted(recipe_schema(), values | {"prune": {"pruning_ratio": "0.5"}})


def test_the_schema_is_json_and_explains_every_key() -> None:
    schema = json.loads(json.dumps(recipe_schema()))

    def check(section: type, described: Mapping[str, Any]) -> int:
        count = 0
        for name, key in keys_of(section).items():
            entry = described["properties"][name]
            assert entry.get("description"), f"{section.__name__}.{name}"
            if is_section(key.kind):
                count += check(key.kind, entry)
            count += 1
        return count

    assert check(Recipe, schema) > 60
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["properties"]["align"]["properties"]["steps"]["default"] == 1600
