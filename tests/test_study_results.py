"""Ready-made studies on the real model: each runs in its quick profile, and committed results can be had again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from loram_hub.cli import main
from loram_hub.studies import cells_of, read_rows, read_study
from loram_hub.studies.running import check_study, run_study

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "necessity"
REPEATED = ("base untouched", "Rand 0.7, docstrings, seed 0")
"""Cells of `necessity` that are run again; the second is the cheapest one of LoRAM's."""
TOLERANCE = 0.03
"""Nats. Sums come out in another order on another number of threads, and twelve steps of training make it more."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["necessity", "ratios", "methods", "steps", "domains", "cost"])
def test_a_ready_made_study_runs_from_its_name_to_its_page(
    name: str, work: Path, real_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / name
    options = ["--profile", "quick", "--work-dir", str(work), "--out", str(out), "--json"]
    done = CliRunner().invoke(main, ["study", name, *options])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    cells = cells_of(read_study(name, profile="quick"))
    assert (found["cells"], found["missing"]) == (len(cells), 0)
    rows = read_rows(out)
    assert {row.kind for row in rows} == {"base", "plain", "whole layers", "loram"}
    assert len({row.cell for row in rows}) == len(cells)
    page = (out / "README.md").read_text()
    assert f"loram study {name} --profile quick" in page
    assert "missing" not in page.partition("## What differs")[0]


@pytest.mark.slow
def test_committed_results_can_be_had_again(real_model: Path, tmp_path: Path) -> None:
    committed = read_rows(RESULTS)
    study = read_study("necessity")
    for label in REPEATED:
        assert check_study(study, tmp_path, only=label).missing == (label,)
        repeated = run_study(study, tmp_path, only=label).rows
    known = {(row.cell, row.model, row.held_out): row for row in committed}
    if not {row.cell for row in repeated} & {row.cell for row in committed}:
        pytest.skip("the tasks are made of the standard library, and this Python has another one")
    assert {row.model for row in repeated} == {"base", "pruned", "pruned + adapter", "base + recovered adapter"}
    for row in repeated:
        before = known[row.cell, row.model, row.held_out]
        assert row.loss == pytest.approx(before.loss, abs=TOLERANCE)
        assert (row.tokens, row.parameters) == (before.tokens, before.parameters)
