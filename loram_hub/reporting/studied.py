"""What a report says of a study: its rows, and under what conditions they were measured."""

from __future__ import annotations

from pathlib import Path

from loram_hub.reporting.facts import StudyFacts
from loram_hub.studies.aggregation import gather
from loram_hub.studies.conditions import CONDITIONS, Conditions, read_conditions, stored_conditions, stored_shows
from loram_hub.studies.records import CELLS, read_rows


def study_facts(folder: Path, *, name: str) -> StudyFacts:
    """Read the rows of a study, from its work folder or from where its page was written.

    Raises:
        VerificationError: a row, or the record of its conditions, is damaged.
    """
    rows = read_rows(folder)
    conditions: Conditions | None = None
    is_page = (folder / CONDITIONS).is_file()
    if is_page:
        conditions = stored_conditions(folder)
    elif rows and all((folder.parent / CELLS / f"{row.cell}.json").is_file() for row in rows):
        conditions = read_conditions(folder.parent / CELLS, rows, profile=None)
    return StudyFacts(
        name=name, results=gather(rows), shows=stored_shows(folder), conditions=conditions, has_command=is_page
    )
