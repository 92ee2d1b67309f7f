"""Commands around recipes: publish, config-schema."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loram_hub.cli.group import main
from loram_hub.cli.options import json_option
from loram_hub.cli.output import print_json, print_result, print_table, size_text, suggest
from loram_hub.errors import InvalidRequestError

if TYPE_CHECKING:
    from loram_hub.pipeline import Preview, Published


@main.command(epilog="Example: loram publish publish/llama-2-13b.yaml --dry-run")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--repo-id", help="Publish under this Hub id instead of the recipe's.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Default: a folder of the release's name, here.")
@click.option("--launcher", help="Start the processes of align by this command instead of the recipe's.")
@click.option("--until", help="Last stage to run: prune, refit, teach, align, quantize, evaluate, card or push.")
@click.option(
    "--keep-intermediate/--delete-intermediate",
    default=True,
    show_default=True,
    help="Keep outputs that only later stages need, once those are done.",
)
@click.option("--ignore-versions", is_flag=True, help="Keep what other versions of the tools have made.")
@click.option("--token", help="Hub token; by default HF_TOKEN, or the one you are logged in with.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done, without doing it.")
@json_option
def publish(
    recipe: Path,
    repo_id: str | None,
    launcher: str | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Make a release by RECIPE, from base model to Hub; run it again after an interruption, and it goes on."""
    from loram_hub.pipeline import check_publish, read_recipe
    from loram_hub.pipeline import publish as publish_release

    chosen = read_recipe(recipe)
    if repo_id is not None:
        chosen = replace(chosen, repo_id=repo_id)
    if launcher is not None and chosen.align is not None:
        chosen = replace(chosen, align=replace(chosen.align, launcher=tuple(shlex.split(launcher))))
    if dry_run:
        preview = check_publish(chosen, **options)
        print_result(preview.to_dict(), as_json, lambda: _print_preview(preview))
        if preview.problems:
            click.get_current_context().exit(InvalidRequestError.exit_code)
        return
    published = publish_release(
        chosen,
        announce=lambda preview: _print_preview(preview, err=True),
        **options,
    )
    print_result(published.to_dict(), as_json, lambda: _print_published(published))


@main.command(name="config-schema", epilog="Example: loram config-schema finetune > finetune.schema.json")
@click.argument("kind", type=click.Choice(["publish", "finetune"]), default="publish")
def config_schema(kind: str) -> None:
    """Print the JSON Schema of the recipes of a command, for editors. Default: those of publish."""
    if kind == "publish":
        from loram_hub.pipeline import recipe_schema

        print_json(recipe_schema())
    else:
        from loram_hub.finetuning import FinetuneRecipe
        from loram_hub.recipes import schema_of

        print_json(schema_of(FinetuneRecipe, title="Recipe of a fine-tuning run"))


def _print_preview(preview: Preview, *, err: bool = False) -> None:
    header = ("stage", "", "disk", "memory", "time", "cost", "")
    rows = [
        (
            row.name,
            row.state,
            _size(row.cost.output_bytes + row.cost.scratch_bytes),
            _size(row.cost.memory_bytes),
            _time(row.seconds),
            _dollars(row.price),
            row.why,
        )
        for row in preview.rows
    ]
    total = ("to do", "", _size(preview.disk_bytes), "", _time(preview.seconds), _dollars(preview.price), "")
    print_table(header, [*rows, total], err=err)
    for note in preview.notes:
        click.echo(note, err=err)
    for problem in preview.problems:
        click.echo(f"PROBLEM: {problem}", err=err)


def _print_published(published: Published) -> None:
    rows: Sequence[tuple[str, ...]] = [
        (stage.name, "made" if stage.made else "held", _time(stage.seconds), _size(stage.nbytes), stage.why)
        for stage in published.stages
    ]
    print_table(("stage", "", "time", "disk", ""), rows)
    if published.commit is None:
        suggest("loram verify", published.release)
        return
    click.echo(f"Published {published.url}")
    click.echo(f"commit: {published.commit}")


def _size(nbytes: int) -> str:
    return size_text(nbytes) if nbytes else "-"


def _time(seconds: float | None) -> str:
    from loram_hub.pipeline.preview import hours_text

    return "?" if seconds is None else hours_text(seconds)


def _dollars(price: float | None) -> str:
    return "?" if price is None else f"${price:,.2f}"
