"""Engine processes of this machine: started, watched, restarted, and never left behind.

Each engine lives in a process group of its own and dies with this process, even when that is killed with SIGKILL. An
engine that exits is started again on its port with backoff; the manager learns of the new process as an unverified
server, so it takes no traffic before the reconciler has brought it to the policy. Waits: for an engine to answer
(``start_timeout_s``), for it to exit, and between restarts (``backoff_s``); an engine that keeps dying ends the fleet
with ``StalledError`` and the tail of its log.

Run it in the main thread: the kernel ends an engine when the *thread* that started it is gone.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict

import aiohttp
import psutil

from agentrl.errors import StalledError
from agentrl.process import ClaimedPort, start_time
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.sglang_client import SGLangClient

log = logging.getLogger(__name__)

ENGINE_API_KEY_VARIABLE = "AGENTRL_ENGINE_API_KEY"
"""Read by ``agentrl.serving.embedded_engine``, which this module must not import (torch)."""
_POLL_S = 0.1
_PROBE_TIMEOUT_S = 5.0
_FIRST_HEALTH_TIMEOUT_S = 60.0
_LOG_TAIL_BYTES = 2000
_SAME_PROCESS_S = 0.05

# Linux ends the child with SIGKILL when its parent thread dies (PR_SET_PDEATHSIG = 1); exec keeps that setting. Done in
# a launcher rather than preexec_fn, which may deadlock in a process with threads. The parent may be dead already.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("parent is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ProcessEntry(TypedDict):
    """One line of ``processes.json``."""

    role: str
    pid: int | None
    """None for servers that someone else runs."""
    url: str
    started: float | None
    """Unix seconds, as the kernel tells: with the pid it names one process for good."""
    log: str


class EngineSpec(Protocol):
    """How to start one engine."""

    @property
    def capacity(self) -> float: ...

    @property
    def api_key(self) -> str | None: ...

    @property
    def probes_health(self) -> bool:
        """Whether readiness includes one sampled token (``/health``)."""
        ...

    def command(self, host: str, port: int) -> list[str]: ...

    def environment(self) -> Mapping[str, str]:
        """Variables over those of this process."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedEngineSpec:
    """One embedded engine (``agentrl.serving.embedded_engine``)."""

    model_path: str
    python: str = sys.executable
    device: str | None = None
    dtype: str | None = None
    max_running_requests: int | None = None
    label: str = "base"
    """What it reports as ``weight_version`` until the reconciler loads the policy."""
    extra_args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    capacity: float = 1.0
    api_key: str | None = None
    probes_health: bool = False

    def command(self, host: str, port: int) -> list[str]:
        options: dict[str, object] = {
            "--model-path": self.model_path,
            "--host": host,
            "--port": port,
            "--weight-version": self.label,
            "--parent-pid": os.getpid(),
            "--device": self.device,
            "--dtype": self.dtype,
            "--max-running-requests": self.max_running_requests,
        }
        given = [part for name, value in options.items() if value is not None for part in (name, str(value))]
        return [self.python, "-m", "agentrl.serving.embedded_engine", *given, "--incremental-streaming-output", *self.extra_args]

    def environment(self) -> Mapping[str, str]:
        # Not on the command line, which every user of the machine can read.
        return self.env if self.api_key is None else {ENGINE_API_KEY_VARIABLE: self.api_key, **self.env}


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangEngineSpec:
    """One SGLang server."""

    model_path: str
    command_prefix: Sequence[str] = (sys.executable, "-m", "sglang.launch_server")
    """How to start SGLang, e.g. ``[venv/bin/python, -m, sglang.launch_server]``."""
    extra_args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    label: str = "base"
    capacity: float = 1.0
    api_key: str | None = None
    probes_health: bool = True

    def command(self, host: str, port: int) -> list[str]:
        key = [] if self.api_key is None else ["--api-key", self.api_key]
        return [
            *self.command_prefix,
            *("--model-path", self.model_path),
            *("--host", host),
            *("--port", str(port)),
            *("--weight-version", self.label),
            "--incremental-streaming-output",
            *key,
            *self.extra_args,
        ]

    def environment(self) -> Mapping[str, str]:
        # Without it a request aborted in the waiting queue loses up to 49 tokens.
        return {"SGLANG_FORCE_STREAM_INTERVAL": "1", **self.env}


@dataclass(slots=True, eq=False)
class _Engine:
    index: int
    spec: EngineSpec
    log_path: Path
    claim: ClaimedPort | None = None
    """Its port, kept over restarts: an engine loads for seconds or minutes before it listens."""
    process: asyncio.subprocess.Process | None = None
    started: float | None = None
    deaths: deque[float] = field(default_factory=deque[float])

    @property
    def port(self) -> int:
        return self.claim.number if self.claim is not None else 0

    def url(self, host: str) -> str:
        return f"http://{host}:{self.port}"


