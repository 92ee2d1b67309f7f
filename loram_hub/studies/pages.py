"""The page of a study: what was asked and how, what shows, tables and figures, and what differs from the paper.

Everything is made from the study, its rows and the conditions under which they were measured; equal input gives equal
bytes. `docs/results/` holds such pages.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loram_hub.errors import InvalidRequestError
from loram_hub.files import resource_errors, write_bytes, write_text
from loram_hub.studies.aggregation import Results, Setting, gather
from loram_hub.studies.budget import budget_lines, difference_lines
from loram_hub.studies.claims import CLAIMS, MILDER, Judgement, about_costs, judge
from loram_hub.studies.conditions import CONDITIONS, read_conditions, study_values
from loram_hub.studies.conditions import Conditions as Conditions
from loram_hub.studies.conditions import stored_conditions as stored_conditions
from loram_hub.studies.figures import study_pictures
from loram_hub.studies.grid import Cell, cells_of
from loram_hub.studies.labels import plural
from loram_hub.studies.latex import latex_table
from loram_hub.studies.markdown import markdown_table, markdown_text
from loram_hub.studies.paper import paper_table
from loram_hub.studies.plots import Picture
from loram_hub.studies.records import CELLS, RESULTS, Row, read_rows, write_rows
from loram_hub.studies.specification import Study
from loram_hub.studies.tables import Table, study_tables

PAGE, TABLES_MD, TABLES_TEX = "README.md", "tables.md", "tables.tex"
_HEADINGS = {
    "losses": "All losses",
    "recovery": "With and without recovery and alignment",
    "ratios": "Over the ratio",
    "steps": "Over the steps of alignment",
    "domains": "Across domains",
    "cost": "Cost",
}


def write_results(
    study: Study, work_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, profile: str | None = None
) -> Path:
    """Write the page of a study, with its rows, tables and figures.

    Args:
        study: the study that was run, as `read_study` returned it.
        work_dir: the work folder of `run_study`.
        out_dir: folder for `README.md`, `results.jsonl`, `conditions.json`, `tables.md`, `tables.tex` and figures;
            files of these names are replaced.
        profile: the profile that the study was read with, for its command.

    Returns:
        The path of the page.

    Raises:
        InvalidRequestError: the study has not been run there.
        VerificationError: a row or the record of its cell is missing or damaged.
        MissingDependencyError: matplotlib is not installed.
        ResourceError: the folder cannot be written.
    """
    work = Path(work_dir).expanduser()
    file = work / study.name / RESULTS
    if not file.is_file():
        raise InvalidRequestError(f"{work} has no results of the study {study.name}. Run it there first.")
    rows = read_rows(file)
    conditions = read_conditions(work / CELLS, rows, study, profile=profile)
    return _write(Path(out_dir).expanduser(), rows, render_results(study, rows, conditions), conditions)


def write_page(study: Study, out_dir: str | os.PathLike[str]) -> Path:
    """Write the page of a study anew, from the rows and conditions in its folder; nothing is measured.

    Args:
        study: the study that was run; but for the wording of its page (title, question, mirrors, shows) it has to be
            the one of the folder.
        out_dir: a folder that `write_results` has written.

    Returns:
        The path of the page.

    Raises:
        IncompatibleError: the folder has the results of another study or profile.
        VerificationError: rows or conditions are missing or damaged.
        MissingDependencyError: matplotlib is not installed.
        ResourceError: the folder cannot be written.
    """
    folder = Path(out_dir).expanduser()
    rows = read_rows(folder)
    conditions = replace(stored_conditions(folder, study), study=study_values(study))
    return _write(folder, rows, render_results(study, rows, conditions), conditions)


def render_results(study: Study, rows: Sequence[Row], conditions: Conditions) -> dict[str, bytes]:
    """Return the page of a study, its tables and figures, by name of the file.

    Args:
        study: the study.
        rows: its rows, in any order.
        conditions: under which they were measured.

    Raises:
        InvalidRequestError: there are no rows, or `shows` names what there is not.
        IncompatibleError: the rows do not belong together.
        MissingDependencyError: matplotlib is not installed.
    """
    results = gather(
        rows,
        planned=planned_cells(study),
        held_out=[one.name for one in study.held_out],
    )
    tables, pictures = study_tables(results, study.shows), study_pictures(results, study.shows)
    every = [table for group in tables.values() for table in group]
    markdown = "\n\n".join(markdown_table(table) for table in every)
    latex = "\n\n".join(latex_table(table, study=study.name) for table in every)
    page = "\n".join(_page(study, results, conditions, tables, pictures))
    texts = {PAGE: page, TABLES_MD: f"# {study.title}: tables\n\n{markdown}\n", TABLES_TEX: f"{latex}\n"}
    drawn = {f"{picture.name}.png": picture.png for group in pictures.values() for picture in group}
    return {name: text.encode() for name, text in texts.items()} | drawn


def planned_cells(study: Study) -> list[tuple[Setting, int]]:
    """Return every cell that a study is to have, as its setting and its seed."""
    return [(_setting(cell), cell.seed) for cell in cells_of(study)]


def _write(folder: Path, rows: Sequence[Row], files: Mapping[str, bytes], conditions: Conditions) -> Path:
    with resource_errors(f"Writing {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / RESULTS, rows)
    write_text(folder / CONDITIONS, conditions.to_json())
    for name, content in files.items():
        write_bytes(folder / name, content)
    return folder / PAGE


def _setting(cell: Cell) -> Setting:
    return Setting(
        kind=cell.kind,
        method="" if cell.method is None else cell.method.method,
        ratio=cell.ratio,
        importance="" if cell.method is None else cell.method.scoring,
        pattern="" if cell.method is None else cell.method.kept,
        alignment_steps=cell.alignment_steps,
        quantization="" if cell.quantization == "none" else cell.quantization,
        masked=cell.masked,
        data=cell.data,
    )


def _page(
    study: Study,
    results: Results,
    conditions: Conditions,
    tables: Mapping[str, Sequence[Table]],
    pictures: Mapping[str, Sequence[Picture]],
) -> Iterator[str]:
    yield from (f"# {study.title}", "", study.question, "")
    yield f"It mirrors {study.mirrors} of the LoRAM paper (arXiv 2502.13533), at another size:"
    yield from ("[what differs](#what-differs-from-the-paper). The page is generated from `results.jsonl`.", "")
    yield from ("## How it was run", "", "```sh", conditions.command, "```", "")
    yield from (f"- {line}" for line in (*budget_lines(study, results), *_machine_lines(conditions)))
    yield from ("", "## What shows", "")
    yield from _claims(judge(results, costs=about_costs(study.name, study.shows)))
    for name, group in tables.items():
        yield from ("", f"## {_HEADINGS[name]}", "")
        for picture in pictures.get(name, ()):
            yield from (f"![{markdown_text(picture.alt)}]({picture.name}.png)", "")
        yield "\n\n".join(markdown_table(table) for table in group)
    yield from ("", "## What differs from the paper", "")
    yield from (f"- {line}" for line in difference_lines(study))
    printed = paper_table(study.name)
    if printed is not None:
        yield from ("", "## What the paper prints", "", "Not measured here.", "", markdown_table(printed))
    yield from ("", "## Files", "")
    yield from _file_lines()


def _claims(judgements: Sequence[Judgement]) -> Iterator[str]:
    """State every claim with its verdict, then the numbers that the verdicts follow from."""
    measured = [one for one in judgements if one.verdict != "not measured"]
    yield from (f"- {one}" for one in measured)
    left = [CLAIMS[one.claim].rstrip(".") for one in judgements if one.verdict == "not measured"]
    if left:
        yield f"- Not measured here: {'; '.join(left)}."
    yield from (
        "",
        "A claim shows in a setting where every seed agrees with it, on the held-out set that is in domain for the",
    )
    yield "training data. Milder ratios are the lower half of a method's ratios, the middle one included, where this"
    yield "study has several."
    if measured:
        yield from ("", "<details><summary>The numbers, setting by setting</summary>", "")
        yield from ("| claim | setting | held-out set | verdict | numbers |", "|---|---|---|---|---|")
        for one in measured:
            for finding in one.findings:
                if finding.verdict == "not measured" or one.claim == MILDER:  # which stands there, with all ratios
                    continue
                cells = (finding.claim, finding.setting, finding.held_out, finding.verdict, finding.numbers)
                yield f"| {' | '.join(markdown_text(cell) for cell in cells)} |"
        yield from ("", "</details>")


def _machine_lines(conditions: Conditions) -> Iterator[str]:
    for machine in conditions.machines:
        gpu = f", {markdown_text(str(machine['gpu']))}" if machine.get("gpu") else ""
        cores, threads = machine.get("cpus"), machine.get("threads")
        system = f"{machine.get('system')} on {machine.get('processor')}"
        yield f"Machine: {markdown_text(system)}, {plural(cores or 0, 'core')}, {plural(threads or 0, 'thread')}{gpu}."
    for versions in conditions.versions:
        named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        yield f"Versions: {markdown_text(named)}."
    yield f"All cells took {_time(conditions.seconds)} together; the machine may have had other work."


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _file_lines() -> tuple[str, ...]:
    return (
        f"- [`{RESULTS}`]({RESULTS}): every measured loss, one for each cell, model and held-out set",
        f"- [`{CONDITIONS}`]({CONDITIONS}): the study as it was run, command, machine and versions",
        f"- [`{TABLES_MD}`]({TABLES_MD}), [`{TABLES_TEX}`]({TABLES_TEX}): the tables alone, for reading and for papers "
        "(booktabs)",
        "",
    )
