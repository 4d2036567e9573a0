"""The sandbox service: SandboxFusion's HTTP shape, sessions and unit-test scoring, in front of isolated code.

The pool and the sessions start with the application, and everything they started is gone when it ends. With several
processes, each is this application with a pool of its own behind one listening socket; see ``processes.py``.
"""

import hmac
import ipaddress
import logging
import os
import socket
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentrl.errors import ConfigError, SandboxError
from agentrl.process import KEEP_ALIVE_S
from agentrl.rate_limit import RateLimit
from agentrl.sandbox.admission import Admission
from agentrl.sandbox.job import MIB, Limits
from agentrl.sandbox.pool import UIDS_PER_SERVICE, Pool, TierChoice
from agentrl.sandbox.processes import Siblings, serve_processes
from agentrl.sandbox.scoring import RunTestsRequest
from agentrl.sandbox.service import Service
from agentrl.sandbox.sessions import Sessions
from agentrl.sandbox.wire import (
    OpenSessionRequest,
    RunCodeRequest,
    RunCodeResponse,
    RunJupyterRequest,
    RunJupyterResponse,
    SessionRunRequest,
)

log = logging.getLogger(__name__)

TIER_HEADER = "X-Sandbox-Tier"
DRAIN_S = 5.0
_OPEN_PATHS = ("/v1/ping", "/health")
_RAM_PER_RUN_EXTRA_BYTES = Limits(wall_s=1, memory_bytes=0).tmpfs_bytes + 30 * MIB
_RAM_PER_SESSION_BYTES = 64 * MIB  # a trajectory's usual few MiB and its share of those that hoard
_MAX_SESSIONS = 1024
RATE_LIMIT = 1000.0
"""Requests per second and client address: above what a process can run, so that only a flood meets it."""


