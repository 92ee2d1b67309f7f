"""Tables, claims and pages of a study are what its rows give, computed here once more by plain means."""

from __future__ import annotations

import html
import json
import math
import random
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pipeline_materials import save_tiny_base, some_texts
from study_rows import BASE_LOSS, BASE_PARAMETERS, study_rows

from loram_hub.cli.studying import study as study_command
from loram_hub.errors import IncompatibleError, InvalidRequestError, VerificationError
from loram_hub.reporting import report
from loram_hub.studies import Row, line_figures, read_study, ready_studies, row_figures
from loram_hub.studies.aggregation import Setting, gather
from loram_hub.studies.claims import CLAIMS, Judgement, about_costs, judge
from loram_hub.studies.conditions import Conditions, stored_shows, study_values
from loram_hub.studies.indexing import index_page, write_index
from loram_hub.studies.latex import latex_table, latex_text
from loram_hub.studies.markdown import markdown_table
from loram_hub.studies.pages import render_results, write_page, write_results
from loram_hub.studies.specification import Study
from loram_hub.studies.tables import PARTS, Table, shown_parts, study_tables

RESULTS_FOLDER = Path(__file__).parents[1] / "docs" / "results"
FINAL = "base + recovered adapter"
ROWS = study_rows()
STUDY = read_study("necessity", profile="quick")
HOSTILE = r"a_b & 50% #1 $x$ {y} ~^ | <b> `c` \d"
TINY_STUDY = """
name: tiny
title: Tiny
question: Does it run?
mirrors: nothing
base: ./base
seeds: [1, 2]
keep_first: 1
keep_last: 2
methods: [{method: rand, ratios: [0.5]}]
data: [{name: pairs, train: [{source: ./tasks.jsonl}]}]
held_out: [{name: pairs, source: ./held_out.jsonl, of: pairs, max_tokens: 32}]
lora: {dropout: 0.0}
training: {steps: 1, batch_size: 2, micro_batch: 2, max_tokens: 32}
shows: [losses]
"""
CONDITIONS = Conditions(
    study=study_values(STUDY),
    profile="quick",
    machines=({"system": "Linux", "processor": "x86_64", "cpus": 2, "threads": 2, "gpu": None},),
    versions=({"python": "3.12.1", "torch": "2.13.0"},),
    seconds=7200.0,
)


def loss(seed: int, model: str = FINAL, held_out: str = "held-out tasks", **cell: Any) -> float:
    """Look a loss up in the rows themselves."""
    wanted = {"seed": seed, "model": model, "held_out": held_out, **cell}
    (found,) = [row.loss for row in ROWS if all(getattr(row, key) == value for key, value in wanted.items())]
    return found


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def cells(table: Table, start: str) -> dict[str, str]:
    """Read a row of a table as it stands in Markdown, by heading."""
    lines = [line for line in markdown_table(table).splitlines() if line.startswith("|")]
    head, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    (row,) = [row for row in rows if row[0] == start]
    return dict(zip(head, row, strict=True))


def all_tables(rows: Sequence[Row], **options: Any) -> list[Table]:
    found = [table for group in study_tables(gather(rows, **options)).values() for table in group]
    assert found
    return found


def named(rows: Sequence[Row], name: str, **options: Any) -> Table:
    (found,) = [table for table in all_tables(rows, **options) if table.name == name]
    return found


STRU = {"kind": "loram", "method": "stru", "ratio": 0.7, "alignment_steps": 12}
STRU_NAME = "Stru 0.7, 12 alignment steps"


def test_losses_are_means_and_deviations_over_the_seeds() -> None:
    row = cells(named(ROWS, "losses-held-out-tasks"), STRU_NAME)

    assert row["before fine-tuning"] == spread([loss(seed, "pruned", **STRU) for seed in range(3)])
    assert row["with the adapter, not recovered"] == spread([loss(s, "pruned + adapter", **STRU) for s in range(3)])
    assert row["base + recovered"] == f"**{spread([loss(seed, **STRU) for seed in range(3)])}**"
    assert row["parameters"] == f"{next(r for r in ROWS if r.ratio == 0.7).parameters / 1e6:.1f} M"
    assert row["seeds"] == "3"


