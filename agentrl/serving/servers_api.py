"""``/servers``: look at the manager's servers and change them while a run goes on. Loopback only, bearer token always.

    GET    /servers                          every server with its state, load and counters
    POST   /servers         {"url": ...}     add one; the reconciler brings it to the policy before it takes traffic
    DELETE /servers         {"url": ...}     forget one; its requests continue elsewhere with what they have
    POST   /servers/drain   {"url": ...}     send nothing new there; with "wait_s" wait until it is idle
    POST   /servers/undrain {"url": ...}     take it back

A removed engine that this run started keeps running, and is added again when it is started anew: to take it out, drain it.
"""

import hmac
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator

from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.supervise import running

MAX_WAIT_S = 600.0


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    """``http://host:port`` of an SGLang or embedded engine."""

    @field_validator("url")
    @classmethod
    def _is_base_url(cls, value: str) -> str:
        parts = urlsplit(value)
        extra = parts.path.strip("/") or parts.query or parts.fragment or parts.username
        is_plain = value.isascii() and value.isprintable() and " " not in value
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or extra or not is_plain:
            raise ValueError(f"{value!r} is not a server's base url; give http://host:port")
        return value.rstrip("/")


class AddBody(_Body):
    """A server to add."""

    capacity: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Relative speed."""
    api_key: str | None = Field(default=None, repr=False)
    admin_key: str | None = Field(default=None, repr=False)

    @field_validator("api_key", "admin_key")
    @classmethod
    def _fits_a_header(cls, value: str | None) -> str | None:
        if value is not None and not (value.isascii() and value.isprintable()):
            raise ValueError("a key holds printable ASCII characters only; does it end with a line break?")
        return value


class UrlBody(_Body):
    """A server that is there."""


class DrainBody(_Body):
    """A server to drain."""

    wait_s: Annotated[float, Field(ge=0, le=MAX_WAIT_S)] = 0.0
    """Wait this long for its requests; those that are left then continue elsewhere."""


def create_servers_api(manager: AsyncLLMServerManager, *, token: str) -> FastAPI:
    """The application. Handlers run on the manager's loop.

    Args:
        manager: whose servers.
        token: the bearer token that every call must send.
    """
    if not token:
        raise ValueError("the /servers API changes where a run generates: it needs a token")
    app = FastAPI(title="agentrl servers", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def _authorize(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return JSONResponse({"error": "missing or wrong bearer token"}, 401)
        return await call_next(request)

    def check_known(url: str) -> None:
        if url not in manager.urls:
            raise HTTPException(404, f"{url} is not among the servers {manager.urls}; add it first")

    def listing() -> dict[str, Any]:
        servers = [_finite(asdict(stats)) for stats in manager.stats()]
        return {"required": manager.required, "parked": manager.num_parked(), "counters": manager.counters(), "servers": servers}

    @app.get("/servers")
    async def _list() -> dict[str, Any]:
        return listing()

    @app.post("/servers")
    async def _add(body: AddBody) -> Response:
        if body.url in manager.urls:
            return JSONResponse({"error": f"{body.url} is one of the servers already; remove it first to start it anew"}, 409)
        manager.add_server(body.url, capacity=body.capacity, api_key=body.api_key, admin_key=body.admin_key)
        return JSONResponse(listing())

    @app.delete("/servers")
    async def _remove(body: UrlBody) -> dict[str, Any]:
        check_known(body.url)
        manager.remove_server(body.url)
        return listing()

    @app.post("/servers/drain")
    async def _drain(body: DrainBody) -> dict[str, Any]:
        check_known(body.url)
        manager.drain(body.url)
        idle = await manager.wait_drained(body.url, timeout_s=body.wait_s) if body.wait_s else None
        return {"idle": idle, **listing()}

    @app.post("/servers/undrain")
    async def _undrain(body: UrlBody) -> dict[str, Any]:
        check_known(body.url)
        manager.undrain(body.url)
        return listing()

    return app


@asynccontextmanager
async def serving_servers_api(manager: AsyncLLMServerManager, *, token: str, host: str = "127.0.0.1") -> AsyncGenerator[str]:
    """Serve the API beside the block, on a free port; yields its url."""
    listener = socket.create_server((host, 0))
    config = uvicorn.Config(
        create_servers_api(manager, token=token),
        http="h11",
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    port = listener.getsockname()[1]
    try:
        async with running(servers_api=_serve(server, listener)):
            yield f"http://{host}:{port}"
    finally:
        listener.close()


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    """uvicorn without its signal handlers: those belong to the process, which drains."""
    config = server.config
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[listener])
    try:
        await server.main_loop()
    finally:
        server.should_exit = True
        await server.shutdown(sockets=[listener])


def _finite(stats: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan: latencies before the first request are null."""
    return {key: None if isinstance(value, float) and value != value else value for key, value in stats.items()}  # noqa: PLR0124
