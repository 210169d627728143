"""Runs a command where it can do no harm, for a parent that trusts it with nothing.

`main(FD)` reads what to run from the descriptor FD (see `Order`). In namespaces of their own, this process (the keeper)
has a maker make a first process (init), which makes the file system, starts the command and watches it. When any of
these ends, for whatever reason, so does everything in the namespace of processes. Without namespaces this process
starts and watches the command itself, ends all of its descendants after it, and Landlock alone hides the file system.

Standard input, output and error are the command's. How it ended is written to `order.report`, a line of JSON.

Standard library only, and little of it: a start takes some ten milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from megatron_flowrl.rewards.sandbox import linux, seccomp

_LOOK_SECONDS = 0.02
_PAGE = resource.getpagesize()
_NOBODY = 65534
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_WORK = "/tmp"
_FILES = 4096  # in the work folder
_OPEN_FILES = 64


@dataclass(frozen=True)
class Order:
    """What the parent wants. It travels as JSON."""

    parent: int
    report: int
    command: Sequence[str]
    files: Mapping[str, str]
    """Name -> content, in the command's work folder, where it starts."""

    folder: str
    """An empty folder: a mount point for the command's file system, or, without namespaces, its work folder."""

    readable: Sequence[str] = ()
    """Paths that the command may read, beside the system's libraries."""

    importable: Sequence[str] = ()
    """Folders that it may list, and where namespaces make none of their own, read: Python looks for modules there."""

    namespaces: bool = True
    cpu_seconds: float = 10.0
    wall_seconds: float = 20.0
    memory_bytes: int = 2**30
    processes: int = 16
    file_bytes: int = 2**25
    folder_bytes: int = 2**26
    environment: Mapping[str, str] = field(default_factory=dict)


def main(descriptor: int) -> NoReturn:
    """What the module says."""
    with os.fdopen(descriptor) as sent:
        order = Order(**json.load(sent))
    os.set_inheritable(order.report, False)  # what the command executes may not write there
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != order.parent:
        os._exit(1)
    with _troubles_told(order):
        if order.namespaces:
            _keep(order)
        else:
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
            _write_files(order, order.folder)
            os.chdir(order.folder)
            _start_and_watch(order, order.folder, as_nobody=False)
    os._exit(0)


@contextlib.contextmanager
def _troubles_told(order: Order) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _report(order, problem=f"{type(error).__name__}: {error}")
        os._exit(1)


def _report(order: Order, **fields: object) -> None:
    with contextlib.suppress(OSError):
        os.write(order.report, f"{json.dumps(fields)}\n".encode())


def _keep(order: Order) -> None:
    """Have a process make namespaces, give it its user ids, and wait for its end."""
    superuser = os.getuid() == 0
    made, tell_made = os.pipe()
    mapped, tell_mapped = os.pipe()
    maker = os.fork()
    if not maker:
        with _troubles_told(order):
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            os.close(made)
            os.close(tell_mapped)
            linux.unshare(linux.NAMESPACES)
            os.write(tell_made, b"x")
            if not os.read(mapped, 1):
                os._exit(1)
            _make(order, as_nobody=superuser)
        os._exit(0)
    os.close(tell_made)
    os.close(mapped)
    if os.read(made, 1):
        _map_users(maker, superuser)
        os.write(tell_mapped, b"x")
    os.waitpid(maker, 0)


def _map_users(process: int, superuser: bool) -> None:
    """Inside, user 0 is this one. A superuser gives the command another, so that limits on processes count for it."""
    for name, own in (("uid_map", os.getuid()), ("gid_map", os.getgid())):
        if name == "gid_map" and not superuser:
            _write(f"/proc/{process}/setgroups", "deny")
        nobody = f"{_NOBODY} {_NOBODY} 1\n" if superuser else ""
        _write(f"/proc/{process}/{name}", f"0 {own} 1\n{nobody}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _make(order: Order, as_nobody: bool) -> None:
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    init = os.fork()
    if init:
        os.waitpid(init, 0)
        return
    with _troubles_told(order):
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        _make_root(order)
        _write_files(order, _WORK)
        os.chdir(_WORK)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)  # its memory is closed to the command
        _start_and_watch(order, _WORK, as_nobody)
    os._exit(0)


