"""JSON Schema of recipes, for editors: generated from the dataclasses, so it cannot say anything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, get_args, get_origin

from loram_hub.recipes.fields import Key, element_of, is_section, keys_of

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TYPES: Mapping[type, str] = {str: "string", bool: "boolean", int: "integer", float: "number"}


def schema_of(section: type, *, title: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe.

    An editor that knows it completes keys and shows what they mean. Ranges, and what one section asks of another, are
    checked by the dataclasses alone.

    Args:
        section: the dataclass of the recipe.
        title: names it.
    """
    return {"$schema": DIALECT, "title": title, **_section(section)}


def _section(section: type) -> dict[str, Any]:
    keys = keys_of(section)
    schema: dict[str, Any] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _property(key) for name, key in keys.items()},
    }
    required = [name for name, key in keys.items() if key.required]
    return schema | ({"required": required} if required else {})


def _property(key: Key) -> dict[str, Any]:
    schema = _kind(key.kind)
    if key.optional:
        if isinstance(schema.get("type"), str) and "enum" not in schema:
            schema["type"] = [schema["type"], "null"]
        else:
            schema = {"anyOf": [schema, {"type": "null"}]}
    if key.text:
        schema["description"] = key.text
    if not key.required and key.default is not None:
        schema["default"] = _plain(key.default)
    return schema


def _kind(kind: Any) -> dict[str, Any]:  # noqa: ANN401 (a type)
    if is_section(kind):
        return _section(kind)
    inner = element_of(kind)
    if inner is not None:
        return {"type": "array", "items": _kind(inner)}
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    return {"type": _TYPES[kind]}


def _plain(value: Any) -> Any:  # noqa: ANN401 (a default)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return asdict(value) if is_section(type(value)) else value
