"""A SLURM of two nodes on this machine: its own munged, slurmctld and two slurmd, in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "scripts" / "slurm"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_DEVICES = ("/dev/null", "/dev/zero")  # what stands for a node's GPUs: SLURM wants devices

_SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthInfo=socket={folder}/munge/sock,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
PlugStackConfig={folder}/plugstack.conf
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool_%n
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmdLogFile={folder}/slurmd_%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
EnforcePartLimits=ALL
KillWait=5
MinJobAge=300
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=node[1-2] Default=YES PriorityTier=1 GraceTime=5 MaxTime=INFINITE
PartitionName=high Nodes=node[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""


@dataclass
class Cluster:
    """Commands are given SLURM_CONF; `wait_for` looks until something is so."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, command: Sequence[str], **more: str) -> subprocess.CompletedProcess[str]:
        """A command; its output, whatever its status."""
        return subprocess.run(
            command, env={**self.environment, **more}, capture_output=True, text=True, timeout=60, cwd=REPOSITORY
        )

    def submit(self, command: Sequence[str], **more: str) -> str:
        """`sbatch --parsable`; the job's number."""
        done = self.run(command, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def state(self, job: str) -> str:
        """As scontrol has it."""
        shown = self.run(["scontrol", "show", "job", job]).stdout
        return next((word[9:] for word in shown.split() if word.startswith("JobState=")), "GONE")

    def wait_for(self, fact: Callable[[], object], seconds: float = 60.0, why: Callable[[], str] = str) -> None:
        """Raises AssertionError, with what `why` says, where it does not come about."""
        deadline = time.monotonic() + seconds
        while not fact():
            assert time.monotonic() < deadline, why()
            time.sleep(0.1)

    def start(self, name: str) -> None:
        """A daemon: munged, slurmctld, or a node's slurmd."""
        munge = self.folder / "munge"
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        commands = {
            "munged": ["munged", "-F", "-f", *(f"--{option}={munge / file}" for option, file in files.items())],
            "slurmctld": ["slurmctld", "-D", "-c", "-f", self.environment["SLURM_CONF"]],
        }
        command = commands.get(name) or ["slurmd", "-D", "-N", name, "-f", self.environment["SLURM_CONF"]]
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out)

    def stop(self, name: str) -> None:
        """And wait for its end."""
        daemon = self.daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def close(self) -> None:
        """Cancel all jobs, then end the daemons, nodes first."""
        self.run(["scancel", "--user", self.environment["USER"]])
        self.run(["scancel", "--signal=KILL", "--full", "--user", self.environment["USER"]])
        deadline = time.monotonic() + 20
        while self.run(["squeue", "--noheader"]).stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for name in [*(one for one in self.daemons if one.startswith("node")), "slurmctld", "munged"]:
            if name in self.daemons:
                self.stop(name)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with two devices each; the partition `high` pre-empts `low`, with five seconds of grace."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"SLURM is not here: no {', '.join(missing)} (Debian: munge slurmctld slurmd slurm-client)")
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    user = pwd.getpwuid(os.getuid()).pw_name
    host = socket.gethostname().partition(".")[0]
    ports = _free_ports(3)
    nodes = "\n".join(
        f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[number]} CPUs=8 RealMemory=8000 "
        f"Gres=gpu:{len(_DEVICES)}"
        for number in (1, 2)
    )
    conf = folder / "slurm.conf"
    conf.write_text(_SLURM_CONF.format(host=host, port=ports[0], folder=folder, user=user, nodes=nodes))
    (folder / "gres.conf").write_text(
        "AutoDetect=off\n" + "".join(f"NodeName=node[1-2] Name=gpu File={device}\n" for device in _DEVICES)
    )
    (folder / "plugstack.conf").write_text("")
    (folder / "state").mkdir()
    munge = folder / "munge"
    munge.mkdir(mode=0o755)
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o400)
    found = Cluster(folder, {**os.environ, "SLURM_CONF": str(conf), "USER": user})
    try:
        found.start("munged")
        found.wait_for((munge / "sock").exists, 20, lambda: (folder / "munged.out").read_text())
        for name in ("slurmctld", "node1", "node2"):
            found.start(name)

        def idle() -> bool:
            return found.run(["sinfo", "--noheader", "--partition=low", "--format=%T %D"]).stdout.strip() == "idle 2"

        found.wait_for(idle, 60, lambda: "\n".join(path.read_text()[-3000:] for path in folder.glob("*.log")))
        yield found
    finally:
        found.close()


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """Variables with a python that trains and serves without torch; what it does otherwise is python's own."""
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    python = tmp_path / "python"
    worker = Path(__file__).parent / "stub.py"
    python.write_text(
        f'#!/bin/bash\ncase "$*" in\n*torch.distributed.run*|*"megatron_flowrl serve"*|*"megatron_flowrl evaluate"*)\n'
        f'    exec {sys.executable} {worker} "$@" ;;\n*) exec {sys.executable} "$@" ;;\nesac\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return {"FLOWRL_PYTHON": str(python), "FLOWRL_HOME": str(REPOSITORY)}