class ServerRegistry(Protocol):
    """Who is told of engines: the manager, or an actor that tells a manager elsewhere."""

    @property
    def urls(self) -> Collection[str]: ...
    def add_server(
        self, url: str, *, capacity: float = 1.0, api_key: str | None = None, admin_key: str | None = None
    ) -> None: ...
    def remove_server(self, url: str) -> None: ...
    def quarantine(self, url: str, reason: str) -> None: ...


class EngineFleet:
    """Runs one process per spec and keeps the manager informed.

    Args:
        specs: one per engine.
        manager: gets every engine as soon as it answers, unverified.
        log_dir: ``engine-<i>.log`` is appended to, over restarts.
        host: to bind.
        omp_threads: OMP_NUM_THREADS of each engine; None leaves the environment's.
        start_timeout_s: from the start of a process to its first answer.
        backoff_s: before the first restart; doubled per death within a minute, up to ``max_backoff_s``.
        max_deaths_per_minute: more than these of one engine end the fleet.
        stop_grace_s: between SIGTERM and SIGKILL.
        first_index: number of the first engine, where others run elsewhere.
        on_change: called with all processes whenever one starts, answers or dies (for ``processes.json``).
    """

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        *,
        manager: ServerRegistry,
        log_dir: str | os.PathLike[str],
        host: str = "127.0.0.1",
        omp_threads: int | None = None,
        start_timeout_s: float = 600.0,
        backoff_s: float = 0.5,
        max_backoff_s: float = 30.0,
        max_deaths_per_minute: int = 5,
        stop_grace_s: float = 10.0,
        first_index: int = 0,
        on_change: Callable[[list[ProcessEntry]], None] | None = None,
    ) -> None:
        self._manager = manager
        self._host = host
        self._omp_threads = omp_threads
        self._start_timeout_s = start_timeout_s
        self._backoff_s, self._max_backoff_s = backoff_s, max_backoff_s
        self._max_deaths = max_deaths_per_minute
        self._stop_grace_s = stop_grace_s
        self._on_change = on_change
        self._log_dir = Path(log_dir)
        self._engines = [_Engine(i, spec, self._log_dir / f"engine-{i}.log") for i, spec in enumerate(specs, first_index)]

    def processes(self) -> list[ProcessEntry]:
        """The engines that run now."""
        return [
            ProcessEntry(
                role="engine",
                pid=engine.process.pid,
                url=engine.url(self._host),
                started=engine.started,
                log=str(engine.log_path),
            )
            for engine in self._engines
            if engine.process is not None
        ]

    async def run(self) -> None:
        """Keep all engines running until cancelled, then end them.

        Raises:
            StalledError: an engine died more than ``max_deaths_per_minute`` times (in an ExceptionGroup).
        """
        self._log_dir.mkdir(parents=True, exist_ok=True)
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            for engine in self._engines:
                group.create_task(self._keep(engine, session), name=f"engine {engine.index}")

    async def _keep(self, engine: _Engine, session: aiohttp.ClientSession) -> None:
        try:
            while True:
                await self._start(engine)
                died = await self._serve_until_death(engine, session)
                self._changed()
                await asyncio.sleep(self._note_death(engine, died))
        finally:
            await self._stop(engine)
            self._forget(engine)

    async def _serve_until_death(self, engine: _Engine, session: aiohttp.ClientSession) -> str:
        """Returns how it ended."""
        process = engine.process
        assert process is not None
        url = engine.url(self._host)
        problem = await self._wait_until_ready(engine, session)
        if not problem:
            spec = engine.spec
            self._manager.add_server(url, capacity=spec.capacity, api_key=spec.api_key)
            log.info("engine answers index=%d pid=%d url=%s", engine.index, process.pid, url)
            self._changed()
            code = await process.wait()
            problem = f"exited with code {code}"
            if url in self._manager.urls:
                self._manager.quarantine(url, f"process {process.pid} {problem}")
        await self._stop(engine)  # ends what is left of its process group
        return problem

    async def _wait_until_ready(self, engine: _Engine, session: aiohttp.ClientSession) -> str:
        """Empty once the engine answers, otherwise what went wrong."""
        process = engine.process
        assert process is not None
        client = SGLangClient(engine.url(self._host), api_key=engine.spec.api_key, session=session)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while process.returncode is None:
                    if await client.is_ready(timeout_s=_PROBE_TIMEOUT_S) and (
                        not engine.spec.probes_health or await client.is_healthy(timeout_s=_FIRST_HEALTH_TIMEOUT_S)
                    ):
                        return "" if process.returncode is None else f"exited with code {process.returncode}"
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            return f"did not answer within start_timeout_s={self._start_timeout_s:g}"
        return f"exited with code {process.returncode} before it answered"

    def _note_death(self, engine: _Engine, problem: str) -> float:
        """Seconds to wait before the next start; raises when it dies too often."""
        now = asyncio.get_running_loop().time()
        engine.deaths.append(now)
        while engine.deaths[0] < now - 60:
            engine.deaths.popleft()
        if len(engine.deaths) > self._max_deaths:
            raise StalledError(
                f"engine {engine.index} died {len(engine.deaths)} times within a minute (limit {self._max_deaths}); the last "
                f"time it {problem}. Read {engine.log_path}, which ends with:\n{_tail(engine.log_path)}"
            )
        wait_s = min(self._backoff_s * 2 ** (len(engine.deaths) - 1), self._max_backoff_s)
        log.warning("engine died index=%d problem=%s restart_in_s=%g log=%s", engine.index, problem, wait_s, engine.log_path)
        return wait_s

    async def _start(self, engine: _Engine) -> None:
        if engine.claim is not None and not _is_free(self._host, engine.port):
            self._forget(engine)
        if engine.claim is None:
            engine.claim = ClaimedPort(self._host)
        port = engine.port
        command = engine.spec.command(self._host, port)
        env = {**os.environ, **engine.spec.environment()}
        if self._omp_threads is not None:
            env["OMP_NUM_THREADS"] = str(self._omp_threads)
        with engine.log_path.open("ab") as log_file:
            engine.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-c", _LAUNCHER, str(os.getpid())),
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_file,
                stderr=asyncio.subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        engine.started = _start_time(engine.process.pid)
        log.info("engine started index=%d pid=%d port=%d", engine.index, engine.process.pid, port)
        self._changed()

    async def _stop(self, engine: _Engine) -> None:
        """SIGTERM, then SIGKILL, to the process group that was started here."""
        process, engine.process = engine.process, None
        if process is None:
            return
        if process.returncode is None:
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._stop_grace_s):
                    await process.wait()
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()

    def _forget(self, engine: _Engine) -> None:
        if engine.claim is not None:
            self._manager.remove_server(engine.url(self._host))
            engine.claim.close()
            engine.claim = None
        self._changed()

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change(self.processes())


