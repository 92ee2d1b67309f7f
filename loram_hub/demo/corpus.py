"""Real text that every Python installation brings along, for `loram demo` and tests: no download, no committed text.

Tasks: a signature of the standard library, to be answered with the first sentence of its docstring. They are split by
top-level module, so that the held-out tasks come from modules that training never saw. General text: Python's own help
topics and long docstrings, without those of held-out modules.

Source files are parsed, never imported: some modules of the standard library open windows or browsers when imported.
The corpus is a pure function of the Python version.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from loram_hub.errors import ResourceError
from loram_hub.texts import Example

_TESTS_AND_TOOLS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "distutils", "ensurepip"}
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "pydoc_data"}
_SUMMARY_CHARACTERS = range(20, 161)
_SIGNATURE_CHARACTERS = range(161)
_LONG_DOCSTRING = 400
"""Characters from which a docstring counts as general text."""
_HELD_OUT_PERCENT = 20
_END_OF_SENTENCE = re.compile(r"(?<=[a-z\])'\"`*])\.(?=\s)")

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class _Docstring:
    module: str
    signature: str
    """Empty for the docstring of a module."""
    text: str

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.sha256(self.module.partition(".")[0].encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < _HELD_OUT_PERCENT


def stdlib_examples() -> tuple[list[Example], list[Example]]:
    """Build tasks from the standard library: a public signature, to be answered with what it does.

    Returns:
        Training and held-out tasks, each completion once, and none in both. Several thousand and several hundred.

    Raises:
        ResourceError: this Python has no readable standard library sources.
    """
    splits: dict[bool, dict[str, Example]] = {False: {}, True: {}}
    for docstring in _docstrings():
        summary = _summary(docstring.text)
        is_usable = len(docstring.signature) in _SIGNATURE_CHARACTERS and len(summary) in _SUMMARY_CHARACTERS
        if docstring.signature and is_usable:
            example = Example(prompt=f"{docstring.signature}\nSummary:", completion=f" {summary}")
            splits[docstring.is_held_out].setdefault(summary.lower().rstrip("."), example)
    train, held_out = splits[False], splits[True]
    return list(train.values()), [example for summary, example in held_out.items() if summary not in train]


def stdlib_texts() -> list[str]:
    """Collect general text: help topics of the language and long docstrings, none of them from a held-out module.

    Raises:
        ResourceError: this Python has no readable standard library sources.
    """
    from pydoc_data.topics import topics

    long = [doc.text for doc in _docstrings() if len(doc.text) >= _LONG_DOCSTRING and not doc.is_held_out]
    return [*topics.values(), *dict.fromkeys(long)]


@cache
def _docstrings() -> tuple[_Docstring, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found = tuple(docstring for path in _public_modules(root) for docstring in _docstrings_of(path, root))
    if not found:
        raise ResourceError(
            f"{root} holds no sources of the standard library, which the demo's data is built from. Use a full Python."
        )
    return found


def _public_modules(root: Path) -> Iterator[Path]:
    left_out = _TESTS_AND_TOOLS | _NOT_THE_LIBRARY
    for path in sorted(root.rglob("*.py")):
        names = path.relative_to(root).with_suffix("").parts
        is_private = any(name.startswith("_") for name in names if name != "__init__")
        if not is_private and left_out.isdisjoint(names) and not names[0].startswith(("config-", "lib-")):
            yield path


def _docstrings_of(path: Path, root: Path) -> Iterator[_Docstring]:
    names = [name for name in path.relative_to(root).with_suffix("").parts if name != "__init__"]
    module = ".".join(names)
    tree = ast.parse(path.read_bytes())
    if text := ast.get_docstring(tree):
        yield _Docstring(module, "", text)
    yield from _docstrings_below(tree, module, module)


def _docstrings_below(node: ast.Module | ast.ClassDef, module: str, prefix: str) -> Iterator[_Docstring]:
    for child in node.body:
        if not isinstance(child, _Definition) or child.name.startswith("_"):
            continue
        if text := ast.get_docstring(child):
            yield _Docstring(module, _signature(child, prefix), text)
        if isinstance(child, ast.ClassDef):
            yield from _docstrings_below(child, module, f"{prefix}.{child.name}")


def _signature(node: _Definition, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {prefix}.{node.name}({bases})" if bases else f"class {prefix}.{node.name}"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{keyword} {prefix}.{node.name}({ast.unparse(node.args)})"


def _summary(docstring: str) -> str:
    """Return the first sentence of a docstring, on one line."""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    end = _END_OF_SENTENCE.search(paragraph)
    return paragraph[: end.end()] if end else paragraph
