"""Recipes from YAML, strictly: an unknown key, or a value of another type, is an error that names its place."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin

from loram_hub.errors import InvalidRequestError, LoramError
from loram_hub.recipes.fields import Key, element_of, flat_fields, is_section, keys_of, without_none
from loram_hub.recipes.yaml_text import MAX_BYTES, parse_yaml

_T = TypeVar("_T")
_ELSEWHERE = 0.75  # how alike a key of another section must be to have been meant; difflib's own is 0.6
_WANTED: Mapping[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def read_file(section: type[_T], path: str | os.PathLike[str]) -> _T:
    """Read a recipe from a YAML file; files that it names are looked for beside it.

    Args:
        section: the dataclass of the recipe.
        path: the file.

    Returns:
        The recipe, its paths absolute.

    Raises:
        InvalidRequestError: there is no such file, it is no YAML, or it says what no recipe can; the message names
            file, line and key.
        MissingDependencyError: PyYAML is not installed.
    """
    values, place = _read_file(Path(path).expanduser())
    return _read(section, values, place)


def read_profile(section: type[_T], path: str | os.PathLike[str], profile: str | None) -> _T:
    """Read a recipe whose file may hold `profiles`: named sets of keys that outweigh the others.

    Args:
        section: the dataclass of the recipe; it has no key `profiles`.
        path: the file.
        profile: the set to take; None for none. Its sections are merged into those of the file, key by key; lists and
            plain values replace what is there.

    Raises:
        InvalidRequestError: see `read_file`; or there is no such profile.
    """
    values, place = _read_file(Path(path).expanduser())
    profiles = values.pop("profiles", None) or {}
    if not isinstance(profiles, Mapping) or not all(isinstance(keys, Mapping) for keys in profiles.values()):
        place.refuse("profiles", f"profiles is {_shown(profiles)}; a section with a section for each name is needed.")
    if profile is None:
        return _read(section, values, place)
    if profile not in profiles:
        known = ", ".join(map(str, profiles)) or "none"
        raise InvalidRequestError(f"{place.source} has no profile {profile!r:.80}; it has: {known}.")
    prefix = f"profiles.{profile}."
    moved = {key.removeprefix(prefix): line for key, line in place.lines.items() if key.startswith(prefix)}
    return _read(section, _merged(values, profiles[profile]), replace(place, lines={**place.lines, **moved}))


def _merged(values: Mapping[str, Any], outweighing: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for key, value in outweighing.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def section_from(section: type[_T], values: Mapping[str, Any], *, folder: str | os.PathLike[str] | None = None) -> _T:
    """Build a recipe from plain values, as JSON or YAML give them.

    Args:
        section: the dataclass of the recipe.
        values: sections and keys as in a recipe file.
        folder: where relative paths start; None for the current folder.

    Returns:
        The recipe.

    Raises:
        InvalidRequestError: see `read_file`.
    """
    return _read(section, values, _Place(source="The recipe", folder=Path(folder or ".").absolute(), lines={}))


def read_section(section: type[_T], path: Path | None, given: Mapping[str, Any]) -> _T:
    """Read one section from a file of its own.

    Args:
        section: its dataclass.
        path: the file; None for none.
        given: values that outweigh the file's.

    Raises:
        InvalidRequestError: see `read_file`.
    """
    if path is None:
        return _read(section, given, _Place(source="The command line", folder=Path.cwd(), lines={}))
    values, place = _read_file(path.expanduser())
    return _read(section, {**values, **given}, place)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where values come from, for errors and for relative paths."""

    source: str
    folder: Path
    lines: Mapping[str, int]
    known: dict[str, str] = field(default_factory=dict)
    """Every path of a recipe by its last key, to find the section that a key was meant for."""

    def refuse(self, path: str, problem: str) -> NoReturn:
        line = self.lines.get(path)
        where = self.source if line is None else f"{self.source}, line {line}"
        raise InvalidRequestError(f"{where}: {problem}")


def _read_file(file: Path) -> tuple[dict[str, Any], _Place]:
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_BYTES + 1).decode("utf-8-sig")
    except OSError as err:
        raise InvalidRequestError(f"The file {file} cannot be read: {err.strerror}.") from err
    except UnicodeDecodeError as err:
        raise InvalidRequestError(f"The file {file} is not UTF-8 text: {err}.") from err
    values, lines = parse_yaml(text, source=str(file))
    return values, _Place(source=str(file), folder=file.absolute().parent, lines=lines)


def _read(section: type[_T], values: Mapping[str, Any], place: _Place) -> _T:
    place.known.update(_paths(section, ""))
    return _section(section, values, "", place)


