"""Landlock: the file-system wall of the tier that has no namespaces. Reading is allowed below the given paths, nothing else."""

import ctypes
import os
import struct
from collections.abc import Iterable

from . import linux

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_FS_WRITE_FILE = 1 << 1
_FS_READ_FILE = 1 << 2
_FS_READ_DIR = 1 << 3
_FS_ALL_ABI_1 = (1 << 13) - 1
_FS_REFER = 1 << 13  # ABI 2
_FS_TRUNCATE = 1 << 14  # ABI 3
_FS_IOCTL_DEV = 1 << 15  # ABI 5
_NET_ALL = 0b11  # ABI 4: bind and connect TCP
_SCOPE_ALL = 0b11  # ABI 6: abstract unix sockets and signals


def abi() -> int:
    """The kernel's Landlock ABI, 0 where it is absent or disabled."""
    try:
        return linux.syscall(
            linux.SYS_LANDLOCK_CREATE_RULESET, ctypes.c_void_p(None), 0, _CREATE_RULESET_VERSION, what="landlock"
        )
    except OSError:
        return 0


def create_ruleset(readable: Iterable[str], devices: Iterable[str]) -> int:
    """A ruleset that allows reading below ``readable`` and reading and writing ``devices``. Missing paths are skipped.

    Returns:
        A file descriptor for ``restrict_self``; it may be used by any number of processes.
    """
    version = abi()
    if version == 0:
        raise OSError("Landlock is not available: the kernel is older than 5.13 or lsm= leaves it out")
    file_system = _FS_ALL_ABI_1
    file_system |= (
        (_FS_REFER if version >= 2 else 0) | (_FS_TRUNCATE if version >= 3 else 0) | (_FS_IOCTL_DEV if version >= 5 else 0)
    )
    attributes = struct.pack("=QQQ", file_system, _NET_ALL if version >= 4 else 0, _SCOPE_ALL if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = linux.syscall(
        linux.SYS_LANDLOCK_CREATE_RULESET, ctypes.c_char_p(attributes), size, 0, what="landlock_create_ruleset"
    )
    for path in readable:
        _allow(ruleset, path, _FS_READ_FILE | _FS_READ_DIR)
    for path in devices:
        _allow(ruleset, path, _FS_READ_FILE | _FS_WRITE_FILE)
    return ruleset


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            access &= ~_FS_READ_DIR
        rule = struct.pack("=Qi", access, fd)
        linux.syscall(
            linux.SYS_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.c_char_p(rule), 0, what=f"landlock_add_rule({path})"
        )
    finally:
        os.close(fd)


def restrict_self(ruleset: int) -> None:
    """Apply a ruleset to the calling thread. Needs no_new_privs. Cannot be undone."""
    linux.syscall(linux.SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0, what="landlock_restrict_self")
