"""Tasks found by name, and what each of them needs, before anything is loaded or fetched.

The harness has some ten thousand task files; reading all of them takes longer than a small evaluation. So the folders
whose names a task's name begins with are read first, and the rest only for a name that is not among them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from loram_hub.downstream.presets import Sampling, TaskRequest
from loram_hub.errors import AccessError, InvalidRequestError, MissingDependencyError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]  # ships no types

logger = logging.getLogger(__name__)

_LOCAL_BUILDERS = frozenset({"arrow", "csv", "json", "parquet", "text"})
"""What `dataset_path` says where `data_files` are files of this machine."""
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://")

Place = Literal["local files", "prepared", "downloaded", "missing"]
"""Where data are: files named by the task; in the cache of `datasets`; as `hf download` left them; nowhere here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTask:
    """A task that is not a group, before it is loaded."""

    name: str
    """In the harness."""
    request: TaskRequest
    """What asked for it."""
    config: Mapping[str, Any]
    """Its YAML, included files merged; functions are paths."""
    file: Path
    """Its YAML file."""
    dataset: str | None
    """Hub id of its data; None for files of this machine, and for data that the task makes itself."""
    dataset_config: str | None
    """Configuration of the dataset."""
    place: Place
    """Where the data are."""
    folder: Path | None
    """Snapshot in the Hub cache, where `place` is `downloaded`."""
    data_files: Any
    """Local files with absolute paths, where the task names some; None otherwise."""

    @property
    def runs_code(self) -> bool:
        """Whether its answers are programs, which must be run to be judged."""
        return bool(self.config.get("unsafe_code"))

    @property
    def sampling(self) -> Sampling | None:
        """How programs are drawn, if not in the task's own way."""
        return self.request.sampling

    def to_dict(self) -> dict[str, Any]:
        """Return what a dry run says of it: plain JSON values."""
        return {
            "task": self.name,
            "num_fewshot": self.request.num_fewshot,
            "dataset": self.dataset,
            "dataset_config": self.dataset_config,
            "data": self.place,
            "download": download_command(self.dataset) if self.dataset and self.place == "missing" else None,
            "runs_code": self.runs_code,
        }


def require_harness() -> None:
    """Raise `MissingDependencyError` unless lm-evaluation-harness is installed."""
    if find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "Downstream tasks are measured by lm-evaluation-harness, which is not installed: "
            "pip install 'loram-hub[eval]'"
        )


def download_command(dataset: str) -> str:
    """Return the command that fetches a dataset."""
    return f"hf download --repo-type dataset {dataset}"


def plan_tasks(
    requests: Sequence[TaskRequest], *, include_path: Sequence[str | os.PathLike[str]] = ()
) -> tuple[PlannedTask, ...]:
    """Find tasks and what they need; the network is not used.

    Args:
        requests: from `requested`.
        include_path: folders with task files of your own, in the harness's format; they win over the harness's.

    Returns:
        The tasks, those of groups and tags one by one.

    Raises:
        InvalidRequestError: there is no such task or folder, or a data file of a task is not there.
        MissingDependencyError: lm-eval is not installed.
    """
    require_harness()
    folders = [_existing_folder(folder) for folder in include_path]
    index = task_manager([request.task for request in requests], folders).task_index
    planned: dict[str, PlannedTask] = {}
    for request in requests:
        for name in _leaves(request.task, index):
            planned.setdefault(name, _planned(name, request, index[name]))
    return tuple(planned.values())


def task_manager(names: Sequence[str], folders: Sequence[Path], *, overlay: Path | None = None) -> TaskManager:
    """Make the harness's index of the folders in which tasks of these names are.

    Args:
        names: tasks, groups or tags.
        folders: of the user.
        overlay: a folder whose files replace all others.

    Raises:
        InvalidRequestError: a name is in none of them.
    """
    own = list(folders) + ([] if overlay is None else [overlay])
    manager = _index([*_likely_folders(names), *own])
    if all(name in manager.task_index for name in names):
        return manager
    logger.info("Reading all task files of the harness")
    import lm_eval.tasks  # type: ignore[import-untyped]

    manager = _index([Path(lm_eval.tasks.__file__).parent, *own])
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        where = f", nor in {', '.join(map(str, folders))} (files that are no valid YAML are passed over)"
        raise InvalidRequestError(
            f"{unknown[0]!r:.80} is no task, group or tag of lm-evaluation-harness{where if folders else ''}, and no "
            "preset (math, csr, code, paper). 'lm-eval ls tasks' lists those that there are."
        )
    return manager


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness's warnings back: they are about arguments that only we give."""
    harness = logging.getLogger("lm_eval")
    level = harness.level
    harness.setLevel(logging.ERROR)
    try:
        yield
    finally:
        harness.setLevel(level)


def _index(folders: Sequence[Path]) -> TaskManager:
    from lm_eval.tasks import TaskManager

    with quiet_harness():
        return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)