@pytest.mark.parametrize(("name", "cell"), [(STRU_NAME, STRU), ("LoRA on the whole layers", {"kind": "whole layers"})])
def test_the_share_of_plain_loras_gain_is_taken_seed_by_seed(name: str, cell: dict[str, Any]) -> None:
    shares = [(BASE_LOSS - loss(seed, **cell)) / (BASE_LOSS - loss(seed, kind="plain")) for seed in range(3)]

    assert cells(named(ROWS, "losses-held-out-tasks"), name)["share of plain LoRA's gain"] == spread(shares, 2)


def test_where_plain_lora_gains_nothing_there_is_no_share() -> None:
    assert min(loss(seed, held_out="texts", kind="plain") for seed in range(3)) > 3.0

    row = cells(named(ROWS, "losses-texts"), STRU_NAME)

    assert row["share of plain LoRA's gain"] == "no gain to share"


def test_recovery_and_alignment_are_compared_seed_by_seed() -> None:
    row = cells(named(ROWS, "recovery-held-out-tasks"), STRU_NAME)

    unaligned = STRU | {"alignment_steps": 0}
    assert row["neither"] == spread([loss(seed, "pruned + adapter", **unaligned) for seed in range(3)])
    assert row["recovered, not aligned"] == spread([loss(seed, **unaligned) for seed in range(3)])
    recovery = [loss(seed, **STRU) - loss(seed, "pruned + adapter", **STRU) for seed in range(3)]
    assert row["recovery brings"] == spread(recovery, sign="+")
    alignment = [loss(seed, **STRU) - loss(seed, **unaligned) for seed in range(3)]
    assert row["alignment brings"] == spread(alignment, sign="+")


def test_perplexity_and_reduction_stand_over_the_ratio() -> None:
    row = cells(named(ROWS, "ratios-held-out-tasks"), STRU_NAME)

    assert row["its perplexity"] == spread([math.exp(loss(seed, **STRU)) for seed in range(3)], 2)
    assert row["times fewer"] == f"{BASE_PARAMETERS / int(BASE_PARAMETERS * (1 - 0.7 * 0.7)):.2f}"


def test_costs_are_those_of_the_cells() -> None:
    row = cells(named(ROWS, "cost"), STRU_NAME)

    found = {r.seed: r for r in ROWS if all(getattr(r, key) == value for key, value in STRU.items())}
    assert row["peak memory (MB)"] == spread([(found[seed].peak_memory_bytes or 0) / 1e6 for seed in range(3)], 0)
    assert row["fine-tuning (s)"] == spread([found[seed].tuning_seconds or 0 for seed in range(3)], 1)


def test_every_training_set_is_measured_on_every_held_out_set() -> None:
    rows = study_rows(data=("tasks", "sums"), methods={"stru": (0.7,)}, steps=(12,))

    row = cells(named(rows, "domains"), "Stru 0.7, sums")

    for held_out in ("held-out tasks", "held-out sums", "texts"):
        losses = [
            r.loss
            for r in rows
            if (r.held_out, r.data, r.method, r.model) == (held_out, "sums", "stru", FINAL)
        ]  # fmt: skip
        assert row[held_out] == f"**{spread(losses)}**"


@pytest.mark.parametrize("part", PARTS)
def test_every_table_has_the_three_controls(part: str) -> None:
    rows = study_rows(data=("sums", "tasks"))

    tables = study_tables(gather(rows), [part])[part]

    for table in tables:
        first = [str(row[0].value) for row in table.rows]
        assert first[0] == "base untouched"
        assert {"plain LoRA on the base, sums", "LoRA on the whole layers, sums"} <= set(first)


