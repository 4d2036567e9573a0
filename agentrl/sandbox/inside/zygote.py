"""The fork server: started once, warm, inside its own namespaces; every run is a fork of it.

Launched as its own program. For the launchers bubblewrap and nsjail nothing is warm: a run is started through them, and the
rest (deadlines, memory, outcomes) is the same loop. Launched as its own program. The launcher leaves the host's namespaces, forks, and from then on only watches: when the
service's end of its stdin closes, it kills the fork server, and with that (pid 1 of its namespace) everything inside.
The fork server talks to the service over one SOCK_SEQPACKET socket: requests with descriptors in, outcomes out.
"""

import contextlib
import gc
import importlib
import json
import math
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from . import cgroup, child, jail, landlock, launchers, linux, seccomp

WATCHDOG_INTERVAL_S = 0.05
IDLE_INTERVAL_S = 1.0
_MAX_WATCHDOG_SHARE = 0.1  # of the time may go into looking at processes
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_WARM_UP = {
    "numpy": "import numpy, numpy.random, numpy.linalg\nnumpy.linalg.det(numpy.eye(3))",
    "sympy": (
        "import sympy\nx = sympy.Symbol('x')\nsympy.solve(x**2 - 1, x)\n"
        "sympy.integrate(x * sympy.exp(x), x)\nsympy.simplify((x**2 - 1) / (x - 1))\nstr(sympy.Rational(1, 3))"
    ),
}


@dataclass(slots=True)
class _Run:
    id: int
    pid: int
    pidfd: int
    started: float
    wall_s: float
    cpu_s: float
    memory_bytes: int
    total_cpu_s: float
    """Of all processes of a session together; a run is bounded by its wall time."""
    busy: bool
    """False for a session between cells: looked at less often."""
    cgroup: str = ""
    killed: str = ""


def main() -> NoReturn:
    """Entry of the program. argv[1] is the JSON configuration, fd ``control_fd`` the socket to the service."""
    config = json.loads(sys.argv[1])
    control = socket.socket(fileno=config["control_fd"])
    try:
        if not seccomp.supported():
            raise OSError(f"no seccomp table for {os.uname().machine}; supported: {', '.join(seccomp.SUPPORTED_MACHINES)}")
        if config["tier"] == "zygote":
            jail.enter_namespaces(user=config["user_namespace"])
        pid = os.fork()
    except OSError as error:
        control.send(json.dumps({"op": "fatal", "error": str(error)}).encode())
        os._exit(1)
    if pid == 0:
        _serve(control, config)
    control.close()
    _watch(pid)


def _watch(pid: int) -> NoReturn:
    """Kill the fork server when the service goes away, also when it is wedged; end when it ends."""
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(0, select.POLLIN | select.POLLHUP)
    ready = dict(poll.poll())
    if pidfd not in ready:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.waitpid(pid, 0)
    os._exit(0)


def _serve(control: socket.socket, config: dict[str, Any]) -> NoReturn:
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    try:
        server = Zygote(control, config)
        server.prepare()
        server.loop()
    except BaseException as error:  # noqa: BLE001 - the edge of this process
        control.send(json.dumps({"op": "fatal", "error": f"{type(error).__name__}: {error}"[:4000]}).encode())
        os._exit(1)
    os._exit(0)


