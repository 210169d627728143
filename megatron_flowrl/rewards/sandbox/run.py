"""Commands in a jail: how one is started, fed and read, and which walls there are on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from megatron_flowrl.rewards.sandbox.jail import Order
from megatron_flowrl.rewards.sandbox.library import Library

_PACKAGES = str(Path(__file__).parents[3])
_MAIN = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from megatron_flowrl.rewards.sandbox.jail import main; main(int(sys.argv[2]))"
)
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
_CHUNK = 2**16
_LATE_SECONDS = 5.0  # after its time limit a jail that has not ended by itself is ended
PYTHON = os.path.realpath(sys.executable)
_NOTHING = Library()


@dataclass(frozen=True)
class Limits:
    """What a command may take; it is ended where it takes more, or what it asks for fails."""

    cpu_seconds: float = 10.0
    """Of processor time, each process."""

    wall_seconds: float = 20.0

    memory_bytes: int = 2**30
    """Of address space each process, and resident all together."""

    processes: int = 16
    file_bytes: int = 2**25
    """Of a file."""

    folder_bytes: int = 2**26
    """Of all files together, where there are namespaces."""

    output_bytes: int = 2**22
    """Of standard output, and of standard error."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | None
    """Its exit status, minus the number of the signal that ended it; None where it was ended for `reason`."""

    reason: str
    """`time limit`, `memory limit`, `process limit`, `output limit`, or nothing."""

    output: bytes
    errors: bytes
    seconds: float


class JailBroken(Exception):
    """The jail itself could not be made, or ended in an odd way: the command is not to blame."""


class Jail:
    """A command under way. A context manager: leaving it ends the command and all that it has started."""

    def __init__(
        self,
        command: Sequence[str],
        files: Mapping[str, str],
        limits: Limits,
        *,
        namespaces: bool,
        library: Library = _NOTHING,
    ) -> None:
        """Starts at once. `files` are written where the command starts. Raises JailBroken or OSError."""
        self.limits, self._began = limits, time.monotonic()
        self._folder = _mount_point() if namespaces else tempfile.mkdtemp(prefix="flowrl-jail-")
        self._folder_is_ours = not namespaces
        ours, theirs = os.pipe()
        self._report: IO[bytes] = os.fdopen(ours, "rb")
        sent, send = os.pipe()
        shared = {name: value for name, value in asdict(limits).items() if name != "output_bytes"}
        order = Order(
            parent=os.getpid(),
            report=theirs,
            command=list(command),
            files=dict(files),
            folder=self._folder,
            readable=[*dict.fromkeys((sys.base_prefix, *library.folders))],  # links among them are followed inside
            importable=library.paths,
            namespaces=namespaces,
            environment={
                **_ENVIRONMENT,
                "HOME": "/tmp",
                "TMPDIR": "/tmp" if namespaces else self._folder,
                **({"PYTHONPATH": os.pathsep.join(library.paths)} if library.paths else {}),
            },
            **shared,
        )
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _MAIN, _PACKAGES, str(sent)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs, sent],
                start_new_session=True,
                env=_ENVIRONMENT,
                cwd="/",
            )
        except BaseException:
            os.close(send)
            self._report.close()
            self._remove_folder()
            raise
        finally:
            os.close(theirs)
            os.close(sent)
        with contextlib.suppress(BrokenPipeError), os.fdopen(send, "w") as file:
            json.dump(asdict(order), file)

    def run(self, given: bytes = b"") -> Outcome:
        """Give it this as standard input, and wait for its end. Raises JailBroken."""
        output, errors, full = self._exchange(given)
        reason = "output limit" if full else ""
        code = None
        if not reason:
            code, reason = self.report()
        return Outcome(code, reason, output, errors, time.monotonic() - self._began)

    def _exchange(self, given: bytes) -> tuple[bytes, bytes, bool]:
        """Standard output and error, at most as much as is allowed, and whether there was more."""
        assert self.process.stdin and self.process.stdout and self.process.stderr
        streams: dict[object, bytearray] = {self.process.stdout: bytearray(), self.process.stderr: bytearray()}
        deadline = self._began + self.limits.wall_seconds + _LATE_SECONDS
        left, full = memoryview(given), False
        with selectors.DefaultSelector() as selector:
            for stream in streams:
                selector.register(stream, selectors.EVENT_READ)  # type: ignore[arg-type]
            os.set_blocking(self.process.stdin.fileno(), False)
            selector.register(self.process.stdin, selectors.EVENT_WRITE)
            while selector.get_map() and not full:
                ready = selector.select(max(deadline - time.monotonic(), 0.0))
                if not ready:
                    raise JailBroken("it did not end in time")
                for key, _ in ready:
                    if key.fileobj is self.process.stdin:
                        left = self._feed(left)
                        if not left:
                            selector.unregister(self.process.stdin)
                            with contextlib.suppress(BrokenPipeError):
                                self.process.stdin.close()
                        continue
                    chunk = os.read(key.fd, _CHUNK)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    streams[key.fileobj] += chunk
                    full = len(streams[key.fileobj]) > self.limits.output_bytes
        kept = [bytes(stream[: self.limits.output_bytes]) for stream in streams.values()]
        return kept[0], kept[1], full

    def _feed(self, left: memoryview) -> memoryview:
        assert self.process.stdin
        try:
            return left[os.write(self.process.stdin.fileno(), left[:_CHUNK]) :] if left else left
        except BlockingIOError:
            return left
        except BrokenPipeError:  # it does not read all, which it need not
            return left[:0]

    def report(self) -> tuple[int | None, str]:
        """Exit status and reason, when it has ended; see `Outcome`. Raises JailBroken."""
        said = self._report.readline()
        try:
            reply = json.loads(said)
            if "problem" in reply:
                raise JailBroken(str(reply["problem"]))
            code, reason = reply["code"], reply["reason"]
        except (ValueError, KeyError, TypeError):
            raise JailBroken(f"it ended without a report ({said[:100]!r})") from None
        return code, "time limit" if code == -signal.SIGXCPU else reason

    def close(self) -> None:
        """End it, and wait for its end; safe to call twice."""
        if self._folder_is_ours:  # no namespace ends what the command has started: the keeper has to
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_LATE_SECONDS)
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr, self._report):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder_is_ours:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _mount_point() -> str:
    """An empty folder, the same for all jails of a user: each mounts its own file system there, and sees no other's."""
    folder = Path(tempfile.gettempdir(), f"flowrl-jails-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise JailBroken(f"{folder} is another user's: remove it, or set TMPDIR")
    return str(folder)


__all__ = ["PYTHON", "Jail", "JailBroken", "Limits", "Outcome"]