@settings(max_examples=10)
@given(st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(order: random.Random) -> None:
    rows = study_rows(seeds=(0, 1), methods={"rand": (0.5,), "stru": (0.5,)}, steps=(0, 4))
    shuffled = order.sample(rows, len(rows))

    assert [*map(markdown_table, all_tables(shuffled))] == [*map(markdown_table, all_tables(rows))]
    assert judge(gather(shuffled)) == judge(gather(rows))


def without(rows: Sequence[Row], **cell: Any) -> list[Row]:
    return [row for row in rows if not all(getattr(row, key) == value for key, value in cell.items())]


def test_a_missing_seed_changes_what_it_is_the_mean_of_and_is_named() -> None:
    table = named(without(ROWS, seed=2, **STRU), "losses-held-out-tasks")

    row = cells(table, STRU_NAME)
    assert row["seeds"] == "2"
    assert row["base + recovered"] == f"**{spread([loss(seed, **STRU) for seed in (0, 1)])}**"
    cell_count = 1 + 3 * (2 + 5 * 3)
    assert f"{cell_count - 1} of {cell_count} cells" in table.note
    assert f"missing: {STRU_NAME} with seed 2." in table.note


def test_differences_leave_out_seeds_that_one_side_lacks() -> None:
    rows = without(ROWS, seed=2, **(STRU | {"alignment_steps": 0}))

    row = cells(named(rows, "recovery-held-out-tasks"), STRU_NAME)

    change = [loss(seed, **STRU) - loss(seed, **STRU | {"alignment_steps": 0}) for seed in (0, 1)]
    assert row["alignment brings"] == f"{spread(change, sign='+')} (2 of 3 seeds)"


def test_a_planned_cell_that_is_not_there_is_missing_and_never_zero() -> None:
    rows = without(ROWS, **STRU)
    planned = [(Setting(data="tasks", importance="taylor", **STRU), seed) for seed in range(3)]

    table = named(rows, "losses-held-out-tasks", planned=planned)

    row = cells(table, STRU_NAME)
    assert row["seeds"] == "0"
    numbers = ("parameters", "before fine-tuning", "base + recovered", "share of plain LoRA's gain")
    assert {row[column] for column in numbers} == {"missing"}
    assert r"\textit{missing}" in latex_table(table)


def test_one_seed_has_no_deviation() -> None:
    rows = study_rows(seeds=(3,))

    row = cells(named(rows, "losses-held-out-tasks"), STRU_NAME)

    assert re.fullmatch(r"\*\*\d\.\d{3}\*\*", row["base + recovered"])


def test_qlora_is_measured_against_plain_lora_on_the_base_as_it_is() -> None:
    rows = study_rows(quantizations=("", "nf4"), methods={"stru": (0.7,)}, steps=(0,))
    results = gather(rows)
    (setting,) = [one for one in results.settings("loram") if one.quantization == "nf4"]
    plain = next(one for one in results.settings("plain") if not one.quantization)

    gains = results.gains(setting, "held-out tasks")

    against = results.gains(plain, "held-out tasks")
    assert results.shares(setting, "held-out tasks") == {seed: gains[seed] / against[seed] for seed in (0, 1, 2)}
    assert "Stru 0.7, NF4" in markdown_table(study_tables(results)["losses"][0])


def changed(rows: Sequence[Row], which: Callable[[Row], bool], **values: Any) -> list[Row]:
    """Change the last of the rows that are meant, one of a cell that was trained."""
    last = [row for row in rows if row.kind == "loram" and which(row)][-1]
    return [replace(row, **values) if row == last else row for row in rows]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*rows, rows[-1]], "twice"),
        (lambda rows: [*rows[:-1], replace(rows[-1], study="another")], "another"),
        (lambda rows: [*rows[:-1], replace(rows[-1], tokens=999)], "1,000 tokens in one cell and 999"),
        (lambda rows: [*rows[:-1], replace(rows[-1], cell="0123456789ab")], "0123456789ab"),
        (lambda rows: changed(rows, lambda row: row.held_out == "held-out tasks", in_domain=False), "in domain"),
        (lambda rows: changed(rows, lambda row: row.in_domain, data="sums"), "in domain"),
    ],
    ids=["a row twice", "two studies", "other tokens", "two cells", "in domain for some", "in domain for two"],
)
def test_rows_that_do_not_belong_together_are_refused(change: Callable[[list[Row]], list[Row]], said: str) -> None:
    with pytest.raises(IncompatibleError, match=said):
        gather(change(ROWS))


