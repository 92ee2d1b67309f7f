"""Sections about studies: their claims, tables and figures, as `loram_hub.studies` makes them of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from loram_hub.cards.escaping import visible
from loram_hub.reporting.contents import Figure, Part, Section, Table
from loram_hub.reporting.facts import Facts, StudyFacts
from loram_hub.reporting.wording import MISSING
from loram_hub.studies.aggregation import Results
from loram_hub.studies.cells import Entry
from loram_hub.studies.claims import CLAIMS, about_costs, judge
from loram_hub.studies.figures import study_pictures
from loram_hub.studies.markdown import spread_text
from loram_hub.studies.plots import Picture
from loram_hub.studies.tables import Table as StudyTable
from loram_hub.studies.tables import study_tables


def study_sections(facts: Facts) -> tuple[Section, ...]:
    """Return a section per study; without a study none, for studies are of several trainings and stand apart."""
    return tuple(
        Section(
            id=f"study-{idx}",
            title=f"Study {visible(study.name)}",
            parts=tuple(_parts(study, idx)),
            hint="The study has no rows yet: run it.",
            command="loram study STUDY --work-dir DIR",
        )
        for idx, study in enumerate(facts.studies, start=1)
    )


def _parts(study: StudyFacts, idx: int) -> Iterator[Part]:
    results = study.results
    yield _claims(results, about_costs(results.study, study.shows))
    shows = study.shows or ()
    pictures = study_pictures(results, shows)
    for name, tables in study_tables(results, shows).items():
        yield _part(results, name, tables, pictures.get(name, ()), idx)


def _claims(results: Results, costs: bool) -> Part:
    """Return the claims that are judged by the rows, and what each verdict follows from."""
    judged = [judgement for judgement in judge(results, costs=costs) if judgement.findings]
    verdicts = [(CLAIMS[one.claim], str(one).removeprefix(CLAIMS[one.claim]).strip()) for one in judged]
    evidence = [
        (finding.claim, finding.setting, finding.held_out or MISSING, finding.verdict, finding.numbers)
        for one in judged
        for finding in one.findings
    ]
    tables = (
        Table(
            caption="What the numbers of this study say of the claims",
            header=("claim", "verdict"),
            rows=tuple(verdicts),
            is_words=True,
        ),
        Table(
            caption="What the verdicts follow from",
            header=("claim", "setting", "held-out set", "verdict", "numbers"),
            rows=tuple(evidence),
            is_words=True,
            is_folded=True,
        ),
    )
    return Part(title="Claims", tables=tables if judged else ())


def _part(results: Results, name: str, tables: tuple[StudyTable, ...], pictures: tuple[Picture, ...], idx: int) -> Part:
    shown = tuple(_table(table) for table in tables)
    return Part(
        title=name.capitalize(),
        paragraphs=tuple(dict.fromkeys(table.note for table in tables)),
        tables=shown,
        figures=tuple(
            Figure(
                name=f"study-{idx}-{picture.name}",
                alt=picture.alt,
                caption=f"{shown[min(at, len(shown) - 1)].caption} Points are seeds, bars standard deviations.",
                table=shown[min(at, len(shown) - 1)],
                draw=partial(bytes, picture.png),
            )
            for at, picture in enumerate(pictures)
        ),
    )


def _table(table: StudyTable) -> Table:
    return Table(
        caption=table.caption,
        header=table.columns,
        rows=tuple(tuple(_text(entry) for entry in row) for row in table.rows),
    )


def _text(entry: Entry) -> str:
    if entry.value is None:
        return "missing"
    return entry.value if isinstance(entry.value, str) else spread_text(entry)
