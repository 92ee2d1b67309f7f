"""The `loram` command: parse, call one library function, print.

Results go to stdout (with `--json` one JSON document), talk and progress to stderr. Errors are one message and an exit
code: 0 ok, 1 unexpected, 2 usage, 3 verification failed, 4 incompatible, 5 access, 6 disk or memory, 130 interrupted.

Commands take their options as **options: click has parsed and typed them, and they go on to one library function by
name.
"""

from loram_hub.cli.group import main as main

from loram_hub.cli import publisher, alignment, publishing, estimation, finetuning, consumer  # isort: skip  (in the order of use; importing adds their commands)
from loram_hub.cli import evaluating, reporting, studying  # isort: skip

__all__ = [
    "alignment",
    "consumer",
    "estimation",
    "evaluating",
    "finetuning",
    "main",
    "publisher",
    "publishing",
    "reporting",
    "studying",
]
