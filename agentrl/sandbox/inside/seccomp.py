"""The system-call filter: classic BPF built by hand, so that neither libseccomp nor a compiler is needed.

A deny list on top of namespaces (or Landlock), empty capabilities and no_new_privs: it removes what those do not cover
(AF_VSOCK and netlink sockets, memfd beyond RLIMIT_AS, key rings, kernel attack surface) and every call newer than the
table. It is not the only wall.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

from . import linux

SUPPORTED_MACHINES = ("x86_64",)

_AUDIT_ARCH_X86_64 = 0xC000_003E
_X32_BIT = 0x4000_0000
_LAST_KNOWN_SYSCALL = 462

_SECCOMP_MODE_FILTER = 2
_RET_KILL_PROCESS = 0x8000_0000
_RET_ERRNO = 0x0005_0000
_RET_ALLOW = 0x7FFF_0000

_LD_W_ABS = 0x20
_JEQ = 0x15
_JGE = 0x35
_JSET = 0x45
_RET = 0x06

_OFFSET_NR = 0
_OFFSET_ARCH = 4
_OFFSET_ARGS = 16

SYSCALLS_X86_64 = {
    "shmget": 29, "shmat": 30, "shmctl": 31, "socket": 41, "connect": 42, "accept": 43, "bind": 49, "listen": 50,
    "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "semget": 64, "semop": 65, "semctl": 66, "shmdt": 67,
    "msgget": 68, "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "ptrace": 101, "syslog": 103, "setpgid": 109, "rt_sigqueueinfo": 129,
    "uselib": 134, "personality": 135, "ustat": 136, "sysfs": 139, "getpriority": 140, "setpriority": 141,
    "sched_setparam": 142, "sched_setscheduler": 144, "vhangup": 153, "modify_ldt": 154, "pivot_root": 155, "_sysctl": 156,
    "adjtimex": 159, "chroot": 161, "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167,
    "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "create_module": 174,
    "init_module": 175, "delete_module": 176, "get_kernel_syms": 177, "query_module": 178, "quotactl": 179, "nfsservctl": 180,
    "tkill": 200, "sched_setaffinity": 203, "io_setup": 206, "io_destroy": 207, "io_getevents": 208, "io_submit": 209,
    "io_cancel": 210, "lookup_dcookie": 212, "semtimedop": 220, "clock_settime": 227, "tgkill": 234, "mbind": 237,
    "set_mempolicy": 238, "mq_open": 240, "mq_unlink": 241, "mq_timedsend": 242, "mq_timedreceive": 243, "mq_notify": 244,
    "mq_getsetattr": 245, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "ioprio_set": 251,
    "migrate_pages": 256, "unshare": 272, "move_pages": 279, "ioctl": 16, "accept4": 288, "rt_tgsigqueueinfo": 297,
    "perf_event_open": 298, "fanotify_init": 300, "fanotify_mark": 301, "prlimit64": 302, "name_to_handle_at": 303,
    "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311,
    "kcmp": 312, "finit_module": 313, "sched_setattr": 314, "seccomp": 317, "memfd_create": 319, "kexec_file_load": 320,
    "bpf": 321, "execveat": 322, "userfaultfd": 323, "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426,
    "io_uring_register": 427, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432,
    "fspick": 433, "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442,
    "quotactl_fd": 443, "memfd_secret": 447, "process_mrelease": 448, "set_mempolicy_home_node": 450, "statmount": 457,
    "listmount": 458,
}  # fmt: skip

# Everything here fails with EPERM unless a rule below says otherwise.
_DENIED = (
    "shmget", "shmat", "shmctl", "shmdt", "semget", "semop", "semctl", "semtimedop", "msgget", "msgsnd", "msgrcv", "msgctl",
    "mq_open", "mq_unlink", "mq_timedsend", "mq_timedreceive", "mq_notify", "mq_getsetattr", "memfd_create", "memfd_secret",
    "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "process_madvise", "process_mrelease",
    "mount", "umount2", "pivot_root", "chroot", "unshare", "setns", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount",
    "fspick", "mount_setattr", "statmount", "listmount", "open_by_handle_at", "name_to_handle_at",
    "init_module", "finit_module", "delete_module", "create_module", "query_module", "get_kernel_syms", "nfsservctl",
    "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff", "acct", "settimeofday", "adjtimex", "clock_settime",
    "clock_adjtime", "sethostname", "setdomainname", "iopl", "ioperm", "vhangup", "quotactl", "quotactl_fd", "uselib", "ustat",
    "sysfs", "_sysctl", "modify_ldt", "personality", "lookup_dcookie", "bpf", "perf_event_open", "userfaultfd", "keyctl",
    "add_key", "request_key", "io_setup", "io_destroy", "io_getevents", "io_submit", "io_cancel", "fanotify_init",
    "fanotify_mark", "syslog", "move_pages", "migrate_pages", "mbind", "set_mempolicy", "set_mempolicy_home_node", "ioprio_set",
    "seccomp",
)  # fmt: skip
_NO_NETWORK = ("socket", "connect", "accept", "accept4", "bind", "listen")
_NOT_IMPLEMENTED = ("clone3", "io_uring_setup", "io_uring_enter", "io_uring_register")

# Without a pid namespace these could reach the service itself; the first argument must be 0 or the caller.
_PID_FIRST = (
    "kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "prlimit64", "sched_setaffinity", "sched_setparam",
    "sched_setscheduler", "sched_setattr", "setpgid",
)  # fmt: skip
_NO_PROCESSES = ("fork", "vfork", "execve", "execveat", "pidfd_open", "pidfd_send_signal", "tkill")

_CLONE_NEW_MASK = 0x7E02_0000
_CLONE_THREAD = 0x0001_0000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

_Instruction = tuple[int, int, int, int]


def _statement(code: int, value: int) -> _Instruction:
    return (code, 0, 0, value & 0xFFFF_FFFF)


def _jump(code: int, value: int, if_true: int, if_false: int) -> _Instruction:
    return (code, if_true, if_false, value & 0xFFFF_FFFF)


def _deny(error: int) -> _Instruction:
    return _statement(_RET, _RET_ERRNO | error)


def _low_word(argument: int) -> _Instruction:
    return _statement(_LD_W_ABS, _OFFSET_ARGS + 8 * argument)


def _for_syscall(name: str, body: list[_Instruction]) -> list[_Instruction]:
    """``body`` when the accumulator holds this system call; it must end in a return on every path."""
    return [_jump(_JEQ, SYSCALLS_X86_64[name], 0, len(body)), *body]


def build_filter(*, own_pid: int | None = None) -> list[_Instruction]:
    """The program as (code, jt, jf, k) instructions.

    Args:
        own_pid: given where there is no pid namespace: processes may then not be created at all, and calls that take a pid
            may name only 0 or this one.
    """
    allow = _statement(_RET, _RET_ALLOW)
    program = [
        _statement(_LD_W_ABS, _OFFSET_ARCH),
        _jump(_JEQ, _AUDIT_ARCH_X86_64, 1, 0),
        _statement(_RET, _RET_KILL_PROCESS),
        _statement(_LD_W_ABS, _OFFSET_NR),
        # Also catches the x32 table, whose numbers carry bit 30.
        _jump(_JGE, _LAST_KNOWN_SYSCALL + 1, 0, 1),
        _deny(errno.ENOSYS),
    ]
    for name in _DENIED:
        program += _for_syscall(name, [_deny(errno.EPERM)])
    for name in _NO_NETWORK:
        program += _for_syscall(name, [_deny(errno.EACCES)])
    for name in _NOT_IMPLEMENTED:
        program += _for_syscall(name, [_deny(errno.ENOSYS)])
    program += _for_syscall(
        "ioctl",
        [_low_word(1), _jump(_JEQ, _TIOCSTI, 1, 0), _jump(_JEQ, _TIOCLINUX, 0, 1), _deny(errno.EPERM), allow],
    )
    clone = [_low_word(0), _jump(_JSET, _CLONE_NEW_MASK, 0, 1), _deny(errno.EPERM)]
    if own_pid is None:
        program += _for_syscall("clone", [*clone, allow])
    else:
        program += _for_syscall("clone", [*clone, _jump(_JSET, _CLONE_THREAD, 1, 0), _deny(errno.EPERM), allow])
        for name in _NO_PROCESSES:
            program += _for_syscall(name, [_deny(errno.EPERM)])
        for name in _PID_FIRST:
            program += _for_syscall(
                name, [_low_word(0), _jump(_JEQ, 0, 1, 0), _jump(_JEQ, own_pid, 0, 1), allow, _deny(errno.EPERM)]
            )
        # setpriority(which, who): only PRIO_PROCESS of oneself.
        program += _for_syscall(
            "setpriority",
            [
                _low_word(0),
                _jump(_JEQ, 0, 0, 3),
                _low_word(1),
                _jump(_JEQ, 0, 2, 0),
                _jump(_JEQ, own_pid, 1, 0),
                _deny(errno.EPERM),
                allow,
            ],
        )
    return [*program, allow]


class _SockFprog(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def supported() -> bool:
    """Is there a system-call table for this machine?"""
    return os.uname().machine in SUPPORTED_MACHINES


def install(program: Iterable[_Instruction]) -> None:
    """Restrict the calling thread and everything it starts; sets no_new_privs first. Cannot be undone."""
    if not supported():
        raise OSError(errno.ENOSYS, f"no seccomp table for {os.uname().machine}; supported: {', '.join(SUPPORTED_MACHINES)}")
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = _SockFprog(length=len(code) // 8, filter=ctypes.cast(buffer, ctypes.c_void_p))
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.prctl(linux.PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(fprog))