def _paths(section: type, prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, key in keys_of(section).items():
        found.setdefault(name, prefix + name)
        if is_section(key.kind):
            found = _paths(key.kind, f"{prefix}{name}.") | found
    return found


def _section(section: type[_T], values: object, path: str, place: _Place) -> _T:
    if not isinstance(values, Mapping):
        place.refuse(path, f"{path or 'a recipe'} is {_shown(values)}; a section with keys is needed.")
    keys = keys_of(section)
    for name in values:
        if name not in keys:
            _refuse_key(str(name), path, keys, place)
    missing = [name for name, key in keys.items() if key.required and name not in values]
    if missing:
        place.refuse(path, f"{_joined(path, missing[0])} is missing. {keys[missing[0]].text}")
    read = {name: _key_value(keys[name], value, _joined(path, name), place) for name, value in values.items()}
    try:
        return _build(section, read)
    except LoramError as err:
        place.refuse(path, f"{path}: {err}" if path else str(err))


def _build(section: type[_T], read: dict[str, Any]) -> _T:
    """Construct a section, and first the parts of it whose keys stand beside its own."""
    for name, part, beside in flat_fields(section):
        inner = {key: read.pop(key) for key in beside if key in read}
        read[name] = part(**inner)
    return section(**read)


def _key_value(key: Key, value: object, path: str, place: _Place) -> Any:  # noqa: ANN401 (of the key's type)
    if value is None:
        if not key.optional:
            place.refuse(path, f"{path} is empty. {key.text}")
        if is_section(key.kind) and path in place.lines:
            _refuse_empty(key, path, place)
        return None
    read = _value(key.kind, value, path, place)
    if key.path_in is None:
        return read
    if not key.path_in:
        return _resolved(read, path, place)
    return tuple(
        replace(item, **{key.path_in: _resolved(getattr(item, key.path_in), f"{path}[{idx}].{key.path_in}", place)})
        for idx, item in enumerate(read)
    )


def _refuse_empty(key: Key, path: str, place: _Place) -> NoReturn:
    """Refuse a section's name with nothing below it: it looks like the defaults, and would leave the stage out."""
    required = [name for name, inner in keys_of(key.kind).items() if inner.required]
    wanted = f"Say {' and '.join(required)} below it" if required else f"Write `{path}: {{}}` for the defaults"
    place.refuse(path, f"{path} is empty. {wanted}, or leave the key out.")


def _value(kind: Any, value: object, path: str, place: _Place) -> Any:  # noqa: ANN401 (of that type)
    if is_section(kind):
        return _section(kind, value, path, place)
    inner = element_of(kind)
    if inner is not None:
        if not isinstance(value, list | tuple):
            place.refuse(path, f"{path} is {_shown(value)}; a list is needed.")
        return tuple(_item(inner, item, f"{path}[{idx}]", place) for idx, item in enumerate(value))
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            place.refuse(path, f"{path} is {_shown(value)}; choose one of {', '.join(map(_plain, choices))}.")
        return value
    return _plain_value(kind, value, path, place)


def _item(kind: Any, value: object, path: str, place: _Place) -> Any:  # noqa: ANN401 (of that type)
    kind, optional = without_none(kind)
    return None if value is None and optional else _value(kind, value, path, place)


def _plain_value(kind: type, value: object, path: str, place: _Place) -> Any:  # noqa: ANN401 (of that type)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        hint = ' Put it in quotes: "..."' if kind is str and isinstance(value, int | float) else ""
        place.refuse(path, f"{path} is {_shown(value)}; {_WANTED[kind]} is needed.{hint}")
    return float(cast(float, value)) if kind is float else value


def _resolved(name: str, path: str, place: _Place) -> str:
    """Return an absolute path where a text names a file beside the recipe; a Hub id stays what it is."""
    try:
        given = Path(name).expanduser()
        found = place.folder / given
        is_there = found.exists()
    except (OSError, RuntimeError, ValueError) as err:
        why = getattr(err, "strerror", None) or err  # without the path, which may be long
        place.refuse(path, f"{path} is {name!r:.80}, which is neither a path nor a Hub id: {why}.")
    if is_there:
        return os.path.normpath(found)
    if given.is_absolute() or name.startswith(("./", "../", "~")):
        place.refuse(path, f"{path} names {name!r}, which does not exist (looked for in {place.folder}).")
    return name


def _refuse_key(name: str, path: str, keys: Mapping[str, Key], place: _Place) -> NoReturn:
    full = _joined(path, name)
    near = get_close_matches(name, keys, n=1)
    meant = _joined(path, near[0]) if near else place.known.get(name)
    if meant is None and (close := get_close_matches(name, place.known, n=1, cutoff=_ELSEWHERE)):
        meant = place.known[close[0]]
    if meant is None:
        place.refuse(full, f"{full!r:.200} is no key of a recipe. Here can stand: {', '.join(keys)}.")
    place.refuse(full, f"{full!r:.200} is no key of a recipe; did you mean {meant!r}?")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(value: object) -> str:
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a section"}
    return f"{value!r:.80} ({kinds.get(type(value), type(value).__name__)})"


def _plain(choice: object) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)
