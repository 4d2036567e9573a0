"""The sandbox service: SandboxFusion's ``/run_code`` in front of isolated, warm Python.

A request is parsed, admitted (or refused with 429), run by the pool, and answered. The pool starts with the application and
everything it started is gone when the application ends.
"""

import asyncio
import hmac
import ipaddress
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError

from agentrl.errors import ConfigError, SandboxError
from agentrl.sandbox.admission import Admission, QueueFull
from agentrl.sandbox.job import MAX_FILES_BYTES, MIB, Limits
from agentrl.sandbox.pool import Pool, TierChoice
from agentrl.sandbox.wire import (
    SUPPORTED_LANGUAGES,
    BadRequest,
    RunCodeRequest,
    RunCodeResponse,
    to_job,
    to_response,
)

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2 * MAX_FILES_BYTES
TIER_HEADER = "X-Sandbox-Tier"
_OPEN_PATHS = ("/v1/ping", "/health")
_RAM_PER_RUN_EXTRA_BYTES = Limits(wall_s=1, memory_bytes=0).tmpfs_bytes + 30 * MIB


class _Metrics:
    """The service's Prometheus series, in a registry of its own so that several applications can live in one process."""

    def __init__(self, admission: Admission, pool: Pool) -> None:
        self.registry = CollectorRegistry()
        self.runs = Counter("agentrl_sandbox_runs", "Finished runs by reason", ["reason"], registry=self.registry)
        self.rejected = Counter("agentrl_sandbox_rejected", "Requests not run, by cause", ["cause"], registry=self.registry)
        buckets = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        self.run_s = Histogram("agentrl_sandbox_run_seconds", "Wall time of runs", buckets=buckets, registry=self.registry)
        self.queue_s = Histogram("agentrl_sandbox_queue_seconds", "Wait for a slot", buckets=buckets, registry=self.registry)
        for name, text, value in (
            ("running", "Runs in flight", lambda: admission.running),
            ("waiting", "Requests in the queue", lambda: admission.waiting),
            ("fork_server_restarts", "Fork servers that died and were replaced", lambda: pool.restarts),
        ):
            Gauge(f"agentrl_sandbox_{name}", text, registry=self.registry).set_function(value)


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

    Raises:
        ConfigError: a number makes no sense.
    """
    for name, value in (("workers", workers), ("max_queue", max_queue + 1), ("memory_limit_mb", memory_limit_mb)):
        if value < 1:
            raise ConfigError(f"sandbox {name} is too small: give at least {'0' if name == 'max_queue' else '1'}")
    capacity = max_concurrency if max_concurrency is not None else _default_concurrency(memory_limit_mb)
    if capacity < 1:
        raise ConfigError(f"sandbox max_concurrency={capacity} must be at least 1")
    pool = Pool(workers=workers, tier=tier, allow_unsafe=allow_unsafe, preload=tuple(preload))
    if python is not None:
        pool.python = python
    service = _Service(pool, Admission(capacity, max_queue), memory_limit_mb=memory_limit_mb)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        async with pool.running():
            yield

    app = FastAPI(title="agentrl sandbox", lifespan=lifespan)
    app.state.pool = pool

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if token is not None and request.url.path not in _OPEN_PATHS and not _authorized(request, token):
            response: Response = JSONResponse({"detail": "missing or wrong bearer token"}, 401, {"WWW-Authenticate": "Bearer"})
        else:
            response = await call_next(request)
        response.headers[TIER_HEADER] = pool.active_tier or "none"
        return response

    body = {"content": {"application/json": {"schema": RunCodeRequest.model_json_schema()}}, "required": True}
    app.add_api_route(
        "/run_code", service.run_code, methods=["POST"], response_model=RunCodeResponse, openapi_extra={"requestBody": body}
    )
    app.add_api_route("/v1/ping", service.ping, methods=["GET"])
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/v1/isolation", service.isolation, methods=["GET"])
    app.add_api_route("/metrics", service.metrics_page, methods=["GET"])
    return app


class _Service:
    """The handlers and what they share."""

    def __init__(self, pool: Pool, admission: Admission, *, memory_limit_mb: int) -> None:
        self._pool = pool
        self._admission = admission
        self._memory_limit_mb = memory_limit_mb
        self._metrics = _Metrics(admission, pool)

    async def run_code(self, request: Request) -> Response:
        """Run one program (SandboxFusion's POST /run_code)."""
        try:
            body = await _read_body(request)
            parsed = RunCodeRequest.model_validate_json(body)
            job = await asyncio.to_thread(to_job, parsed, memory_limit_mb=self._memory_limit_mb)
            if unsupported := self._pool.unsupported(job):
                raise BadRequest(unsupported)
        except ValidationError as error:
            return self._refuse(422, "malformed", _describe(error))
        except BadRequest as error:
            return self._refuse(400, "bad_request", str(error))
        if self._pool.active_tier is None:
            return self._refuse(503, "not_started", "the sandbox has not started; run the application with its lifespan")
        try:
            async with self._admission.permit() as permit:
                self._metrics.queue_s.observe(permit.queue_time_s)
                if await request.is_disconnected():
                    return self._refuse(499, "disconnected", "the client went away while it waited")
                outcome = await self._pool.run(job, permit.slot)
        except QueueFull as error:
            return self._refuse(429, "queue_full", str(error), {"Retry-After": str(error.retry_after_s)})
        except SandboxError as error:
            self._metrics.runs.labels("sandbox_error").inc()
            log.warning("run lost reason=%s", error)
            return _json(RunCodeResponse(status="SandboxError", message=str(error), tier=self._pool.active_tier))
        self._metrics.runs.labels(outcome.reason).inc()
        self._metrics.run_s.observe(outcome.wall_s)
        return _json(to_response(outcome, job, queue_time_s=permit.queue_time_s, tier=self._pool.active_tier))

    def _refuse(self, status: int, cause: str, detail: Any, headers: dict[str, str] | None = None) -> Response:
        self._metrics.rejected.labels(cause).inc()
        return JSONResponse({"detail": detail}, status, headers)

    async def ping(self) -> str:
        """SandboxFusion's liveness answer."""
        return "pong"

    async def health(self) -> Response:
        """Is it able to run code now, and how busy is it? 503 when it is not."""
        pool, admission = self._pool, self._admission
        healthy = pool.active_tier is not None and pool.healthy
        content: dict[str, Any] = {
            "ok": healthy,
            "tier": pool.active_tier,
            "degraded": pool.active_tier != "zygote",
            "self_test": pool.self_test.passed and bool(pool.self_test.attacks),
            "capacity": admission.capacity,
            "running": admission.running,
            "queue": admission.waiting,
            "max_queue": admission.max_queue,
            "restarts": pool.restarts,
            "preload_missing": pool.preload_missing,
            "languages": list(SUPPORTED_LANGUAGES),
        }
        return JSONResponse(content, 200 if healthy else 503)

    async def isolation(self) -> dict[str, Any]:
        """What holds the code, the limits of a run, and what the self-test saw."""
        limits = Limits(wall_s=30.0, memory_bytes=self._memory_limit_mb * MIB)
        return self._pool.describe() | {"limits": {name: getattr(limits, name) for name in limits.__slots__}}

    async def metrics_page(self) -> Response:
        """Prometheus text."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)


def serve(
    host: str = "127.0.0.1",
    port: int = 8080,
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
) -> None:
    """Serve until SIGINT or SIGTERM. Arguments as for ``create_app``.

    Raises:
        ConfigError: a host other than loopback without a token.
        SandboxError: the service could not start; the cause is in the message.
    """
    if token is None and not _is_loopback(host):
        raise ConfigError(f"sandbox host={host} is reachable from elsewhere: give a token, or bind to 127.0.0.1")
    app = create_app(
        workers=workers,
        allow_unsafe=allow_unsafe,
        max_concurrency=max_concurrency,
        max_queue=max_queue,
        preload=preload,
        memory_limit_mb=memory_limit_mb,
        token=token,
        tier=tier,
        python=python,
    )
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
    server = uvicorn.Server(
        uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    )
    server.run()
    if failures:
        raise failures[0]
    if not server.started:
        raise SandboxError(f"the sandbox could not listen on {host}:{port}; is the port taken?")


def _default_concurrency(memory_limit_mb: int) -> int:
    """Twice the cores, as long as half of the free memory holds that many runs at their worst."""
    per_run = memory_limit_mb * MIB + _RAM_PER_RUN_EXTRA_BYTES
    available = 4 << 30
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return max(1, min(2 * (os.cpu_count() or 1), available // 2 // per_run))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _authorized(request: Request, token: str) -> bool:
    given = request.headers.get("Authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise BadRequest(f"the request body is larger than {MAX_BODY_BYTES} bytes")
    return bytes(body)


def _describe(error: ValidationError) -> list[dict[str, Any]]:
    """What is wrong and where, without echoing the input (it may not even be encodable)."""
    return [
        {"loc": ["body", *item["loc"]], "msg": item["msg"], "type": item["type"]} for item in error.errors(include_input=False)
    ]


def _json(response: RunCodeResponse) -> Response:
    return Response(response.model_dump_json(), media_type="application/json")


__all__ = ["create_app", "serve"]
