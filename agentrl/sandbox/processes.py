"""Several HTTP processes behind one port: each has fork servers of its own, and its death loses only its own runs.

They share a listening socket. A session lives in one of them, whose number its id begins with; a request that arrives
elsewhere is passed on over a private unix socket. A new session goes where most places are free, so that none is given up
while another process has room. ``/health`` and ``/metrics`` answer for all of them together.
"""

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import aiohttp
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from agentrl.errors import SandboxError
from agentrl.process import die_with_parent

if TYPE_CHECKING:
    from agentrl.sandbox.service import Service

log = logging.getLogger(__name__)

_BOOT = "import sys; from agentrl.sandbox.processes import be_one_of; be_one_of(sys.argv[1])"
_RESTART_PAUSE_S = (0.2, 30.0)
_START_LIMIT_S = 120.0
_ANSWER_LIMIT_S = 5.0
"""A process that is gone refuses at once; one that says nothing for so long is left out of an answer for all."""
_ADDED = ("capacity", "running", "queue", "max_queue", "sessions", "max_sessions", "restarts")
_LOCAL = "local"
_NOT_FORWARDED = (b"host", b"content-length", b"transfer-encoding", b"connection")


@dataclass(slots=True)
class Siblings:
    """One process's view of the others."""

    index: int
    count: int
    directory: str
    """Private to this service; holds one unix socket per process."""
    service: "Service | None" = None
    _clients: dict[int, aiohttp.ClientSession] = field(default_factory=dict[int, aiohttp.ClientSession])
    _opening: Counter[int] = field(default_factory=Counter[int])
    """Sessions that this process is having opened, by the process they go to: not in its count yet."""

    @property
    def session_prefix(self) -> str:
        return f"{self.index}-"

    def path(self, index: int) -> str:
        return f"{self.directory}/{index}.sock"

    def bind(self) -> socket.socket:
        """The socket on which the siblings reach this process."""
        path = Path(self.path(self.index))
        path.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.listen(1024)
        return listening

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Passes on what belongs to another process and answers for all where that is asked."""

        async def route(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or _LOCAL in QueryParams(scope["query_string"]):
                await app(scope, receive, send)
                return
            path = str(scope["path"])
            if path in ("/health", "/metrics"):
                response = await (self._health() if path == "/health" else self._metrics())
                await response(scope, receive, send)
                return
            if path == "/sessions" and scope["method"] == "POST":
                owner = await self._roomiest()
                self._opening[owner] += 1
                try:
                    await self._pass_on(owner, app, scope, receive, send)
                finally:
                    self._opening[owner] -= 1
            else:
                await self._pass_on(_owner(path, self.count), app, scope, receive, send)

        return route

    async def _pass_on(self, owner: int | None, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the owner answer: this process (also for None) or another."""
        if owner is None or owner == self.index:
            await app(scope, receive, send)
            return
        response = await self._forward(owner, Request(scope, receive))
        await response(scope, receive, send)

    async def _roomiest(self) -> int:
        """The healthy process with the most free places for sessions; this one among equals."""
        assert self.service is not None
        healths = {index: json.loads(raw) for index, raw in (await self._ask_all("/health")).items()}
        free = {
            i: health["max_sessions"] - health["sessions"] - self._opening[i] for i, health in healths.items() if health["ok"]
        }
        own, _ = self.service.health()
        free[self.index] = own["max_sessions"] - own["sessions"] - self._opening[self.index]
        return max(free, key=lambda index: (free[index], index == self.index))

    def _client(self, index: int) -> aiohttp.ClientSession:
        client = self._clients.get(index)
        if client is None or client.closed:
            connector = aiohttp.UnixConnector(self.path(index), limit=0)
            client = self._clients[index] = aiohttp.ClientSession(connector=connector)
        return client

    async def _forward(self, owner: int, request: Request) -> Response:
        from agentrl.sandbox.service import read_body

        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in request.scope["headers"] if k not in _NOT_FORWARDED}
        try:
            body = await read_body(request)
            async with self._client(owner).request(
                request.method, f"http://sibling{request.url.path}?{_LOCAL}", data=body, headers=headers,
                timeout=aiohttp.ClientTimeout(total=None),
            ) as answer:  # fmt: skip
                kept = {"content-type": answer.headers.get("content-type", "application/json")}
                if "retry-after" in answer.headers:
                    kept["retry-after"] = answer.headers["retry-after"]
                return Response(await answer.read(), answer.status, Headers(kept))
        except (aiohttp.ClientError, OSError) as error:
            log.warning("sibling unreachable index=%d reason=%s", owner, error)
            if request.url.path == "/sessions":
                detail = "the process that was to hold the session died while it opened. Ask again."
                return JSONResponse({"detail": detail, "reason": "not_started"}, 503, {"Retry-After": "1"})
            detail = "the session is gone: its process died. Open a new one; its variables and files are lost."
            return JSONResponse({"detail": detail, "reason": "lost"}, 410)

    async def _ask_all(self, path: str) -> dict[int, bytes]:
        """Every other process's own answer; a process that is being replaced has none."""
        answers: dict[int, bytes] = {}
        for index in range(self.count):
            if index == self.index:
                continue
            try:
                async with self._client(index).get(
                    f"http://sibling{path}?{_LOCAL}", timeout=aiohttp.ClientTimeout(total=_ANSWER_LIMIT_S)
                ) as answer:
                    answers[index] = await answer.read()
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                log.warning("sibling unreachable index=%d reason=%s", index, error)
        return answers

    async def _health(self) -> Response:
        assert self.service is not None
        own, healthy = self.service.health()
        others = [json.loads(raw) for raw in (await self._ask_all("/health")).values()]
        for other in others:
            for name in _ADDED:
                own[name] += other[name]
        own |= {"processes": self.count, "processes_alive": 1 + len(others)}
        return JSONResponse(own, 200 if healthy else 503)

    async def _metrics(self) -> Response:
        assert self.service is not None
        own = await self.service.metrics_page()
        others = list((await self._ask_all("/metrics")).values())
        return Response(add_metrics([bytes(own.body), *others]), media_type=own.media_type)


