"""Write docs/reference/: commands, recipes and the Python interface, from the code itself.

    python docs/references.py

The pages are committed, so that they read on GitHub as they do on the site; a test compares them with what this gives.
Commands come from click's own tree, keys of recipes from `loram config-schema`, Python names from the source text,
which is read and not imported.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import click
from click.testing import CliRunner

import loram_hub
from loram_hub.cli import main

ROOT: Final = Path(__file__).resolve().parents[1]
FOLDER: Final = ROOT / "docs" / "reference"
NOTE: Final = "<!-- Written by docs/references.py (`make reference`): change the code's own texts, not this page. -->"

# Which modules a group of names comes from: a new name of one of them finds its place by itself.
GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "Publisher": (
        "pruning",
        "sparsification",
        "refitting",
        "teaching",
        "alignment",
        "quantization",
        "pipeline",
        "pushing",
    ),
    "Consumer": (
        "auto",
        "finetuning",
        "masked_lora",
        "lowmemory",
        "estimation",
        "fitting",
        "recovery",
        "rescaling",
        "merging",
    ),
    "Evidence": ("inspection", "evaluation", "downstream", "updates", "studies", "reporting"),
    "Errors": ("errors",),
}

# Names that are imported from their own module, as in `from loram_hub.reporting import report`.
ELSEWHERE: Final[Mapping[str, tuple[str, ...]]] = {
    "finetuning": ("SealCallback", "latest_checkpoint", "check_finetune"),
    "doctor": ("examine", "fix"),
    "downstream": ("preview_tasks",),
    "studies": ("check_study", "read_study", "read_rows", "gather", "judge", "write_results"),
}


# Types that signatures name and that are no classes.
ALIASES: Final[Mapping[str, str]] = {
    "Calibration": "texts.py",
    "Specification": "texts.py",
    "Record": "texts.py",
    "Method": "sparsification/settings.py",
}


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    return {"cli.md": commands_page(), "recipes.md": recipes_page(), "api.md": python_page()}


# Every function below gives blocks of Markdown, which a blank line parts.


def _page(blocks: Iterable[str]) -> str:
    return "\n\n".join([NOTE, *blocks]) + "\n"


# Commands


def commands_page() -> str:
    """Return the page of commands, in the order in which `loram -h` lists them."""
    return _page(_commands())


def _commands() -> Iterator[str]:
    context = click.Context(main, info_name="loram")
    names = main.list_commands(context)
    yield "# Commands"
    yield (
        "Results go to stdout (`--json`: one JSON document), talk and progress to stderr. Options of `loram` itself "
        "stand before the command:"
    )
    yield _options(main, context)
    yield "`loram COMMAND -h` says what stands here. A command ends with one of these codes:"
    yield "\n".join(
        ["| exit code | meaning |", "|---|---|", *(f"| {code} | {meaning} |" for code, meaning in _exit_codes())]
    )
    rows = (f"| [`{name}`](#loram-{name}) | {_text(_paragraphs(main.commands[name])[0])} |" for name in names)
    yield "\n".join(["| command | what it does |", "|---|---|", *rows])
    for name in names:
        yield from _command(name, main.commands[name])


def _exit_codes() -> Iterator[tuple[int, str]]:
    listed = re.search(r"exit\s+code: (.*?)\.\s", inspect.getdoc(loram_hub.cli) or "", re.DOTALL)
    if listed is None:
        raise ValueError("the docstring of loram_hub.cli no longer lists the exit codes")
    for entry in re.split(r",\s+(?=\d)", listed[1]):
        code, meaning = entry.split(maxsplit=1)
        yield int(code), _joined([meaning])


def _paragraphs(command: click.Command) -> list[str]:
    return [_joined([paragraph]) for paragraph in inspect.cleandoc(command.help or "").split("\n\n")]


def _command(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=f"loram {name}")
    yield f"## loram {name}"
    yield from map(_text, _paragraphs(command))
    yield _fence("text", f"loram {name} {' '.join(command.collect_usage_pieces(context))}")
    yield _options(command, context)
    if command.epilog:
        yield _fence("sh", _joined([command.epilog]).removeprefix("Example: "))


def _options(command: click.Command, context: click.Context) -> str:
    records = filter(None, (parameter.get_help_record(context) for parameter in command.get_params(context)))
    shown = [(names, text) for names, text in records if text and "--help" not in names]
    return "\n".join(f"- `{names}`: {_text(_default_as_code(text))}" for names, text in shown)


def _default_as_code(text: str) -> str:
    return re.sub(r"\s*\[default: (.*)\]$", r" Default: `\1`.", _joined([text]))


# Recipes


def recipes_page() -> str:
    """Return the page of all keys of recipes."""
    return _page(_recipes())


def _recipes() -> Iterator[str]:
    yield "# Recipes"
    yield (
        "Recipes are YAML files, read strictly: a key that nobody knows is an error that names the nearest one. "
        "`loram config-schema KIND` prints the JSON Schema, for editors. What is not marked as needed may be left out."
    )
    types = [each.type for each in main.commands["config-schema"].params if isinstance(each.type, click.Choice)]
    for kind in types[0].choices:
        printed = CliRunner().invoke(main, ["config-schema", str(kind)], catch_exceptions=False).stdout
        schema = json.loads(printed)
        yield f"## loram {kind}"
        yield _text(schema["title"]) + "."
        yield "\n".join(_keys(schema, ""))


def _keys(section: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, schema in section["properties"].items():
        kind, inner = _kind(schema)
        facts = [kind, *(["needed"] if name in section.get("required", ()) else [])]
        default = schema.get("default")
        if default not in (None, []) and not isinstance(default, dict):
            facts.append(f"default `{json.dumps(default)}`")
        text = schema.get("description")
        yield f"- `{prefix}{name}` ({', '.join(facts)}){': ' + _text(text) if text else ''}"
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}{'[].' if kind == 'list' else '.'}")


def _kind(schema: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    """Return what a value is, in words, and the section that it holds, if it does."""
    if "anyOf" in schema:
        return _kind(schema["anyOf"][0])
    if "enum" in schema:
        return "one of " + ", ".join(f"`{choice}`" for choice in schema["enum"]), None
    named = schema["type"]
    kind = named if isinstance(named, str) else named[0]
    if kind == "object":
        return "section", schema
    if kind == "array":
        of, inner = _kind(schema["items"])
        return ("list", inner) if inner is not None else (f"list of {of}", None)
    return {"string": "text", "boolean": "true or false", "integer": "whole number"}.get(kind, kind), None


# Python


def python_page() -> str:
    """Return the page of the names that `import loram_hub` gives."""
    return _page(_names())


def _names() -> Iterator[str]:
    homes: Mapping[str, str] = loram_hub._HOME
    known = {module for modules in GROUPS.values() for module in modules}
    if lost := {homes[name] for name in loram_hub.__all__} - known:
        raise ValueError(f"modules {sorted(lost)} export names and stand in no group of docs/references.py: add them")
    yield "# Python"
    yield (
        "`from loram_hub import ...`. A name loads its module when it is first used; `recover`, `verify`, `info` and "
        "`count_parameters` never load torch."
    )
    for group, modules in GROUPS.items():
        exported = [name for name in loram_hub.__all__ if homes[name] in modules]
        yield f"## {group}"
        for name in sorted(exported, key=lambda name: (modules.index(homes[name]), name)):
            yield from _entry(name, homes[name], heading=name)
    yield _error_classes()
    yield "## Types"
    yield "Names that stand for others in the signatures above."
    yield "\n".join(_alias(name, module) for name, module in ALIASES.items())
    yield "## From their own modules"
    yield "As in `from loram_hub.reporting import report`."
    for module, names in ELSEWHERE.items():
        for name in names:
            yield from _entry(name, module, heading=f"{module}.{name}")


def _entry(name: str, module: str, *, heading: str) -> Iterator[str]:
    yield f"### {heading}"
    path, node = _definition(name, f"loram_hub.{module}")
    yield from _class(name, node) if isinstance(node, ast.ClassDef) else _function(name, node)
    yield f"[Source](../../{path.relative_to(ROOT).as_posix()})"


def _definition(name: str, module: str) -> tuple[Path, ast.FunctionDef | ast.ClassDef]:
    """Return where a name is defined, and the definition; imports of the package are followed."""
    stem = ROOT.joinpath(*module.split("."))
    path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in reversed(tree.body):  # the last definition is the one that is not an overload
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return path, node
    for imports in ast.walk(tree):
        if isinstance(imports, ast.ImportFrom) and imports.module and imports.module.startswith("loram_hub"):
            for alias in imports.names:
                if (alias.asname or alias.name) == name:
                    return _definition(alias.name, imports.module)
    raise ValueError(f"{path.relative_to(ROOT)} has no definition or import of {name}")


def _class(name: str, node: ast.ClassDef) -> Iterator[str]:
    first, *rest = _docstring(node)
    yield first
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            made = _signature(name, method).removesuffix(" -> None")
            yield from [] if made == f"{name}()" else [_fence("python", made)]
    yield from rest
    if fields := "\n".join(_fields(node)):
        yield fields
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith(("_", "on_")):
            if any(isinstance(each, ast.Name) and each.id == "property" for each in method.decorator_list):
                yield f"`{method.name}`: {_text(_first_line(method))}"
            else:
                yield from _function(f"{name}.{method.name}", method)


def _fields(node: ast.ClassDef) -> Iterator[str]:
    for field, following in pairwise([*node.body, None]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            default = "" if field.value is None else f" = {ast.unparse(field.value)}"
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = ": " + _text(_joined([str(following.value.value)]))
            yield f"- `{field.target.id}: {ast.unparse(field.annotation)}{default}`{text}"


def _function(name: str, node: ast.FunctionDef) -> Iterator[str]:
    first, *rest = _docstring(node)
    yield first
    yield _fence("python", _signature(name, node))
    yield from rest


def _signature(name: str, node: ast.FunctionDef) -> str:
    arguments = node.args
    shown = [each for each in arguments.posonlyargs + arguments.args if each.arg not in ("self", "cls")]
    defaults = [None] * (len(shown) - len(arguments.defaults)) + [*arguments.defaults]
    parts = [_argument(each, default) for each, default in zip(shown, defaults, strict=True)]
    if arguments.vararg is not None:
        parts.append(f"*{_argument(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_argument(each, value) for each, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg is not None:
        parts.append(f"**{_argument(arguments.kwarg, None)}")
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    line = f"{name}({', '.join(parts)}){returns}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation is not None else ""
    equals = " = " if annotation else "="
    return argument.arg + annotation + (f"{equals}{ast.unparse(default)}" if default is not None else "")


def _alias(name: str, file: str) -> str:
    """Return what a type's name stands for, and the text below it, if there is one."""
    body = ast.parse((ROOT / "loram_hub" / file).read_text(encoding="utf-8")).body
    for node, following in pairwise([*body, None]):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not (isinstance(target, ast.Name) and target.id == name and isinstance(node, ast.Assign | ast.AnnAssign)):
            continue
        value = node.value
        stands_for = str(value.value) if isinstance(value, ast.Constant) else ast.unparse(value) if value else ""
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = ": " + _text(_joined([str(following.value.value)]))
        return f"- `{name} = {stands_for}`{text}"
    raise ValueError(f"loram_hub/{file} has no {name}")


