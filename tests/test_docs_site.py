"""The documents: every link leads somewhere, no page is lost, the generated ones are current, and the site builds."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
from base_configs import BASES
from markdown_it import MarkdownIt
from markdown_it.token import Token

import loram_hub
from loram_hub.architecture import architecture_of
from loram_hub.plan import PruningSettings, planned_sizes

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FRONT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "consume/README.md", "publish/README.md")
BESIDE = ("benchmarks/README.md", "benchmarks/gpu/README.md", "model_cards/README.md")
PAGES = tuple(
    [*FRONT, *BESIDE, *sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md") if path.is_file())]
)


@cache
def tokens_of(page: str) -> list[Token]:
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse((ROOT / page).read_text(encoding="utf-8"))


def links_of(page: str) -> list[str]:
    found = []
    for token in tokens_of(page):
        for child in token.children or ():
            target = {"link_open": "href", "image": "src"}.get(child.type)
            if target is not None:
                found.append(str(child.attrs[target]))
    return found


@cache
def anchors_of(page: str) -> frozenset[str]:
    """The anchors that GitHub gives to the headings of a page."""
    anchors: dict[str, int] = {}
    tokens = tokens_of(page)
    for heading, content in pairwise(tokens):
        if heading.type == "heading_open":
            text = "".join(child.content for child in content.children or () if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            anchors[slug] = anchors.get(slug, -1) + 1
    return frozenset(f"{slug}-{n}" if n else slug for slug, count in anchors.items() for n in range(count + 1))


def problems_of(page: str, links: Sequence[str]) -> Iterator[str]:
    for link in links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (ROOT / page).parent / unquote(parts.path) if parts.path else ROOT / page
        resolved = target.resolve()
        if link.startswith("/") or not resolved.is_relative_to(ROOT) or not resolved.exists():
            yield f"{page}: {link} leads nowhere"
        elif parts.fragment:
            markdown = resolved / "README.md" if resolved.is_dir() else resolved
            if parts.fragment not in anchors_of(markdown.relative_to(ROOT).as_posix()):
                yield f"{page}: {link} names no heading of {markdown.name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_and_anchor_leads_somewhere(page: str) -> None:
    assert list(problems_of(page, links_of(page))) == []


def test_a_broken_link_would_be_found() -> None:
    broken = ["missing.md", "docs/missing.md", "docs/faq.md#missing", "#missing", "/docs/faq.md", "../outside"]

    found = list(problems_of("README.md", [*broken, "docs/faq.md", "docs/faq.md#can-i-merge", "#limits", "docs"]))

    assert [problem.split(": ")[1].split(" ")[0] for problem in found] == broken


def test_every_page_can_be_reached_from_the_readme_on_github() -> None:
    reached, waiting = {"README.md"}, ["README.md"]
    while waiting:
        page = waiting.pop()
        for link in links_of(page):
            path = urlsplit(link).path
            target = ((ROOT / page).parent / path).resolve()
            target = target / "README.md" if target.is_dir() else target
            name = target.relative_to(ROOT).as_posix() if path and target.is_relative_to(ROOT) else ""
            if name.endswith(".md") and name not in reached and target.is_file():
                reached.add(name)
                waiting.append(name)

    assert set(PAGES) - reached == set()


@pytest.fixture(scope="module")
def references() -> ModuleType:
    spec = importlib.util.spec_from_file_location("references", DOCS / "references.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_references_are_current(references: ModuleType) -> None:
    stale = [
        name
        for name, text in references.pages().items()
        if (references.FOLDER / name).read_text(encoding="utf-8") != text
    ]

    assert stale == [], "run `make reference`"


def test_the_references_name_every_command_option_and_export() -> None:
    from click import Option

    from loram_hub.cli import main

    commands = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## loram (\S+)$(.*?)(?=^## |\Z)", commands, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(main.commands)
    for name, command in main.commands.items():
        for parameter in command.params:
            if isinstance(parameter, Option) and not parameter.hidden:
                assert f"{parameter.opts[0]}" in sections[name]

    python = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^### (\w+)$", python, re.MULTILINE)) == sorted(loram_hub.__all__)
    for name in re.findall(r"^### (\w+\.\w+)$", python, re.MULTILINE):
        module, _, function = name.partition(".")
        assert callable(getattr(importlib.import_module(f"loram_hub.{module}"), function))


class Loads(HTMLParser):
    """What a browser fetches to show a page, and the pictures without a text beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.silent: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        loaded = given.get("src") if tag in ("script", "img", "iframe") else None
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            loaded = given.get("href")
        if loaded:
            self.addresses.append(loaded)
        if tag == "img" and not given.get("alt"):
            self.silent.append(str(given.get("src")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    if importlib.util.find_spec("material") is None:
        why = "mkdocs-material is not installed; it comes with the extra [docs]"
        if os.environ.get("LORAM_REQUIRE_DOCS") == "1":
            pytest.fail(why)
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "Deprecat" not in done.stderr
    return folder


def test_the_site_has_every_page_and_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in PAGES:
        path = page.removeprefix("docs/").removesuffix(".md")
        path = "index" if path == "README" else re.sub(r"/README$", "/index", path)
        assert (site / f"{path}.html").is_file()
    built = sorted(site.rglob("*.html"))
    assert len(built) > len(PAGES)
    for file in built:
        loads = Loads()
        loads.feed(file.read_text(encoding="utf-8"))
        assert loads.silent == []
        assert loads.addresses
        for address in loads.addresses:
            assert not urlsplit(address).netloc
            folder = site if address.startswith("/") else file.parent  # 404.html may be shown in place of any page
            assert (folder / unquote(urlsplit(address).path).lstrip("/")).is_file()
    styles = "".join(file.read_text(encoding="utf-8") for file in sorted(site.rglob("*.css")))
    assert re.findall(r"(?:@import|url\()\s*['\"]?https?:", styles) == []


def test_files_that_pages_link_to_can_be_read_on_the_site(site: Path) -> None:
    recipe = (site / "publish" / "smollm2-135m.yaml.html").read_text(encoding="utf-8")
    assert "HuggingFaceFW/fineweb" in recipe
    assert "publish/smollm2-135m.yaml.html" in (site / "quickstart-publisher.html").read_text(encoding="utf-8")
    notebook = (site / "consume" / "finetune.ipynb.html").read_text(encoding="utf-8")
    assert "AutoLoramModel" in re.sub(r"<[^>]+>", "", notebook)


def test_the_table_of_kept_heads_is_what_a_plan_keeps() -> None:
    page = (DOCS / "faq.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (0\.\d\d) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    large, small = (BASES[name][0] for name in ("meta-llama/Llama-3.1-70B", "HuggingFaceTB/SmolLM2-135M-Instruct"))
    bases = [large, small, *({**large, "num_key_value_heads": heads} for heads in (1, 32))]

    for ratio, *kept in rows:
        settings = PruningSettings(pruning_ratio=float(ratio))
        planned = [planned_sizes(architecture_of(base), settings)[settings.keep_first] for base in bases]
        assert [layer.kv_heads for layer in planned] == [int(heads) for heads in kept]


def test_the_reference_tells_how_classes_are_made_and_what_names_of_types_stand_for() -> None:
    text = (ROOT / "docs" / "reference" / "api.md").read_text()

    for name in ("RecoverCallback", "finetuning.SealCallback"):
        entry = text.partition(f"### {name}\n")[2].partition("\n### ")[0]
        assert re.search(rf"```python\n{name.rpartition('.')[2]}\(\s*\S", entry), name
    for alias in ("Calibration", "Specification", "Method"):
        assert f"\n- `{alias} = " in text