def _make_root(order: Order) -> None:
    """A file system of the system's libraries and the readable paths, nothing to be written, and a work folder."""
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    root = order.folder
    linux.mount("tmpfs", root, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=755")
    for name, options in (("proc", None), ("tmp", f"size={order.folder_bytes},nr_inodes={_FILES},mode=1777")):
        os.mkdir(f"{root}/{name}")
        kind = "tmpfs" if name == "tmp" else name
        linux.mount(kind, f"{root}/{name}", kind, linux.MS_NOSUID | linux.MS_NODEV, options)
    beside = (*order.readable, *map(os.path.realpath, order.readable))  # where links among them lead
    for path in dict.fromkeys((*_SYSTEM, *beside)):  # after /tmp, where one of them may be
        if os.path.islink(path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path) and not os.path.exists(root + path):
            os.makedirs(root + path)
            _bind(path, root + path, linux.MS_RDONLY)
    os.mkdir(f"{root}/dev")
    for path in _DEVICES:
        open(root + path, "w").close()
        _bind(path, root + path, 0)
    linux.mount(
        "none", root, None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
    )
    linux.pivot_root(root)


def _bind(source: str, target: str, flags: int) -> None:
    linux.mount(source, target, None, linux.MS_BIND | linux.MS_REC)
    linux.mount("none", target, None, linux.MS_REMOUNT | linux.MS_BIND | flags | linux.kept_flags(target))


def _write_files(order: Order, folder: str) -> None:
    for name, content in order.files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(content)


def _start_and_watch(order: Order, work: str, as_nobody: bool) -> None:
    began = time.monotonic()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGTERM])
    watcher = os.getpid()
    command = os.fork()
    if not command:
        with _troubles_told(order):
            _confine(order, work, as_nobody)
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == watcher:
                os.execve(order.command[0], list(order.command), dict(order.environment))
        os._exit(1)
    for stream in (0, 1, 2):  # theirs alone: whoever reads sees the end when they end
        os.close(stream)
    status, reason = None, ""
    while status is None and not reason:
        ended, its_status = os.waitpid(-1, os.WNOHANG)
        if ended == command:
            status = its_status
        elif not ended:
            told = signal.sigtimedwait([signal.SIGCHLD, signal.SIGTERM], _LOOK_SECONDS)
            asked_to_end = told is not None and told.si_signo == signal.SIGTERM
            reason = "ended from outside" if asked_to_end else _beyond(order, began)
    if not order.namespaces:
        _end_children()
    _report(order, code=None if status is None else os.waitstatus_to_exitcode(status), reason=reason)


def _confine(order: Order, work: str, as_nobody: bool) -> None:
    os.setsid()
    seconds = math.ceil(order.cpu_seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # SIGXCPU first, which says why
    limits = {
        resource.RLIMIT_AS: order.memory_bytes,
        resource.RLIMIT_NPROC: order.processes,
        resource.RLIMIT_FSIZE: order.file_bytes,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (most, most))
    seen = (*_SYSTEM, *order.readable, *order.importable, *_DEVICES, "/proc")
    readable = [path for path in seen if os.path.exists(path)]
    if order.namespaces:
        linux.drop_bounding_set()
    if as_nobody:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    linux.drop_capabilities()
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    if linux.landlock_abi():
        linux.restrict_files(readable, [work, "/dev/null"])
    if seccomp.known_here():
        seccomp.deny()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD, signal.SIGTERM])


def _beyond(order: Order, began: float) -> str:
    """Which limit that no rlimit keeps is passed; nothing where none is."""
    if time.monotonic() - began > order.wall_seconds:
        return "time limit"
    processes = _others() if order.namespaces else _descendants()
    if len(processes) > 2 * order.processes:
        return "process limit"
    resident = 0
    for process in processes:
        with contextlib.suppress(OSError, IndexError, ValueError):
            resident += int(_read(f"/proc/{process}/statm").split()[1]) * _PAGE
    return "memory limit" if resident > order.memory_bytes else ""


def _others() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _descendants() -> list[int]:
    parents = {}
    for process in _others():
        with contextlib.suppress(OSError, IndexError, ValueError):
            parents[process] = int(_read(f"/proc/{process}/stat").rpartition(")")[2].split()[1])
    found = [os.getpid()]
    for parent in found:
        found += [process for process, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def _end_children() -> None:
    """All descendants: orphans become children of this process. They are stopped first: what is stopped cannot fork."""
    known: set[int] = set()
    while new := {*_descendants()} - known:
        _send_all(new, signal.SIGSTOP)
        known |= new
    _send_all(known, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _send_all(processes: Iterable[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()
