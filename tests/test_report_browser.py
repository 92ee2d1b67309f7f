"""A report in a real browser: what a reader would be annoyed or harmed by is looked for in the rendered page.

The control page at the end breaks every rule, and each must be found there: a check that finds nothing proves nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from report_materials import save_sources, scores_of

from loram_hub.importance.stored import StoredScores, write_scores
from loram_hub.release import open_metadata
from loram_hub.reporting import report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Dialog, Page, Request, Route

NAME = "<img src=x onerror=alert(1)>"
"""What a stranger might call a base model."""
WIDTHS = (390, 1440)
SCHEMES = ("light", "dark")
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

_RULES = """
() => {
  const found = [];
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) found.push(`overflow: ${root.scrollWidth} > ${root.clientWidth}`);

  for (const img of document.images) {
    if (!(img.getAttribute('alt') || '').trim()) found.push('alt: an image has none');
    if (img.naturalWidth === 0) found.push('image: one shows nothing');
  }

  let level = 0;
  for (const heading of document.querySelectorAll('h1, h2, h3, h4, h5, h6')) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1) found.push(`headings: ${heading.tagName} after H${level}`);
    level = next;
  }
  if (document.querySelectorAll('h1').length !== 1) found.push('headings: not one H1');

  const parts = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const luminance = rgb => {
    const [r, g, b] = rgb.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const over = (top, alpha, below) => top.map((c, i) => c * alpha + below[i] * (1 - alpha));
  const isDark = matchMedia('(prefers-color-scheme: dark)').matches;
  const canvas = isDark && getComputedStyle(root).colorScheme.includes('dark') ? [18, 18, 18] : [255, 255, 255];
  const background = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, alpha = 1] = parts(getComputedStyle(at).backgroundColor);
      if (alpha > 0) layers.push([[r, g, b], alpha]);
      if (alpha === 1) break;
    }
    return layers.reverse().reduce((below, [rgb, alpha]) => over(rgb, alpha, below), canvas);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest('script, style') || !element.checkVisibility()) continue;
    texts += 1;
    const behind = background(element);
    const [r, g, b, alpha = 1] = parts(getComputedStyle(element).color);
    const [high, low] = [luminance(over([r, g, b], alpha, behind)), luminance(behind)].sort((x, y) => y - x);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`contrast: ${ratio.toFixed(2)} of ${JSON.stringify(node.data.trim().slice(0, 40))}`);
  }
  if (texts === 0) found.push('text: there is none');
  return found;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for all tests; where there is none they are skipped, unless LORAM_REQUIRE_BROWSER is 1."""
    named = [os.environ.get("CHROMIUM"), *map(shutil.which, _NAMES)]
    executable = next((path for path in named if path), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _absent("playwright is not installed")
    if executable is None:
        _absent(f"there is no browser: CHROMIUM is not set, and none of {', '.join(_NAMES)} is on the PATH")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=list(_FLAGS))
        yield started
        started.close()


def _absent(why: str) -> Any:
    if os.environ.get("LORAM_REQUIRE_BROWSER") == "1":
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section, about things with names of a stranger's."""
    folder = tmp_path_factory.mktemp("report")
    sources = save_sources(folder, base_id=NAME, data=f"{NAME} $x_{{$")
    release = open_metadata(sources.release)
    stored = StoredScores(
        scores=scores_of(release.plan), importance="taylor:param_first", seed=3, base_id=NAME, base_commit=None,
        base_config_sha256=release.manifest.base.config_sha256, calibration=None,
    )  # fmt: skip
    write_scores(folder / "importance.safetensors", stored)
    written = report(
        sources.all, folder / "report.html", compare=sources.plain, importance=folder / "importance.safetensors"
    )
    assert written.missing == ()
    return written.path


