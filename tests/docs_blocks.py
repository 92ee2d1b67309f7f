"""The code blocks of the documents, and what can be said of one without running it.

A fenced block names its language. Those in sh, python, yaml and json are code: each is run, or the line before it says
why not, as in `<!-- not run: needs a GPU -->`. An indented block is sh. What a program prints is in a `text` block.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "consume/README.md", "publish/README.md", "model_cards/README.md")
GENERATED = ("docs/results", "docs/reference")
"""Pages that programs write; they show results and signatures."""
LANGUAGES: Mapping[str, str] = {
    "sh": "sh", "bash": "sh", "shell": "sh", "console": "sh", "python": "python", "py": "python", "yaml": "yaml",
    "yml": "yaml", "json": "json",
}  # fmt: skip
SHOWN = ("text", "mermaid", "latex")
"""Languages of blocks that are no code."""
_MARK = re.compile(r"^\s*<!--\s*not run:\s*(\S.*?)\s*-->\s*$", re.DOTALL)
_PROMPT = re.compile(r"^\$ ", re.MULTILINE)
_COMMAND = re.compile(r"^(?:\$ |(?:loram|pip|python|make|git|hf|vllm|torchrun|curl) (?=\S))", re.MULTILINE)
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1\n.*?^\s*\2$", re.DOTALL | re.MULTILINE)
_OPERATORS = frozenset("();<>|&")
_ASSIGNMENT = re.compile(r"\w+=")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A block of code on a page."""

    page: str
    """The page, relative to the repository."""
    line: int
    """The first line of the block, counted from 1."""
    language: str
    """As the page names it."""
    text: str
    """The code."""
    reason: str | None = None
    """Why it is not run; None: it is."""

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.page}:{self.line}"

    @property
    def kind(self) -> str | None:
        """One of sh, python, yaml and json; None for what is no code."""
        return LANGUAGES.get(self.language)


def pages() -> tuple[str, ...]:
    """Return the pages whose code is tested, in an order that does not depend on the machine."""
    found = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return (*PAGES, *(page for page in found if not page.startswith(tuple(f"{folder}/" for folder in GENERATED))))


def blocks_of(page: str, text: str | None = None) -> tuple[Block, ...]:
    """Return the blocks of a page in their order; `text` is its content, where it is no file of the repository."""
    from markdown_it import MarkdownIt

    content = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    content = re.sub(r"\A---\n.*?\n---\n", lambda head: "\n" * head[0].count("\n"), content, flags=re.DOTALL)
    found, reason = [], None
    for token in MarkdownIt("commonmark").parse(content):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            words = token.info.split()
            language = "sh" if token.type == "code_block" else words[0] if words else ""
            code = _PROMPT.sub("", token.content) if language == "console" else token.content
            found.append(Block(page=page, line=token.map[0] + 1, language=language, text=code, reason=reason))
            reason = None
        elif reason is not None:
            raise ValueError(f"{page}: the mark `not run: {reason}` stands before no block of code.")
        elif token.type == "html_block" and (mark := _MARK.match(token.content)):
            reason = mark[1]
    return tuple(found)


def problem_of(block: Block) -> str | None:
    """Say what is wrong with how a block is written down; None if nothing is."""
    if block.kind is None and block.language not in SHOWN:
        return f"names the language {block.language!r}; write sh, python, yaml, json, or text for what is printed"
    if block.kind is None and block.reason is not None:
        return "is no code, and is marked as not run"
    if block.kind is None and (found := _COMMAND.search(block.text)):
        return f"is text, and has a command: {block.text[found.start() :].splitlines()[0]}"
    if block.kind == "sh" and "```" in block.text:
        return "is indented and has a fence in it: Markdown takes it for one block of code"
    return None


