"""Running a step in several processes: through torchrun on this machine, or through the launcher that a recipe names.

The step is handed over as `loram align ... --settings FILE`, so what runs on a cluster is a command that anyone can
repeat by hand. Its talk goes to our stderr; what it prints on stdout is its result, or its error, which is raised here
as if the step had run in this process. The processes end with us: the kernel kills the launcher when we die, and
torchrun's ranks have asked for the same.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import loram_hub.errors
from loram_hub.alignment import align
from loram_hub.alignment.launch import launcher_mark
from loram_hub.corpora import Corpus
from loram_hub.errors import InvalidRequestError, LoramError
from loram_hub.files import dump_json, resource_errors
from loram_hub.pipeline.recipe import Recipe
from loram_hub.teaching import teach

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 60.0
"""Time that processes have to end after Ctrl-C."""
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})", re.ASCII)
"""What `os.path.expandvars` fills in."""


def align_in_processes(
    recipe: Recipe,
    release: Path,
    out: Path,
    *,
    run_dir: Path,
    corpora: Sequence[Corpus],
    teacher: Path | None = None,
    token: str | bool | None = None,
) -> None:
    """Align a release in as many processes as the recipe asks for, replacing `out`.

    Raises:
        LoramError: what `align` raises, also in another process.
    """
    assert recipe.align is not None
    device = None if recipe.device is None else recipe.device.partition(":")[0]
    settings = recipe.align_settings
    launcher = launcher_of(recipe)
    if not launcher:
        align(
            release, out, corpora=corpora, settings=settings, teacher=teacher, run_dir=run_dir,
            report_to=recipe.align.report_to, device=device or "cpu", overwrite=True, token=token,
        )  # fmt: skip
        return
    request = settings.to_dict() | {
        "corpora": [asdict(corpus) for corpus in corpora],
        "report_to": list(recipe.align.report_to),
    }
    options: list[str | Path] = ["--run-dir", run_dir, "--device", device or "cpu", "--overwrite"]
    options += [] if teacher is None else ["--teacher", teacher]
    run_command(launcher, "align", request, release, out, *options, beside=out, token=token)


def teach_in_processes(
    recipe: Recipe, base: Path, out: Path, *, corpora: Sequence[Corpus], token: str | bool | None = None
) -> None:
    """Compute the teacher's targets in as many processes as `align` will have; what is there already is kept.

    Raises:
        LoramError: what `teach` raises, also in another process.
    """
    settings = recipe.teaching_settings
    launcher = launcher_of(recipe)
    if not launcher:
        teach(base, out, corpora=corpora, settings=settings, device=recipe.device, token=token)
        return
    request = asdict(settings) | {"corpora": [asdict(corpus) for corpus in corpora]}
    run_command(launcher, "teach", request, base, out, "--device", recipe.device or "cpu", beside=out, token=token)


def launcher_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the command that starts the processes; nothing if one process is enough."""
    if recipe.align is None:
        return ()
    if recipe.align.launcher:
        return tuple(os.path.expandvars(part) for part in recipe.align.launcher)
    processes = recipe.align.settings.processes or 1
    if processes == 1:
        return ()
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))


def check_launcher(recipe: Recipe) -> None:
    """Raise `InvalidRequestError` if the recipe's launcher cannot be started here."""
    launcher = launcher_of(recipe)
    given = () if recipe.align is None else recipe.align.launcher
    names = [name.strip("{}") for part in given for name in _VARIABLE.findall(part)]
    unset = [name for name in names if name not in os.environ]
    if unset:
        raise InvalidRequestError(
            f"align.launcher has the variable {unset[0]!r:.200}, which is not set. Run this inside of the job that "
            "sets it."
        )
    if launcher and shutil.which(launcher[0]) is None:
        raise InvalidRequestError(
            f"align.launcher begins with {launcher[0]!r}, which is no command on this machine. Is its module loaded?"
        )


def run_command(
    launcher: Sequence[str],
    command: str,
    request: Mapping[str, Any],
    *arguments: str | Path,
    beside: Path,
    token: str | bool | None,
) -> None:
    """Run a `loram` command through a launcher and wait for it.

    Args:
        launcher: what starts the processes.
        command: of `loram`.
        request: its settings, handed over in a file.
        *arguments: its other arguments.
        beside: the command's output; the file with the settings is made beside it.
        token: of the Hub, handed over in the environment, where other users do not see it.

    Raises:
        LoramError: the one that the command ended with; or it ended well and left no output.
    """
    settings = beside.with_name(f".{beside.name}.settings.json")
    with resource_errors(f"Writing {settings}"):
        settings.write_text(dump_json(request), encoding="utf-8")
    line = [*launcher, "-m", "loram_hub", command, *map(str, arguments), "--settings", str(settings), "--json"]
    logger.info("starting %s", " ".join(line))
    environment = dict(os.environ) | launcher_mark()
    environment |= {"HF_TOKEN": token} if isinstance(token, str) else {}
    try:
        with subprocess.Popen(
            line, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=_die_with_parent(os.getpid())
        ) as process:
            output = _wait(process)
    except FileNotFoundError as err:
        raise InvalidRequestError(f"The launcher {line[0]!r} is no command on this machine.") from err
    finally:
        settings.unlink(missing_ok=True)
    if process.returncode != 0:
        raise _error_of(output, process.returncode, command)
    if not beside.exists():
        raise LoramError(
            f"The launcher {line[0]!r} ended with status 0, and {beside} is not there. It must start the command that "
            "is added to it, on machines that see this folder, and wait for its end, as torchrun and srun do."
        )


def _wait(process: subprocess.Popen[str]) -> str:
    """Return what the command printed; if we are interrupted, end it first."""
    assert process.stdout is not None
    try:
        return process.communicate()[0]
    except BaseException:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def _die_with_parent(parent: int) -> Any:  # noqa: ANN401 (what Popen takes)
    """Return what has the kernel kill a child when this process ends, however it ends."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork: afterwards a lock may be held

    def arrange() -> None:
        set_parent_death_signal = 1
        prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)

    return arrange


def _error_of(output: str, status: int, command: str) -> LoramError:
    """Return the error that the first failing process reported."""
    for line in output.splitlines():
        start = line.find('{"error"')  # some launchers put the number of the process before each line
        if start < 0:
            continue
        try:
            error = json.loads(line[start:])["error"]
        except (ValueError, KeyError):
            continue
        kind = getattr(loram_hub.errors, str(error.get("kind")), LoramError)
        if isinstance(kind, type) and issubclass(kind, LoramError):
            return kind(str(error.get("message")))
    ended = f"signal {-status}" if status < 0 else f"status {status}"
    return LoramError(
        f"The processes of loram {command} ended with {ended}; what they said is above. Run it again: it goes on where "
        "it was."
    )
