"""Which walls a jail has on this machine, found by making one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from megatron_flowrl.config.errors import UserError
from megatron_flowrl.rewards.sandbox import linux, seccomp
from megatron_flowrl.rewards.sandbox.run import PYTHON, Jail, JailBroken, Limits


@dataclass(frozen=True)
class Walls:
    """What holds a command."""

    namespaces: bool
    """Of users, processes, mounts, network, IPC and host name: no network, a file system of its own, nothing outlives
    it."""

    landlock: int
    """The kernel's ABI, 0 where there is none: what it may open."""

    seccomp: bool
    """System calls that it has no use for fail."""

    trouble: str = ""
    """Why there are no namespaces."""

    def __str__(self) -> str:
        there = [
            "namespaces (users, processes, mounts, network, IPC)" if self.namespaces else "",
            f"Landlock (ABI {self.landlock})" if self.landlock else "",
            "seccomp" if self.seccomp else "",
            "resource limits",
        ]
        return ", ".join(name for name in there if name)


@cache
def walls() -> Walls:
    """Those of this machine."""
    trouble = ""
    try:
        with Jail([PYTHON, "-I", "-S", "-c", "pass"], {}, Limits(), namespaces=True) as jail:
            outcome = jail.run()
        if outcome.code != 0:
            trouble = f"python does not start there: {outcome.errors.decode(errors='replace').strip()[-200:]}"
    except (JailBroken, OSError) as error:
        trouble = str(error)
    return Walls(not trouble, linux.landlock_abi(), seccomp.known_here(), trouble)


def checked_walls(unprotected: bool) -> Walls:
    """`walls()`. Raises UserError where there are no namespaces, unless told to do without."""
    found = walls()
    if not found.namespaces and not unprotected:
        raise UserError(
            f"answers that are programs cannot be run safely here: no namespaces ({found.trouble}); allow unprivileged "
            "user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
            "kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces above 0; in a container, a "
            "seccomp profile that lets unshare through), grade on another machine, or set code.unprotected=true where "
            "nothing on this one matters"
        )
    return found


__all__ = ["Walls", "checked_walls", "walls"]
