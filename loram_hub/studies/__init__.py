"""Studies: a grid of LoRAM runs and their controls, measured on held-out data, resumable cell by cell.

specification   the study, from YAML
grid            its cells
materials       base and data, found and hashed
making          releases, each made once
measuring       held-out losses, peak memory
filling         one cell
workers         which processes are at work in a folder
running         `run_study`
records         rows of results.jsonl
aggregation     means, pairs and shares by setting
tables          tables; `markdown` and `latex` write them
conditions      under what they were measured: conditions.json
claims          what of the paper's claims shows
figures         pictures
pages           `write_results`: the page of a study
indexing        `write_index`: the page of pages, docs/results
"""

from importlib import import_module
from typing import TYPE_CHECKING

from loram_hub.studies.aggregation import gather as gather
from loram_hub.studies.claims import judge as judge
from loram_hub.studies.grid import Cell as Cell
from loram_hub.studies.grid import cells_of as cells_of
from loram_hub.studies.indexing import write_index as write_index
from loram_hub.studies.pages import write_page as write_page
from loram_hub.studies.pages import write_results as write_results
from loram_hub.studies.records import Row as Row
from loram_hub.studies.records import read_rows as read_rows
from loram_hub.studies.specification import Study as Study
from loram_hub.studies.specification import read_study as read_study
from loram_hub.studies.specification import ready_studies as ready_studies

if TYPE_CHECKING:
    from loram_hub.studies.running import StudyPreview as StudyPreview
    from loram_hub.studies.running import StudyResult as StudyResult
    from loram_hub.studies.running import check_study as check_study
    from loram_hub.studies.running import run_study as run_study

_RUNNING = ("StudyPreview", "StudyResult", "check_study", "run_study")


def __getattr__(name: str) -> object:
    if name not in _RUNNING:  # which needs torch; rows and tables do not
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("loram_hub.studies.running"), name)
