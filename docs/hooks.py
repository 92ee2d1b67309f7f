"""What the site shows besides this folder: README.md as its front page, and files of the repository that pages link to.

The Markdown is written for GitHub, where a link may leave docs/ (`../consume/README.md`, `../publish/slurm.sh`). For
the site each of these files becomes a page beside the guides: Markdown as it is, notebooks and sources as listings.
Links are rewritten to where a file then lies, so that `mkdocs build --strict` checks all of them.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = "docs/results"
PICTURES: Final = (".png", ".svg")
LANGUAGES: Final = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".toml": "toml", ".j2": "jinja"}

_LINK = re.compile(r"(\]\()([^()\s]+)(\))")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of results into the navigation: one per study, as many as there are."""
    studies = sorted(path.parent.name for path in (ROOT / RESULTS).glob("*/README.md"))
    pages: list[Any] = [f"results/{study}/README.md" for study in studies]
    if (ROOT / RESULTS / "README.md").is_file():
        pages.insert(0, "results/README.md")
    entries: list[Any] = config.nav or []
    config.nav = [
        {"Results": pages} if entry == "Results" else entry for entry in entries if entry != "Results" or pages
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the navigation names outside of docs/, README.md first, and what all pages link to."""
    named = [name for name in _named(config.nav) if files.get_file_from_path(name) is None]
    waiting = [*named, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        if not source.startswith("docs/"):
            files.append(_file(source, config, in_navigation=source in named))
        for target in _targets(source) if source.endswith(".md") else ():
            if target not in seen and not target.startswith("docs/"):
                seen.add(target)
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page to where files of the repository lie on the site."""
    uri = page.file.src_uri
    source = uri if (ROOT / uri).is_file() and not (ROOT / "docs" / uri).is_file() else f"docs/{uri}"

    def moved(link: str) -> str:
        target = _target(source, link)
        if target is None:
            return link
        there = posixpath.relpath(_uri(target), posixpath.dirname(uri) or ".")
        fragment = urlsplit(link).fragment
        return f"{there}#{fragment}" if fragment else there

    return _with_links(markdown, moved) if (ROOT / source).is_file() else markdown


def _named(navigation: Any) -> Iterator[str]:  # noqa: ANN401 (mkdocs has no type for it)
    if isinstance(navigation, str):
        yield navigation
    elif isinstance(navigation, dict):
        yield from _named(list(navigation.values()))
    else:
        for entry in navigation or ():
            yield from _named(entry)


def _targets(source: str) -> list[str]:
    """Return the files of the repository that a Markdown file links to."""
    found: list[str] = []

    def note(link: str) -> str:
        target = _target(source, link)
        if target is not None:
            found.append(target)
        return link

    _with_links((ROOT / source).read_text(encoding="utf-8"), note)
    return found


def _target(source: str, link: str) -> str | None:
    """Return the file of the repository that a link means; None for an address, an anchor or what is not there."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or not parts.path:
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), parts.path))
    if (ROOT / path).is_dir():
        path += "/README.md"
    return path if (ROOT / path).is_file() else None


def _uri(path: str) -> str:
    """Return where a file of the repository lies among the sources of the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith((".md", *PICTURES)) else f"{path}.md"


def _file(path: str, config: MkDocsConfig, *, in_navigation: bool) -> File:
    level = InclusionLevel.INCLUDED if in_navigation else InclusionLevel.NOT_IN_NAV
    if path.endswith((".md", *PICTURES)):
        return File.generated(config, _uri(path), abs_src_path=str(ROOT / path), inclusion=level)
    return File.generated(config, _uri(path), content=_listing(path), inclusion=level)


def _listing(path: str) -> str:
    """Return a page that shows a source file; it is left out of the search, which is for texts."""
    text = (ROOT / path).read_text(encoding="utf-8")
    suffix = Path(path).suffix
    body = "\n\n".join(_cells(text)) if suffix == ".ipynb" else _fenced(text, LANGUAGES.get(suffix, "text"))
    return f"---\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n{body}\n"


def _cells(notebook: str) -> Iterator[str]:
    for cell in json.loads(notebook)["cells"]:
        text = "".join(cell["source"])
        yield (
            re.sub(r"^#", "##", text, flags=re.MULTILINE)
            if cell["cell_type"] == "markdown"
            else _fenced(text, "python")
        )


def _fenced(text: str, language: str) -> str:
    return f"````````{language}\n{text.rstrip()}\n````````"


def _with_links(markdown: str, moved: Callable[[str], str]) -> str:
    """Return the text with each link replaced by what `moved` makes of it; code blocks stay as they are."""
    lines = []
    fence: str | None = None
    for line in markdown.splitlines(keepends=True):
        mark = _FENCE.match(line)
        if fence is None and mark is None:
            lines.append(_LINK.sub(lambda link: link[1] + moved(link[2]) + link[3], line))
            continue
        lines.append(line)
        if fence is None and mark is not None:
            fence = mark[1]
        elif fence is not None and mark is not None and mark[1].startswith(fence):
            fence = None
    return "".join(lines)
