"""The `loram` command itself: its errors and exit codes."""

from __future__ import annotations

import errno
import json
import logging
import sys
import warnings
from typing import Any

import click

from loram_hub.cli.options import AS_JSON
from loram_hub.errors import LoramError

EXIT_UNEXPECTED, EXIT_RESOURCE, EXIT_INTERRUPTED = 1, 6, 130


class _LoramGroup(click.Group):
    """Turns errors into one message and an exit code; commands are listed in the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 (click's)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            _fail(
                "Interrupted. Nothing half-written was left here; a push goes on where it was when it is run again.",
                EXIT_INTERRUPTED,
                "Interrupted",
            )
        except LoramError as err:
            _fail(str(err), err.exit_code, type(err).__name__, reraise=err)
        except MemoryError as err:
            _fail("Out of memory.", EXIT_RESOURCE, "MemoryError", reraise=err)
        except OSError as err:
            code = EXIT_RESOURCE if err.errno in (errno.ENOSPC, errno.EDQUOT) else EXIT_UNEXPECTED
            _fail(f"{type(err).__name__}: {err}. --debug shows where.", code, type(err).__name__, reraise=err)
        # The border to the user: whatever is left becomes one message and exit code 1, with --debug the traceback.
        except Exception as err:
            out_of_memory = type(err).__name__ == "OutOfMemoryError"  # torch's, which derives from RuntimeError
            code = EXIT_RESOURCE if out_of_memory else EXIT_UNEXPECTED
            _fail(f"{type(err).__name__}: {err} --debug shows where.", code, type(err).__name__, reraise=err)


def _fail(message: str, code: int, kind: str, *, reraise: BaseException | None = None) -> None:
    context = click.get_current_context()
    if context.find_root().params.get("debug") and reraise is not None:
        raise reraise
    if context.find_root().meta.get(AS_JSON):
        click.echo(json.dumps({"error": {"code": code, "kind": kind, "message": message}}))
    click.echo(f"Error: {message}", err=True)
    context.exit(code)


@click.group(
    cls=_LoramGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with: loram demo",
)
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bars, warnings only.")
@click.version_option(package_name="loram-hub")
def main(debug: bool, quiet: bool) -> None:
    """Train LoRA on a pruned model, use it on the original one (LoRAM, arXiv 2502.13533)."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    logging.getLogger("loram_hub").setLevel(level)
    # transformers 5.23 renamed it; peft and trl still use the old name, and users can do nothing about that.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
    if quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