def test_no_rows_are_no_study() -> None:
    with pytest.raises(InvalidRequestError, match="no rows yet"):
        gather([])


def test_the_untouched_base_does_not_say_what_a_held_out_set_is_in_domain_for() -> None:
    rows = [replace(row, in_domain=True) if row.kind == "base" else row for row in ROWS]

    assert gather(rows).in_domain == gather(ROWS).in_domain == {"held-out tasks": "tasks", "texts": None}


def judged(rows: Sequence[Row], claim: str) -> Judgement:
    return next(one for one in judge(gather(rows)) if one.claim == claim)


def moved(rows: Sequence[Row], by: float, **cell: Any) -> list[Row]:
    """Raise the losses of some rows."""
    return [
        replace(row, loss=row.loss + by) if all(getattr(row, key) == value for key, value in cell.items()) else row
        for row in rows
    ]


STRU_FINAL = {**STRU, "model": FINAL, "seed": 1}


@pytest.mark.parametrize(
    ("claim", "rows", "ratio"),
    [
        ("beats the base", moved(ROWS, 1, kind="base"), 0.7),
        ("beats the base, milder", moved(ROWS, 1, kind="base"), 0.35),
        ("recovery", ROWS, 0.7),
        ("alignment", moved(ROWS, 1, alignment_steps=0, model=FINAL), 0.7),
        ("longer alignment", moved(ROWS, 1, alignment_steps=4, model=FINAL), 0.7),
        ("importance", moved(ROWS, 1, method="rand", model=FINAL), 0.7),
        ("whole layers", moved(ROWS, 1, kind="whole layers", model=FINAL), 0.7),
    ],
    ids=["base", "milder", "recovery", "alignment", "longer", "importance", "whole layers"],
)
def test_a_claim_shows_only_where_every_seed_agrees(claim: str, rows: list[Row], ratio: float) -> None:
    shown, refuted = judged(rows, claim), judged(moved(rows, 9, **STRU_FINAL | {"ratio": ratio}), claim)

    assert shown.findings
    assert {finding.verdict for finding in shown.findings} == {"shows"}
    assert re.search(r"This shows in (both|all \d+) settings measured \(3 seeds\)", str(shown))
    assert refuted.verdict == "does not show"
    (against,) = [finding for finding in refuted.findings if finding.verdict == "does not show"]
    assert against.setting == f"Stru {ratio:g}, 12 alignment steps"
    assert "lower at 2 of 3 seeds" in against.numbers


def test_the_numbers_of_a_verdict_are_those_of_the_rows() -> None:
    (finding,) = [one for one in judged(ROWS, "importance").findings if one.setting == STRU_NAME]

    stru = [loss(seed, **STRU) for seed in range(3)]
    rand = [loss(seed, **STRU | {"method": "rand"}) for seed in range(3)]
    change = spread([first - second for first, second in zip(stru, rand, strict=True)], sign="+")
    lower = sum(first < second for first, second in zip(stru, rand, strict=True))
    assert finding.numbers == (
        f"{statistics.mean(stru):.3f} against {statistics.mean(rand):.3f} nats: {change}, lower at {lower} of 3 seeds"
    )


def test_costs_are_judged_against_plain_lora() -> None:
    slower = [replace(row, tuning_seconds=1e6) if row.kind == "loram" else row for row in ROWS]

    assert judged(ROWS, "memory").verdict == "shows"
    assert judged(slower, "time").verdict == "does not show"


def test_one_ratio_of_a_method_is_no_milder_one() -> None:
    rows = study_rows(methods={"rand": (0.7,), "stru": (0.35, 0.7)}, steps=(0,))

    milder = judged(rows, "beats the base, milder")

    assert [finding.setting for finding in milder.findings] == ["Stru 0.35"]
    assert not judged(study_rows(methods={"unst": (0.55,)}), "beats the base, milder").findings


