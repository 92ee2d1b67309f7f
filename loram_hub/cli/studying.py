"""`loram study`: the paper's tables and figures, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loram_hub.cli.group import main
from loram_hub.cli.options import json_option
from loram_hub.cli.output import print_result, print_table, suggest

if TYPE_CHECKING:
    from loram_hub.studies import Study, StudyPreview, StudyResult


@main.command(name="study", epilog="Example: loram study necessity --profile quick --work-dir work --out results")
@click.argument("study")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    help="Folder for cells, releases and runs; finished cells in it are not run again.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write page, tables and figures to this folder.")
@click.option("--profile", help="Take this profile of the study, as in --profile quick.")
@click.option("--seed", "seeds", type=int, multiple=True, help="Run this seed alone; may be given again. Default: all.")
@click.option(
    "--only", help="Run the cells with this text in their labels alone, as in --only 'stru 0.7'; see --dry-run."
)
@click.option("--keep-releases", is_flag=True, help="Keep releases that no unfinished cell needs; they are large.")
@click.option("--token", help="Hub token; by default HF_TOKEN, or the one you are logged in with.")
@click.option("--dry-run", is_flag=True, help="Say which cells would be run, without running them.")
@json_option
def study(
    study: str,
    work_dir: Path | None,
    out: Path | None,
    profile: str | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Run STUDY, a YAML file or a ready-made study: methods, necessity, ratios, steps, cost or domains.

    Every cell is pruned, aligned, fine-tuned, recovered and measured; run it again after an interruption, and it goes
    on. With --out alone, the page in that folder is written anew from the rows that lie there; STUDY and --profile have
    to be those that were run.
    """
    from loram_hub.studies import read_study

    chosen = read_study(study, profile=profile)
    if work_dir is None:
        _write_again(chosen, out, as_json)
    elif dry_run:
        from loram_hub.studies import check_study

        given = {name: options[name] for name in ("seeds", "only", "token")}
        preview = check_study(chosen, work_dir, **given | {"seeds": given["seeds"] or None})
        print_result(_preview(preview), as_json, lambda: _print_preview(preview))
    else:
        from loram_hub.studies import run_study

        result = run_study(chosen, work_dir, **options | {"seeds": options["seeds"] or None})
        page = _page(chosen, work_dir, out, profile)
        print_result(_result(result, page), as_json, lambda: _print_result(result, page))


def _write_again(study: Study, out: Path | None, as_json: bool) -> None:
    from loram_hub.studies.pages import write_page

    if out is None:
        raise click.UsageError("Give --work-dir to run the study, or --out to write a finished one's page anew.")
    page = write_page(study, out)
    print_result({"page": str(page)}, as_json, lambda: click.echo(f"Wrote {page}"))


def _page(study: Study, work_dir: Path, out: Path | None, profile: str | None) -> Path | None:
    from loram_hub.studies.pages import write_results

    return None if out is None else write_results(study, work_dir, out, profile=profile)


def _preview(preview: StudyPreview) -> dict[str, Any]:
    return {
        "study": preview.study.name,
        "folder": str(preview.folder),
        "finished": list(preview.finished),
        "missing": list(preview.missing),
    }


def _print_preview(preview: StudyPreview) -> None:
    states = [(label, "finished") for label in preview.finished] + [(label, "to run") for label in preview.missing]
    print_table(("cell", "state"), states)


def _result(result: StudyResult, page: Path | None) -> dict[str, Any]:
    return {
        "study": result.study.name,
        "folder": str(result.folder),
        "cells": result.cells,
        "made": result.made,
        "missing": result.missing,
        "rows": [row.to_dict() for row in result.rows],
        "page": None if page is None else str(page),
    }


def _print_result(result: StudyResult, page: Path | None) -> None:
    from loram_hub.studies.aggregation import gather
    from loram_hub.studies.claims import about_costs, judge

    costs = about_costs(result.study.name, result.study.shows)
    click.echo(f"{result.cells - result.missing} of {result.cells} cells are there, {result.made} of them new.")
    for judgement in judge(gather(result.rows), costs=costs):
        if judgement.verdict != "not measured":
            click.echo(str(judgement))
    if page is not None:
        click.echo(f"Wrote {page}")
    else:
        suggest("loram study", result.study.name, "--work-dir", result.folder, "--out", "results")