def _error_classes() -> str:
    rows = ["| error | exit code | meaning |", "|---|---|---|"]
    codes: dict[str, object] = {}
    for node in ast.parse((ROOT / "loram_hub" / "errors.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            inherited = (codes[base] for base in bases if base in codes)
            codes[node.name] = next(_exit_code(node), None) or next(inherited)
            rows.append(f"| `{node.name}({', '.join(bases)})` | {codes[node.name]} | {_text(_first_line(node))} |")
    return "\n".join(rows)


def _exit_code(node: ast.ClassDef) -> Iterator[object]:
    for each in node.body:
        if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "exit_code":
            yield ast.literal_eval(each.value)


# Texts


def _first_line(node: ast.FunctionDef | ast.ClassDef) -> str:
    return _joined([(ast.get_docstring(node) or "").split("\n\n")[0]])


def _docstring(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    """Yield a docstring as Markdown: its paragraphs, its sections as lists."""
    text = ast.get_docstring(node)
    if not text:
        raise ValueError(f"{node.name} has no docstring")
    for block in text.split("\n\n"):
        head, *lines = block.splitlines()
        if head == "Args:":
            yield _items(lines)
        elif head in ("Raises:", "Attributes:"):
            yield head
            yield _items(lines)
        elif head == "Returns:":
            yield f"Returns: {_text(_joined(lines))}"
        elif head == "Example:":
            yield _fence("python", _example(lines))
        elif head.startswith("    "):
            yield _fence("text", inspect.cleandoc(block))
        else:
            yield _text(_joined([head, *lines]))


def _items(lines: Sequence[str]) -> str:
    """Return the entries of a section as a list; a line that names nothing goes on with the entry before it."""
    entries: list[tuple[str, list[str]]] = []
    indent = len(lines[0]) - len(lines[0].lstrip())
    for line in lines:
        starts = re.match(rf" {{{indent}}}(\*{{0,2}}[\w.]+): (.*)", line)
        if starts:
            entries.append((starts[1], [starts[2]]))
        else:
            entries[-1][1].append(line)
    return "\n".join(f"- `{name}`: {_text(_joined(text))}" for name, text in entries)


def _example(lines: Sequence[str]) -> str:
    """Return an example without prompts; what it prints becomes a comment."""
    code: list[str] = []
    for line in lines:
        text = re.sub(r"\s*# doctest: .*", "", line.strip())
        text = text[4:] if text.startswith((">>> ", "... ")) else f"# {text}"
        if code and code[-1].startswith(("import ", "from ")) and not text.startswith(("import ", "from ")):
            code.append("")  # as the formatter of this repository wants it, which reads Markdown too
        code.append(text)
    return "\n".join(code)


def _joined(lines: Sequence[str]) -> str:
    return " ".join(" ".join(lines).split())


def _fence(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _text(text: str) -> str:
    """Return plain text as Markdown: what would be markup is shown, code spans stay."""
    pieces = text.split("`")
    pieces[::2] = [piece.replace("<", "&lt;").replace("|", r"\|") for piece in pieces[::2]]
    return "`".join(pieces)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, page in pages().items():
        (FOLDER / name).write_text(page, encoding="utf-8")
