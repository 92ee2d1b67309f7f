"""YAML as recipes use it: mappings, lists, and plain values; every line can be named in an error.

PyYAML reads YAML 1.1, in which `1e-4` is a text, `off` is false, `1:30` is 90 and `010` is 8. Recipes are read by the
core schema of YAML 1.2, where numbers are what they look like. Left out altogether is what a recipe has no use for and
an attacker has: tags, aliases (a few lines can grow to gigabytes), deep nesting, large files, keys that come twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from loram_hub.errors import InvalidRequestError, MissingDependencyError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 12
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NAMED: Mapping[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def parse_yaml(text: str, *, source: str) -> tuple[dict[str, Any], Mapping[str, int]]:
    """Read a YAML mapping.

    Args:
        text: of the file.
        source: names the file in errors.

    Returns:
        The mapping, and the line (from 1) of each key by its path (`align.steps`, `align.corpora[0].source`).

    Raises:
        InvalidRequestError: it is no YAML, no mapping, or uses what recipes do not have.
        MissingDependencyError: PyYAML is not installed.
    """
    try:
        import yaml  # type: ignore[import-untyped]  # ships no types
    except ImportError as err:
        raise MissingDependencyError("Reading recipes needs PyYAML: pip install pyyaml") from err
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise InvalidRequestError(f"{source} is larger than {MAX_BYTES // 1024} KiB. Is it a recipe?")
    try:
        _check_events(text, source)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        where = source if mark is None else f"{source}, line {mark.line + 1}"
        raise InvalidRequestError(f"{where}: this is no valid YAML: {getattr(err, 'problem', None) or err}.") from err
    if not isinstance(root, yaml.MappingNode):
        raise InvalidRequestError(f"{source} must hold a mapping of keys to values.")
    lines: dict[str, int] = {}
    values = _value(root, "", lines, source)
    assert isinstance(values, dict)
    return values, lines


def _check_events(text: str, source: str) -> None:
    """Refuse aliases, tags and depth before anything is built of them."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        place = f"{source}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise InvalidRequestError(f"{place}: anchors and aliases are not used in recipes. Write the value out.")
        if getattr(event, "tag", None) is not None:
            raise InvalidRequestError(f"{place}: the tag {event.tag!r:.100} is not used in recipes. Leave it out.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise InvalidRequestError(f"{place}: more than {MAX_DEPTH} levels of nesting. Is it a recipe?")


def _value(node: Any, path: str, lines: dict[str, int], source: str) -> Any:  # noqa: ANN401 (PyYAML ships no types)
    import yaml

    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else _refuse_key(source, line)
            inner = f"{path}.{key}" if path else key
            if key in values:
                raise InvalidRequestError(f"{source}, line {line}: {inner!r:.200} was given before. Keep one of them.")
            lines[inner] = line
            values[key] = _value(value_node, inner, lines, source)
        return values
    if isinstance(node, yaml.SequenceNode):
        for idx, item in enumerate(node.value):
            lines[f"{path}[{idx}]"] = item.start_mark.line + 1
        return [_value(item, f"{path}[{idx}]", lines, source) for idx, item in enumerate(node.value)]
    return _scalar(node.value) if node.style is None else node.value


def _refuse_key(source: str, line: int) -> NoReturn:
    raise InvalidRequestError(f"{source}, line {line}: a key must be a plain word.")


def _scalar(text: str) -> Any:  # noqa: ANN401 (null, a number, true, false or text)
    if text in _NAMED:
        return _NAMED[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
