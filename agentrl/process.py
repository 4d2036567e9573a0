"""How child processes are tied to the process that started them, where they listen, how often a process collects garbage, and how
one ends."""

import atexit
import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

import psutil

KEEP_ALIVE_S = 75
"""Our servers keep an idle connection for so long: longer than clients would use it again (aiohttp 15 s, httpx 5 s), because what is
sent into a connection that is just being closed is lost. Uvicorn's own 5 s is not."""
REUSED_WITHIN_S = 4.0
"""Our clients use an idle connection to somebody else's server again for so long: shorter than common servers keep it (uvicorn: 5 s),
since a POST that meets a connection being closed is lost, and may not be sent again."""
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


class ClaimedPort:
    """A free TCP port that the kernel gives nobody else until `close`: for a server that is started now and listens seconds later.

    Bound but not listening. On Linux a server that binds this very port may still have it, as servers set SO_REUSEADDR; those that take
    any free port (0), and outgoing connections, are given others. Elsewhere that server would be refused, so there the port was merely
    free a moment ago.
    """

    def __init__(self, host: str) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, 0))
        self.number = int(self._socket.getsockname()[1])
        if sys.platform != "linux":
            self._socket.close()

    def __enter__(self) -> int:
        return self.number

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Safe to call twice."""
        self._socket.close()


def end_process(code: int) -> NoReturn:
    """End this process with this exit code: exit handlers run, output is flushed, but the interpreter is not taken apart.

    For one that used torch's process groups. Their threads live as long as anything refers to the group, and caches inside torch do.
    One that lets go of the last exchange's tensor while Python ends is cut off in the middle of that, which aborts the process
    (SIGABRT, "terminate called without an active exception"): all its work is done, and its exit code says that it crashed.
    """
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  # what Python itself calls at this point
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads any more
            stream.flush()
    os._exit(code)


def settle_garbage_collector() -> None:
    """Collect seldom, and never again what exists now. For a process that has loaded its libraries and begins its real work.

    A generation's answer holds a small list per token, so Python's defaults (a collection every 700 new containers) walk the
    young objects several times per turn, and now and then every object that the libraries made.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
