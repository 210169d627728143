"""Runs a server for a parent, and ends it when the parent ends, however that happens.

    python -m megatron_flowrl.rollout.guard GRACE_SECONDS TELL COMMAND ...

The parent holds the other end of this process's standard input. When that closes (the parent is done, was interrupted,
or was killed) or a signal to stop arrives, the server gets SIGTERM and `GRACE_SECONDS`; then what is left of its
session gets SIGTERM, and at last SIGKILL, and what its processes had in /dev/shm is removed, as is their folder for
temporary files (vLLM's sockets). The exit status is the server's.

To the file descriptor TELL it writes, as JSON, the server's session and its folder for temporary files: should the
guard itself be killed, the kernel asks the server to end, and the parent removes what is left with `clear`.

A server is more than one process: vLLM's own children outlive it when it is killed, and so do their files in shared
memory. Only the standard library is imported here: a guard a server costs a few megabytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_SHARED_MEMORY = "/dev/shm/"
_SHARED_FILE = "shared_memory.json"  # in the folder for temporary files: what was seen, for `clear`
_LOOK_SECONDS = 0.5
_LAST_SECONDS = 5.0
_LONGEST_FOLDER = 60  # a socket's path has at most 107 characters, 37 of which are its name in vLLM
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def session_members(session: int) -> list[int]:
    """Living processes of a session (Linux)."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            text = stat.read_text()
            state, _, _, of = text.rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                members.append(int(stat.parent.name))
    return members


def shared_memory_of(processes: list[int]) -> set[str]:
    """Files in /dev/shm that the processes have mapped or open."""
    found: set[str] = set()
    for process in processes:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/maps").read_text().splitlines()
            found |= {line[line.index(_SHARED_MEMORY) :] for line in lines if _SHARED_MEMORY in line}
        for link in _links(process):
            if link.startswith(_SHARED_MEMORY):
                found.add(link)
    return {name for name in found if not name.endswith(" (deleted)")}


def _links(process: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for handle in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield os.readlink(handle)


def end(server: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """The server is asked to end, then what it leaves of its session is, then all is killed; and /dev/shm as it was."""
    shared = shared_memory_of(session_members(server.pid))
    if server.poll() is None:
        server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(grace_seconds)
    shared |= shared_memory_of(session_members(server.pid))
    _end_session(server.pid, min(grace_seconds, _LAST_SECONDS))
    server.wait()
    _remove(shared)


def clear(session: int, temporary: str, grace_seconds: float) -> None:
    """What a guard that was killed has left: its server's processes, their files in /dev/shm, and their folder."""
    shared = shared_memory_of(session_members(session))
    with contextlib.suppress(OSError, ValueError):
        shared |= {*json.loads(Path(temporary, _SHARED_FILE).read_text())}
    _end_session(session, grace_seconds)
    _remove(shared)
    shutil.rmtree(temporary, ignore_errors=True)


def _end_session(session: int, seconds: float) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for member in session_members(session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, number)
        deadline = time.monotonic() + seconds
        while session_members(session) and time.monotonic() < deadline:
            time.sleep(0.02)


def _remove(shared: set[str]) -> None:
    for name in shared:
        with contextlib.suppress(OSError):
            os.unlink(name)


def guard(grace_seconds: float, tell: int, command: list[str]) -> int:
    """Run `command` until it ends or has to; returns its exit status, negative for a signal."""
    with tempfile.TemporaryDirectory(prefix="server-", ignore_cleanup_errors=True) as temporary:
        return _guard(grace_seconds, tell, command, temporary)


def _with_temporary(folder: str) -> dict[str, str]:
    """The environment with a folder for temporary files; compiled kernels stay where other servers find them."""
    if len(folder) > _LONGEST_FOLDER:
        return dict(os.environ)
    kept = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
    return {"TORCHINDUCTOR_CACHE_DIR": kept, **os.environ, "TMPDIR": folder}


def _guard(grace_seconds: float, tell: int, command: list[str], temporary: str) -> int:
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    for number in _STOP_SIGNALS:
        signal.signal(number, stop)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a cluster's notice is the trainer's; the server inherits this
    try:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=_with_temporary(temporary),
            preexec_fn=_end_with_guard if sys.platform == "linux" else None,  # one thread: nothing can be held here
        )
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    with contextlib.suppress(BrokenPipeError):  # the parent has ended already, which is noticed below
        os.write(tell, json.dumps([server.pid, temporary]).encode())
    os.close(tell)
    shared: set[str] = set()
    while server.poll() is None and not stopping:
        # Looked at all the time: a server that dies by itself can no longer be asked.
        seen = shared_memory_of(session_members(server.pid))
        if not seen <= shared:
            shared |= seen
            with contextlib.suppress(OSError):
                Path(temporary, _SHARED_FILE).write_text(json.dumps(sorted(shared)))
        with contextlib.suppress(InterruptedError):
            ready, _, _ = select.select([sys.stdin], [], [], _LOOK_SECONDS)
            stopping = stopping or (bool(ready) and not os.read(sys.stdin.fileno(), 4096))
    end(server, grace_seconds)
    _remove(shared)
    return server.returncode


def _end_with_guard() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(guard(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
