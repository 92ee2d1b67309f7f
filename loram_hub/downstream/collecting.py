"""One model after another is asked by the harness; the numbers are collected."""

from __future__ import annotations

import hashlib
import logging
import math
import random
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from loram_hub.downstream.backends import Wrapped
from loram_hub.downstream.catalogue import PlannedTask, quiet_harness
from loram_hub.downstream.loading import program_parts
from loram_hub.downstream.presets import MEANS
from loram_hub.downstream.programs import Confinement, Limits, Problem, pass_rates, passed_programs
from loram_hub.downstream.results import MeasuredModel, MeasuredTask, TaskScore

logger = logging.getLogger(__name__)

_BOOTSTRAP = 100_000  # the harness's own; means, that is almost everything, need none
_REVISION = re.compile(r"@([0-9a-f]{40})/")


@dataclass(kw_only=True, slots=True)
class Collector:
    """Models come in, numbers pile up."""

    planned: Mapping[str, PlannedTask]
    """By name."""
    loaded: Mapping[str, Any]
    """From `load_tasks`."""
    limit: int | None
    """Questions of each task; None for all."""
    seed: int
    """Of few-shot examples and sampling."""
    limits: Limits
    """Of each generated program."""
    scores: list[TaskScore] = field(default_factory=list)
    """Found so far, as the following."""
    tasks: dict[str, MeasuredTask] = field(default_factory=dict)
    models: list[MeasuredModel] = field(default_factory=list)
    confinement: Confinement | None = None

    def measure(self, wrapped: Wrapped) -> None:
        """Measure one model on all tasks."""
        start = time.perf_counter()
        logger.info("%s: %d tasks", wrapped.model, len(self.planned))
        results = self._ask(wrapped.lm)
        for name, numbers in results["results"].items():
            if name in self.planned:
                self._add_task(wrapped.model, name, results)
            else:
                self._add_numbers(wrapped.model, name, numbers, samples=None, headline=None)
        self._add_means(wrapped.model)
        seconds = time.perf_counter() - start
        self.models.append(
            MeasuredModel(model=wrapped.model, parameters=wrapped.parameters, backend=wrapped.backend, seconds=seconds)
        )

    def _ask(self, lm: Any) -> Mapping[str, Any]:  # noqa: ANN401 (the harness's, untyped)
        from lm_eval.evaluator import evaluate  # type: ignore[import-untyped]  # ships no types

        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=self.seed)
        with quiet_harness(), _seeded(self.seed), warnings.catch_warnings():
            # Of the way the harness calls generate; users can do nothing about it.
            warnings.filterwarnings("ignore", ".*generation flags.*|.*generation_config.*", UserWarning)
            found: Mapping[str, Any] = evaluate(
                lm=lm,
                task_dict=dict(self.loaded),
                limit=self.limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=True,
                confirm_run_unsafe_code=True,  # such tasks have lost the metric that would run code
            )
        return found

    def _add_task(self, model: str, name: str, results: Mapping[str, Any]) -> None:
        task, samples = self.loaded["tasks"][name], results["samples"][name]
        measured = _described(self.planned[name], task, samples, documents=results["n-samples"][name]["original"])
        first = self.tasks.setdefault(name, measured)
        # Equal seeds and templates: what differs then between models is the models.
        assert first.prompts_sha256 == measured.prompts_sha256
        if self.planned[name].runs_code:
            self._add_programs(model, name, task, samples)
        else:
            request = self.planned[name].request
            headline = None if request.metric is None else f"{request.metric},{request.filter}"
            self._add_numbers(model, name, results["results"][name], samples=measured.samples, headline=headline)

    def _add_numbers(
        self, model: str, name: str, numbers: Mapping[str, Any], *, samples: int | None, headline: str | None
    ) -> None:
        """Take numbers in the harness's form, `metric,filter`: value and `metric_stderr,filter`: error."""
        keys = [key for key in numbers if "," in key and not key.partition(",")[0].endswith("_stderr")]
        chosen = headline if headline in keys else next(iter(keys), None)
        for key in keys:
            metric, _, taken = key.partition(",")
            value, error = numbers[key], numbers.get(f"{metric}_stderr,{taken}")
            if isinstance(value, int | float | np.number):
                self.scores.append(
                    TaskScore(
                        model=model,
                        task=name,
                        metric=metric,
                        filter=taken,
                        value=float(value),
                        stderr=float(error) if isinstance(error, int | float | np.number) else None,
                        samples=samples,
                        is_headline=key == chosen,
                    )
                )

    def _add_programs(self, model: str, name: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401
        problems = []
        for sample in samples:
            start, tests = program_parts(task, sample["doc"])
            problems.append(Problem(programs=tuple(start + answer for answer in sample["resps"][0]), tests=tests))
        count = len(problems[0].programs)
        logger.info("%s: running %d programs of %s", model, count * len(problems), name)
        passed, self.confinement = passed_programs(problems, limits=self.limits)
        for k, (value, error) in pass_rates(passed, count, sorted({1, count})).items():
            self.scores.append(
                TaskScore(
                    model=model,
                    task=name,
                    metric=f"pass@{k}",
                    filter="none",
                    value=value,
                    stderr=error,
                    samples=len(problems),
                    is_headline=k == 1,
                )
            )

    def _add_means(self, model: str) -> None:
        for mean, (names, metric) in MEANS.items():
            found = [
                score
                for score in self.scores
                if score.model == model and score.task in names and score.metric == metric and score.filter == "none"
            ]
            if {score.task for score in found} != set(names):
                continue
            errors = [score.stderr for score in found if score.stderr is not None]
            spread = math.sqrt(math.fsum(error**2 for error in errors)) / len(names)
            self.scores.append(
                TaskScore(
                    model=model,
                    task=f"mean of {mean}",
                    metric=metric,
                    filter="none",
                    value=math.fsum(score.value for score in found) / len(names),
                    stderr=spread if len(errors) == len(names) else None,
                    samples=None,
                    is_headline=True,
                )
            )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed what the harness draws from, and give the caller his random numbers back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _described(
    planned: PlannedTask,
    task: Any,  # noqa: ANN401 (the harness's, untyped)
    samples: Sequence[Mapping[str, Any]],
    *,
    documents: int,
) -> MeasuredTask:
    config = task.config
    is_generated = config.output_type == "generate_until"
    seen: dict[Any, str] = {}
    for sample in samples:  # one for each filter
        seen[sample["doc_id"]] = f"{sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}\n"
    text = "".join(seen[place] for place in sorted(seen))
    return MeasuredTask(
        task=planned.name,
        version=None if task.VERSION is None else str(task.VERSION),
        dataset=planned.dataset,
        dataset_config=planned.dataset_config,
        dataset_revision=_revision(planned, task),
        split=config.test_split or config.validation_split or config.training_split,
        num_fewshot=int(config.num_fewshot or 0),
        samples=len(seen),
        documents=documents,
        generation=_plain(config.generation_kwargs) if is_generated else None,
        programs=int(config.repeats) if planned.runs_code else None,
        prompts_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def _plain(values: Mapping[str, Any] | None) -> dict[str, Any]:
    simple = (str, int, float, bool, list, type(None))
    return {key: value for key, value in (values or {}).items() if isinstance(value, simple)}


def _revision(planned: PlannedTask, task: Any) -> str | None:  # noqa: ANN401 (the harness's, untyped)
    """Return the commit of a Hub dataset: of its snapshot, or from the addresses of the files it was made of."""
    if planned.dataset is None:
        return None
    if planned.folder is not None:
        return planned.folder.name
    for split in getattr(task, "dataset", {}).values():
        for address in getattr(split.info, "download_checksums", None) or {}:
            found = _REVISION.search(str(address))
            if found is not None:
                return found[1]
    return None
