"""The Linux calls that the jail is made of, which Python 3.11's library lacks. Standard library only."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable
from typing import Final

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000
NAMESPACES: Final = (
    CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
)

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MS_RELATIME: Final = 1 << 21
MNT_DETACH: Final = 2

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_CAPBSET_DROP: Final = 24
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_SECCOMP: Final = 22
PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2

_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
_LANDLOCK_VERSION: Final = 1
_LANDLOCK_PATH_BENEATH: Final = 1
# Rights by the ABI that brought them: execute ... make_sym; refer; truncate; (network); ioctl_dev.
_FS_RIGHTS: Final = {1: 0x1FFF, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_FS_READ: Final = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, read a directory
_FS_OF_FILES: Final = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
_NET_RIGHTS: Final = 0b11  # bind and connect, TCP
_SCOPES: Final = 0b11  # abstract sockets and signals stay inside

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    result: int = getattr(_libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """New namespaces for this process; the one of processes is for its children."""
    _call("unshare", flags)


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


def kept_flags(path: str) -> int:
    """Flags of a mount that a remount may not take away in a user namespace; no devices and no set-uid in any case."""
    given = os.statvfs(path).f_flag
    kept = given & (os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME)
    return kept | MS_NOSUID | (given & os.ST_NODEV) | (MS_RELATIME if given & os.ST_RELATIME else 0)


def pivot_root(new: str) -> None:
    """Make `new`, a mount point, the root of this process's file system; the old one is gone."""
    os.chdir(new)
    _call("syscall", ctypes.c_long({"x86_64": 155, "aarch64": 41}[platform.machine()]), b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def prctl(option: int, value: int, pointer: object = 0) -> None:
    """prctl(2)."""
    _call("prctl", option, ctypes.c_ulong(value), pointer, 0, 0)


def drop_bounding_set() -> None:
    """What this process executes, also as user 0, gets no capability. Needs CAP_SETPCAP."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:  # past the last that this kernel knows
                return
            raise


def drop_capabilities() -> None:
    """Of this process."""
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _call("syscall", ctypes.c_long({"x86_64": 126, "aarch64": 91}[platform.machine()]), header, nothing)


def landlock_abi() -> int:
    """0 where the kernel has none."""
    try:
        return _call("syscall", ctypes.c_long(_LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), _LANDLOCK_VERSION)
    except OSError:
        return 0


def restrict_files(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Landlock: nothing of the file system but these paths and what is beneath; no TCP; signals stay inside.

    What the kernel's ABI does not know of these is left out. no_new_privs comes first. Raises OSError.
    """
    abi = landlock_abi()
    rights = sum(bits for since, bits in _FS_RIGHTS.items() if since <= abi)
    attributes = struct.pack("=QQQ", rights, _NET_RIGHTS if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _call("syscall", ctypes.c_long(_LANDLOCK_CREATE_RULESET), attributes, ctypes.c_size_t(size), 0)
    try:
        for paths, allowed in ((readable, _FS_READ), (writable, rights)):
            for path in paths:
                _allow_beneath(ruleset, path, allowed & rights)
        _call("syscall", ctypes.c_long(_LANDLOCK_RESTRICT_SELF), ruleset, 0)
    finally:
        os.close(ruleset)


def _allow_beneath(ruleset: int, path: str, rights: int) -> None:
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            rights &= _FS_OF_FILES
        rule = struct.pack("=Qi", rights, beneath)
        _call("syscall", ctypes.c_long(_LANDLOCK_ADD_RULE), ruleset, _LANDLOCK_PATH_BENEATH, rule, 0)
    finally:
        os.close(beneath)
