"""Recipes of releases: from a YAML file, from plain values, and their JSON Schema."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from loram_hub.pipeline.recipe import Recipe
from loram_hub.recipes import read_file, schema_of, section_from


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read the recipe of a release from a YAML file; raises as `loram_hub.recipes.read_file` does.

    Example:
        >>> from loram_hub.pipeline import read_recipe  # doctest: +SKIP
        >>> read_recipe("publish/llama-2-70b.yaml").align.settings.steps  # doctest: +SKIP
        1600
    """
    return read_file(Recipe, path)


def recipe_from(values: Mapping[str, Any], *, folder: str | os.PathLike[str] | None = None) -> Recipe:
    """Build the recipe of a release from plain values; raises as `loram_hub.recipes.section_from` does."""
    return section_from(Recipe, values, folder=folder)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a release's recipe, see `loram_hub.recipes.schema_of`."""
    return schema_of(Recipe, title="Recipe of a LoRAM release")