class AttachedServers:
    """Servers that someone else runs: added to the manager for the life of ``run``, never started or stopped."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        manager: AsyncLLMServerManager,
        capacity: float = 1.0,
        api_key: str | None = None,
        admin_key: str | None = None,
        on_change: Callable[[list[ProcessEntry]], None] | None = None,
    ) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._manager = manager
        self._capacity = capacity
        self._api_key, self._admin_key = api_key, admin_key
        self._on_change = on_change

    def processes(self) -> list[ProcessEntry]:
        return [ProcessEntry(role="engine", pid=None, url=url, started=None, log="") for url in self._urls]

    async def run(self) -> None:
        """Add the servers, wait until cancelled, remove them."""
        for url in self._urls:
            self._manager.add_server(url, capacity=self._capacity, api_key=self._api_key, admin_key=self._admin_key)
        if self._on_change is not None:
            self._on_change(self.processes())
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            for url in self._urls:
                self._manager.remove_server(url)


def kill_stale(entries: Sequence[Mapping[str, Any]], *, grace_s: float = 5.0) -> list[int]:
    """End engines that an earlier run left behind, as recorded in its ``processes.json``; blocks up to ``grace_s``.

    A pid is touched only when the process that has it now started when the record says: pids are reused.

    Returns:
        The pids that were ended.
    """
    stale = [process for entry in entries if (process := _recorded_process(entry)) is not None]
    family = {child for process in stale for child in _children(process)} | set(stale)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(list(family), timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=grace_s)
    return sorted(process.pid for process in stale)


def _recorded_process(entry: Mapping[str, Any]) -> psutil.Process | None:
    pid, started = entry.get("pid"), entry.get("started")
    if entry.get("role") != "engine" or not pid or not started or pid == os.getpid():
        return None
    try:
        process = psutil.Process(int(pid))
        return process if abs(start_time(process.pid) - float(started)) < _SAME_PROCESS_S else None
    except psutil.Error:
        return None


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _start_time(pid: int) -> float | None:
    try:
        return start_time(pid)
    except psutil.Error:
        return None


def _signal_group(pgid: int, sig: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, sig)


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a port in TIME_WAIT after a crash is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _tail(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError:
        return "(no log)"
    return data[-_LOG_TAIL_BYTES:].decode(errors="replace")
