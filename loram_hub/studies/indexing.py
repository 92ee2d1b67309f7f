"""The page above the pages of studies: what was asked, what shows, and the command that gives it again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from loram_hub.errors import InvalidRequestError
from loram_hub.files import write_text
from loram_hub.studies.aggregation import gather
from loram_hub.studies.claims import about_costs, judge
from loram_hub.studies.conditions import stored_conditions
from loram_hub.studies.labels import plural
from loram_hub.studies.pages import PAGE, planned_cells
from loram_hub.studies.records import RESULTS, read_rows
from loram_hub.studies.specification import read_study, ready_studies


def write_index(folder: str | os.PathLike[str]) -> Path:
    """Write `README.md` above the results of ready-made studies, each in a folder of its name.

    Args:
        folder: as `docs/results` of this project; its other folders are left alone.

    Returns:
        The path of the page.

    Raises:
        InvalidRequestError: there are no results.
        IncompatibleError: a ready-made study is not what it was when it was run.
        VerificationError: rows or conditions are damaged.
        ResourceError: the page cannot be written.
    """
    place = Path(folder).expanduser()
    text = index_page(place)
    write_text(place / PAGE, text)
    return place / PAGE


def index_page(folder: Path) -> str:
    """Return the page above the results of ready-made studies; see `write_index`."""
    names = [name for name in ready_studies() if (folder / name / RESULTS).is_file()]
    if not names:
        raise InvalidRequestError(f"{folder} has no results of a ready-made study. Write some with 'loram study'.")
    lines = [
        "# Results",
        "",
        "Studies that were run, each with the untouched base, plain LoRA on the base, and LoRA on only those layers of",
        "the base that structured pruning leaves whole. A claim shows where every seed agrees with it. The pages are",
        "generated from the `results.jsonl` beside them; the commands give the numbers again.",
    ]
    return "\n".join([*lines, *(line for name in names for line in _section(folder, name)), ""])


def _section(folder: Path, name: str) -> Iterator[str]:
    conditions = stored_conditions(folder / name)
    study = read_study(name, profile=conditions.profile)
    stored_conditions(folder / name, study)
    results = gather(read_rows(folder / name), planned=planned_cells(study))
    there, count = len(results.planned) - len(results.missing(results.settings())), len(results.planned)
    yield from ("", f"## [{study.title}]({name}/{PAGE})", "", study.question, "")
    judged = judge(results, costs=about_costs(name, study.shows))
    yield from (f"- {judgement}" for judgement in judged if judgement.verdict != "not measured")
    yield f"- {there} of {plural(count, 'cell')}, {plural(len(results.seeds), 'seed')}: `{conditions.command}`"
