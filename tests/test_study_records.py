"""What a study's files may say: rows that a measurement can give, and studies whose cells can be told apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from study_rows import study_rows

from loram_hub.errors import InvalidRequestError, VerificationError
from loram_hub.recipes import section_from
from loram_hub.studies import Study, cells_of, read_rows
from loram_hub.studies.records import RESULTS, rows_of, write_rows

ROWS = study_rows(seeds=(0,), steps=(0,), other=None)
LORAM = next(idx for idx, row in enumerate(ROWS) if row.method == "stru")
STUDY: Mapping[str, Any] = {
    "name": "tiny", "title": "Tiny", "question": "Does it run?", "mirrors": "nothing", "base": "org/base",
    "methods": [{"method": "rand", "ratios": [0.5]}],
    "calibration": {"source": "org/texts"},
    "data": [{"name": "pairs", "train": [{"source": "org/pairs"}]}],
    "held_out": [{"name": "held-out", "source": "org/held-out", "of": "pairs"}],
    "training": {"steps": 1},
}  # fmt: skip


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_rows(tmp_path / RESULTS, ROWS)

    assert read_rows(tmp_path) == ROWS
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("loss", "NaN"), ("loss", "Infinity"), ("loss", "-0.5"), ("loss", "1e400"), ("loss", "1e7"),
        ("tokens", "0"), ("tokens", "-3"), ("parameters", "1" * 30), ("ratio", "1.0"), ("ratio", "-0.1"),
        ("seed", "-1"), ("threads", "0"), ("tuning_seconds", "-1"), ("peak_memory_bytes", "-1"),
        ("model", '"merged"'), ("method", '"best"'), ("quantization", '"int8"'), ("kind", "[]"),
        ("cell", '"../../etc/pwd"'), ("cell", '"0123456789AB"'), ("held_out", '""'), ("held_out", '"a\\nb"'),
        ("study", '"../up"'), ("data", f'"{"x" * 300}"'), ("loss", "[" * 100_000), ("loss", '1, "loss": 2'),
        ("method", '""'), ("ratio", "null"), ("importance", '""'), ("pattern", '"4:8"'), ("data", '""'),
        ("masked", "true"), ("kind", '"plain"'), ("kind", '"base"'),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_a_row_that_no_measurement_gives_is_refused_with_its_line(tmp_path: Path, key: str, text: str) -> None:
    lines = [json.dumps(row.to_dict()) for row in ROWS]
    old = json.dumps(ROWS[LORAM].to_dict()[key])
    lines[LORAM] = lines[LORAM].replace(f'"{key}": {old}', f'"{key}": {text}')
    assert text in lines[LORAM]
    (tmp_path / RESULTS).write_text("\n".join(lines), encoding="utf-8")

    with pytest.raises(VerificationError, match=rf"line {LORAM + 1}\b"):
        read_rows(tmp_path)


@pytest.mark.parametrize("rows", [None, [3], [{"loss": 1.0}], [ROWS[0].to_dict() | {"loss": -1.0}]], ids=str)
def test_a_record_without_rows_is_refused_with_the_name_of_its_cell(rows: object) -> None:
    with pytest.raises(VerificationError, match=r"Rand 0\.5, pairs, seed 0"):
        rows_of({"label": "Rand 0.5, pairs, seed 0", "rows": rows}, study="tiny")


STRU = {"method": "stru", "ratios": [0.5]}
SEMI = {"method": "semi"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"methods": [STRU, STRU]}, r"'stru taylor 0\.5' twice"),
        ({"methods": [STRU, STRU | {"importance": "taylor:param_first"}]}, r"'stru taylor 0\.5' twice"),
        ({"methods": [STRU, STRU | {"ratios": [0.35, 0.5]}]}, r"'stru taylor 0\.5' twice"),
        ({"methods": [STRU | {"ratios": [0.5, 0.5]}]}, "ratios of stru"),
        ({"methods": [SEMI, SEMI | {"pattern": "4:8", "masked": [True, False]}]}, "'semi 4:8' twice"),
        ({"methods": [SEMI | {"masked": []}]}, "masked of semi is empty"),
        ({"methods": [SEMI | {"masked": [True, True]}]}, "masked of semi has True twice"),
        ({"methods": [SEMI | {"pattern": "8:4"}]}, "8:4"),
        ({"methods": [SEMI | {"pattern": "unstructured"}]}, "unstructured"),
        ({"methods": [STRU | {"importance": "best"}]}, "best"),
        ({"methods": [STRU | {"importance": "random"}]}, "method: rand"),
        ({"alignment": {"steps": [0, 0]}}, r"alignment\.steps has 0 twice"),
        ({"alignment": {"steps": []}}, r"alignment\.steps is empty"),
        ({"alignment": {"steps": [2], "corpora": [{"source": "a/b"}], "distillation": 0.5}}, "teacher"),
        ({"alignment": {"warmup": 1.0}}, "warmup"),
        ({"quantization": ["nf4", "nf4"]}, "quantization has 'nf4' twice"),
        ({"seeds": [-1]}, "numbers from 0"),
        ({"keep_first": -1}, "keep_first is -1"),
        ({"keep_last": -2}, "keep_last is -2"),
        ({"shows": ["losses", "prices"]}, "prices"),
        ({"training": {"epochs": 1.0}}, r"training\.steps is missing"),
        ({"training": {}}, r"training\.steps is missing"),
        ({"data": [{"name": "pairs", "train": []}]}, "no source"),
        ({"data": [{"name": "a\nb", "train": [{"source": "a/b"}]}]}, "name"),
        ({"held_out": [{"name": "A b", "source": "a/b"}, {"name": "a-B", "source": "a/c"}]}, "'a-b' twice"),
        ({"held_out": [{"name": "a", "source": "a/b", "limit": 0}]}, "limit is 0"),
        ({"calibration": {"source": "a/b", "samples": 0}}, "samples is 0"),
    ],
)  # fmt: skip
def test_a_study_whose_cells_cannot_be_told_apart_or_must_fail_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        section_from(Study, {**STUDY, **changes})


@pytest.mark.parametrize(
    "methods",
    [
        [STRU, STRU | {"importance": "magnitude"}, {"method": "rand", "ratios": [0.5]}],
        [STRU, STRU | {"ratios": [0.7]}],
        [SEMI, SEMI | {"pattern": "2:4"}, {"method": "unst", "ratios": [0.5], "masked": [False, True]}],
    ],
    ids=["scoring", "ratios", "patterns"],
)
def test_methods_that_differ_in_something_are_taken(methods: list[Any]) -> None:
    cells = cells_of(section_from(Study, {**STUDY, "methods": methods}))

    assert len(set(cells)) == len(cells)
