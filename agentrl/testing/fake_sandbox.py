"""A small sandbox over real HTTP for tests of what calls one. It isolates nothing: only for code that the test wrote.

It speaks SandboxFusion's ``/run_code`` by running trusted Python in a subprocess, records the requests, and fails on demand.
"""

import asyncio
import contextlib
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from aiohttp import web

RunResult = dict[str, Any]
_REPLAY = """
import ast, contextlib, io
names = {{"__name__": "__main__"}}
def run(code):
    body = ast.parse(code).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        if value is not None:
            print(repr(value))
for cell in {cells!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        run(cell)
run({cell!r})
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """How one request fails: an HTTP status, or a dropped connection, or a delay before the ordinary answer."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])
    drop: bool = False
    delay_s: float = 0.0
    body: dict[str, Any] | None = None
    """Answer this with 200 instead of running anything."""


class FakeSandbox:
    """``async with FakeSandbox() as sandbox: ... sandbox.url``. Faults are used up one per request, in order."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.faults: deque[Fault] = deque()
        self.sessions: dict[str, list[str]] = {}
        """The cells of every open session; each cell runs after a silent replay of those before it."""
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/run_code", self._run_code)
        app.router.add_post("/sessions", self._open_session)
        app.router.add_post("/sessions/{id}/run", self._run_cell)
        app.router.add_delete("/sessions/{id}", self._delete_session)
        app.router.add_get("/v1/ping", self._ping)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _ping(self, request: web.Request) -> web.Response:
        return web.json_response("pong")

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"ok": True, "tier": "unsafe", "degraded": True})

    async def _open_session(self, request: web.Request) -> web.Response:
        session = f"fake-{len(self.requests)}-{len(self.sessions)}"
        self.sessions[session] = []
        return web.json_response({"session_id": session, "idle_ttl": 300.0, "ttl": 3600.0, "tier": "unsafe"})

    async def _delete_session(self, request: web.Request) -> web.Response:
        found = self.sessions.pop(request.match_info["id"], None) is not None
        return web.json_response({"deleted": found}, status=200 if found else 410)

    async def _run_cell(self, request: web.Request) -> web.Response:
        session, body = request.match_info["id"], await request.json()
        self.requests.append(body)
        if session not in self.sessions:
            return web.json_response({"detail": "gone", "reason": "deleted"}, status=410)
        result = await _run(_REPLAY.format(cells=self.sessions[session], cell=body["code"]), None, float(body.get("timeout", 10)))
        alive = result["status"] != "TimeLimitExceeded"
        if alive:
            self.sessions[session].append(body["code"])
        else:
            del self.sessions[session]
        status = "Success" if result["return_code"] == 0 else "Failed"
        answer = {"status": status, "message": "", "run_result": result, "session_id": session, "session_alive": alive}
        return web.json_response(answer)

    async def _run_code(self, request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = await request.json()
        self.requests.append(body)
        fault = self.faults.popleft() if self.faults else Fault()
        if fault.delay_s:
            await asyncio.sleep(fault.delay_s)
        if fault.drop:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if fault.status is not None:
            return web.json_response({"detail": f"fault {fault.status}"}, status=fault.status, headers=fault.headers)
        if fault.body is not None:
            return web.json_response(fault.body)
        if body.get("language", "python") != "python":
            return web.json_response({"detail": "supported: python"}, status=400)
        result = await _run(body["code"], body.get("stdin"), float(body.get("run_timeout", 10)))
        return web.json_response(
            {
                "status": "Success" if result["return_code"] == 0 else "Failed",
                "message": "",
                "compile_result": None,
                "run_result": result,
                "executor_pod_name": None,
                "files": {},
            },
            headers={"X-Sandbox-Tier": "unsafe"},
        )


async def _run(code: str, stdin: str | None, timeout_s: float) -> RunResult:
    started = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-c",
        code,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate((stdin or "").encode())
    except TimeoutError:
        return _result("TimeLimitExceeded", timeout_s, None, b"", b"")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    return _result("Finished", time.monotonic() - started, process.returncode, stdout, stderr)


def _result(status: str, seconds: float, code: int | None, stdout: bytes, stderr: bytes) -> RunResult:
    return {
        "status": status,
        "execution_time": seconds,
        "return_code": code,
        "stdout": stdout.decode("utf-8", "replace"),
        "stderr": stderr.decode("utf-8", "replace"),
    }
