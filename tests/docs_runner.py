"""Run the code blocks of a page, in their order, as a reader would: one shell, one Python, one folder.

Shell blocks run in a real bash, whose variables last from block to block. `loram` and `python` are found on its PATH as
stand-ins that hand their arguments, folder, environment and files over to one interpreter. That one has imported
everything, and forks a child for each command: importing torch and transformers takes seconds, forking does not.
The Python blocks of a page run in one such child, which keeps their names.

As a script this module is the interpreter that forks: `docs_runner.py SOCKET`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TextIO

ROOT = Path(__file__).resolve().parents[1]
_MODULES = (
    "loram_hub.cli", "loram_hub.pruning", "loram_hub.quantization", "loram_hub.merging", "loram_hub.recovery",
    "loram_hub.inspection", "loram_hub.cards", "loram_hub.pushing", "loram_hub.pipeline.publishing",
    "loram_hub.finetuning.running", "loram_hub.evaluation", "loram_hub.auto", "loram_hub.fitting",
    "loram_hub.importance", "loram_hub.sparsification.sparsifying", "loram_hub.masked_lora", "datasets",
    "trl.trainer.sft_trainer", "peft", "transformers.models.llama.modeling_llama",
    "transformers.integrations.bitsandbytes", "peft.tuners.lora.bnb", "matplotlib.pyplot",
)  # fmt: skip
_SECONDS = 300
"""After which a block is taken to hang."""
_STAND_IN = """#!{python} -IS
import json, os, socket, sys
there = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
there.connect({socket!r})
order = {{"program": {program!r}, "arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(there, [json.dumps(order).encode()], [0, 1, 2])
sys.exit(int(there.recv(16)))
"""


class BlockError(AssertionError):
    """A block failed; the message has the end of its output."""


class Interpreter:
    """The interpreter that forks, and the stand-ins that reach it.

    Args:
        folder: Where socket and stand-ins lie; a short path, since a socket's is limited to 107 bytes.
        environment: Its environment. What libraries read when they are imported, such as HF_ENDPOINT, is fixed by it.
        stand_ins: Programs that `docs_stand_ins` stands in for.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], *, stand_ins: Sequence[str] = ()) -> None:
        self.tools = folder / "tools"
        self.tools.mkdir(parents=True)
        for program in stand_ins:
            script = f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/docs_stand_ins.py {program} "$@"\n'
            (self.tools / program).write_text(script)
            (self.tools / program).chmod(0o755)
        self.address = str(folder / "socket")
        for program in ("loram", "python"):
            stand_in = self.tools / program
            stand_in.write_text(_STAND_IN.format(python=sys.executable, socket=self.address, program=program))
            stand_in.chmod(0o755)
        self.environment = {
            **environment,
            **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")},
            "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator: no fork takes its thread along
            "TRANSFORMERS_VERBOSITY": "error",
            "PATH": os.pathsep.join([str(self.tools), str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, self.address],
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
        )

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self.__exit__(None, None, None)
            raise BlockError("The interpreter that forks did not start; see stderr.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Session:
    """A reader's shell and Python in one folder. A block that fails ends it.

    Args:
        interpreter: That runs `loram` and Python.
        folder: To work in.
    """

    def __init__(self, interpreter: Interpreter, folder: Path) -> None:
        self._interpreter, self.folder = interpreter, folder
        self._log = (folder.parent / f"{folder.name}.log").open("w+b")
        self._count = 0
        answers, answer = os.pipe()
        self._answers = os.fdopen(answers, "r")
        self._bash = subprocess.Popen(
            ["bash", "-eo", "pipefail"],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            cwd=folder,
            env=interpreter.environment | {"ANSWER": str(answer), "PYTHONPATH": str(ROOT)},
            pass_fds=(answer,),
            start_new_session=True,
        )
        os.close(answer)
        self._python: tuple[socket.socket, TextIO, TextIO] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._bash.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._bash.stdin.close()
        try:
            self._bash.wait(10)
        except subprocess.TimeoutExpired:  # a block hangs
            os.killpg(self._bash.pid, signal.SIGKILL)
            self._bash.wait()
        self._answers.close()
        if self._python is not None:
            there, orders, results = self._python
            with contextlib.suppress(BrokenPipeError):
                orders.close()
            there.recv(16)
            for opened in (results, there):
                opened.close()
        self._log.close()

    def run(self, kind: str, code: str, place: str) -> str:
        """Run a block; returns what it printed.

        Args:
            kind: `sh` or `python`.
            code: Its text.
            place: Where it stands, for messages.
        """
        began = self._log.seek(0, os.SEEK_END)
        is_done = self._run_shell(code) if kind == "sh" else self._run_python(code, place)
        self._log.seek(began)
        printed = self._log.read().decode(errors="replace")
        if not is_done:
            raise BlockError(f"{place} failed:\n{code}\n--- it printed:\n{printed[-4000:]}")
        return printed

    def _run_shell(self, code: str) -> bool:
        self._count += 1
        script = self.folder.parent / f"{self.folder.name}-{self._count}.sh"
        script.write_text(code)
        assert self._bash.stdin is not None
        try:
            self._bash.stdin.write(f"source {script} < /dev/null\nprintf 'done\\n' >&$ANSWER\n")
            self._bash.stdin.flush()
        except BrokenPipeError:
            return False
        return _answered(self._answers)

    def _run_python(self, code: str, place: str) -> bool:
        if self._python is None:
            self._python = self._start_python()
        _, orders, results = self._python
        try:
            orders.write(json.dumps({"code": code, "place": place}) + "\n")
            orders.flush()
        except BrokenPipeError:
            return False
        return _answered(results)

    def _start_python(self) -> tuple[socket.socket, TextIO, TextIO]:
        there = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        there.connect(self._interpreter.address)
        (given, orders), (results, answer) = os.pipe(), os.pipe()
        order = {
            "program": "session", "arguments": [], "folder": str(self.folder),
            "environment": self._interpreter.environment | {"PYTHONPATH": str(ROOT)},
        }  # fmt: skip
        files = [given, self._log.fileno(), self._log.fileno(), answer]
        socket.send_fds(there, [json.dumps(order).encode()], files)
        os.close(given)
        os.close(answer)
        there.settimeout(_SECONDS)
        return there, os.fdopen(orders, "w"), os.fdopen(results, "r")


def _answered(answers: TextIO) -> bool:
    """Whether a block came to its end; not, if the process ended before, or hangs."""
    return bool(select.select([answers], [], [], _SECONDS)[0]) and answers.readline() == "done\n"


def _serve(address: str) -> None:
    """Import everything, then fork a child for every order, until the process is told to end."""
    for module in _MODULES:
        importlib.import_module(module)
    gc.freeze()  # or each child would look through all that was imported
    if Path("/proc/self/task").is_dir():
        assert len(os.listdir("/proc/self/task")) == 1, "a second thread: a fork could take a lock along"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children that wait for commands
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(address)
        listening.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            there, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _take(there)
            there.close()


def _take(there: socket.socket) -> NoReturn:
    """Take an order: fork a child that runs it, and answer with its exit status."""
    message, files, _, _ = socket.recv_fds(there, 1 << 20, 4)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        there.close()
        _run(json.loads(message), files)
    for file in files:
        os.close(file)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    there.send(str(status if status >= 0 else 128 - status).encode())
    os._exit(0)


def _run(order: dict[str, Any], files: list[int]) -> NoReturn:
    """Run a command to its end, and end the process as the interpreter would."""
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    code: object = 1
    try:
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"])
        time.tzset()
        sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        arguments = order["arguments"]
        if order["program"] == "loram":
            _loram(arguments)
        elif order["program"] == "python":
            _python(arguments)
        else:
            _session(files[3])
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
    except BaseException:  # as the interpreter does with what nobody caught
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _loram(arguments: list[str]) -> None:
    from loram_hub.cli import main

    main(arguments, prog_name="loram")


def _python(arguments: list[str]) -> None:
    """Do what `python ARGUMENTS` does, for the options that documents use."""
    while arguments[:1] == ["-W"]:
        arguments = arguments[2:]
    first, rest = arguments[0], arguments[1:]
    if first == "-m":
        sys.argv = rest
        if rest[0] == "loram_hub":
            _loram(rest[1:])
        else:
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first in ("-c", "-"):
        sys.argv, sys.path[0] = [first, *rest[1:]], ""
        exec(compile(rest[0] if first == "-c" else sys.stdin.read(), "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = arguments, str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def _session(answer: int) -> None:
    """Run the Python blocks of a page, one after the other, with the names of those before."""
    sys.argv, sys.path[0] = [""], ""
    names: dict[str, Any] = {"__name__": "__main__"}
    for line in sys.stdin:
        order = json.loads(line)
        exec(compile(order["code"], order["place"], "exec"), names)
        sys.stdout.flush()
        os.write(answer, b"done\n")  # what ends this process closes it: the traceback has been written then


if __name__ == "__main__":
    _serve(sys.argv[1])
