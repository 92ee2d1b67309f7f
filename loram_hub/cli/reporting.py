"""`loram report`: one HTML page about releases, trainings and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loram_hub.cli.group import main
from loram_hub.cli.options import json_option
from loram_hub.cli.output import print_result, size_text

if TYPE_CHECKING:
    from loram_hub.reporting import Report


@main.command(name="report", epilog="Example: loram report runs/my-run my-release --compare plain-lora -o report.html")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default="report.html", show_default=True, help="The page to write."
)
@click.option("--compare", metavar="ADAPTER", help="A plain LoRA adapter, whose update is laid beside the others'.")
@click.option(
    "--importance", type=click.Path(path_type=Path), help="File of importance scores, if it is in none of the sources."
)
@click.option(
    "--evaluation",
    "evaluations",
    type=click.Path(path_type=Path),
    multiple=True,
    help="What 'loram eval --json' printed; may be repeated.",
)
@click.option(
    "--pictures", type=click.Path(path_type=Path), help="Folder for the pictures as PNG. Default: <page>_files."
)
@click.option(
    "--base",
    metavar="MODEL",
    help="Folder or Hub id of the model that adapters are for, where no release that is given and not the Hub's cache "
    "has its config. Without it the Hub is asked once for what the adapter names.",
)
@click.option("--title", help="Of the page. Default: one that names the first source.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier page and the pictures that it shows.")
@click.option("--dry-run", is_flag=True, help="Read everything and say what would be shown, without writing.")
@click.option("--token", help="Hub token; by default HF_TOKEN, or the one you are logged in with.")
@json_option
def report(sources: tuple[str, ...], out: Path, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Write one HTML page about SOURCE..., which needs no network to be read: pictures, tables, losses, norms.

    A source is a release or an adapter (folder or Hub id); the folder of a fine-tuning run, an alignment, a study, the
    demo, or a publication (--work-dir of 'loram publish'); or the JSON of 'loram eval'.
    """
    from loram_hub.reporting import report as write_report

    written = write_report(sources, out, **options)
    result = written.to_dict() | {"dry_run": options["dry_run"]}
    print_result(result, as_json, lambda: _print(written, dry_run=options["dry_run"]))


def _print(written: Report, *, dry_run: bool) -> None:
    size = "" if dry_run else f", {size_text(written.nbytes)}"
    click.echo(f"{'Would write' if dry_run else 'Wrote'} {written.path}: {len(written.pictures)} pictures{size}.")
    for title in written.sections:
        click.echo(f"  {title}")
    for title in written.missing:
        click.echo(f"  no data: {title}")