def commands_of(script: str) -> Iterator[list[str]]:
    """Split a shell script into its simple commands, each without what comes before or after it in a pipe."""
    script = _HEREDOC.sub("", script).replace("\\\n", " ")
    for line in script.splitlines():
        words: list[str] = []
        reader = shlex.shlex(line, posix=True, punctuation_chars=True)
        reader.whitespace_split, reader.commenters = True, "#"
        for word in reader:
            if set(word) <= _OPERATORS:
                if words:
                    yield words
                words = []
            elif words or not _ASSIGNMENT.match(word):
                words.append(word)
        if words:
            yield words


def loram_arguments(command: list[str]) -> list[str] | None:
    """Return the arguments of `loram` in a command, however it is started; None if it is another program."""
    if command[0] == "loram":
        return command[1:]
    for place in range(len(command) - 1):
        if command[place : place + 2] == ["-m", "loram_hub"]:
            return command[place + 2 :]
    return None


def check_command(arguments: list[str]) -> None:
    """Let click parse a `loram` command, without running it; raises `click.UsageError`.

    Files need not be there.
    """
    import click

    from loram_hub.cli import main

    exists, click.Path.convert = click.Path.convert, lambda self, value, param, ctx: value  # type: ignore[method-assign,assignment]
    try:
        with main.make_context("loram", list(arguments)) as context:
            words = [*context._protected_args, *context.args]
            name, command, rest = main.resolve_command(context, words)
            assert command is not None
            command.make_context(name, rest, parent=context)
    except click.exceptions.Exit:  # --help and --version end at once
        pass
    finally:
        click.Path.convert = exists  # type: ignore[method-assign]


def check_shell(block: Block) -> int:
    """Check a shell block that is not run; returns how many `loram` commands it has."""
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{block.place}: bash cannot read it: {done.stderr}")
    found = [given for command in commands_of(block.text) if (given := loram_arguments(command)) is not None]
    for arguments in found:
        check_command(arguments)
    return len(found)


def check_python(block: Block) -> None:
    """Check a Python block that is not run: it compiles, and what it imports from loram_hub is there."""
    tree = ast.parse(block.text, block.place)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "loram_hub":
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "loram_hub":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                getattr(module, alias.name)


def check_yaml(block: Block) -> str:
    """Read a YAML block as the recipe that it shows, or as a part of one; returns which.

    What a part leaves out is taken from a recipe of the repository; a section of the block takes the place of the whole
    section. A list of a block's keys that no recipe has is an error.
    """
    from loram_hub.recipes.yaml_text import parse_yaml

    values, _ = parse_yaml(block.text, source=block.place)
    problems = []
    for name, (read, example) in _kinds_of_recipe().items():
        whole, _ = parse_yaml((ROOT / example).read_text(encoding="utf-8"), source=example)
        whole = {key: value for key, value in whole.items() if key != "profiles"}  # which are recipes of their own
        is_whole = bool({"base", "release", "name"} & values.keys())
        try:
            read(values if is_whole else whole | values, block.place)
        except ValueError as err:
            problems.append(f"{name}: {err}")
        else:
            return name
    raise ValueError(f"{block.place} is no recipe:\n" + "\n".join(problems))


def _kinds_of_recipe() -> dict[str, tuple[Any, str]]:
    from loram_hub.finetuning import FinetuneRecipe
    from loram_hub.pipeline.recipe import Recipe
    from loram_hub.recipes import section_from
    from loram_hub.studies.specification import Study

    def reader(section: type) -> Any:
        return lambda values, place: section_from(section, values, folder=ROOT / "consume")

    return {
        "release": (reader(Recipe), "publish/llama-2-70b.yaml"),
        "finetune": (reader(FinetuneRecipe), "consume/finetune-16gb.yaml"),
        "study": (reader(Study), "loram_hub/studies/ready/methods.yaml"),
    }


def check(block: Block) -> None:
    """Check a block that is not run."""
    checks: dict[str, Callable[[Block], object]] = {
        "sh": check_shell, "python": check_python, "yaml": check_yaml, "json": check_json,
    }  # fmt: skip
    assert block.kind is not None
    checks[block.kind](block)


def check_json(block: Block) -> None:
    """Read a JSON block."""
    json.loads(block.text)
