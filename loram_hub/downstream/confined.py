"""A process that runs one generated program and its tests, with as little power as the system lets it give away.

Run by path, in a process of its own, by `programs`: nothing of loram-hub is imported, and nothing may import it. The
job comes on stdin as JSON. On stdout go a line that says how far the process is confined and, after the last assertion
of the tests, the proof: a random text that the program was not given. A program that exits early, prints, or is killed
leaves no proof.

What stops a program: limits of the kernel on time, memory, size of files and number of processes; a network namespace
without any network; another user, where this one is root and that one could read Python's library; and a guard on what
the interpreter does, which refuses to start processes, to open connections, and to change files outside the folder of
the program. Where the kernel grants no namespace and no other user, the guard is all there is. It is no wall: a program
written to break out of a Python process, or to search it for the proof, can. Run code of a model that you do not trust
in a virtual machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000  # of unshare(2)
_NOBODY = 65534
_REFUSED = (
    "ctypes.", "fcntl.", "ftplib.", "gc.get_", "http.", "imaplib.", "mmap.", "nntplib.", "os.chflags", "os.chmod",
    "os.chown", "os.exec", "os.fork", "os.kill", "os.link", "os.lockf", "os.mkdir", "os.posix_spawn", "os.putenv",
    "os.remove", "os.removexattr", "os.rename", "os.rmdir", "os.setxattr", "os.spawn", "os.startfile", "os.symlink",
    "os.system", "os.truncate", "os.unsetenv", "os.utime", "poplib.", "pty.", "resource.", "shutil.", "signal.",
    "smtplib.", "socket.", "sqlite3.", "subprocess.", "sys._current", "syslog.", "telnetlib.", "urllib.", "webbrowser.",
)  # fmt: skip
"""Audit events that a program may not cause: what they begin with."""
_REFUSED_MODULES = frozenset({"_ctypes", "_posixsubprocess", "_testcapi", "_xxsubinterpreters", "ctypes"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC


def confine(job: dict[str, Any]) -> dict[str, str]:
    """Give away what the program does not need; returns what that came to."""
    folder = os.path.realpath(job["folder"])
    os.chdir(folder)
    os.umask(0o077)
    network = _leave_network()
    user = _leave_root(folder)
    limits = {
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 0,  # no more threads and processes; the kernel does not hold root to it
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    sys.addaudithook(_guard(folder))
    return {"network": network, "user": user}


def _leave_network() -> str:
    try:
        unshare = ctypes.CDLL(None, use_errno=True).unshare
    except (OSError, AttributeError):
        return "guarded"
    flags = _NEW_NETWORK if os.geteuid() == 0 else _NEW_NETWORK | _NEW_USER
    return "none" if unshare(flags) == 0 else "guarded"


def _leave_root(folder: str) -> str:
    """Become nobody, if that is possible and nobody can still import Python's library."""
    if os.geteuid() != 0:
        return "own"
    try:
        os.chown(folder, _NOBODY, _NOBODY)
        os.seteuid(_NOBODY)
        readable = os.access(os.__file__, os.R_OK, effective_ids=True) and os.access(
            folder, os.W_OK, effective_ids=True
        )
        os.seteuid(0)
        if readable:
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
    except OSError:
        return "root"
    return "nobody" if os.geteuid() == _NOBODY else "root"


def _guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Make an audit hook, which no Python code can take off again."""
    inside, refused, modules, writing = folder + os.sep, _REFUSED, _REFUSED_MODULES, _WRITING
    realpath, devnull = os.path.realpath, os.devnull

    def guard(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(refused):
            raise PermissionError(f"{event} is refused to a generated program")
        if event == "import" and args[0] in modules:
            raise PermissionError(f"{args[0]} is refused to a generated program")
        if event == "open" and isinstance(args[2], int) and args[2] & writing and not isinstance(args[0], int):
            path = os.fsdecode(args[0])
            if path != devnull and not realpath(path).startswith(inside):
                raise PermissionError(f"{path} is outside the folder of the program")

    return guard


def main() -> None:
    """Run the job on stdin."""
    job = json.load(sys.stdin)
    program, proof = job["program"], job.pop("proof").encode()
    leave, write, results = os._exit, os.write, os.dup(1)
    confined = json.dumps(confine(job)).encode() + b"\n"
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    write(results, confined)
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException:  # whatever a program raises, SystemExit included, it did not get to its end
        leave(1)
    write(results, proof)
    leave(0)


if __name__ == "__main__":
    main()
