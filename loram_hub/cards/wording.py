"""What both kinds of card say in the same way: names, numbers, tables, the licence block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loram_hub.cards.escaping import Markdown, code, hub_link, is_hub_id
from loram_hub.cards.evaluations import MODELS, Evaluation
from loram_hub.cards.task_scores import Score, ScoredTask, TaskScores
from loram_hub.errors import InvalidRequestError
from loram_hub.licences import CHANGES, Licence

MAX_ROWS = 200
"""Files that a card lists; a manifest may have any number."""


def check_repo_id(repo_id: str | None) -> None:
    """Raise `InvalidRequestError` if a name is given that cannot be a repository on the Hub."""
    if repo_id is not None and not is_hub_id(repo_id):
        raise InvalidRequestError(f"repo_id is {repo_id[:200]!r}; the Hub's form is needed: org/name.")


def title_of(repo_id: str | None, otherwise: str) -> Markdown:
    """Return the heading: the repository's name, or a description."""
    return code(otherwise) if repo_id is None else Markdown(repo_id.rpartition("/")[2].replace("_", "\\_"))


def count(number: int) -> Markdown:
    """Show a whole number with thousands separated."""
    return Markdown(f"{number:,}")


def size(nbytes: int) -> Markdown:
    """Show a number of bytes in the unit that suits it."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= scale:
            return Markdown(f"{nbytes / scale:,.2f} {unit}")
    return Markdown(f"{nbytes / 2**10:,.2f} KiB")


def loss_rows(evaluation: Evaluation | None) -> list[tuple[Markdown, ...]]:
    """Return the table of losses, a row for every model whether it was measured or not; empty without losses."""
    if evaluation is None or not evaluation.rows:
        return []
    absent = Markdown("not measured")
    rows: list[tuple[Markdown, ...]] = []
    for model in MODELS:
        row = evaluation.row(model)
        if row is None:
            rows.append((Markdown(model), absent, absent, absent))
        else:
            perplexity = absent if row.perplexity is None else Markdown(f"{row.perplexity:,.2f}")
            rows.append((Markdown(model), Markdown(f"{row.loss:.4f}"), perplexity, count(row.parameters)))
    return rows


def evaluation_line(evaluation: Evaluation | None) -> Markdown | None:
    """Say what the losses were measured on; None without losses."""
    if evaluation is None or not evaluation.rows:
        return None
    data = "held-out data" if evaluation.dataset is None else hub_link(evaluation.dataset, kind="datasets/")
    how = ", by the protocol of the LoRAM paper (at most 512 tokens)" if evaluation.protocol == "paper" else ""
    return Markdown(f"{count(evaluation.tokens)} tokens of {count(evaluation.examples)} sequences from {data}{how}")


def task_values(evaluation: Evaluation | None) -> dict[str, object]:
    """Return what the table of tasks shows: `task_rows` (empty without tasks), and `task_models`, `tasks_line`."""
    tasks = None if evaluation is None else evaluation.tasks
    if tasks is None:
        return {"task_rows": [], "task_models": [], "tasks_line": None}
    models = [model for model in MODELS if any(model in task.scores for task in tasks.tasks)]
    return {
        "task_rows": [_task_row(task, models) for task in tasks.tasks[:MAX_ROWS]],
        "task_models": [Markdown(model) for model in models],
        "tasks_line": _tasks_line(tasks),
    }


def _task_row(task: ScoredTask, models: Sequence[str]) -> tuple[Markdown, ...]:
    metric = code(task.metric) if task.filter == "none" else Markdown(f"{code(task.metric)} ({code(task.filter)})")
    shots = Markdown("-") if task.num_fewshot is None else count(task.num_fewshot)
    asked = Markdown("-" if task.samples is None else f"{task.samples:,}")
    if task.samples is not None and not task.is_whole:
        asked = Markdown(f"first {task.samples:,} of {task.documents or 0:,}")
    name = Markdown(f"{code(task.task)} (own task file)") if task.is_own else code(task.task)
    return (name, metric, shots, asked, *(_score(task.scores.get(model)) for model in models))


def _score(score: Score | None) -> Markdown:
    if score is None:
        return Markdown("not measured")
    shown = [_number(number) for number in (score.value, score.stderr) if number is not None]
    return Markdown(" ± ".join(shown))


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def _tasks_line(tasks: TaskScores) -> Markdown:
    """Say what measured: the harness, and what ran the base with the adapter."""
    adapted = tasks.backends.get(MODELS[-1])
    ran = "" if adapted is None else f"; base and recovered adapter ran as {code(adapted)}"
    return Markdown(f"lm-evaluation-harness {code(tasks.harness)}, value ± standard error{ran}")


def file_rows(hashes: Mapping[str, str]) -> list[tuple[Markdown, Markdown]]:
    """Return name and SHA-256 of files, at most `MAX_ROWS`."""
    return [(code(name), code(digest)) for name, digest in list(hashes.items())[:MAX_ROWS]]


def licence_values(licence: Licence, changes: Markdown) -> dict[str, object]:
    """Return what the licence block says; all of it is our own data."""
    return {
        "licence": Markdown(f"[{licence.title}](LICENSE)"),
        "terms": Markdown(f"<{licence.link}>") if licence.link else None,
        "display": Markdown(licence.display[0]) if licence.display else None,
        "notice": Markdown(licence.notice) if licence.notice else None,
        "use_policy": Markdown(f"<{licence.use_policy}>") if licence.use_policy else None,
        "licence_limits": [Markdown(limit) for limit in licence.limits],
        "changes": Markdown(f"{CHANGES} {changes}."),
    }
