"""Downstream tasks: lm-evaluation-harness on base, pruned model, and both with their adapters.

`presets` are the paper's tasks as data; `catalogue` finds tasks and says what they need before anything is loaded;
`loading` has the harness load them; `backends` opens the models; `measuring` is the way in; `programs` runs generated
code in processes of its own (`confining`, `confined`), where that was allowed.

The harness has the prompts, the few-shot examples and the metrics. What is ours: a release opens by `AutoLoramModel`,
adapters by PEFT, merged models by `loram merge`; programs are judged here; every number comes with what it was made of.
"""

from loram_hub.downstream.catalogue import PlannedTask as PlannedTask
from loram_hub.downstream.catalogue import check_needs as check_needs
from loram_hub.downstream.measuring import check_tasks as check_tasks
from loram_hub.downstream.measuring import evaluate_tasks as evaluate_tasks
from loram_hub.downstream.measuring import preview_tasks as preview_tasks
from loram_hub.downstream.presets import PRESETS as PRESETS
from loram_hub.downstream.presets import Sampling as Sampling
from loram_hub.downstream.presets import TaskRequest as TaskRequest
from loram_hub.downstream.programs import Confinement as Confinement
from loram_hub.downstream.programs import Limits as Limits
from loram_hub.downstream.programs import pass_at_k as pass_at_k
from loram_hub.downstream.programs import run_program as run_program
from loram_hub.downstream.results import MeasuredModel as MeasuredModel
from loram_hub.downstream.results import MeasuredTask as MeasuredTask
from loram_hub.downstream.results import TaskResults as TaskResults
from loram_hub.downstream.results import TaskScore as TaskScore