def test_ways_of_scoring_and_patterns_are_settings_of_their_own() -> None:
    rows = study_rows(methods={"rand": (0.7,), "stru": (0.7,), "semi": (None,)}, steps=(0,))
    other = {"stru": {"importance": "magnitude"}, "semi": {"pattern": "2:4"}}
    others = [
        replace(row, **other[row.method], cell=row.cell[::-1], loss=row.loss + 1) for row in rows if row.method in other
    ]

    table = named([*rows, *others], "losses-held-out-tasks")

    names = [str(row[0].value) for row in table.rows][3:]
    assert names == ["Rand 0.7", "Stru (magnitude) 0.7", "Stru (taylor) 0.7", "Semi 2:4", "Semi 4:8"]
    means = {name: float(cells(table, name)["base + recovered"].strip("*").partition(" ")[0]) for name in names}
    assert means["Stru (magnitude) 0.7"] == pytest.approx(means["Stru (taylor) 0.7"] + 1, abs=2e-3)
    assert means["Semi 2:4"] == pytest.approx(means["Semi 4:8"] + 1, abs=2e-3)
    about = judged([*rows, *others], "importance").findings
    assert {finding.setting for finding in about} == {"Stru (magnitude) 0.7", "Stru (taylor) 0.7"}


def test_what_was_not_measured_is_said_to_be_not_measured() -> None:
    controls_alone = [row for row in ROWS if row.kind != "loram"]

    verdicts = {one.claim: one.verdict for one in judge(gather(controls_alone))}

    assert verdicts == dict.fromkeys(CLAIMS, "not measured")
    assert judged(without(ROWS, method="rand"), "importance").verdict == "not measured"
    assert str(judged(without(ROWS, method="rand"), "importance")).endswith("Not measured here.")


def hostile_rows() -> list[Row]:
    rows = study_rows(data=(HOSTILE, "sums"), steps=(0, 4))
    return without(rows, method="stru", seed=1)


def test_latex_tables_are_balanced_and_as_wide_as_their_heads() -> None:
    for table in all_tables(hostile_rows()):
        text = latex_table(table, study="x")
        for environment in ("table", "tabular"):
            assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}") == 1
        body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) == len(table.rows) + 1
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(table.columns) - 1}
        assert not re.findall(r"(?<!\\)[%#_]", text.replace(r"\label{tab:x-" + table.name, ""))
        assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
        assert len(re.findall(r"(?<!\\)\{", text)) == len(re.findall(r"(?<!\\)\}", text))


def test_latex_escapes_every_character_that_is_a_command() -> None:
    assert latex_text(r"a\b{c}_%&#$~^") == (r"a\textbackslash{}b\{c\}\_\%\&\#\$\textasciitilde{}\textasciicircum{}")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX is installed")
def test_latex_tables_compile(tmp_path: Path) -> None:
    tables = "\n".join(latex_table(table) for table in all_tables(hostile_rows()))
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{tables}\end{{document}}"
    (tmp_path / "tables.tex").write_text(document, encoding="utf-8")

    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout[-2000:]


def test_markdown_tables_keep_their_columns_whatever_names_hold() -> None:
    for table in all_tables(hostile_rows()):
        tokens = MarkdownIt("commonmark").enable("table").parse(markdown_table(table))
        rows = [token for token in tokens if token.type == "tr_open"]
        assert len(rows) == len(table.rows) + 1
        places = [token for token in tokens if token.type in ("th_open", "td_open")]
        assert len(places) == len(rows) * len(table.columns)
        assert not [token for token in tokens for child in token.children or () if child.type == "html_inline"]


