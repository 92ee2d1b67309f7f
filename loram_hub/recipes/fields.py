"""What a recipe may say: the keys of its sections, read off the dataclasses that hold them.

A section shows the fields of its dataclass. A field that is marked `flat` is itself a dataclass whose fields stand
beside the others, so that settings that a step already has need not be repeated for the recipe.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

FLAT = "flat"
"""Mark of a field whose own fields stand beside the others; its value lists those that a recipe has elsewhere."""
PATH = "path"
"""Mark of a text that may name a file, relative to the recipe; of a list of sections, its value is the key that may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key of a section."""

    name: str
    kind: Any
    """Its type, without None."""
    optional: bool
    """Whether null is allowed."""
    required: bool
    default: Any
    """Value where it is not given; None where there is none."""
    text: str
    """What it means, in one or two sentences."""
    path_in: str | None
    """Whether the text may name a file (an empty text), or the key of its sections that may; else None."""


def keys_of(section: type) -> dict[str, Key]:
    """Return the keys of a section by name, in their order."""
    return {key.name: key for key in _keys_of(section)}


@cache
def _keys_of(section: type) -> tuple[Key, ...]:
    hints, texts = get_type_hints(section), field_texts(section)
    found: list[Key] = []
    for field in fields(section):
        if FLAT in field.metadata:
            elsewhere = field.metadata[FLAT]
            found += [key for key in _keys_of(hints[field.name]) if key.name not in elsewhere]
        else:
            found.append(_key(field, hints[field.name], texts.get(field.name, "")))
    return tuple(found)


def flat_fields(section: type) -> Iterator[tuple[str, type, frozenset[str]]]:
    """Yield the fields of a section that are marked `flat`: name, dataclass, and which of its keys stand beside."""
    hints = get_type_hints(section)
    for field in fields(section):
        if FLAT in field.metadata:
            inner = hints[field.name]
            yield field.name, inner, frozenset(keys_of(inner)) - frozenset(field.metadata[FLAT])


def _key(field: Field[Any], hint: Any, text: str) -> Key:  # noqa: ANN401 (a type)
    kind, optional = without_none(hint)
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return Key(
        name=field.name,
        kind=kind,
        optional=optional,
        required=default is MISSING,
        default=None if default is MISSING else default,
        text=text,
        path_in=field.metadata.get(PATH),
    )


def without_none(hint: Any) -> tuple[Any, bool]:  # noqa: ANN401 (a type)
    """Split `X | None` into X and True; any other type is returned with False."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    rest = [part for part in get_args(hint) if part is not NoneType]
    assert len(rest) == 1, f"a recipe has no union of several types: {hint}"
    return rest[0], True


def element_of(kind: Any) -> Any:  # noqa: ANN401 (a type)
    """Return X of `tuple[X, ...]`; None for any other type."""
    return get_args(kind)[0] if get_origin(kind) is tuple else None


def is_section(kind: Any) -> bool:  # noqa: ANN401 (a type)
    """Whether a type is a dataclass: a section of a recipe."""
    return isinstance(kind, type) and is_dataclass(kind)


@cache
def field_texts(section: type) -> Mapping[str, str]:
    """Return the docstring below each field of a dataclass, as one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(section)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    texts = {}
    for statement, below in pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            texts[statement.target.id] = " ".join(below.value.value.split())
    return texts
