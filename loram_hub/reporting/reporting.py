"""`report`: gather, say, draw, write."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from loram_hub.adapter import CONFIG as ADAPTER_CONFIG
from loram_hub.errors import InvalidRequestError
from loram_hub.files import fsync_file, fsync_folder, resource_errors
from loram_hub.release import is_release
from loram_hub.reporting.contents import Contents
from loram_hub.reporting.facts import Facts
from loram_hub.reporting.gathering import gather
from loram_hub.reporting.page import pictures_of, render_page
from loram_hub.reporting.release_sections import (
    alignment_section,
    importance_section,
    kept_section,
    memory_section,
)
from loram_hub.reporting.study_sections import study_sections
from loram_hub.reporting.summary import key_figures, lead, provenance_section, title_of
from loram_hub.reporting.tuning_sections import norms_section, recovery_section, training_section

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `report` wrote."""

    path: Path
    """The page."""
    pictures: tuple[Path, ...]
    """The same pictures as files of their own."""
    sections: tuple[str, ...]
    """Titles of the sections that show something."""
    missing: tuple[str, ...]
    """Titles of those for which there were no data; each says on the page what to give."""
    nbytes: int
    """Size of the page; 0 if it was not written."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"path": str(self.path), "pictures": [str(path) for path in self.pictures]}


def report(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    compare: str | os.PathLike[str] | None = None,
    importance: str | os.PathLike[str] | None = None,
    evaluations: Sequence[str | os.PathLike[str]] = (),
    pictures: str | os.PathLike[str] | None = None,
    title: str | None = None,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
) -> Report:
    """Write what is known of releases, trainings and adapters as one HTML page that needs nothing else.

    The page has its pictures and its style inside and asks no server for anything; equal input gives equal bytes. What
    the sources do not hold is named on it, with what to give. No weights of a model are read.

    Args:
        sources: folders or Hub ids of releases and adapters; folders of fine-tuning runs, of alignments, of
            publications ('loram publish --work-dir'), of the demo, of studies; JSON files of 'loram eval'. In any mix.
        out: the page, `*.html`.
        compare: an adapter whose update is laid beside those of the sources: plain LoRA, trained on the base.
        importance: file of importance scores, if it lies in none of the sources.
        evaluations: JSON files of 'loram eval', as among the sources.
        pictures: folder for the pictures as files; None for `<name of the page>_files` beside it.
        title: of the page; None for one that names the first source.
        base: folder or Hub id of the model that adapters are for, where nothing else here has its config. Without it
            the releases that are given and the Hub's cache are looked at, then the Hub is asked once for what the
            adapter names.
        overwrite: replace an earlier page and its pictures. In `<name of the page>_files` pictures that the earlier
            page shows, and this one does not, go; every other file stays, and in `pictures` all do.
        dry_run: read everything and say which sections there would be, without writing.
        token: of the Hub.

    Returns:
        Where it is, and which sections it has.

    Raises:
        InvalidRequestError: no source; `out` is no HTML file, exists, or lies in a release or an adapter; `compare` is
            no adapter; an evaluation is malformed.
        CheckpointError: a source is nothing that a report can be made of, or `base` no model.
        VerificationError: a file is torn or altered.
        PlanMismatchError: the importance scores are not those that the release was pruned by.
        MissingDependencyError: matplotlib or jinja2 is not installed.
        AccessError: the Hub refused or could not be reached.
        ResourceError: it cannot be written.

    Example:
        >>> from loram_hub import report  # doctest: +SKIP
        >>> report(["runs/my-run", "org/Llama-3.1-70B-LoRAM-0.85"], "report.html").sections  # doctest: +SKIP
    """
    page = Path(out).expanduser()
    folder = page.with_name(f"{page.stem}_files") if pictures is None else Path(pictures).expanduser()
    _check_place(page, folder, overwrite=overwrite)
    facts = gather(sources, compare=compare, importance=importance, evaluations=evaluations, base=base, token=token)
    contents = contents_of(facts, title=title)
    figures = [figure for section in contents.sections for part in section.parts for figure in part.figures]
    drawn: dict[str, bytes] = {}
    nbytes = 0
    if not dry_run:
        drawn = {figure.name: figure.draw() for figure in tqdm(figures, desc="Drawing", unit="picture")}
        html = render_page(contents, drawn).encode()
        nbytes = len(html)
        files = {f"{name}.png": png for name, png in drawn.items()}
        outdated = _drawn_earlier(page, folder) if pictures is None else []
        _write(page, html, folder, files, [path for path in outdated if path.name not in files])
        logger.info("%s: %s bytes, %s pictures", page, f"{nbytes:,}", len(drawn))
    return Report(
        path=page,
        pictures=tuple(folder / f"{figure.name}.png" for figure in figures),
        sections=tuple(section.title for section in contents.sections),
        missing=tuple(section.title for section in contents.missing),
        nbytes=nbytes,
    )


def contents_of(facts: Facts, *, title: str | None = None) -> Contents:
    """Decide what a page shows, without drawing it."""
    sections = (
        recovery_section(facts),
        kept_section(facts),
        importance_section(facts),
        alignment_section(facts),
        memory_section(facts),
        training_section(facts),
        norms_section(facts),
        *study_sections(facts),
        provenance_section(facts),
    )
    return Contents(
        title=title_of(facts) if title is None else title,
        lead=lead(facts),
        key_figures=key_figures(facts),
        sections=tuple(section for section in sections if section.parts),
        missing=tuple(section for section in sections if not section.parts),
    )


def _check_place(page: Path, folder: Path, *, overwrite: bool) -> None:
    if page.suffix.lower() not in (".html", ".htm"):
        raise InvalidRequestError(f"{page} is to be an HTML page; give a name that ends with .html.")
    for path in (page, folder):
        if path.exists() and path.is_dir() != (path == folder):
            kind = "a folder" if path.is_dir() else "a file"
            raise InvalidRequestError(f"{path} is {kind} already. Choose another name.")
    for above in (*Path(os.path.abspath(page)).parents, *Path(os.path.abspath(folder)).parents):
        if is_release(above) or (above / ADAPTER_CONFIG).is_file():
            raise InvalidRequestError(
                f"{page} or its pictures would lie in {above}, a release or an adapter, which must hold its own files "
                "alone. Choose a place outside of it."
            )
    taken = [page] if page.exists() else [*folder.iterdir()][:1] if folder.is_dir() else []
    if taken and not overwrite:
        raise InvalidRequestError(f"{taken[0]} exists already. Choose another name, or ask to overwrite it.")


def _drawn_earlier(page: Path, folder: Path) -> list[Path]:
    """Return the pictures that the page shows which is there now: of that name, and of those very bytes."""
    if not page.is_file() or not folder.is_dir():
        return []
    shown = pictures_of(page.read_text(encoding="utf-8", errors="replace"))
    files = ((folder / f"{name}.png", png) for name, png in shown.items())
    return [path for path, png in files if path.is_file() and not path.is_symlink() and path.read_bytes() == png]


def _write(page: Path, html: bytes, folder: Path, pictures: Mapping[str, bytes], outdated: Sequence[Path]) -> None:
    """Write the pictures, then the page, each in one step; outdated pictures go."""
    with resource_errors(f"Writing {page}"):
        page.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in pictures.items():
            _replace(folder / name, png)
        for path in outdated:
            path.unlink(missing_ok=True)
        fsync_folder(folder)
        _replace(page, html)
        fsync_folder(page.parent)


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(content)
    fsync_file(aside)
    os.replace(aside, path)