def _likely_folders(names: Sequence[str]) -> list[Path]:
    """Return the harness's folders named as a task is, or as the words that its name begins with."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    starts = {"_".join(name.split("_")[:words]) for name in names for words in range(1, name.count("_") + 2)}
    return [root / start for start in sorted(starts) if re.fullmatch(r"\w+", start) and (root / start).is_dir()]


def _existing_folder(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InvalidRequestError(f"{path} is no folder; task files (*.yaml) are looked for in folders.")
    return path.resolve()


def _leaves(name: str, index: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the tasks of a group or tag, or the task itself."""
    entry = index.get(name)
    if entry is None or name in above:
        raise InvalidRequestError(f"The group {(above or (name,))[-1]!r:.80} names {name!r:.80}, which is no task.")
    members: Sequence[Any] = ()
    if entry.kind.name == "TAG":
        members = sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        listed = (entry.cfg or {}).get("task")
        members = listed if isinstance(listed, list) else ()
    else:
        yield name
    for member in members:
        inner = member.get("task", member.get("group")) if isinstance(member, dict) else member
        if not isinstance(inner, str):
            raise InvalidRequestError(f"The group {name!r:.80} has a member without a name; that is not measured here.")
        yield from _leaves(inner, index, (*above, name))


def _planned(name: str, request: TaskRequest, entry: Any) -> PlannedTask:  # noqa: ANN401 (the harness's, untyped)
    config: dict[str, Any] = dict(entry.cfg or {})
    if entry.yaml_path is None or entry.kind.name == "PY_TASK":
        raise InvalidRequestError(
            f"The task {name!r:.80} is made by code of its own, not by a file; it is not measured."
        )
    data_files = (config.get("dataset_kwargs") or {}).get("data_files")
    path = config.get("dataset_path")
    is_local = path is None or path in _LOCAL_BUILDERS or Path(str(path)).is_dir()
    place: Place = "local files"
    folder = None
    if is_local:
        data_files = None if data_files is None else _local_files(name, data_files, Path(entry.yaml_path).parent)
    else:
        data_files = None
        place, folder = _place_of(str(path))
    return PlannedTask(
        name=name,
        request=request,
        config=config,
        file=Path(entry.yaml_path),
        dataset=None if is_local else str(path),
        dataset_config=config.get("dataset_name"),
        place=place,
        folder=folder,
        data_files=data_files,
    )


def _local_files(task: str, named: Any, beside: Path) -> Any:  # noqa: ANN401 (text, list or mapping, as in datasets)
    """Make the names of data files absolute paths; relative ones are looked for here and beside the task's file."""
    if isinstance(named, Mapping):
        return {split: _local_files(task, files, beside) for split, files in named.items()}
    if isinstance(named, list):
        return [_local_files(task, file, beside) for file in named]
    if _REMOTE.match(str(named)) or any(char in str(named) for char in "*?["):
        return named
    for path in (Path(str(named)).expanduser(), beside / str(named)):
        if path.exists():
            return str(path.resolve())
    raise InvalidRequestError(f"The task {task!r:.80} reads {named}, which is neither here nor in {beside}.")


def _place_of(dataset: str) -> tuple[Place, Path | None]:
    """Look for a dataset of the Hub on this machine."""
    import datasets.config  # type: ignore[import-untyped]  # ships no types
    from datasets.naming import camelcase_to_snakecase  # type: ignore[import-untyped]

    owner, _, name = dataset.rpartition("/")
    prepared = "___".join([*([owner] if owner else []), camelcase_to_snakecase(name)])
    if any((Path(datasets.config.HF_DATASETS_CACHE) / prepared).glob("*/*/*")):
        return "prepared", None
    try:
        return "downloaded", Path(snapshot_download(dataset, repo_type="dataset", local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return "missing", None


def check_needs(planned: Sequence[PlannedTask], *, run_generated_code: bool, missing_data: bool = False) -> None:
    """Refuse what cannot be measured, and say what will be downloaded; with `missing_data`, data may be nowhere.

    Raises:
        InvalidRequestError: a task runs generated code, and that was not allowed; or its programs cannot be judged.
        AccessError: offline mode is on, and data are not on this machine.
    """
    code = [task for task in planned if task.runs_code]
    if code and not run_generated_code:
        raise InvalidRequestError(
            f"{', '.join(task.name for task in code)}: to judge the answers, programs that the model wrote must be run "
            "on this machine. Allow it with run_generated_code=True (--run-generated-code), best in a virtual machine, "
            "or leave the task out."
        )
    missing = list(dict.fromkeys(task.dataset for task in planned if task.place == "missing" and task.dataset))
    if not missing or missing_data:
        return
    commands = "; ".join(download_command(dataset) for dataset in missing)
    tasks = ", ".join(f"{task.name} ({task.dataset})" for task in planned if task.place == "missing")
    if is_offline():
        raise AccessError(
            f"Offline mode is on, and the data of {tasks} are not on this machine. Fetch them where there is a "
            f"network, then run this again: {commands}"
        )
    logger.info("To be downloaded from the Hub: %s", tasks)


def is_offline() -> bool:
    """Whether the network must not be used (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE)."""
    import datasets.config

    return bool(constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE)
