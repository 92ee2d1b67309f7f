"""Figures of a study: real PNG files, the same for the same rows, described in the numbers that they show."""

from __future__ import annotations

import io
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from study_rows import study_rows

from loram_hub.studies import Row
from loram_hub.studies.aggregation import Spread, gather
from loram_hub.studies.figures import study_pictures
from loram_hub.studies.plots import Mark, Picture, draw_spread, spaced
from loram_hub.studies.tables import PARTS

FINAL = "base + recovered adapter"
ROWS = study_rows(seeds=(0, 1), methods={"rand": (0.35, 0.7), "stru": (0.35, 0.7)}, other=None)
DOMAINS = study_rows(seeds=(0, 1), methods={"stru": (0.7,)}, steps=(12,), data=("$sums$", "tasks"), other=None)


def drawn(part: str, rows: Sequence[Row] | None = None) -> Picture:
    """Draw the one figure of a name."""
    (picture,) = study_pictures(gather(rows or (DOMAINS if part == "domains" else ROWS)), (part,))[part]
    return picture


@pytest.fixture(scope="module")
def pictures() -> Mapping[str, Picture]:
    return {part: drawn(part) for part in PARTS}


def said(rows: Sequence[Row] = ROWS, **cell: object) -> str:
    """Mean and deviation of the losses of a cell on the tasks, from the rows themselves."""
    wanted = {"data": "tasks", "held_out": "held-out tasks", "model": FINAL, **cell}
    found = [row.loss for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]
    assert len(found) == 2
    return f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}"


@pytest.mark.parametrize("part", PARTS)
def test_a_figure_is_a_picture_that_says_in_words_what_it_shows(pictures: Mapping[str, Picture], part: str) -> None:
    picture = pictures[part]

    with Image.open(io.BytesIO(picture.png)) as image:
        assert image.format == "PNG"
        assert 600 <= image.width <= 1400
        assert 200 <= image.height <= 1400
        assert np.asarray(image.convert("L")).std() > 5
    assert len(picture.png) < 200_000
    assert "plain LoRA on the base" in picture.alt
    if part != "cost":
        assert said(DOMAINS if part == "domains" else ROWS, kind="plain") in picture.alt
        assert "4.000" in picture.alt


def test_a_figure_states_the_ends_of_its_lines(pictures: Mapping[str, Picture]) -> None:
    stru = {"method": "stru", "alignment_steps": 12}

    mild, strong = said(ratio=0.35, **stru), said(ratio=0.7, **stru)
    over_ratios = f"Stru, 12 alignment steps: {mild} at ratio 0.35 to {strong} at ratio 0.7."
    assert over_ratios in pictures["ratios"].alt
    start = said(ratio=0.7, method="stru", alignment_steps=0)
    assert f"Stru 0.7: {start} at 0 steps to {strong} at 12 steps." in pictures["steps"].alt


def test_equal_rows_give_equal_bytes_in_any_order(pictures: Mapping[str, Picture]) -> None:
    shuffled = random.Random(1).sample(ROWS, len(ROWS))

    assert drawn("recovery", shuffled) == pictures["recovery"]


def test_another_number_gives_another_picture(pictures: Mapping[str, Picture]) -> None:
    worse = drawn("steps", [replace(row, loss=row.loss + 0.5) if row.method == "stru" else row for row in ROWS])

    assert worse.png != pictures["steps"].png
    assert worse.alt != pictures["steps"].alt


def test_missing_cells_leave_gaps() -> None:
    rows = [row for row in study_rows(seeds=(0,), other=None) if row.ratio != 0.7 and row.kind != "whole layers"]

    pictures = study_pictures(gather(rows), ("losses", "cost"))

    (losses_picture,), (cost,) = pictures["losses"], pictures["cost"]
    assert "whole layers" not in losses_picture.alt
    assert "0.7" not in cost.alt


def test_a_mark_stands_at_the_mean_and_its_bar_is_the_deviation() -> None:
    values = (1.0, 2.0, 6.0)
    axes = Figure().subplots()

    draw_spread(
        axes, 4.0, Spread(values=tuple(enumerate(values))), Mark(shape="o", colour="black", label=""), across=True
    )

    (bar,) = axes.containers
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    assert bar.lines[0].get_xdata().tolist() == [mean]
    assert bar.lines[0].get_ydata().tolist() == [4.0]
    ((left, right),) = bar.lines[2][0].get_segments()
    np.testing.assert_allclose([left[0], right[0]], [mean - deviation, mean + deviation])
    assert sorted(axes.lines[0].get_xdata()) == [1.0, 2.0, 6.0]


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.01, 0.2))
def test_labels_are_moved_apart_and_keep_their_order(heights: list[float], gap: float) -> None:
    heights.sort()

    moved = spaced(heights, gap)

    assert len(moved) == len(heights)
    assert all(above - below >= gap - 1e-9 for below, above in pairwise(moved))
    if all(above - below > gap for below, above in pairwise(heights)):
        assert moved == heights
    if heights:
        assert statistics.mean(moved) == pytest.approx(statistics.mean(heights))
