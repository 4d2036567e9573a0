"""The filter, executed by a small interpreter of classic BPF: every decision without installing anything."""

import errno
import itertools
import struct

import pytest

from agentrl.sandbox.inside.seccomp import SYSCALLS_X86_64, build_filter

ALLOW, ERRNO, KILL = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
X86_64, I386 = 0xC000_003E, 0x4000_0003
OWN_PID = 4321


def decide(program: list[tuple[int, int, int, int]], nr: int, *args: int, arch: int = X86_64) -> int:
    padded = [arg & (2**64 - 1) for arg in (*args, 0, 0, 0, 0, 0, 0)[:6]]
    data = struct.pack("=IIQ6Q", nr, arch, 0, *padded)
    accumulator, counter = 0, 0
    while True:
        code, if_true, if_false, value = program[counter]
        counter += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif code == 0x06:
            return value
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            counter += if_true if holds else if_false


@pytest.fixture(params=[None, OWN_PID], ids=["namespaces", "landlock"])
def program(request: pytest.FixtureRequest) -> list[tuple[int, int, int, int]]:
    return build_filter(own_pid=request.param)


@pytest.mark.parametrize("nr", [0, 1, 3, 9, 11, 12, 13, 39, 53, 60, 202, 231, 257, 262, 318])
def test_what_an_ordinary_program_needs_is_allowed(program: list[tuple[int, int, int, int]], nr: int) -> None:
    assert decide(program, nr) == ALLOW


@pytest.mark.parametrize(
    "name", ["ptrace", "mount", "unshare", "setns", "bpf", "keyctl", "memfd_create", "userfaultfd", "chroot", "perf_event_open"]
)
def test_dangerous_calls_are_not_permitted(program: list[tuple[int, int, int, int]], name: str) -> None:
    assert decide(program, SYSCALLS_X86_64[name]) == ERRNO | errno.EPERM


def test_sockets_are_refused_but_socketpair_is_not(program: list[tuple[int, int, int, int]]) -> None:
    for name in ("socket", "connect", "bind", "listen", "accept", "accept4"):
        assert decide(program, SYSCALLS_X86_64[name]) == ERRNO | errno.EACCES
    assert decide(program, 53, 1, 1) == ALLOW


def test_foreign_architectures_kill_and_unknown_numbers_do_not_exist(program: list[tuple[int, int, int, int]]) -> None:
    assert decide(program, 20, arch=I386) == KILL
    for nr in (463, 1000, 0x4000_0000, 0x4000_0000 + 101, 0xFFFF_FFFF):
        assert decide(program, nr) == ERRNO | errno.ENOSYS


def test_new_namespaces_by_clone_are_refused_and_threads_are_not(program: list[tuple[int, int, int, int]]) -> None:
    thread = 0x3D0F00
    assert decide(program, 56, thread) == ALLOW
    for flag in (0x2_0000, 0x200_0000, 0x400_0000, 0x800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000):
        assert decide(program, 56, flag | 17) == ERRNO | errno.EPERM
        assert decide(program, 56, flag | thread) == ERRNO | errno.EPERM
    assert decide(program, 435) == ERRNO | errno.ENOSYS


def test_terminal_injection_is_refused_also_with_high_bits_set(program: list[tuple[int, int, int, int]]) -> None:
    for request, high in itertools.product((0x5412, 0x541C), (0, 1 << 32)):
        assert decide(program, 16, 0, request | high) == ERRNO | errno.EPERM
    assert decide(program, 16, 0, 0x5401) == ALLOW


def test_processes_may_be_made_only_inside_a_pid_namespace() -> None:
    for nr, expected in ((57, ALLOW), (58, ALLOW), (59, ALLOW), (56, ALLOW)):
        assert decide(build_filter(), nr, 17) == expected
        assert decide(build_filter(own_pid=OWN_PID), nr, 17) == ERRNO | errno.EPERM


@pytest.mark.parametrize(
    "name", ["kill", "tgkill", "prlimit64", "sched_setaffinity", "sched_setscheduler", "sched_setattr", "setpgid"]
)
def test_without_a_pid_namespace_only_the_caller_itself_may_be_named(name: str) -> None:
    program = build_filter(own_pid=OWN_PID)
    nr = SYSCALLS_X86_64[name]
    assert decide(program, nr, 0) == decide(program, nr, OWN_PID) == ALLOW
    for pid in (1, OWN_PID + 1, -1, -OWN_PID):
        assert decide(program, nr, pid) == ERRNO | errno.EPERM


@pytest.mark.parametrize(
    ("which", "who", "allowed"), [(0, 0, True), (0, OWN_PID, True), (0, 7, False), (1, 0, False), (2, 0, False)]
)
def test_only_the_callers_own_priority_may_change(which: int, who: int, allowed: bool) -> None:
    decision = decide(build_filter(own_pid=OWN_PID), SYSCALLS_X86_64["setpriority"], which, who, 5)
    assert decision == (ALLOW if allowed else ERRNO | errno.EPERM)


def test_every_call_has_one_number() -> None:
    assert len(set(SYSCALLS_X86_64.values())) == len(SYSCALLS_X86_64)
