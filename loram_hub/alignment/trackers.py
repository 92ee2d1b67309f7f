"""Trackers that people watch their runs with: trackio, Weights & Biases, TensorBoard. None is a dependency.

They are asked for by name, as with transformers' `report_to`, and used as their makers document them. Accelerate's own
trackers are not used: its one for trackio drops the step, so that a resumed run would start again at 0, and each starts
accelerate's process state beside the process group that is there.

Errors of a tracker go through, as in transformers' `Trainer`: one that cannot be opened stops the run before its first
step. Once open, trackio and wandb send from processes or threads of their own and retry, so that a network that fails
does not reach the run. Whatever happens to them, the run's log has everything. A resumed run is a new run in the
tracker, of the same name, which goes on at its step; to go on in the old one, set `WANDB_RUN_ID` and `WANDB_RESUME`.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from loram_hub.errors import InvalidRequestError, MissingDependencyError


class Tracker(Protocol):
    """Where the values of a run are shown."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Show values of a step; those in a mapping are shown as `name/key`, what is no number is left out."""

    def finish(self) -> None:
        """End the run; waits until all is written."""


def open_trackers(
    report_to: Sequence[str], *, project: str, name: str, config: Mapping[str, Any], folder: Path
) -> Tracker:
    """Open the trackers that were asked for, as one. Called on rank 0 alone.

    Args:
        report_to: any of `trackio`, `wandb`, `tensorboard`; none is a tracker that shows nothing.
        project: what the run belongs to.
        name: of the run.
        config: settings of the run, JSON values.
        folder: where TensorBoard's event files go.

    Returns:
        The tracker; `finish` it at the end.

    Raises:
        InvalidRequestError: a name is unknown.
        MissingDependencyError: a tracker's package is not installed.
    """
    check_trackers(report_to)
    trackers: list[Tracker] = []
    with ExitStack() as opened:
        for wanted in dict.fromkeys(report_to):
            tracker = _TRACKERS[wanted](project, name, config, folder)
            opened.callback(tracker.finish)
            trackers.append(tracker)
        opened.pop_all()  # all are open: none is to be finished here
    return _Together(trackers)


def check_trackers(report_to: Sequence[str]) -> None:
    """Check that trackers are known and installed, without opening any.

    Args:
        report_to: as for `open_trackers`.

    Raises:
        InvalidRequestError: a name is unknown.
        MissingDependencyError: a tracker's package is not installed.
    """
    for wanted in report_to:
        if wanted not in _TRACKERS:
            nearest = difflib.get_close_matches(wanted.lower(), _TRACKERS, n=1)
            meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise InvalidRequestError(f"Tracker {wanted!r} is unknown; there are {', '.join(_TRACKERS)}.{meant}")
        _package(wanted)


class _Together:
    """Several trackers as one, with values flattened for all."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = _numbers(values)
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def finish(self) -> None:
        with ExitStack() as finished:  # the others are finished too if one fails
            for tracker in self._trackers:
                finished.callback(tracker.finish)


class _Run:
    """A run of trackio or wandb, whose interfaces are the same in what is needed here."""

    def __init__(self, package: str, project: str, name: str, config: Mapping[str, Any]) -> None:
        with redirect_stdout(sys.stderr):  # trackio prints; what goes to stdout is our caller's
            self._run = _package(package).init(project=project, name=name, config=dict(config))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()


class _TensorBoard:
    """Event files for TensorBoard."""

    def __init__(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        self._writer.add_text(f"{name}/settings", _table(config))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, global_step=step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


_TRACKERS: Mapping[str, Callable[[str, str, Mapping[str, Any], Path], Tracker]] = {
    "trackio": lambda project, name, config, folder: _Run("trackio", project, name, config),
    "wandb": lambda project, name, config, folder: _Run("wandb", project, name, config),
    "tensorboard": lambda project, name, config, folder: _TensorBoard(name, config, folder),
}


def _package(name: str) -> ModuleType:
    try:
        package = importlib.import_module(name)
    except ImportError as err:
        raise MissingDependencyError(f"Reporting to {name} needs its package: pip install {name}") from err
    if package.__file__ is None:  # a folder of that name, such as wandb leaves where it was run, passes for a package
        raise MissingDependencyError(f"Reporting to {name} needs its package, not the folder: pip install {name}")
    return package


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            numbers |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = value
    return numbers


def _table(config: Mapping[str, Any]) -> str:
    """Show settings in Markdown, which TensorBoard renders."""
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in config.items())])