@pytest.mark.parametrize("name", sorted(ready_studies()))
def test_ready_made_studies_have_a_quick_profile_and_the_papers(name: str) -> None:
    default, quick, paper = (read_study(name, profile=profile) for profile in (None, "quick", "paper"))

    assert {default.name, quick.name, paper.name} == {name}
    assert (default.base, quick.base) == ("demo", "demo")
    assert paper.base.startswith("meta-llama/")
    assert paper.training.batch_size == 128
    assert quick.training.steps is not None
    assert quick.training.steps <= 4
    text = (Path(read_study.__code__.co_filename).parent / "ready" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "Nobody here has run it" in text


def test_the_ready_made_studies_are_those_of_the_paper() -> None:
    assert {"methods", "necessity", "ratios", "steps", "cost", "domains"} <= set(ready_studies())


def test_shows_chooses_tables_and_refuses_what_there_is_not() -> None:
    results = gather(ROWS)

    assert shown_parts(results) == ("losses", "recovery", "ratios", "steps", "cost")
    assert shown_parts(results, ("cost", "losses", "domains")) == ("losses", "cost")
    with pytest.raises(InvalidRequestError, match="'losess'"):
        shown_parts(results, ("losess",))


def quick_rows() -> list[Row]:
    """Make the rows that the quick profile of a ready-made study would give, without general text."""
    rows = study_rows(
        name="necessity", seeds=(0,), methods={"stru": (0.7,)}, steps=(0, 2), data=("docstrings",), other=None
    )
    return [replace(row, held_out="held-out docstrings") for row in rows]


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    """Lay out rows and records as `run_study` leaves them."""
    rows, work = quick_rows(), tmp_path / "work"
    (work / "cells").mkdir(parents=True)
    (work / "necessity").mkdir()
    lines = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    (work / "necessity" / "results.jsonl").write_text(lines, encoding="utf-8")
    names = {row.cell for row in rows}
    assert len(names) == 5
    for name in names:
        record = {"machine": CONDITIONS.machines[0], "versions": CONDITIONS.versions[0], "seconds": 7200 / len(names)}
        (work / "cells" / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    return work


def test_what_machines_say_of_themselves_is_shown_as_text() -> None:
    machine = {**CONDITIONS.machines[0], "gpu": "GPU <img src=x> `a` *b*"}
    conditions = replace(CONDITIONS, machines=(machine,), versions=({"torch": "<script>alert(1)</script>"},))

    page = render_results(losses_alone(STUDY), quick_rows(), conditions)["README.md"].decode()

    assert "<script>" not in page
    assert "<img" not in page
    assert "GPU &lt;img src=x&gt; \\`a\\` \\*b\\*." in page


def losses_alone(study: Study) -> Study:
    """Leave out figures that a test of texts does not look at."""
    return replace(study, shows=("losses",))


def test_a_page_says_what_was_run_and_what_shows(work_dir: Path, tmp_path: Path) -> None:
    page = write_results(losses_alone(STUDY), work_dir, tmp_path / "out", profile="quick").read_text(encoding="utf-8")

    assert page.startswith(f"# {STUDY.title}\n")
    command = "loram study necessity --profile quick --work-dir DIR --out DIR2"
    for text in (STUDY.question, f"\n{command}\n", "torch 2.13.0", "2 threads", "5 of 5 cells", "2.0 hours"):
        assert text in page
    for judgement in judge(gather(quick_rows()), costs=False):
        if judgement.verdict != "not measured":
            assert f"- {judgement}\n" in page
    assert CLAIMS["memory"] not in page
    assert "Not measured here: " in page
    (alt,) = re.findall(r"!\[(.*)\]\(losses-held-out-docstrings\.png\)", page)
    assert "base untouched 4.000" in alt
    assert "## What differs from the paper" in page
    assert str(tmp_path) not in page


def test_a_page_is_written_anew_from_its_own_folder_to_the_byte(work_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_results(losses_alone(STUDY), work_dir, out, profile="quick")
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "README.md").unlink()

    write_page(losses_alone(STUDY), out)

    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert set(first) == {
        "README.md", "conditions.json", "results.jsonl", "tables.md", "tables.tex", "losses-held-out-docstrings.png"
    }  # fmt: skip


def test_a_page_counts_the_cells_that_the_study_still_lacks() -> None:
    rows = without(quick_rows(), alignment_steps=2)

    page = render_results(losses_alone(STUDY), rows, CONDITIONS)["README.md"].decode()

    assert "4 of 5 cells are there" in page
    assert "missing: Stru 0.7, 2 alignment steps with seed 0" in page


@pytest.fixture
def written(work_dir: Path, tmp_path: Path) -> Path:
    """Return the folder of a page."""
    out = tmp_path / "results" / "necessity"
    write_results(losses_alone(STUDY), work_dir, out, profile="quick")
    return out


def test_rows_are_not_shown_under_another_study_or_profile(written: Path) -> None:
    before = {path.name: path.read_bytes() for path in written.iterdir()}

    with pytest.raises(IncompatibleError, match=r"training\.learning_rate was 0\.001, is 0\.1\. .*--profile quick"):
        write_page(replace(STUDY, training=replace(STUDY.training, learning_rate=0.1)), written)
    with pytest.raises(IncompatibleError, match=r"alignment\.steps\[1\] was 2, is 12; .* and \d+ more"):
        write_page(read_study("necessity"), written)
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before
    conditions = json.loads(before["conditions.json"])
    plain = study_values(read_study("necessity"))
    digest = Conditions(study=plain, profile=None, machines=(), versions=(), seconds=0).digest
    changed_text = json.dumps(conditions | {"study": plain, "digest": digest})
    (written / "conditions.json").write_text(changed_text, encoding="utf-8")
    with pytest.raises(IncompatibleError, match=r"another study or profile: .*was 32, is 2; "):
        write_index(written.parent)


def test_the_words_of_a_page_may_change(written: Path) -> None:
    page = write_page(replace(STUDY, title="Other words", shows=("losses", "cost")), written)

    assert page.read_text(encoding="utf-8").startswith("# Other words\n")
    assert stored_shows(written) == ("losses", "cost")


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("study"),
        lambda values: values.update(study=[]),
        lambda values: values["study"].update(seeds=[7]),
        lambda values: values["study"].update(shows=3),
        lambda values: values.update(profile=["quick"]),
        lambda values: values.update(profile="quick\n```\n<script>"),
        lambda values: values["study"].update(name="a`b"),
        lambda values: values.update(machines=[{"cpus": "two"}]),
        lambda values: values.update(versions=[3]),
        lambda values: values.update(seconds=-1),
    ],
    ids=["no study", "a list", "other seeds", "shows", "profile", "lines", "name", "machines", "versions", "seconds"],
)
def test_conditions_that_were_altered_are_refused(written: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((written / "conditions.json").read_text(encoding="utf-8"))
    change(values)
    (written / "conditions.json").write_text(json.dumps(values), encoding="utf-8")

    with pytest.raises(VerificationError, match=r"conditions\.json"):
        write_page(losses_alone(STUDY), written)


def test_costs_are_judged_where_the_study_is_about_them(written: Path) -> None:
    assert stored_shows(written) == ("losses",)
    (written / "conditions.json").unlink()
    assert stored_shows(written) is None
    assert [about_costs("necessity", shows) for shows in ((), ("losses", "cost"), ("losses",), None)] == [
        True, True, False, False
    ]  # fmt: skip
    assert about_costs("cost", None)


def test_a_report_shows_of_a_study_what_its_page_does(written: Path, tmp_path: Path) -> None:
    report([written], tmp_path / "page.html")
    (written / "conditions.json").unlink()
    report([written], tmp_path / "rows.html")

    page, rows = (html.unescape((tmp_path / name).read_text(encoding="utf-8")) for name in ("page.html", "rows.html"))
    assert CLAIMS["recovery"] in page
    assert CLAIMS["recovery"] in rows
    assert CLAIMS["memory"] not in page + rows
    about_memory = "What fine-tuning costs: the model that is trained on, peak memory, time."
    assert about_memory in rows
    assert about_memory not in page


def test_rows_without_their_records_make_no_page(work_dir: Path, tmp_path: Path) -> None:
    next((work_dir / "cells").iterdir()).unlink()

    with pytest.raises(VerificationError, match="missing"):
        write_results(STUDY, work_dir, tmp_path / "out")


def test_a_study_that_has_not_run_makes_no_page(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no results of the study necessity"):
        write_results(STUDY, tmp_path, tmp_path / "out")


def test_the_command_writes_a_finished_page_anew(work_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_results(STUDY, work_dir, out, profile="quick")
    page = (out / "README.md").read_bytes()
    (out / "README.md").unlink()

    done = CliRunner().invoke(study_command, ["necessity", "--profile", "quick", "--out", str(out), "--json"])

    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"page": str(out / "README.md")}
    assert (out / "README.md").read_bytes() == page


def test_the_command_runs_a_study_and_writes_its_page(tmp_path: Path) -> None:
    save_tiny_base(tmp_path / "base", dtype="float32")
    for name, seed in (("tasks", 5), ("held_out", 6)):
        pairs = [{"prompt": text[:20], "completion": text[20:]} for text in some_texts(8, seed=seed, words=8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(TINY_STUDY, encoding="utf-8")
    options = [str(tmp_path / "tiny.yaml"), "--work-dir", str(tmp_path / "work")]

    preview = CliRunner().invoke(study_command, [*options, "--dry-run", "--json"])
    assert preview.exit_code == 0, preview.output
    assert json.loads(preview.stdout)["missing"] == [
        "base untouched", "plain LoRA, pairs, seed 1", "LoRA on the whole layers, pairs, seed 1",
        "Rand 0.5, pairs, seed 1", "plain LoRA, pairs, seed 2", "LoRA on the whole layers, pairs, seed 2",
        "Rand 0.5, pairs, seed 2",
    ]  # fmt: skip

    done = CliRunner().invoke(study_command, [*options, "--seed", "1", "-o", str(tmp_path / "out"), "--json"])

    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert (found["cells"], found["made"], found["missing"]) == (7, 4, 3)
    assert len(found["rows"]) == 1 + 1 + 1 + 3
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "4 of 7 cells are there" in page
    assert "loram study tiny.yaml --work-dir DIR --out DIR2" in page
    assert str(tmp_path) not in (tmp_path / "out" / "conditions.json").read_text(encoding="utf-8")
    fresh = CliRunner().invoke(study_command, [options[0], "--out", str(tmp_path / "out")])
    assert fresh.exit_code == 0, fresh.output
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == page
    again = CliRunner().invoke(study_command, [*options, "--seed", "1"])
    assert "4 of 7 cells are there, 0 of them new." in again.stdout
    assert "Recovery helps" in again.stdout


def test_the_command_wants_a_folder_to_work_in_or_one_to_write() -> None:
    done = CliRunner().invoke(study_command, ["necessity"])

    assert done.exit_code == 2
    assert "--work-dir" in done.output


def test_an_index_says_what_shows_in_every_study(work_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    write_results(losses_alone(STUDY), work_dir, folder / "necessity", profile="quick")
    (folder / "notes").mkdir()

    page = write_index(folder).read_text(encoding="utf-8")

    assert f"## [{STUDY.title}](necessity/README.md)" in page
    shown = [judgement for judgement in judge(gather(quick_rows()), costs=False) if judgement.verdict != "not measured"]
    assert shown
    assert all(f"- {judgement}\n" in page for judgement in shown)
    assert CLAIMS["memory"] not in page
    assert f"- 5 of 5 cells, 1 seed: `{CONDITIONS.command}`" in page
    assert "notes" not in page


def test_a_folder_without_results_has_no_index(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no results"):
        write_index(tmp_path)


_COMMITTED = sorted(path.parent.name for path in RESULTS_FOLDER.glob("*/results.jsonl"))


@pytest.mark.skipif(not _COMMITTED, reason="no results are committed")
def test_committed_pages_are_what_their_rows_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for figures in (line_figures, row_figures):
        monkeypatch.setattr(figures, "png", lambda _: b"")  # drawing is slow, and other fonts draw other pictures
    assert index_page(RESULTS_FOLDER) == (RESULTS_FOLDER / "README.md").read_text(encoding="utf-8")
    for name in _COMMITTED:
        copy = shutil.copytree(RESULTS_FOLDER / name, tmp_path / name)
        profile = json.loads((copy / "conditions.json").read_text(encoding="utf-8"))["profile"]
        write_page(read_study(name, profile=profile), copy)
        for text in ("README.md", "tables.md", "tables.tex", "results.jsonl", "conditions.json"):
            assert (copy / text).read_text(encoding="utf-8") == (RESULTS_FOLDER / name / text).read_text(
                encoding="utf-8"
            ), f"{name}/{text} is not what its rows give; run: loram study {name} --out docs/results/{name}"