def problems(browser: Browser, file: Path, *, scheme: Any, width: int) -> list[str]:
    """Open a page as a reader would, unfold everything, and return what is wrong, each with the rule it breaks."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        return _problems(context, file)
    finally:
        context.close()


def _problems(context: BrowserContext, file: Path) -> list[str]:
    found: list[str] = []
    page = context.new_page()

    def note_message(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            found.append(f"console: {message.text}")

    def note_dialog(dialog: Dialog) -> None:
        found.append(f"script ran: {dialog.message}")
        dialog.dismiss()

    def note_failure(request: Request) -> None:
        found.append(f"request failed: {request.url}")

    def guard(route: Route) -> None:
        if route.request.url == file.as_uri():
            route.continue_()
        else:
            found.append(f"request: {route.request.url}")
            route.abort()

    page.on("console", note_message)
    page.on("pageerror", lambda error: found.append(f"console: {error}"))
    page.on("dialog", note_dialog)
    page.on("requestfailed", note_failure)
    page.route("**/*", guard)
    page.goto(file.as_uri())
    _unfold(page)
    return [*found, *page.evaluate(_RULES)]


def _unfold(page: Page) -> None:
    page.evaluate("() => { for (const details of document.querySelectorAll('details')) details.open = true; }")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_shows_nothing_wrong(browser: Browser, page_file: Path, width: int, scheme: str) -> None:
    assert problems(browser, page_file, scheme=scheme, width=width) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_report_that_lacks_most_of_its_data_shows_nothing_wrong(
    browser: Browser, page_file: Path, tmp_path: Path, scheme: str
) -> None:
    written = report([page_file.parent / "evaluation.json"], tmp_path / "report.html")
    assert len(written.missing) > 5
    assert written.path.read_text().count("<h2 ") == len(written.sections) + 1  # all that lacks data is in one section

    assert problems(browser, written.path, scheme=scheme, width=390) == []


def test_on_paper_nothing_is_cut_off(browser: Browser, page_file: Path) -> None:
    page = browser.new_page(viewport={"width": 718, "height": 1000})  # A4 within its margins
    page.emulate_media(media="print")
    page.goto(page_file.as_uri())
    cut_off = """() => [...document.querySelectorAll('.scroll, .picture')]
      .filter(box => box.checkVisibility() && box.scrollWidth > box.clientWidth + 1)
      .map(box => `${box.getAttribute('aria-label')}: ${box.scrollWidth} > ${box.clientWidth}`)"""

    assert page.evaluate(cut_off) == []
    assert page.evaluate("() => [...document.querySelectorAll('summary')].every(shown => shown.checkVisibility())")
    _unfold(page)  # as one who wants the numbers on paper does
    assert page.evaluate(cut_off) == []
    page.close()


def test_names_of_strangers_are_text(browser: Browser, page_file: Path) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())

    assert NAME in page.inner_text("body")
    assert page.locator("img[src='x']").count() == 0
    assert page.locator("img").count() >= 9
    assert page.evaluate("() => [...document.images].every(image => image.src.startsWith('data:image/png'))")
    page.close()


def test_the_page_forbids_itself_to_load_or_run_anything(browser: Browser, page_file: Path, tmp_path: Path) -> None:
    smuggled = tmp_path / "smuggled.html"
    added = "<script>alert(1)</script><img alt='x' src='https://example.invalid/x.png'></main>"
    smuggled.write_text(page_file.read_text().replace("</main>", added))

    found = problems(browser, smuggled, scheme="light", width=1440)

    assert any("Content Security Policy" in problem and "script" in problem for problem in found)
    assert not [problem for problem in found if problem.startswith(("script ran", "request: "))]


_BROKEN = {
    "console": "<script>console.error('no')</script>",
    "script ran": "<script>alert(1)</script>",
    "request": "<img alt='far' src='https://example.invalid/far.png'>",
    "request failed": "<link rel='stylesheet' href='missing.css'>",
    "overflow": "<div style='width: 3000px'>wide</div>",
    "alt": "<img src='data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7'>",
    "image": "<img alt='nothing' src='data:image/png;base64,AAAA'>",
    "headings": "<h4>too deep</h4>",
}


@pytest.mark.parametrize("rule", _BROKEN)
def test_every_rule_finds_the_page_that_breaks_it(browser: Browser, tmp_path: Path, rule: str) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(f"<!doctype html><title>x</title><h1>x</h1><p>sound</p>{_BROKEN[rule]}")

    found = problems(browser, broken, scheme="light", width=390)

    assert any(problem.startswith(f"{rule}:") for problem in found), found


def test_a_sound_page_breaks_no_rule(browser: Browser, tmp_path: Path) -> None:
    sound = tmp_path / "sound.html"
    sound.write_text("<!doctype html><title>x</title><h1>x</h1><h2>y</h2><p>sound</p>")

    assert problems(browser, sound, scheme="light", width=390) == []


@pytest.mark.parametrize(("scheme", "grey", "ratio"), [("light", "#777777", "4.48"), ("dark", "#666666", "3.66")])
def test_faint_text_is_found_in_the_scheme_where_it_is_faint(
    browser: Browser, tmp_path: Path, scheme: str, grey: str, ratio: str
) -> None:
    other = SCHEMES[1 - SCHEMES.index(scheme)]
    faint = tmp_path / "faint.html"
    faint.write_text(
        "<!doctype html><title>x</title><style>:root { color-scheme: light dark }"
        " body { background: #fff; color: #000 }"
        " @media (prefers-color-scheme: dark) { body { background: #000; color: #fff } }"
        f" @media (prefers-color-scheme: {scheme}) {{ p {{ color: {grey} }} }}</style><h1>x</h1><div><p>faint</p></div>"
    )

    assert problems(browser, faint, scheme=scheme, width=390) == [f'contrast: {ratio} of "faint"']
    assert problems(browser, faint, scheme=other, width=390) == []
