"""Tasks loaded by the harness, with what we change about them: shots, where the data are, how programs are drawn.

A change is a small YAML file that includes the task's own and wins over it; that is the harness's own way, so groups
see it, too. A task whose answers are programs loses the metric and the filters by which the harness would run them: its
file would fetch `code_eval` from the Hub the moment it is read, and run programs without limits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # ships no types

from loram_hub.downstream.catalogue import PlannedTask, is_offline, quiet_harness, task_manager
from loram_hub.errors import AccessError, InvalidRequestError, LoramError

_PROMPT = "prompt"
"""Column of a code task that a program begins with, as in HumanEval."""
_JUDGING = ("metric_list", "filter_list", "process_results")
_LOCATION = ("include", "tag", "group", "task_list")


def load_tasks(names: Sequence[str], planned: Sequence[PlannedTask], folders: Sequence[Path]) -> dict[str, Any]:
    """Load tasks with their data, downloading what is not here.

    Args:
        names: tasks, groups and tags as they were asked for.
        planned: the tasks they come to, checked by `check_needs`.
        folders: task folders of the user.

    Returns:
        What the harness's `evaluate` takes: tasks and groups.

    Raises:
        InvalidRequestError: a task file is wrong, or its data are not what it says.
        AccessError: data cannot be had from the Hub.
    """
    with tempfile.TemporaryDirectory(prefix="loram-tasks-") as overlay:
        for number, task in enumerate(planned):
            text = yaml.safe_dump(_overlay(task), sort_keys=False, allow_unicode=True)
            (Path(overlay) / f"{number}.yaml").write_text(text, encoding="utf-8")
        with _loading_errors([task.name for task in planned]), quiet_harness():
            manager = task_manager([*names, *(task.name for task in planned)], folders, overlay=Path(overlay))
            loaded: dict[str, Any] = manager.load(list(names))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _overlay(task: PlannedTask) -> dict[str, Any]:
    """Return the YAML that replaces a task's."""
    overlay: dict[str, Any] = _code_task(task) if task.runs_code else {"include": str(task.file.resolve())}
    overlay["task"] = task.name
    if task.request.num_fewshot is not None and task.config.get("num_fewshot") != 0:  # 0 is what the task insists on
        overlay["num_fewshot"] = task.request.num_fewshot
    if task.data_files is not None:
        overlay["dataset_kwargs"] = {**(task.config.get("dataset_kwargs") or {}), "data_files": task.data_files}
    if task.place == "downloaded" and is_offline():
        overlay["dataset_path"] = str(task.folder)
    return overlay


def _code_task(task: PlannedTask) -> dict[str, Any]:
    kept = {key: value for key, value in task.config.items() if key not in (*_JUDGING, *_LOCATION)}
    function = next(_functions(kept), None)
    if function is not None:
        raise InvalidRequestError(
            f"The task {task.name!r:.80} makes its prompts with {function}, a file that may itself run code or fetch "
            "it. Only code tasks whose prompts are templates are measured, as HumanEval's."
        )
    kept["metric_list"] = [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}]
    sampling = task.sampling
    if sampling is not None:
        kept["repeats"] = sampling.programs
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        own = kept.get("generation_kwargs") or {}
        kept["generation_kwargs"] = {**own, **drawn, "max_gen_toks": sampling.max_new_tokens}
    return kept


def _functions(value: Any) -> Iterator[str]:  # noqa: ANN401 (YAML)
    """Yield the files of the functions in a task's config: `!function utils.f` is read as `<folder>/utils.f`."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _functions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _functions(inner)
    elif isinstance(value, str) and value.startswith("/") and "\n" not in value:
        module = value.rpartition(".")[0] + ".py"
        if len(module) < 4096 and Path(module).is_file():
            yield module


def program_parts(task: Any, doc: Mapping[str, Any]) -> tuple[str, str]:  # noqa: ANN401 (the harness's, untyped)
    """Return what a program begins with, and its tests.

    Raises:
        InvalidRequestError: the record is not laid out as HumanEval's.
    """
    start, tests = doc.get(_PROMPT), task.doc_to_target(doc)
    if not isinstance(start, str) or not isinstance(tests, str) or not tests.strip():
        raise InvalidRequestError(
            f"The code task {task.task_name!r:.80} is not laid out as HumanEval: each record needs a column 'prompt' "
            "that the program begins with, and doc_to_target must give the source of the tests."
        )
    return start, tests


@contextmanager
def _loading_errors(names: Sequence[str]) -> Iterator[None]:
    """Turn what the harness, `datasets` and jinja raise into one line."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError  # type: ignore[import-untyped]
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from jinja2 import TemplateError

    tasks = ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")
    try:
        yield
    except LoramError:
        raise
    except (DatasetNotFoundError, HfHubHTTPError, HTTPError, ConnectionError, TimeoutError) as err:
        raise AccessError(f"Data of {tasks} cannot be had from the Hub: {_line(err)}") from err
    except (
        DatasetsError, TemplateError, yaml.YAMLError, OSError, ValueError, KeyError, TypeError, AttributeError,
        ImportError, IndexError, RuntimeError,
    ) as err:  # fmt: skip
        raise InvalidRequestError(
            f"The harness cannot load {tasks}: {type(err).__name__}: {_line(err)} Check the task file and its data."
        ) from err


def _line(err: BaseException) -> str:
    cause = err.__cause__ if err.__cause__ is not None and not str(err).strip() else err
    return f"{' '.join(str(cause).split())[:400]}."