class Zygote:
    """The single-threaded loop: start runs, enforce wall time and memory, report how they ended."""

    def __init__(self, control: socket.socket, config: dict[str, Any]) -> None:
        self._control = control
        self._config = config
        self._runs: dict[int, _Run] = {}  # by pidfd
        self._ruleset: int | None = None
        self._launcher: list[str] = []
        self._looked_at = 0.0
        self._look_cost_s = 0.0
        self._own_pid = os.getpid()
        self._pid_namespace = -1
        self._epoll = select.epoll()
        self._own_arguments = 0
        self._own_anonymous = 0
        self._address_space = 0
        self._page = os.sysconf("SC_PAGE_SIZE")

    def prepare(self) -> None:
        """Build the root, import what was asked for, and say hello."""
        started = time.monotonic()
        if self._config["cgroup_path"]:
            self._config["cgroup"] = os.open(self._config["cgroup_path"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._config["tier"] == "zygote":
            self._config["covered"] = jail.build_root(extra=self._config["readable"])
            self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        elif self._config["tier"] in launchers.NAMES:
            self._launcher, self._config["covered"] = launchers.command(
                self._config["tier"], user=self._config["user_namespace"], extra=self._config["readable"]
            )
        else:
            self._ruleset = landlock.create_ruleset(jail.readable_paths(), jail.DEVICES)
        # Behind a launcher nothing would be warm: each run is a new interpreter.
        missing = [name for name in self._config["preload"] if not self._launcher and not _preload(name)]
        gc.collect()
        gc.freeze()
        own = _look_at("self", self._page)
        self._own_arguments, self._own_anonymous = (own.arguments, own.anonymous_bytes) if own else (0, 0)
        with open("/proc/self/statm") as file:
            self._address_space = int(file.read().split()[0]) * self._page
        hello = {
            "op": "hello",
            "missing": missing,
            "landlock_abi": landlock.abi(),
            "address_space_bytes": self._address_space,
            "boot_s": round(time.monotonic() - started, 4),
        }
        self._control.send(json.dumps(hello).encode())

    def loop(self) -> None:
        """Serve until the service closes its end."""
        self._epoll.register(self._control.fileno(), select.EPOLLIN)
        while True:
            for fd, _ in self._epoll.poll(self._next_wakeup()):
                if fd != self._control.fileno():
                    self._finish(fd)
                elif not self._receive():
                    return
            self._enforce()

    def _next_wakeup(self) -> float:
        if not self._runs:
            return -1
        deadline = min(run.started + run.wall_s for run in self._runs.values()) - time.monotonic()
        return max(0.0, min(deadline, self._look_interval_s()))

    def _look_interval_s(self) -> float:
        wanted = WATCHDOG_INTERVAL_S if any(run.busy for run in self._runs.values()) else IDLE_INTERVAL_S
        return max(wanted, self._look_cost_s / _MAX_WATCHDOG_SHARE)

    def _receive(self) -> bool:
        try:
            message, fds, _, _ = socket.recv_fds(self._control, 65536, 8)
        except ConnectionError:
            return False
        if not message:
            return False
        request = json.loads(message)
        if request["op"] == "run":
            self._start(request, fds)
            return True
        for run in [run for run in self._runs.values() if run.id == request["id"]]:
            if request["op"] == "kill":
                self._kill(run, request["reason"])
            elif request["op"] == "interrupt":
                self._interrupt(run)
            elif request["op"] == "busy":
                run.busy = request["busy"]
        return True

    def _start(self, request: dict[str, Any], fds: list[int]) -> None:
        request["address_space_bytes"] = self._address_space + request["memory_bytes"]
        request["cgroup"] = ""
        try:
            if self._config["cgroup_path"]:
                # Pages of its tmpfs are charged to it too.
                memory_bytes = request["memory_bytes"] + request["tmpfs_bytes"]
                name = f"run-{self._own_pid}-{request['id']}"
                request["cgroup"] = name  # first: one that is half made is removed below
                cgroup.create(self._config["cgroup"], name, memory_bytes=memory_bytes, processes=request["processes"])
            pid = self._fork(request, fds)
        except OSError as error:
            if request["cgroup"]:
                cgroup.remove(self._config["cgroup"], request["cgroup"])
            self._send({"op": "done", "id": request["id"], "error": f"fork: {error}"})
            return
        finally:
            for fd in fds:
                os.close(fd)
        run = _Run(
            id=request["id"],
            pid=pid,
            pidfd=os.pidfd_open(pid),
            started=time.monotonic(),
            wall_s=math.inf if request["session"] else request["wall_s"],
            cpu_s=request["cpu_s"],
            memory_bytes=request["memory_bytes"],
            total_cpu_s=request["cpu_s"] if request["session"] else math.inf,
            busy=not request["session"],
            cgroup=request["cgroup"],
        )
        self._runs[run.pidfd] = run
        self._epoll.register(run.pidfd, select.EPOLLIN)

    def _fork(self, request: dict[str, Any], fds: list[int]) -> int:
        nested = self._pid_namespace >= 0
        if nested:
            linux.unshare(linux.CLONE_NEWPID)
        try:
            pid = os.fork()
            if pid == 0:
                self._control.detach()
                if self._launcher:
                    launchers.launch(self._launcher, request, fds, self._config)
                child.run(request, fds, self._config, self._ruleset)
            return pid
        finally:
            # A second unshare fails until the process has returned to its own pid namespace.
            if nested:
                linux.setns(self._pid_namespace, linux.CLONE_NEWPID)

    def _finish(self, pidfd: int) -> None:
        run = self._runs.pop(pidfd)
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        _, status, usage = os.wait4(run.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if self._launcher and code > 128:
            code = 128 - code  # how a launcher passes a signal on
        if run.cgroup and cgroup.remove(self._config["cgroup"], run.cgroup):
            run.killed = run.killed or "memory"
        cpu_s = usage.ru_utime + usage.ru_stime
        self._send(
            {
                "op": "done",
                "id": run.id,
                "code": code,
                "reason": run.killed or _reason(code, cpu_s, run.cpu_s),
                "wall_s": round(time.monotonic() - run.started, 6),
                "cpu_s": round(cpu_s, 6),
                "max_rss_kb": usage.ru_maxrss,
            }
        )

    def _send(self, message: dict[str, Any]) -> None:
        self._control.send(json.dumps(message).encode())

    def _kill(self, run: _Run, reason: str) -> None:
        if reason != "signal":  # a mere "end it": one that has ended by itself meanwhile, or for its limits, says so
            run.killed = run.killed or reason
        # pid 1 of the run's namespace: the kernel kills the rest with it.
        if not self._signal_launched(run, signal.SIGKILL):
            signal.pidfd_send_signal(run.pidfd, signal.SIGKILL)

    def _interrupt(self, run: _Run) -> None:
        if not self._signal_launched(run, signal.SIGINT):
            signal.pidfd_send_signal(run.pidfd, signal.SIGINT)

    def _signal_launched(self, run: _Run, number: int) -> bool:
        """Signal what a launcher has started; the launcher then ends by itself. False when there is no such process."""
        if not self._launcher:
            return False
        found = False
        for name in os.listdir("/proc"):
            if name.isdecimal() and (process := _look_at(name, self._page)) is not None and process.parent == run.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(name), number)
                    found = True
        return found

    def _enforce(self) -> None:
        now = time.monotonic()
        for run in self._runs.values():
            if now >= run.started + run.wall_s:
                self._kill(run, "wall")
        if self._ruleset is not None or now < self._looked_at + self._look_interval_s():
            return
        watched = [run for run in self._runs.values() if now - run.started >= WATCHDOG_INTERVAL_S]
        if watched:
            # Time on the processor: on a busy machine the clock would count the wait for it too.
            before = time.process_time()
            self._look_at_processes(watched)
            self._look_cost_s = time.process_time() - before
            self._looked_at = time.monotonic()

    def _look_at_processes(self, watched: list[_Run]) -> None:
        """Kill what uses too much over all its processes together; rlimits bound only each alone."""
        processes: dict[int, _Process] = {}
        for name in os.listdir("/proc"):
            if name.isdecimal() and (process := _look_at(name, self._page)) is not None:
                processes[int(name)] = process
        memory: dict[int, int] = {}
        members: dict[int, list[int]] = {}
        cpu_s: dict[int, float] = {}
        for pid, process in processes.items():
            root = pid
            while (above := processes.get(root)) is not None and above.parent != self._own_pid:
                root = above.parent
            # Same argument area as ours: forked and never exec'ed, so our own pages are in its count but shared.
            is_fork = process.arguments and process.arguments == self._own_arguments
            private = max(0, process.anonymous_bytes - (self._own_anonymous if is_fork else 0))
            memory[root] = memory.get(root, 0) + private
            members.setdefault(root, []).append(pid)
            cpu_s[root] = cpu_s.get(root, 0) + process.cpu_s
        for run in watched:
            if memory.get(run.pid, 0) > run.memory_bytes and _proportional(members[run.pid]) > run.memory_bytes:
                self._kill(run, "memory")
            elif cpu_s.get(run.pid, 0) > run.total_cpu_s:
                self._kill(run, "cpu")


@dataclass(slots=True)
class _Process:
    parent: int
    arguments: int
    """Address of the argument area: changes with exec, not with fork."""
    anonymous_bytes: int
    cpu_s: float
    """Its own and that of its children that were waited for."""


def _reason(code: int, cpu_s: float, cpu_limit_s: float) -> str:
    if code == -signal.SIGKILL and cpu_s >= cpu_limit_s - 0.1:
        return "cpu"
    if code < 0:
        return "signal"
    return "exit" if code else "ok"


def _look_at(name: str, page: int) -> _Process | None:
    """A process by its entry in /proc, or None when it is gone."""
    try:
        with open(f"/proc/{name}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        with open(f"/proc/{name}/statm", "rb") as file:
            _, resident, shared = file.read().split()[:3]
        return _Process(
            parent=int(fields[1]),
            arguments=int(fields[45]),
            anonymous_bytes=(int(resident) - int(shared)) * page,
            cpu_s=sum(map(int, fields[11:15])) / _TICKS_PER_S,
        )
    except (OSError, ValueError, IndexError):
        return None


def _proportional(pids: list[int]) -> int | float:
    """Anonymous bytes of the processes, pages that forks share counted once. Exact and slow: for those that look too large."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                total += next(int(line.split()[1]) * 1024 for line in file if line.startswith(b"Pss_Anon:"))
        except (FileNotFoundError, ProcessLookupError):
            continue
        except (OSError, StopIteration, ValueError):
            return math.inf  # not to be had here: the quick count decides
    return total


def _preload(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    if name in _WARM_UP:
        exec(compile(_WARM_UP[name], f"warm-up of {name}", "exec"), {"__name__": "warm_up"})
    return True