def _owner(path: str, count: int) -> int | None:
    """The process a session's path belongs to."""
    parts = path.split("/")
    if len(parts) < 3 or parts[1] != "sessions":
        return None
    number = parts[2].partition("-")[0]
    return int(number) if number.isdecimal() and int(number) < count else None


def add_metrics(pages: list[bytes]) -> bytes:
    """Pages of Prometheus text with the same series, added up: all of ours are counts."""
    totals: dict[str, float] = {}
    for page in pages:
        for line in page.decode().splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                totals[name] = totals.get(name, 0.0) + float(value)
    lines: list[str] = []
    for page in pages:
        for line in page.decode().splitlines():
            name = line.rpartition(" ")[0]
            if line.startswith("#"):
                if page is pages[0]:
                    lines.append(line)
            elif name in totals:
                lines.append(f"{name} {totals.pop(name)}")
    return ("\n".join(lines) + "\n").encode()


def be_one_of(configuration: str) -> None:
    """The entry of one process."""
    from agentrl.sandbox.app import serve_one_of

    given = json.loads(configuration)
    siblings = Siblings(given["index"], given["count"], given["directory"])
    listening = socket.socket(fileno=given["fd"])
    try:
        serve_one_of(siblings, listening, **given["options"])
    except SandboxError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(3)


def serve_processes(host: str, port: int, count: int, options: dict[str, Any]) -> None:
    """Start the processes, replace those that die, and stop with SIGINT or SIGTERM.

    Raises:
        SandboxError: the port is taken, or the first process could not start.
    """
    shares = {
        name: math.ceil(options[name] / count) for name in ("max_concurrency", "max_queue", "max_sessions") if options.get(name)
    }
    with tempfile.TemporaryDirectory(prefix="agentrl-sandbox-") as directory:  # private to this user
        try:
            listening = socket.create_server((host, port), backlog=2048, family=_family(host))
        except OSError as error:
            raise SandboxError(f"the sandbox could not listen on {host}:{port}: {error}") from error
        with listening:
            listening.set_inheritable(True)
            keeper = _Keeper(count, directory, listening.fileno(), options | shares)
            keeper.run()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class _Keeper:
    """The parent: no requests pass through it."""

    def __init__(self, count: int, directory: str, fd: int, options: dict[str, Any]) -> None:
        self._children: list[subprocess.Popen[bytes] | None] = [None] * count
        self._directory = directory
        self._fd = fd
        self._options = options
        self._stopping = False
        self._drain_s = float(options["drain_s"])

    def run(self) -> None:
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._children[0] = self._start(0)
            self._wait_for_first()
            pause_s = _RESTART_PAUSE_S[0]
            while not self._stopping:
                for index, child in enumerate(self._children):
                    if child is not None and child.poll() is None:
                        continue
                    if child is not None:
                        log.error("process died, restarting index=%d code=%s", index, child.returncode)
                        time.sleep(pause_s)
                        pause_s = min(2 * pause_s, _RESTART_PAUSE_S[1])
                    if not self._stopping:
                        self._children[index] = self._start(index)
                time.sleep(0.1)
        finally:
            self._end()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        configuration = {"index": index, "count": len(self._children), "directory": self._directory, "fd": self._fd}
        return subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(configuration | {"options": self._options})],
            pass_fds=(self._fd,),
            preexec_fn=die_with_parent,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    def _wait_for_first(self) -> None:
        """One process alone first: where it cannot isolate, neither could the others."""
        child, deadline = self._children[0], time.monotonic() + _START_LIMIT_S
        assert child is not None
        while not os.path.exists(f"{self._directory}/0.sock") and not self._stopping:
            if child.poll() is not None:
                raise SandboxError(f"the sandbox could not start (exit status {child.returncode}); the reason is above")
            if time.monotonic() > deadline:
                raise SandboxError(f"the sandbox's first process did not start within {_START_LIMIT_S:g} s")
            time.sleep(0.05)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _end(self) -> None:
        alive = [child for child in self._children if child is not None and child.poll() is None]
        for child in alive:
            child.terminate()
        deadline = time.monotonic() + self._drain_s + 10.0
        for child in alive:
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
