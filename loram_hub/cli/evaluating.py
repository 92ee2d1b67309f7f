"""The command that measures: held-out loss, downstream tasks, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loram_hub.cli.group import main
from loram_hub.cli.options import json_option, mismatch_option
from loram_hub.cli.output import print_result, print_table
from loram_hub.errors import InvalidRequestError

if TYPE_CHECKING:
    from loram_hub.downstream import PlannedTask

_LOSSES = ("max_tokens", "protocol")
_TASKS = ("task_folder", "num_fewshot", "as_", "run_generated_code")


@main.command(
    name="eval",
    epilog="Example: loram eval held_out.jsonl --base org/model --release R --adapter A --recovered my-adapter",
)
@click.argument("data", required=False)
@click.option("--base", help="The original model.")
@click.option("--release", help="The pruned model.")
@click.option("--adapter", help="The adapter trained on the release.")
@click.option("--recovered", help="The recovered adapter, for the base.")
@click.option("--max-tokens", type=int, help="Longest sequence of DATA [1024].")
@click.option(
    "--protocol", type=click.Choice(["paper"]), help="Read DATA as the LoRAM paper does: 2,000 records, 512 tokens."
)
@click.option(
    "--tasks", help="Tasks of lm-evaluation-harness, or presets (paper, math, csr, code), with commas between them."
)
@click.option(
    "--task-folder",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Task files of your own, in the harness's format; may be given several times.",
)
@click.option("--num-fewshot", type=int, help="Solved examples before each question. Default: the preset's or task's.")
@click.option(
    "--as",
    "as_",
    type=click.Choice(["adapter", "merged", "vllm"]),
    default="adapter",
    show_default=True,
    help="How tasks meet base and recovered adapter.",
)
@click.option(
    "--run-generated-code",
    is_flag=True,
    help="Allow tasks that run programs which the model wrote (HumanEval), on this machine.",
)
@click.option("--batch-size", type=int, default=8, show_default=True, help="Sequences per forward pass.")
@click.option("--limit", type=int, help="Read at most this many records, and questions of each task.")
@click.option("--device", help="Where to run, for example cuda. Default: cpu.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Also write the results to this JSON file.")
@click.option("--dry-run", is_flag=True, help="Say what would be measured and downloaded, without doing it.")
@mismatch_option
@json_option
def evaluate(
    data: str | None,
    tasks: str | None,
    out: Path | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Compare the models on held-out DATA, on tasks, or on both.

    DATA are texts or prompt/completion records: file, folder or dataset id. Tasks are those of lm-evaluation-harness,
    which needs: pip install 'loram-hub[eval]'.
    """
    _check(data, tasks, options)
    if out is not None:
        _check_out(out)
    would = _checked(data, tasks, options, dry_run=dry_run)
    if dry_run:
        print_result(would, as_json, lambda: _print_preview(would))
        return
    result: dict[str, Any] = {}
    if data is not None:
        result |= _losses(data, options)
        if out is not None:
            _write(out, result)  # so that they are not lost if tasks fail
    if tasks is not None:
        result["tasks"] = _task_results(tasks, options)
        if out is not None:
            _write(out, result)
    print_result(result, as_json, lambda: _print_found(result))


def _check(data: str | None, tasks: str | None, options: Mapping[str, Any]) -> None:
    if data is None and tasks is None:
        raise click.UsageError("Give DATA, --tasks, or both.")
    for names, subject, is_given in ((_LOSSES, "DATA", data is not None), (_TASKS, "--tasks", tasks is not None)):
        idle = [] if is_given else [name for name in names if options[name] not in (None, (), False, "adapter")]
        if idle:
            raise click.UsageError(f"--{idle[0].strip('_').replace('_', '-')} goes with {subject}.")


def _losses(data: str, options: Mapping[str, Any]) -> dict[str, Any]:
    from loram_hub import evaluate as evaluate_models

    table = evaluate_models(
        data, identify=True, **{name: value for name, value in options.items() if name not in _TASKS}
    )
    return table.to_dict()


def _task_results(tasks: str, options: Mapping[str, Any]) -> dict[str, Any]:
    from loram_hub.downstream import evaluate_tasks

    return evaluate_tasks(tasks, include_path=options["task_folder"], **_of_tasks(options)).to_dict()


def _of_tasks(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in (*_LOSSES, "task_folder")}


def _checked(data: str | None, tasks: str | None, options: Mapping[str, Any], *, dry_run: bool) -> dict[str, Any]:
    """Check all of a request before any of it is measured; return what would be."""
    from loram_hub.evaluation import check_given, check_losses

    models = {part: options[part] for part in ("base", "release", "adapter", "recovered")}
    check_given(**models)
    if data is not None:
        taken = ("protocol", "max_tokens", "limit", "batch_size")
        check_losses(data, **{name: options[name] for name in taken})
    planned = () if tasks is None else _planned(tasks, options, dry_run=dry_run)
    return {
        "dry_run": True,
        "data": data,
        "protocol": options["protocol"],
        "models": {part: name for part, name in models.items() if name is not None},
        "tasks": [task.to_dict() for task in planned],
    }


def _planned(tasks: str, options: Mapping[str, Any], *, dry_run: bool) -> Sequence[PlannedTask]:
    from loram_hub.downstream import check_tasks

    unused = ("device", "allow_base_mismatch")
    taken = {name: value for name, value in _of_tasks(options).items() if name not in unused}
    return check_tasks(tasks, include_path=options["task_folder"], missing_data=dry_run, **taken)


def _print_preview(would: Mapping[str, Any]) -> None:
    if would["data"] is not None:
        click.echo(f"Loss on {would['data']}.")
    if would["tasks"]:
        rows = [
            (
                task["task"],
                "-" if task["num_fewshot"] is None else str(task["num_fewshot"]),
                task["download"] or task["data"],
                "runs generated code" if task["runs_code"] else "",
            )
            for task in would["tasks"]
        ]
        print_table(("task", "shots", "data", ""), rows)


def _print_found(result: Mapping[str, Any]) -> None:
    if "rows" in result:
        rows = [
            (
                row["model"],
                "not finite" if row["loss"] is None else f"{row['loss']:.4f}",
                "-" if row["perplexity"] is None else f"{row['perplexity']:.2f}",
                f"{row['parameters']:,}",
            )
            for row in result["rows"]
        ]
        print_table(("model", "loss", "perplexity", "parameters"), rows)
    if "tasks" in result:
        _print_scores(result["tasks"]["scores"], [model["model"] for model in result["tasks"]["models"]])


def _print_scores(scores: Sequence[Mapping[str, Any]], models: Sequence[str]) -> None:
    """Print a line for each task and metric, a column for each model."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for score in scores:
        metric = score["metric"] if score["filter"] == "none" else f"{score['metric']} ({score['filter']})"
        value = "-" if score["value"] is None else f"{score['value']:.4f}"
        error = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
        cells.setdefault((score["task"], metric), {})[score["model"]] = value + error
    rows = [(*key, *(found.get(model, "-") for model in models)) for key, found in cells.items()]
    print_table(("task", "metric", *models), rows)


def _check_out(out: Path) -> None:
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise InvalidRequestError(
            f"{out} cannot be written: it is a folder, or the folder it would be in is not there."
        )


def _write(out: Path, result: Mapping[str, Any]) -> None:
    from loram_hub.files import dump_json, resource_errors

    partial = out.with_name(f".{out.name}.partial")
    with resource_errors(f"Writing {out}"):
        partial.write_text(dump_json(result), encoding="utf-8")
        partial.replace(out)
