"""Sets of tasks by name: those of the LoRAM paper (arXiv 2502.13533, tables 1 to 3), as data.

Shots are those of the authors' script: 8 for GSM8K with chains of thought, 1 for MathQA and for the six tasks of
commonsense reasoning, whose mean accuracy is the paper's "CSR".

For HumanEval the script draws 10 programs per problem with the code-eval toolkit and computes pass@1 and pass@10 from
the same 10. It does not set a temperature; `HUMANEVAL` takes what that toolkit's scripts use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loram_hub.errors import InvalidRequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How programs are drawn for a task whose answers are programs."""

    programs: int
    """Per problem, at least 1."""
    temperature: float
    """Of the distribution over tokens, above 0."""
    top_p: float
    """Share of the probability that is sampled from, in (0, 1]."""
    max_new_tokens: int
    """Longest program, tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRequest:
    """A task of lm-evaluation-harness, and how it is to be measured."""

    task: str
    """Name of a task, group or tag in the harness or in a task folder."""
    num_fewshot: int | None = None
    """Solved examples in front of each question; None for the task's own number."""
    metric: str | None = None
    """The number that the task is known by; None for the first that the task computes."""
    filter: str = "none"
    """The harness's name of how the answer is taken out of what was generated."""
    sampling: Sampling | None = None
    """How programs are drawn; None for the task's own way."""


HUMANEVAL = Sampling(programs=10, temperature=0.2, top_p=0.95, max_new_tokens=512)
_CSR_TASKS = ("arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "winogrande")

_MATH = (
    TaskRequest(task="mathqa", num_fewshot=1, metric="acc"),
    TaskRequest(task="gsm8k_cot", num_fewshot=8, metric="exact_match", filter="strict-match"),
)
_CSR = tuple(TaskRequest(task=name, num_fewshot=1, metric="acc") for name in _CSR_TASKS)
_CODE = (TaskRequest(task="humaneval", num_fewshot=0, metric="pass@1", sampling=HUMANEVAL),)

PRESETS: Mapping[str, tuple[TaskRequest, ...]] = {
    "math": _MATH,
    "csr": _CSR,
    "code": _CODE,
    "paper": (*_MATH, *_CSR, *_CODE),
}
"""By name; each can stand among the names of tasks."""

MEANS: Mapping[str, tuple[tuple[str, ...], str]] = {"csr": (_CSR_TASKS, "acc")}
"""Means that are computed where all of their tasks were measured: tasks and metric by name."""


def requested(names: str | Sequence[str], *, num_fewshot: int | None = None) -> tuple[TaskRequest, ...]:
    """Turn names of tasks and presets into requests, each task once.

    Args:
        names: names, or one text with commas between them.
        num_fewshot: solved examples in front of each question, whatever a preset says.

    Raises:
        InvalidRequestError: there is no name, or `num_fewshot` is negative.
    """
    listed = names.split(",") if isinstance(names, str) else names
    chosen = [name.strip() for name in listed if name.strip()]
    if not chosen:
        raise InvalidRequestError(f"No task was named. Presets: {', '.join(PRESETS)}; or tasks of the harness.")
    if num_fewshot is not None and num_fewshot < 0:
        raise InvalidRequestError(f"num_fewshot is {num_fewshot}; 0 examples are the least.")
    requests: dict[str, TaskRequest] = {}
    presets = {request.task: request for request in PRESETS["paper"]}
    for name in chosen:
        for request in PRESETS.get(name, (presets.get(name, TaskRequest(task=name)),)):
            requests.setdefault(request.task, request)
    if num_fewshot is None:
        return tuple(requests.values())
    return tuple(
        TaskRequest(
            task=request.task,
            num_fewshot=num_fewshot,
            metric=request.metric,
            filter=request.filter,
            sampling=request.sampling,
        )
        for request in requests.values()
    )
