"""How child processes are tied to the process that started them, where they listen, and how often a process collects garbage."""

import ctypes
import gc
import os
import signal
import socket
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
# Loaded before any fork: a child between fork and exec must not import.
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """``preexec_fn``: the kernel sends SIGTERM to this child when the thread that forked it dies.

    Start children from the main thread only; the signal follows the thread, not the process.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def start_time(pid: int) -> float:
    """Seconds from boot to the process's start: with the pid, its name. Unlike a date it stays the same when the clock is set.

    Raises:
        psutil.Error: there is no such process.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before it may hold anything
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except FileNotFoundError:  # gone, or not Linux
        return psutil.Process(pid).create_time()


def free_port(host: str) -> int:
    """A TCP port that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def settle_garbage_collector() -> None:
    """Collect seldom, and never again what exists now. For a process that has loaded its libraries and begins its real work.

    A generation's answer holds a small list per token, so Python's defaults (a collection every 700 new containers) walk the
    young objects several times per turn, and now and then every object that the libraries made.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
