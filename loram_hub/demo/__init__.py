"""`loram demo`: the whole LoRAM loop on a small real model, on this machine, in a few minutes.

    base -> prune (Taylor, NF4) -> open with AutoLoramModel -> LoRA with PEFT and TRL -> recover -> evaluate on the base

The task is made from Python itself (`corpus`): say what a function of the standard library does, given its signature.
The question is whether the adapter that was trained on the pruned model makes the *original* model better on modules
that training never saw; the report says so either way.
"""

from importlib.util import find_spec

from loram_hub.errors import MissingDependencyError

_NEEDED = ("torch", "transformers", "bitsandbytes", "datasets", "peft", "trl")
if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise MissingDependencyError(f"The demo needs {', '.join(_missing)}: pip install 'loram-hub[demo]'")

from loram_hub.demo.loop import run_demo as run_demo  # noqa: E402 (after the check, whose message is the better one)
from loram_hub.demo.report import DemoReport as DemoReport  # noqa: E402
from loram_hub.demo.report import DemoSettings as DemoSettings  # noqa: E402