def create_app(
    *,
    workers: int = 1,
    allow_unsafe: bool = False,
    max_concurrency: int | None = None,
    max_queue: int = 256,
    preload: Sequence[str] = (),
    memory_limit_mb: int = 512,
    token: str | None = None,
    tier: TierChoice = "auto",
    python: str | None = None,
    max_sessions: int | None = None,
    session_idle_ttl_s: float = 300.0,
    session_ttl_s: float = 3600.0,
    rate_limit: float | None = RATE_LIMIT,
    siblings: Siblings | None = None,
) -> FastAPI:
    """The application; its lifespan starts and stops the fork servers.

    Args:
        workers: fork servers.
        allow_unsafe: run unprotected where nothing isolates, instead of refusing to start.
        max_concurrency: runs at once; by default twice the cores, less where memory is short.
        max_queue: requests that may wait; more get HTTP 429 with Retry-After.
        preload: modules imported once and warm in every run; one that is not installed is skipped with a warning.
        memory_limit_mb: MiB per run, and the most that a request may ask for.
        token: when set, every path but /v1/ping and /health needs ``Authorization: Bearer``.
        tier: insist on one tier instead of the first that works.
        python: the interpreter inside; this process's own by default.
        max_sessions: open at once; past that the least recently used idle one is ended. By default what memory allows.
        session_idle_ttl_s: seconds without a cell until a session is ended; a session may ask for less.
        session_ttl_s: seconds until it is ended in any case.
        rate_limit: requests per second and client address (of each process); more get HTTP 429. None is no limit.
        siblings: the other processes of the same service.

    Raises:
        ConfigError: a number makes no sense.
    """
    capacity = max_concurrency if max_concurrency is not None else _default_concurrency(memory_limit_mb)
    if max_sessions is None:
        max_sessions = max(8, min(_MAX_SESSIONS, _available_memory() // 2 // _RAM_PER_SESSION_BYTES))
    for name, value, least in (
        ("workers", workers, 1), ("max_queue", max_queue, 0), ("memory_limit_mb", memory_limit_mb, 1),
        ("max_concurrency", capacity, 1), ("max_sessions", max_sessions, 1), ("session_idle_ttl_s", session_idle_ttl_s, 0.1),
        ("session_ttl_s", session_ttl_s, 0.1),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(f"sandbox {name}={value:g} is too small: give at least {least:g}")
    if capacity + max_sessions > UIDS_PER_SERVICE:
        raise ConfigError(
            f"sandbox max_concurrency={capacity} and max_sessions={max_sessions} need more than the {UIDS_PER_SERVICE} uids of one "
            "process: start more processes"
        )
    pool = Pool(workers=workers, tier=tier, allow_unsafe=allow_unsafe, preload=tuple(preload))
    if python is not None:
        pool.python = python
    admission = Admission(capacity, max_queue)
    prefix = siblings.session_prefix if siblings is not None else ""
    sessions = Sessions(pool, max_sessions=max_sessions, first_slot=capacity, id_prefix=prefix)
    service = Service(
        pool,
        admission,
        sessions,
        memory_limit_mb=memory_limit_mb,
        session_idle_ttl_s=session_idle_ttl_s,
        session_ttl_s=session_ttl_s,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        async with pool.running(), sessions.running():
            yield

    app = FastAPI(title="agentrl sandbox", lifespan=lifespan)
    app.state.pool = pool
    app.state.admission = admission
    if siblings is not None:
        siblings.service = service
        app.add_middleware(siblings.middleware)
    app.add_middleware(_Guard, pool=pool, token=token)
    if rate_limit is not None:
        app.add_middleware(RateLimit, per_s=rate_limit)

    for path, handler, method in (
        ("/sessions/{session_id}", service.delete_session, "DELETE"),
        ("/v1/ping", service.ping, "GET"),
        ("/health", service.health_page, "GET"),
        ("/v1/isolation", service.isolation, "GET"),
        ("/metrics", service.metrics_page, "GET"),
    ):
        app.add_api_route(path, handler, methods=[method])
    for path, handler, request, response in (
        ("/run_code", service.run_code, RunCodeRequest, RunCodeResponse),
        ("/run_jupyter", service.run_jupyter, RunJupyterRequest, RunJupyterResponse),
        ("/run_tests", service.run_tests, RunTestsRequest, None),
        ("/sessions", service.open_session, OpenSessionRequest, None),
        ("/sessions/{session_id}/run", service.run_in_session, SessionRunRequest, None),
    ):
        app.add_api_route(path, handler, methods=["POST"], response_model=response, openapi_extra=_described(request))
    return app


def _described(model: type[BaseModel]) -> dict[str, Any]:
    """The request body, which a handler reads by itself, for the OpenAPI document."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:  # none of the models refers to itself
        if isinstance(node, dict):
            fields = cast("dict[str, Any]", node)
            if "$ref" in fields:
                return inlined(parts[str(fields["$ref"]).rpartition("/")[2]])
            return {name: inlined(value) for name, value in fields.items()}
        return [inlined(item) for item in cast("list[Any]", node)] if isinstance(node, list) else node

    return {"requestBody": {"content": {"application/json": {"schema": inlined(schema)}}, "required": True}}


class _Guard:
    """Checks the token and names the tier on every response."""

    def __init__(self, app: ASGIApp, *, pool: Pool, token: str | None) -> None:
        self._app = app
        self._pool = pool
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_tier(message: Message) -> None:
            if message["type"] == "http.response.start":
                tier = (self._pool.active_tier or "none").encode()
                message["headers"] = [*message.get("headers", ()), (TIER_HEADER.lower().encode(), tier)]
            await send(message)

        if self._expected is not None and scope["path"] not in _OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                refusal = JSONResponse({"detail": "missing or wrong bearer token"}, 401, {"WWW-Authenticate": "Bearer"})
                await refusal(scope, receive, send_with_tier)
                return
        await self._app(scope, receive, send_with_tier)


class _Server(uvicorn.Server):
    """Refuses what is queued as soon as it is told to stop, so that the grace period goes to what runs."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        admission: Admission = self.config.app.state.admission  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
        if self.started and not admission.draining:
            # A signal handler: the futures belong to the loop.
            self.servers[0].get_loop().call_soon_threadsafe(admission.drain)
        super().handle_exit(sig, frame)


def serve(
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    processes: int = 1,
    token: str | None = None,
    drain_s: float = DRAIN_S,
    **options: Any,
) -> None:
    """Serve until SIGINT or SIGTERM, then let what runs finish for a while.

    Args:
        host: the address to bind; other than loopback needs a token.
        port: the port to bind.
        processes: HTTP processes behind the one port, each with fork servers of its own; the limits are shared out among them.
        token: as for ``create_app``.
        drain_s: how long runs may go on after the signal.
        options: of ``create_app``.

    Raises:
        ConfigError: a host other than loopback without a token, or a number that makes no sense.
        SandboxError: the service could not start; the cause is in the message.
    """
    if token is None and not _is_loopback(host):
        raise ConfigError(f"sandbox host={host} is reachable from elsewhere: give a token, or bind to 127.0.0.1")
    if processes < 1:
        raise ConfigError(f"sandbox processes={processes} must be at least 1")
    if processes == 1:
        run_app(create_app(token=token, **options), drain_s=drain_s, host=host, port=port)
        return
    create_app(token=token, **options)  # checks the numbers before anything is started
    if options.get("max_concurrency") is None:
        options["max_concurrency"] = _default_concurrency(options.get("memory_limit_mb", 512))
    serve_processes(host, port, processes, {"token": token, "drain_s": drain_s, **options})


def serve_one_of(siblings: Siblings, listening: socket.socket, *, drain_s: float, **options: Any) -> None:
    """Be one process of several: serve the shared socket, and a private one for the siblings."""
    app = create_app(siblings=siblings, **options)
    run_app(app, drain_s=drain_s, sockets=[listening, siblings.bind()])


def run_app(app: FastAPI, *, drain_s: float, host: str = "", port: int = 0, sockets: list[socket.socket] | None = None) -> None:
    """Run an application of ``create_app`` until a signal; failures to start are raised."""
    failures: list[SandboxError] = []
    start = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(application: FastAPI) -> AsyncGenerator[Any, None]:
        try:
            async with start(application) as state:
                yield state
        except SandboxError as error:
            failures.append(error)
            raise

    app.router.lifespan_context = lifespan
    server = _Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http="h11",  # bounds a request's head; httptools, which uvicorn prefers, does not
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(drain_s)),
        )
    )
    server.run(sockets)
    if failures:
        raise failures[0]
    if not server.started:
        raise SandboxError(f"the sandbox could not listen on {host}:{port}; is the port taken?")


def _default_concurrency(memory_limit_mb: int) -> int:
    """Twice the cores, as long as half of the free memory holds that many runs at their worst."""
    per_run = max(1, memory_limit_mb) * MIB + _RAM_PER_RUN_EXTRA_BYTES
    return max(1, min(2 * (os.cpu_count() or 1), _available_memory() // 2 // per_run))


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 << 30


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


__all__ = ["create_app", "serve"]
