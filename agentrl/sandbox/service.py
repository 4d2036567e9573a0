"""The requests: each is parsed, admitted (or refused), run by the pool, and answered. A client that goes away ends its run."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError

from agentrl.errors import SandboxError
from agentrl.sandbox.admission import Admission, Draining, QueueFull, WaitedTooLong
from agentrl.sandbox.job import MAX_FILES_BYTES, MAX_WALL_S, MIB, CellOutcome, Job, Limits, Outcome
from agentrl.sandbox.kernel import Kernel
from agentrl.sandbox.languages import installed
from agentrl.sandbox.metrics import Metrics
from agentrl.sandbox.pool import Pool
from agentrl.sandbox.scoring import (
    AssertTest,
    RunTestsRequest,
    RunTestsResponse,
    StreamTest,
    TestResult,
    output_matches,
    seal_test,
    shown,
)
from agentrl.sandbox.sessions import NoSessionFree, SessionGone, Sessions
from agentrl.sandbox.wire import (
    MAX_JUPYTER_S,
    SESSION_CPU_S,
    BadRequest,
    CommandRunResult,
    OpenSessionRequest,
    OpenSessionResponse,
    Program,
    RunCodeRequest,
    RunCodeResponse,
    RunJupyterRequest,
    RunJupyterResponse,
    SessionRunRequest,
    SessionRunResponse,
    check_code,
    check_fetch,
    check_memory,
    decode_files,
    encode_files,
    explain,
    to_cell,
    to_program,
    to_response,
    to_result,
)

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2 * MAX_FILES_BYTES
CLIENT_HEADER = "X-Sandbox-Client"
_SESSION_START_LIMIT_S = 10.0
_DRAIN_RETRY_S = 5

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")


class _ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Service:
    """The handlers and what they share."""

    def __init__(
        self,
        pool: Pool,
        admission: Admission,
        sessions: Sessions,
        *,
        memory_limit_mb: int,
        session_idle_ttl_s: float,
        session_ttl_s: float,
    ) -> None:
        self._pool = pool
        self._admission = admission
        self._sessions = sessions
        self._memory_limit_mb = memory_limit_mb
        self._idle_ttl_s = session_idle_ttl_s
        self._ttl_s = session_ttl_s
        self.metrics = Metrics(admission, pool, sessions)

    # Each public handler is a route; `_handle` turns what can go wrong into its status.

    async def run_code(self, request: Request) -> Response:
        """Run one program (SandboxFusion's POST /run_code)."""
        return await self._handle(
            request, RunCodeRequest, self._run_code, lambda why: RunCodeResponse(status="SandboxError", message=why)
        )

    async def run_jupyter(self, request: Request) -> Response:
        """Run cells in a fresh kernel (SandboxFusion's POST /run_jupyter)."""
        return await self._handle(
            request, RunJupyterRequest, self._run_jupyter, lambda why: RunJupyterResponse(status="SandboxError", message=why)
        )

    async def run_tests(self, request: Request) -> Response:
        """Run one program against many tests."""
        return await self._handle(request, RunTestsRequest, self._run_tests)

    async def open_session(self, request: Request) -> Response:
        """Open a kernel that lives for a trajectory."""
        return await self._handle(request, OpenSessionRequest, self._open_session)

    async def run_in_session(self, request: Request, session_id: str) -> Response:
        """Run one cell."""

        async def run(parsed: SessionRunRequest, client: str, arrived: float) -> BaseModel:
            return await self._run_in_session(session_id, parsed, client, arrived)

        return await self._handle(request, SessionRunRequest, run)

    async def delete_session(self, session_id: str) -> Response:
        """End a session."""
        try:
            await self._sessions.delete(session_id)
        except SessionGone as error:
            return self._refuse_gone(error)
        return JSONResponse({"session_id": session_id, "deleted": True})

    async def _handle(
        self,
        request: Request,
        kind: type[Body],
        run: Callable[[Body, str, float], Coroutine[Any, Any, BaseModel]],
        failed: Callable[[str], BaseModel] | None = None,
    ) -> Response:
        """Parse, run, answer. ``failed`` makes the answer to a failure of the service where that is not an HTTP status."""
        arrived = time.monotonic()
        try:
            parsed = kind.model_validate_json(await read_body(request))
            if self._pool.active_tier is None:
                return self._refuse(503, "not_started", "the sandbox has not started; run the application with its lifespan")
            client = request.headers.get(CLIENT_HEADER) or (request.client.host if request.client else "")
            answer = await _unless_gone(request, run(parsed, client, arrived))
        except ValidationError as error:
            return self._refuse(422, "malformed", _describe(error))
        except BadRequest as error:
            return self._refuse(400, "bad_request", str(error))
        except QueueFull as error:
            return self._refuse(429, "queue_full", str(error), {"Retry-After": str(error.retry_after_s)})
        except NoSessionFree as error:
            return self._refuse(429, "sessions_full", str(error), {"Retry-After": "5"})
        except WaitedTooLong as error:
            return self._refuse(504, "waited_too_long", str(error))
        except Draining as error:
            return self._refuse(503, "draining", str(error), {"Retry-After": str(_DRAIN_RETRY_S)})
        except SessionGone as error:
            return self._refuse_gone(error)
        except _ClientGone:
            return self._refuse(499, "disconnected", "the client went away")
        except SandboxError as error:
            self.metrics.runs.labels("sandbox_error").inc()
            log.warning("run lost reason=%s", error)
            if failed is None:
                return self._refuse(502, "sandbox_error", str(error))
            answer = failed(str(error))
        return Response(answer.model_dump_json(), media_type="application/json")

    def _refuse(self, status: int, cause: str, detail: Any, headers: dict[str, str] | None = None) -> Response:
        self.metrics.rejected.labels(cause).inc()
        return JSONResponse({"detail": detail}, status, headers)

    def _refuse_gone(self, error: SessionGone) -> Response:
        self.metrics.rejected.labels("session_gone").inc()
        status = 404 if error.reason == "unknown" else 410
        return JSONResponse({"detail": str(error), "reason": error.reason}, status)

    # What is run.

    async def _run_code(self, request: RunCodeRequest, client: str, arrived: float) -> BaseModel:
        program = await self._checked(request)
        async with self._admission.permit(client, timeout_s=_left(request.total_timeout, arrived)) as permit:
            self.metrics.took("queue", permit.queue_time_s)
            compiled, outcome = await self._run_program(program, permit.slot, request.total_timeout, arrived)
        limits = program.compile.limits if outcome is None and program.compile is not None else program.run.limits
        return to_response(outcome, limits, compiled=compiled, queue_time_s=permit.queue_time_s, tier=self._pool.active_tier)

    async def _checked(self, request: RunCodeRequest) -> Program:
        program = await asyncio.to_thread(to_program, request, memory_limit_mb=self._memory_limit_mb)
        for job in (program.compile, program.run):
            if job is not None and (unsupported := self._pool.unsupported(job)):
                raise BadRequest(unsupported)
        return program

    async def _run_program(
        self, program: Program, slot: int, total_s: float | None, arrived: float
    ) -> tuple[Outcome | None, Outcome | None]:
        """How compiling ended, if there is a compile step, and how running did, if compiling succeeded."""
        if program.compile is None:
            return None, await self._timed("run", program.run, slot, total_s, arrived)
        compiled = await self._timed("compile", program.compile, slot, total_s, arrived)
        artifact = compiled.files.get(program.language.artifact)
        if compiled.code != 0 or compiled.reason != "ok" or artifact is None:
            return compiled, None
        return compiled, await self._timed("run", program.built(artifact), slot, total_s, arrived)

    async def _timed(self, phase: Any, job: Job, slot: int, total_s: float | None, arrived: float) -> Outcome:
        started = time.monotonic()
        outcome = await self._pool.run(_bounded(job, _left(total_s, arrived)), slot)
        self.metrics.took(phase, outcome.wall_s)
        self.metrics.took("overhead", max(0.0, time.monotonic() - started - outcome.wall_s))
        (self.metrics.compiles if phase == "compile" else self.metrics.runs).labels(outcome.reason).inc()
        return outcome

    async def _run_jupyter(self, request: RunJupyterRequest, client: str, arrived: float) -> BaseModel:
        memory_mb = check_memory(request.memory_limit_MB, self._memory_limit_mb)
        for cell in request.cells:
            check_code(cell)
        files, fetch = decode_files(request.files), check_fetch(request.fetch_files)
        self._check_files(files, fetch)
        total_s = min(request.total_timeout, MAX_JUPYTER_S)
        limits = Limits(wall_s=_SESSION_START_LIMIT_S, memory_bytes=memory_mb * MIB, cpu_s=total_s)
        async with self._admission.permit(client) as permit:
            self.metrics.took("queue", permit.queue_time_s)
            kernel = await self._started(limits, permit.slot)
            try:
                started = time.monotonic()
                outcomes = await self._run_cells(kernel, request, files, fetch, started + total_s)
                seconds = time.monotonic() - started
            finally:
                await asyncio.shield(kernel.close())
        last = outcomes[-1] if outcomes else None
        is_whole = len(outcomes) == len(request.cells) and (last is None or last.is_alive)
        timed_out = not is_whole and (last is None or last.reason in ("wall", "cpu"))
        driver = CommandRunResult(
            status="TimeLimitExceeded" if timed_out else "Finished",
            execution_time=seconds,
            return_code=None if timed_out else 0 if is_whole or last is None else last.code,
            stdout="",
            stderr="",
            reason="ok" if is_whole or last is None else last.reason,
        )
        return RunJupyterResponse(
            status="Success" if is_whole else "Failed",
            message="" if is_whole or last is None else explain(last.reason, last.code, limits),
            driver=driver,
            cells=[to_cell(outcome) for outcome in outcomes],
            files=encode_files(last) if last is not None else {},
            file_errors=dict(last.file_errors) if last is not None else {},
            queue_time=permit.queue_time_s,
            tier=self._pool.active_tier,
        )

    async def _run_cells(
        self, kernel: Kernel, request: RunJupyterRequest, files: dict[str, bytes], fetch: list[str], ends: float
    ) -> list[CellOutcome]:
        """Until the cells, the time or the kernel ends. Input files come with the first cell, results are fetched after the last."""
        outcomes: list[CellOutcome] = []
        for index, cell in enumerate(request.cells):
            left = ends - time.monotonic()
            if left <= 0:
                break
            outcome = await kernel.run(
                cell,
                wall_s=min(left, request.cell_timeout or left),
                echo=True,
                rich=True,
                files=files if index == 0 else None,
                fetch=fetch if index == len(request.cells) - 1 else (),
            )
            self._count_cell(outcome)
            outcomes.append(outcome)
            if not outcome.is_alive:
                break
        return outcomes

    def _count_cell(self, outcome: CellOutcome) -> None:
        self.metrics.took("cell", outcome.wall_s)
        self.metrics.cells.labels(outcome.reason).inc()

    async def _started(self, limits: Limits, slot: int) -> Kernel:
        began = time.monotonic()
        kernel = await self._pool.open_session(limits, slot)
        self.metrics.took("session_start", time.monotonic() - began)
        return kernel

    def _check_files(self, files: dict[str, bytes], fetch: list[str]) -> None:
        if unsupported := self._pool.unsupported(
            Job(code="", limits=Limits(wall_s=1, memory_bytes=MIB), files=files, fetch=fetch)
        ):
            raise BadRequest(unsupported)

    async def _open_session(self, request: OpenSessionRequest, client: str, arrived: float) -> BaseModel:
        if request.language != "python":
            raise BadRequest(f"sessions run python, not {request.language[:40]!r}")
        if self._pool.active_tier == "unsafe":
            raise BadRequest("there are no sessions without isolation (tier unsafe)")
        memory_mb = check_memory(request.memory_limit_MB, self._memory_limit_mb)
        limits = Limits(wall_s=_SESSION_START_LIMIT_S, memory_bytes=memory_mb * MIB, cpu_s=SESSION_CPU_S)
        if self._admission.draining:
            raise Draining
        idle_ttl_s, ttl_s = (
            min(request.idle_ttl or self._idle_ttl_s, self._idle_ttl_s),
            min(request.ttl or self._ttl_s, self._ttl_s),
        )
        async with self._admission.permit(client):
            began = time.monotonic()
            session = await self._sessions.open(limits, idle_ttl_s=idle_ttl_s, ttl_s=ttl_s)
            self.metrics.took("session_start", time.monotonic() - began)
        return OpenSessionResponse(
            session_id=session.id, idle_ttl=idle_ttl_s, ttl=ttl_s, memory_limit_MB=memory_mb, tier=self._pool.active_tier
        )

    async def _run_in_session(self, session_id: str, request: SessionRunRequest, client: str, arrived: float) -> BaseModel:
        check_code(request.code)
        files, fetch = decode_files(request.files), check_fetch(request.fetch_files)
        self._check_files(files, fetch)
        async with self._sessions.use(session_id) as session:
            async with self._admission.permit(client, timeout_s=_left(request.total_timeout, arrived)) as permit:
                self.metrics.took("queue", permit.queue_time_s)
                left = _left(request.total_timeout, arrived)
                wall_s = min(request.timeout, MAX_WALL_S, *([] if left is None else [left]))
                outcome = await session.kernel.run(
                    request.code, wall_s=wall_s, echo=request.echo, rich=False, files=files, fetch=fetch
                )
            self._count_cell(outcome)
            await self._sessions.finish_cell(session, outcome)
        limits = Limits(wall_s=wall_s, memory_bytes=session.limits.memory_bytes)
        answer = to_response(outcome, limits, queue_time_s=permit.queue_time_s, tier=self._pool.active_tier)
        return SessionRunResponse(**dict(answer), session_id=session_id, session_alive=outcome.is_alive)

    async def _run_tests(self, request: RunTestsRequest, client: str, arrived: float) -> BaseModel:
        streams = [test for test in request.tests if isinstance(test, StreamTest)]
        if len(streams) < len(request.tests) and (request.language != "python" or self._pool.active_tier == "unsafe"):
            raise BadRequest("tests by assertion need python and an isolating tier; use stdin and stdout")
        asked = RunCodeRequest(
            code=request.code,
            language=request.language,
            compile_timeout=request.compile_timeout,
            run_timeout=request.run_timeout,
            memory_limit_MB=request.memory_limit_MB,
            files=request.files,
        )
        program = await self._checked(asked)
        queue_time_s, compile_result = 0.0, None
        job: Job | None = program.run
        if program.compile is not None:
            async with self._admission.permit(client, timeout_s=_left(request.total_timeout, arrived)) as permit:
                queue_time_s += permit.queue_time_s
                compiled = await self._timed("compile", program.compile, permit.slot, request.total_timeout, arrived)
            compile_result = to_result(compiled)
            artifact = compiled.files.get(program.language.artifact)
            job = program.built(artifact) if compiled.code == 0 and artifact is not None else None
        results = [TestResult(passed=False, reason="not_run") for _ in request.tests]
        if job is not None:
            queue_time_s += await self._run_each(request, job, client, arrived, results)
        passed = sum(result.passed for result in results)
        return RunTestsResponse(
            passed=passed, total=len(results), results=results, compile_result=compile_result, queue_time=queue_time_s
        )

    async def _run_each(
        self, request: RunTestsRequest, job: Job, client: str, arrived: float, results: list[TestResult]
    ) -> float:
        """Fill in the results, as many at once as there are slots; returns the longest wait for one."""
        waits, todo, failed = [0.0], list(reversed(range(len(results)))), asyncio.Event()

        async def worker() -> None:
            while todo and not (failed.is_set() and request.stop_on_failure):
                index = todo.pop()
                try:
                    async with self._admission.permit(client, timeout_s=_left(request.total_timeout, arrived)) as permit:
                        waits.append(permit.queue_time_s)
                        self.metrics.took("queue", permit.queue_time_s)
                        results[index] = await self._run_test(request, job, index, permit.slot, arrived)
                except WaitedTooLong:
                    return
                if not results[index].passed:
                    failed.set()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(1 if request.stop_on_failure else min(len(results), self._admission.capacity)):
                    group.create_task(worker())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return max(waits)

    async def _run_test(self, request: RunTestsRequest, job: Job, index: int, slot: int, arrived: float) -> TestResult:
        test = request.tests[index]
        if isinstance(test, AssertTest):
            return await self._run_assertion(test, job, slot, _left(request.total_timeout, arrived))
        fed = replace(job, stdin=test.stdin.encode("utf-8", "replace"), fetch=())
        outcome = await self._timed("run", fed, slot, request.total_timeout, arrived)
        passed = outcome.reason == "ok" and not outcome.truncated and output_matches(outcome.stdout, test.stdout, request.compare)
        return _verdict(outcome, passed, "wrong_output")

    async def _run_assertion(self, test: AssertTest, job: Job, slot: int, left_s: float | None) -> TestResult:
        """The program first; only when it is loaded does its process get to see the test."""
        try:
            sealed, proof = seal_test(test.test)
        except ValueError as error:
            raise BadRequest(str(error)) from error
        wall_s = job.limits.wall_s if left_s is None else max(0.0, min(job.limits.wall_s, left_s))
        limits = Limits(wall_s=_SESSION_START_LIMIT_S, memory_bytes=job.limits.memory_bytes, cpu_s=job.limits.wall_s)
        kernel = await self._started(limits, slot)
        try:
            loaded = await kernel.run(job.code, wall_s=wall_s, echo=False, rich=False, files=job.files)
            self._count_cell(loaded)
            if loaded.reason != "ok" or not loaded.is_alive:
                return _verdict(loaded, False, "exit")
            tested = await kernel.run(sealed, wall_s=max(0.0, wall_s - loaded.wall_s), echo=False, rich=False)
            self._count_cell(tested)
        finally:
            await asyncio.shield(kernel.close())
        passed = tested.reason == "ok" and tested.is_alive and tested.stdout.endswith(f"\n{proof}")
        return _verdict(tested, passed, "assertion", hidden=proof)

    # What is told.

    async def ping(self) -> str:
        """SandboxFusion's liveness answer."""
        return "pong"

    def health(self) -> tuple[dict[str, Any], bool]:
        """How busy it is, and whether it is able to run code now."""
        pool, admission = self._pool, self._admission
        healthy = pool.active_tier is not None and pool.healthy and not admission.draining
        content: dict[str, Any] = {
            "ok": healthy,
            "tier": pool.active_tier,
            "degraded": pool.is_degraded,
            "self_test": pool.self_test.passed and bool(pool.self_test.attacks),
            "capacity": admission.capacity,
            "running": admission.running,
            "queue": admission.waiting,
            "max_queue": admission.max_queue,
            "draining": admission.draining,
            "sessions": len(self._sessions),
            "max_sessions": self._sessions.max_sessions,
            "restarts": pool.restarts,
            "preload_missing": pool.preload_missing,
            "languages": list(installed()),
            "phases_ms": self.metrics.percentiles_ms(),
        }
        return content, healthy

    async def health_page(self) -> Response:
        """503 while no run can be placed."""
        content, healthy = self.health()
        return JSONResponse(content, 200 if healthy else 503)

    async def isolation(self) -> dict[str, Any]:
        """What holds the code, the limits of a run, and what the self-test saw."""
        limits = Limits(wall_s=MAX_WALL_S, memory_bytes=self._memory_limit_mb * MIB)
        return self._pool.describe() | {"limits": {name: getattr(limits, name) for name in limits.__slots__}}

    async def metrics_page(self) -> Response:
        """Prometheus text."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _verdict(outcome: Outcome, passed: bool, wrong: str, hidden: str = "") -> TestResult:
    reason = (
        "ok"
        if passed
        else wrong
        if outcome.reason == "ok" or (wrong == "assertion" and outcome.reason == "exit")
        else outcome.reason
    )
    stdout = outcome.stdout.replace(f"\n{hidden}", "") if hidden else outcome.stdout
    return TestResult(
        passed=passed, reason=reason, execution_time=outcome.wall_s, stdout=shown(stdout), stderr=shown(outcome.stderr)
    )


def _left(total_s: float | None, arrived: float) -> float | None:
    """Of the request's own deadline, in seconds."""
    return None if total_s is None else max(0.0, total_s - (time.monotonic() - arrived))


def _bounded(job: Job, left_s: float | None) -> Job:
    """The job with no more wall time than is left."""
    if left_s is None or left_s >= job.limits.wall_s:
        return job
    return replace(job, limits=replace(job.limits, wall_s=max(left_s, 0.001)))


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result; a client that goes away cancels it.

    Raises:
        _ClientGone: it did.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientGone
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request) -> bytes:
    """The body, bounded.

    Raises:
        BadRequest: it is too large.
    """
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
