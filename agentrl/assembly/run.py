"""``agentrl run``: sandbox, serve and learn on one machine, watched until the learner is done.

The supervisor does no work of its own. A child that dies is started again with the same command; it finds its place from the
checkpoint and the stream. The first Ctrl-C (or SIGTERM) drains: serve finishes its groups, learn writes a checkpoint and
acknowledges. The second ends everything at once.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from agentrl.assembly.evaluations import Evaluations
from agentrl.assembly.failure_budget import EXIT_GAVE_UP
from agentrl.assembly.parts import (
    SUPERVISED_VARIABLE,
    needs_sandbox,
    run_dir_of,
    share_sandbox_token,
    start_stream_server,
)
from agentrl.assembly.sandbox import sandbox_arguments
from agentrl.assembly.stalls import DISK_LOW_BYTES, free_bytes
from agentrl.assembly.watchdog import Watchdog
from agentrl.config import Config, dump_config
from agentrl.errors import AgentRLError, ConfigError
from agentrl.process import ClaimedPort, die_with_parent
from agentrl.stream.server import EmbeddedServer
from agentrl.telemetry.run_dir import RunDir

log = logging.getLogger(__name__)

EXIT_CONFIG = 2
"""Exit code of a configuration error: starting again cannot help."""
RESTART_WINDOW_S = 600.0
"""Window in which ``run.max_restarts`` are allowed."""
STREAM_CHECK_S = 1.0
"""How often the embedded stream server is looked at."""
DRAIN_LIMIT_S = 120.0
"""How long a child may take to drain before it is killed."""


class RunInterrupted(AgentRLError):
    """A signal ended the run before the learner had made its steps; everything is drained and saved."""

    def __init__(self, directory: RunDir, number: int) -> None:
        super().__init__(
            f"{signal.Signals(number).name} ended the run before its last step. What was learned is saved in {directory.root}: "
            "the same command goes on from there"
        )
        self.exit_code = 128 + number


class RunFailed(AgentRLError):
    """A part of the run could not be kept alive."""


@dataclass
class Child:
    """One supervised process."""

    role: str
    command: list[str]
    env: dict[str, str]
    log_path: Path
    claim: ClaimedPort | None = None
    """Its port where others hold the address: its own from before it listens until the run ends."""
    process: subprocess.Popen[bytes] | None = None
    starts: list[float] = field(default_factory=list[float])

    def start(self) -> None:
        self.starts.append(time.monotonic())
        with self.log_path.open("ab") as sink:
            # Its own session: the terminal's Ctrl-C reaches only the supervisor, which decides the order of the end.
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=self.env,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def poll(self) -> int | None:
        return None if self.process is None else self.process.poll()

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self, seconds: float) -> int | None:
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def restarts_in_window(self) -> int:
        return sum(1 for t in self.starts if time.monotonic() - t < RESTART_WINDOW_S) - 1

    def log_tail(self, lines: int = 15) -> str:
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""


def run(config: Config, arguments: Sequence[str], *, tick: Callable[[RunDir], None] | None = None) -> RunDir:
    """Supervise a run until the learner has made its steps.

    Args:
        config: the validated config.
        arguments: ``-c FILE key=value …`` as given; the children load the same.
        tick: called about twice a second while the run goes on (the live view).

    Raises:
        RunFailed: a child kept dying; the message holds the end of its log.
        RunInterrupted: SIGINT or SIGTERM came first; the children were drained.
        ConfigError: the run is already active, or its learner cannot work as configured.
    """
    from agentrl.assembly.learn import check_learning  # brings torch, which nothing else here needs

    check_learning(config)
    directory = run_dir_of(config).create()
    refuse_if_active(directory, ("run", "serve", "learn"))
    directory.write_config(dump_config(config))
    directory.register("run")
    directory.event("run_started", arguments=list(arguments))
    server = start_stream_server(config, directory)
    stop = _StopOnSignal()
    share_sandbox_token(config, directory)
    children = [_child(directory, config, role, arguments) for role in _roles(config)]
    guard = _StreamGuard(config, directory, server)
    evaluations = Evaluations(config, directory, arguments)
    watchdog = Watchdog(directory, config, on_stall=lambda verdict: directory.event("stalled", **asdict(verdict)))
    ended = threading.Event()
    watcher = threading.Thread(target=watchdog.watch, args=(ended,), name="watchdog", daemon=True)
    try:
        with stop:
            for child in children:
                child.start()
            watcher.start()
            is_complete = _supervise(children, directory, stop, guard, evaluations, tick, max_restarts=config.run.max_restarts)
            if is_complete:
                evaluations.finish(stop.sleep)
    except AgentRLError as error:
        directory.event("run_failed", error=str(error))
        raise
    finally:
        ended.set()
        evaluations.stop()
        _shut_down(children, directory, stop, guard)
        for child in children:
            if child.claim is not None:
                child.claim.close()
        if server is not None:
            server.stop()
            directory.deregister("redis")
        if sys.exc_info()[0] is None:
            directory.event("run_ended")
        directory.deregister("run")
    if not is_complete:
        raise RunInterrupted(directory, stop.number)
    return directory


def refuse_if_active(directory: RunDir, roles: Sequence[str]) -> None:
    """Two of the same role would fight over the run.

    Raises:
        ConfigError: one is alive, with its pid.
    """
    for entry in directory.processes():
        if entry["role"] in roles and entry["pid"] not in (os.getpid(), os.getppid()):
            raise ConfigError(
                f"{directory.root} is in use: {entry['role']} runs as pid {entry['pid']}. Wait for it, stop it, or choose another run.name"
            )


def _roles(config: Config) -> list[str]:
    return (["sandbox"] if needs_sandbox(config) and config.sandbox.url == "auto" else []) + ["serve", "learn"]


def _child(directory: RunDir, config: Config, role: str, arguments: Sequence[str]) -> Child:
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", SUPERVISED_VARIABLE: "1"}
    env["OMP_NUM_THREADS"] = str(config.learn.threads if role == "learn" else 1)
    command = [sys.executable, "-m", "agentrl"]
    claim = ClaimedPort("127.0.0.1") if role == "sandbox" else None
    command += [role, *arguments] if claim is None else sandbox_arguments(config, directory, port=claim.number)
    return Child(role, command, env, directory.logs / f"{role}.log", claim)


def _supervise(
    children: Sequence[Child],
    directory: RunDir,
    stop: "_StopOnSignal",
    guard: "_StreamGuard",
    evaluations: Evaluations,
    tick: Callable[[RunDir], None] | None,
    *,
    max_restarts: int,
) -> bool:
    """Watch until the learner exits cleanly (True), a signal comes (False), or a child cannot be kept alive."""
    disk = _DiskGuard(directory)
    while not stop.requested:
        if disk.is_full():
            time.sleep(0.2)
            continue
        guard.look()
        for child in children:
            code = child.poll()
            if code is None:
                continue
            directory.deregister(child.role)
            if code == 0 and child.role == "learn":
                return True
            _restart(child, code, directory, max_restarts=max_restarts)
        evaluations.look()
        if tick is not None:
            tick(directory)
        time.sleep(0.2)
    return False


def _restart(child: Child, code: int, directory: RunDir, *, max_restarts: int) -> None:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    directory.event("child_exited", role=child.role, code=code)
    if code in (EXIT_CONFIG, EXIT_GAVE_UP) or child.restarts_in_window() >= max_restarts or _dies_young(child, code):
        raise RunFailed(
            f"{child.role} ended with {how} and starting it again would not help "
            f"({child.restarts_in_window()} restarts so far). The end of {child.log_path}:\n{child.log_tail()}"
        )
    log.warning("child_restarted role=%s after=%s log=%s", child.role, how, child.log_path)
    child.start()
    directory.event("child_restarted", role=child.role, after=how)


def _dies_young(child: Child, code: int) -> bool:
    """Three exits by its own error within a minute: a bug or a bad input, not an accident."""
    return code > 0 and sum(1 for t in child.starts if time.monotonic() - t < 60.0) >= 3


class _DiskGuard:
    """Holds restarts back while the disk is full: what starts would die again, until no restart is left."""

    def __init__(self, directory: RunDir, *, free: Callable[[Path], int] = free_bytes) -> None:
        self._directory, self._free = directory, free
        self._since: float | None = None

    def is_full(self) -> bool:
        free = self._free(self._directory.root)
        if free < DISK_LOW_BYTES:
            if self._since is None:
                self._since = time.monotonic()
                log.error(
                    "disk_full free_mib=%.1f path=%s: free space; until then nothing is restarted",
                    free / 2**20,
                    self._directory.root,
                )
            return True
        if self._since is not None:
            log.warning("disk_has_room free_mib=%.1f after=%.0f s", free / 2**20, time.monotonic() - self._since)
            with contextlib.suppress(OSError):
                self._directory.event("disk_was_full", seconds=round(time.monotonic() - self._since, 1))
            self._since = None
        return False


class _StreamGuard:
    """Starts the embedded server again when it died: on the same url and append-only file, so that clients reconnect."""

    def __init__(self, config: Config, directory: RunDir, server: EmbeddedServer | None) -> None:
        self._directory, self._server = directory, server
        self._max_restarts = config.run.max_restarts
        self._restarts: list[float] = []
        self._next_look = 0.0

    def look(self) -> None:
        """Raises `RunFailed` when it does not stay up."""
        now = time.monotonic()
        if self._server is None or now < self._next_look:
            return
        self._next_look = now + STREAM_CHECK_S
        if self._server.is_running():
            return
        self._restarts = [t for t in self._restarts if now - t < RESTART_WINDOW_S]
        if len(self._restarts) >= self._max_restarts:
            raise RunFailed(
                f"the stream's server died {len(self._restarts)} times within {RESTART_WINDOW_S:g} s. See {self._directory.redis}/server.log"
            )
        self._restarts.append(now)
        self._directory.event("child_exited", role="redis", code=None)
        url = self._server.ensure()
        self._directory.register("redis", pid=self._server.pid, url=url)
        self._directory.event("child_restarted", role="redis", after="its death")
        log.warning("stream_server_restarted pid=%s restarts=%d", self._server.pid, len(self._restarts))


def _shut_down(children: Sequence[Child], directory: RunDir, stop: "_StopOnSignal", guard: _StreamGuard) -> None:
    """End the children in the order of the data path: serve drains first, then learn saves, then the sandbox."""
    for role in ("serve", "learn", "sandbox"):
        for child in (c for c in children if c.role == role and c.poll() is None and c.process is not None):
            child.signal(signal.SIGTERM)
            limit = time.monotonic() + DRAIN_LIMIT_S
            while child.wait(0.2) is None:
                with contextlib.suppress(AgentRLError):
                    guard.look()  # a drain needs the stream to the end
                if stop.impatient or time.monotonic() > limit:
                    log.warning("child_killed role=%s it did not drain in time", child.role)
                    child.signal(signal.SIGKILL)
            directory.deregister(child.role)


class _StopOnSignal:
    """Turns the first SIGINT or SIGTERM into ``requested`` and the second into ``impatient``."""

    def __init__(self) -> None:
        self.requested = False
        self.impatient = False
        self.number = 0

    def __enter__(self) -> "_StopOnSignal":
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        # The handlers stay while children drain, so that a second Ctrl-C is still counted; they go with the process.
        return None

    def sleep(self, seconds: float) -> bool:
        """Whether nobody asked to stop meanwhile."""
        time.sleep(seconds)
        return not self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.impatient = self.requested
        self.requested = True
        self.number = self.number or number
        log.warning("stopping: serve drains, learn writes a checkpoint. Once more ends at once")
