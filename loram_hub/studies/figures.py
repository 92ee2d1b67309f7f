"""Figures of a study: means with error bars, the seeds as small points, and the controls in each of them.

Every figure is a PNG, equal rows giving equal bytes, with an alternative text that states what it shows in numbers.
`row_figures` has those with a row for each setting, `line_figures` those over a ratio or over steps.
"""

from __future__ import annotations

from loram_hub.studies.aggregation import Results
from loram_hub.studies.line_figures import draw_ratios, draw_steps
from loram_hub.studies.plots import Picture
from loram_hub.studies.row_figures import draw_cost, draw_domains, draw_losses, draw_recovery
from loram_hub.studies.tables import shown_parts

_OF_A_SET = {"losses": draw_losses, "recovery": draw_recovery, "ratios": draw_ratios, "steps": draw_steps}
_OF_ALL = {"domains": draw_domains, "cost": draw_cost}


def study_pictures(results: Results, shows: tuple[str, ...] = ()) -> dict[str, tuple[Picture, ...]]:
    """Draw the figures that a study's rows can fill, by name; those of losses once for each held-out set.

    Args:
        results: from `gather`.
        shows: names to draw; none for all.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    pictures: dict[str, tuple[Picture, ...]] = {}
    for name in shown_parts(results, shows):
        if name in _OF_A_SET:
            pictures[name] = tuple(_OF_A_SET[name](results, held_out) for held_out in results.held_out)
        else:
            pictures[name] = (_OF_ALL[name](results),)
    return pictures
