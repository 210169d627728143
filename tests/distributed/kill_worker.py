"""Worker: a run that saves after every step is killed at random instants and started again, twenty times.

python -m tests.distributed.kill_worker MODEL FOLDER KILLS; prints a JSON line per start:
{"known": newest step that was named in `latest` before the start, "resumed": step it went on from, "died": ...}, and
at the end {"identical": weights equal those of an undisturbed run, bit for bit, "steps": ...}. Starts are forks of
this process, which has imported everything and done nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_flowrl.checkpoint.folder import CheckpointFolder
from megatron_flowrl.platform.distributed import World
from tests.distributed.checkpoint_worker import Run, Training


def start(body: Callable[[Callable[[str], None]], None]) -> tuple[int, int]:
    """Fork `body` into a session of its own; (process id, end of a pipe of what it says)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        os.setsid()
        os.close(reading)
        body(lambda line: os.write(writing, f"{line}\n".encode()) and None)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def run_for(seconds: float, body: Callable[[Callable[[str], None]], None]) -> tuple[list[str], bool]:
    """What `body` said until it was killed, `seconds` after its first word; whether it was still alive then."""
    child, pipe = start(body)
    assert select.select([pipe], [], [], 60.0)[0], "nothing heard of a start for a minute"
    time.sleep(seconds)  # the random instant
    alive = os.waitpid(child, os.WNOHANG)[0] == 0
    if alive:
        os.kill(child, signal.SIGKILL)  # it alone: its writers have to notice
        os.waitpid(child, 0)
    deadline = time.monotonic() + 20
    while _has_processes(child):
        assert time.monotonic() < deadline, "writers outlive the process that was killed"
        time.sleep(0.01)
    with os.fdopen(pipe, "rb") as file:
        said = file.read().decode().splitlines()
    return said, alive


def _has_processes(group: int) -> bool:
    """Living ones: those that are dead may wait for their new parent."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                return True
    return False


def main() -> None:
    model, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    root = CheckpointFolder(folder / "checkpoints")
    run = Run("killed", model, until=0, resume=str(root.root), save=str(root.root), log_z=True)
    draw = random.Random(11)

    def train(say: Callable[[str], None]) -> None:
        training = Training(run, World())
        assert training.writer is not None
        say(json.dumps({"resumed": training.done}))
        while True:
            training.writer.poll()
            training.step()
            training.save()

    longest = 0.6
    for _ in range(kills):
        known = root.latest() or 0
        said, alive = run_for(draw.uniform(0.0, longest), train)
        if (root.latest() or 0) == known:  # a machine that others use: a step and its save take longer there
            longest *= 1.3
        print(json.dumps({"known": known, **json.loads(said[0]), "died": not alive, "latest": root.latest() or 0}))

    last = (root.latest() or 0) + 3

    def finish(run: Run, file: Path) -> Callable[[Callable[[str], None]], None]:
        def body(say: Callable[[str], None]) -> None:
            training = Training(run, World())
            while training.done < last:
                training.step()
            torch.save(training.weights(), file)

        return body

    plain = Run("undisturbed", model, until=0, log_z=True)
    for made, file in ((run, folder / "killed.pt"), (plain, folder / "undisturbed.pt")):
        child, pipe = start(finish(made, file))
        assert os.waitpid(child, 0)[1] == 0
        os.close(pipe)
    killed, undisturbed = torch.load(folder / "killed.pt"), torch.load(folder / "undisturbed.pt")
    identical = all(torch.equal(killed[name], undisturbed[name]) for name in undisturbed)
    print(json.dumps({"identical": identical, "steps": last}))


if __name__ == "__main__":
    main()
