"""The second of two programs that a generated program runs under: a guard inside the interpreter, and the proof.

Started by `confining`, which has given away what the kernel can take. The job comes on stdin as JSON. On stdout go a
line that says how far the process is confined and, after the last assertion of the tests, the proof: a random text. A
program that exits early, prints, or is killed leaves no proof.

While the program runs, no file, variable or frame holds the proof: it lies on the stack of the interpreter, between
two calls. The guard refuses what leads around that (tracing, other frames, this process's memory), and it refuses
what the kernel may have granted: starting processes and threads, connecting, changing files outside the folder. It
is the second wall, not the first. Code written to break out of Python's objects into its memory can get past it, and
past the proof; then what `confining` took away is what holds.
"""

from __future__ import annotations

import json
import os
import posix
import sys
from collections.abc import Callable
from typing import Any

_REFUSED = (
    "_thread.start", "code.__new__", "ctypes.", "fcntl.", "ftplib.", "gc.get_", "http.", "imaplib.",
    "mmap.", "nntplib.", "os.chdir", "os.chflags", "os.chmod", "os.chown", "os.exec", "os.fork", "os.kill", "os.link",
    "os.lockf", "os.mkdir", "os.posix_spawn", "os.putenv", "os.remove", "os.removexattr", "os.rename", "os.rmdir",
    "os.setxattr", "os.spawn", "os.startfile", "os.symlink", "os.system", "os.truncate", "os.unsetenv", "os.utime",
    "poplib.", "pty.", "resource.", "shutil.", "signal.", "smtplib.", "socket.", "sqlite3.", "subprocess.",
    "sys._current", "sys._settraceallthreads", "sys.monitoring", "sys.remote_exec", "sys.setprofile", "sys.settrace",
    "syslog.", "telnetlib.", "urllib.", "webbrowser.",
)  # fmt: skip
"""Audit events that a program may not cause: what they begin with."""
_REFUSED_MODULES = frozenset(
    {
        "_ctypes", "_curses", "_dbm", "_gdbm", "_interpreters", "_multiprocessing", "_posixshmem", "_posixsubprocess",
        "_remote_debugging", "_ssl", "_testcapi", "_testinternalcapi", "_testlimitedcapi", "_tkinter",
        "_xxsubinterpreters", "ctypes", "posix", "readline", "ssl",
    }
)  # fmt: skip
"""Modules of C that write files, reach processes or memory, or hand out frames, without an audit event."""
_REMOVED = (
    "chroot", "eventfd", "login_tty", "memfd_create", "mkfifo", "mknod", "openpty", "pidfd_open", "posix_openpt",
    "sched_setaffinity", "sched_setparam", "sched_setscheduler", "setns", "setpriority", "sync", "unshare",
)  # fmt: skip
"""Functions of `os` that cause no audit event."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
_SYSTEM = ("proc", "sys", "dev")
_DEVICES = ("/dev/null", "/dev/urandom", "/dev/random", "/dev/zero")


def guard_interpreter(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Make an audit hook, which no Python code can take off again.

    What it needs are defaults of its arguments: a program that catches its error has its frame, and could write to
    variables of the outer one, and to globals and builtins.
    """
    path_check = _path_check(folder)

    def guard(
        event: str,
        args: tuple[Any, ...],
        *,
        refused: tuple[str, ...] = _REFUSED,
        modules: frozenset[str] = _REFUSED_MODULES,
        check: Callable[..., None] = path_check,
        error: type[Exception] = PermissionError,
        no_module: type[Exception] = ImportError,
    ) -> None:
        if event.startswith(refused):
            raise error(f"{event} is refused to a generated program")
        if event == "import" and args[0] in modules:
            raise no_module(f"{args[0]} is refused to a generated program")
        if event == "open":
            check(*args)

    return guard


def _path_check(folder: str) -> Callable[..., None]:
    folder_check = _folder_check()

    def check(
        path: Any,  # noqa: ANN401
        mode: str | None,
        flags: int,
        *,
        inside: str = folder + "/",
        writing: int = _WRITING,
        system: tuple[str, ...] = _SYSTEM,
        devices: tuple[str, ...] = _DEVICES,
        kind: Callable[[object], type] = type,
        text: type = str,
        raw: type = bytes,
        number: type = int,
        error: type[Exception] = PermissionError,
        is_folder: Callable[[str], bool] = folder_check,
    ) -> None:
        if kind(path) is number or path in devices:
            return
        if kind(path) is raw:
            path = path.decode("utf-8", "surrogateescape")
        if kind(path) is not text:
            raise error("a generated program opens files by their names")
        parts = [part for part in path.split("/") if part not in {"", "."}]
        is_absolute = path.startswith("/")
        if ".." in parts or (is_absolute and parts and parts[0] in system):
            raise error(f"{path} is refused to a generated program")
        if flags & writing and is_absolute and not path.startswith(inside):
            raise error(f"{path} is outside the folder of the program")
        if mode is None and is_folder(path):  # os.open, which has a use for folders: what is opened relative to them
            raise error(f"{path} is a folder, which a generated program lists and does not open")

    return check


def _folder_check() -> Callable[[str], bool]:
    def is_folder(
        path: str,
        *,
        stat: Callable[[str], os.stat_result] = os.stat,
        missing: type[Exception] = OSError,
    ) -> bool:
        try:
            return stat(path).st_mode & 0o170000 == 0o040000
        except missing:
            return False

    return is_folder


def _prepare(folder: str) -> None:
    for name in _REMOVED:
        for module in (os, posix):
            if hasattr(module, name):
                delattr(module, name)
    for name in _REFUSED_MODULES - {"posix"}:
        sys.modules.pop(name, None)
    sys.addaudithook(guard_interpreter(folder))


def main() -> None:
    """Run the job on stdin."""
    job = json.load(sys.stdin)
    proof = [job.pop("proof").encode()]
    leave, write, results = os._exit, os.write, os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    write(results, sys.argv[1].encode() + b"\n")
    sys.argv[:] = ["program"]
    globals_: dict[str, Any] = {"__name__": "__main__"}
    _prepare(os.path.realpath(job["folder"]))
    try:
        program, tests = (compile(job[part], part, "exec") for part in ("program", "tests"))
        # The proof and the function that writes it are on the stack before the program begins, and in no variable.
        write(results, (proof.pop(), exec(program, globals_), exec(tests, globals_))[0])  # type: ignore[func-returns-value]  # it is the order that counts
    except BaseException:  # whatever a program raises, SystemExit included, it did not get to its end
        leave(1)
    leave(0)


if __name__ == "__main__":
    main()
