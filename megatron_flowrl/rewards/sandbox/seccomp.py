"""A seccomp filter: system calls that answers to programming problems have no use for fail. Standard library only.

What it denies would be a way out of the jail (other namespaces, mounts, other processes' memory), a way to the network,
or a wide road into the kernel (bpf, io_uring, keys). All else is allowed: the walls are the namespaces and Landlock.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Mapping

from megatron_flowrl.rewards.sandbox.linux import NAMESPACES, PR_SET_SECCOMP, prctl

# Name -> number on x86_64, on aarch64; None where there is none.
_DENIED: Mapping[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "shmget": (29, 194),  # memory that no limit counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "clock_settime": (227, 112),
    "settimeofday": (164, 170),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
}
# Name -> number on x86_64, on aarch64.
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_AF_UNIX = 1
_X32 = 0x40000000  # x86_64's other table of calls

_LOAD, _JUMP_EQUAL, _JUMP_FROM, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in seccomp_data; the low half of the argument
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def known_here() -> bool:
    """Whether this machine's table of calls is."""
    return platform.machine() in _ARCHITECTURES


def deny() -> None:
    """For this process and its children, for good. no_new_privs comes first. Raises OSError."""
    program = _program(platform.machine())
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    prctl(PR_SET_SECCOMP, 2, ctypes.create_string_buffer(header, len(header)))


def _program(machine: str) -> bytes:
    column, architecture = _ARCHITECTURES[machine]
    refused, missing = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    lines = [
        _line(_LOAD, _ARCHITECTURE),
        _line(_JUMP_EQUAL, architecture, 1, 0),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER),
        _line(_JUMP_FROM, _X32, 0, 1),
        _line(_RETURN, refused),
        # Its flags are in memory, where no filter looks; C libraries take clone where it is missing.
        _line(_JUMP_EQUAL, _CLONE3[column], 0, 1),
        _line(_RETURN, missing),
    ]
    for numbers in _DENIED.values():
        if (number := numbers[column]) is not None:
            lines += [_line(_JUMP_EQUAL, number, 0, 1), _line(_RETURN, refused)]
    lines += [
        _line(_JUMP_EQUAL, _CLONE[column], 0, 3),
        _line(_LOAD, _FIRST_ARGUMENT),
        _line(_JUMP_ANY_BIT, NAMESPACES, 0, 5),
        _line(_RETURN, refused),
        _line(_JUMP_EQUAL, _SOCKET[column], 0, 3),
        _line(_LOAD, _FIRST_ARGUMENT),
        _line(_JUMP_EQUAL, _AF_UNIX, 1, 0),
        _line(_RETURN, refused),
        _line(_RETURN, _ALLOW),
    ]
    return b"".join(lines)


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
