"""The first of two programs that a generated program runs under: it gives the process's rights away, once and for all.

Run by path, in a process of its own, by `programs`: nothing of loram-hub is imported, and nothing may import it. The
job comes on stdin as JSON. What is left of the process's rights, it hands to `confined`, by exec: a fresh interpreter,
in whose memory ctypes never was. What is taken away is the kernel's to give, so no trick inside Python wins it back:

- network: a namespace without any (where the system grants one);
- user: a process of root becomes nobody, without capabilities. Where nobody could not read Python's library (it lies in
  root's home), one capability is left, to read what file modes would refuse, if Landlock limits that to the library;
- files (Landlock, Linux 5.13 and newer): all but the program's folder is read-only, and only Python's library and the
  system's libraries can be read at all;
- limits on time, memory, size of files, and no further process or thread.

A process of root that cannot become another user runs no program: it says so on stdout, as JSON with `refused`.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import struct
import sys
from pathlib import Path
from typing import Any

_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000  # of unshare(2)
_NOBODY = 65534
_KEEP_CAPABILITIES, _NO_NEW_PRIVILEGES, _AMBIENT = 8, 38, 47  # of prctl(2)
_READ_EVERYTHING = 1 << 2  # CAP_DAC_READ_SEARCH
_CAPABILITY_VERSION = 0x20080522

# Of landlock(7): system calls, and rights to files.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE, _READ, _READ_FOLDER, _TRUNCATE, _TO_DEVICES = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
_MAKE_DEVICES = 1 << 6 | 1 << 11
_RIGHTS_BY_ABI = (13, 14, 15, 15)  # how many rights the first versions know; later ones know 16
_CONNECT_AND_BIND, _ABSTRACT_SOCKETS_AND_SIGNALS = 0b11, 0b11

_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/urandom", "/dev/random", "/dev/zero")


class Refusal(Exception):
    """No program may run here."""


def confine(job: dict[str, Any]) -> dict[str, str]:
    """Give away what the program does not need; returns what that came to."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = os.path.realpath(job["folder"])
    os.chdir(folder)
    os.umask(0o077)
    network = _leave_network(libc)
    if os.geteuid() == 0:
        os.chown(folder, _NOBODY, _NOBODY)
    may_read = os.geteuid() != 0 or _nobody_reads(folder)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        raise Refusal("the kernel does not let the process give up new privileges")
    files = "landlock" if _restrict_files(libc, folder) else "guarded"
    if not may_read and files == "guarded":
        raise Refusal(f"the user nobody cannot read Python in {sys.base_prefix} or write to {folder}")
    user = _leave_root(libc, _NOBODY, 0 if may_read else _READ_EVERYTHING) if os.geteuid() == 0 else "own"
    limits = {
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    return {"network": network, "user": user, "files": files}


def _leave_network(libc: ctypes.CDLL) -> str:
    flags = _NEW_NETWORK if os.geteuid() == 0 else _NEW_NETWORK | _NEW_USER
    return "none" if libc.unshare(flags) == 0 else "guarded"


def _nobody_reads(folder: str) -> bool:
    """Whether nobody can run Python, import its library and write to the folder."""
    os.seteuid(_NOBODY)
    try:
        needed = [(os.path.realpath(sys.executable), os.X_OK), (os.__file__, os.R_OK), (folder, os.W_OK)]
        return all(os.access(path, mode, effective_ids=True) for path, mode in needed)
    finally:
        os.seteuid(0)


def _leave_root(libc: ctypes.CDLL, user: int, capabilities: int) -> str:
    """Become another user, with no other capabilities than these."""
    libc.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    held = struct.pack("6I", capabilities, capabilities, capabilities, 0, 0, 0)
    if libc.capset(header, held) != 0:
        raise Refusal("its capabilities cannot be given up")
    if capabilities and libc.prctl(_AMBIENT, 2, capabilities.bit_length() - 1, 0, 0) != 0:  # 2: raise, kept over exec
        raise Refusal(f"the user nobody cannot read Python in {sys.base_prefix}")
    return "nobody"


def _restrict_files(libc: ctypes.CDLL, folder: str) -> bool:
    """Have Landlock refuse all files but those that a program needs; False where the kernel has no Landlock."""
    abi = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    handled = (1 << (_RIGHTS_BY_ABI[abi - 1] if abi <= len(_RIGHTS_BY_ABI) else 16)) - 1
    network, scope = _CONNECT_AND_BIND * (abi >= 4), _ABSTRACT_SOCKETS_AND_SIGNALS * (abi >= 6)
    attributes = struct.pack("QQQ", handled, network, scope)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    reading = _READ | _READ_FOLDER
    rules = [(folder, handled & ~(_EXECUTE | _MAKE_DEVICES | _TO_DEVICES)), (os.devnull, _READ | _WRITE | _TRUNCATE)]
    rules += [(path, reading) for path in (*sys.path[1:], *_SYSTEM, *_DEVICES)]
    rules += [(path, _READ | _EXECUTE) for path in _mapped_files()]
    for path, rights in rules:
        _allow(libc, ruleset, path, rights & handled)
    return bool(libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not here, so nothing needs it
    if not os.path.isdir(path):
        rights &= _EXECUTE | _WRITE | _READ | _TRUNCATE
    libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, place), 0)
    os.close(place)


def _mapped_files() -> set[str]:
    """Return the files that this interpreter is made of: itself, its loader and the libraries it is linked to."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    fields = (line.split(maxsplit=5) for line in lines)
    return {os.path.realpath(sys.executable), *(found[5] for found in fields if len(found) == 6 and found[5][0] == "/")}


def main() -> None:
    """Confine the process and run the job on stdin in it."""
    source = Path(__file__).with_name("confined.py").read_text(encoding="utf-8")
    job = json.load(sys.stdin)
    try:
        confined = json.dumps(confine(job))
        os.lseek(0, 0, os.SEEK_SET)
        python = os.path.realpath(sys.executable)
        os.execv(python, [python, "-I", "-S", "-B", "-c", source, confined])
    except (Refusal, OSError) as err:
        sys.stdout.write(json.dumps({"refused": str(err)}) + "\n")


if __name__ == "__main__":
    main()
