"""Runs the model's Python in the sandbox service, never in this process.

What the program did, good or bad, is text for the model. What the service did wrong (unreachable, overloaded, broken) is a
``SandboxError`` and never the model's fault. Stateless, it speaks SandboxFusion's ``/run_code``, so either server can stand
behind it; with ``mode: session`` it uses this project's sessions, where variables live as long as the trajectory.
"""

import ast
import asyncio
import contextlib
import random
import re
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import orjson

from agentrl.errors import ConfigError, SandboxError, ToolError
from agentrl.protocols import Tool, ToolContext

Echo = Literal["off", "ast", "verl"]
Mode = Literal["stateless", "session"]

DEFAULT_URL = "http://127.0.0.1:8080"
_FENCE = re.compile(r"\A\s*```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)\n?[ \t]*```\s*\Z", re.DOTALL | re.IGNORECASE)
_CONNECT_TIMEOUT_S = 5.0
_QUEUE_ALLOWANCE_S = 60.0  # the service does not count the wait for a slot in the run's timeout, so neither may we
_MAX_TRACEBACK_CHARS = 3000
_BACKOFF_S = (0.2, 5.0)


def echo_last_value(code: str) -> str:
    """Make the program show the value of its last statement when that is an expression, as an interactive session does.

    The program is parsed; exactly the source range of that expression is wrapped in a call of ``sys.displayhook``, which
    prints nothing for None. No line moves, so tracebacks keep their line numbers. Anything that does not parse is unchanged.
    """
    try:
        with contextlib.suppress(RecursionError, MemoryError):
            body = ast.parse(code).body
            if not body or not isinstance(body[-1], ast.Expr):
                return code
            value = body[-1].value
            start = _offset(code, value.lineno, value.col_offset)
            end = _offset(code, value.end_lineno or value.lineno, value.end_col_offset or 0)
            source = code.encode()
            wrapped = source[:start] + b'__import__("sys").displayhook((' + source[start:end] + b"))" + source[end:]
            ast.parse(wrapped)
            return wrapped.decode()
    except (SyntaxError, ValueError):
        return code
    return code


def _offset(code: str, line: int, column: int) -> int:
    """The byte offset of an ``ast`` position (lines from 1; columns in UTF-8 bytes; only \\n, \\r and \\r\\n end a line)."""
    lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", code)
    return sum(len(text.encode()) for text in lines[: line - 1]) + column


def echo_like_verl(code: str) -> str:
    """verl's textual rule, for comparison only: the last non-empty line goes into ``print(...)``. It breaks many programs."""
    lines = code.split("\n")
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].strip():
            if not lines[index].lstrip().startswith("print"):
                lines[index] = f"print({lines[index]})"
            break
    return "\n".join(lines)


def trim_traceback(stderr: str) -> str:
    """A traceback without library frames, bounded in length; the error itself is always kept."""
    kept: list[str] = []
    skipping = False
    for line in stderr.strip("\n").splitlines():
        if line.startswith('  File "'):
            skipping = "site-packages" in line or "/lib/python" in line or "<frozen " in line
        elif not line.startswith("    "):
            skipping = False
        if not skipping:
            kept.append(line)
    text = "\n".join(kept)
    if len(text) <= _MAX_TRACEBACK_CHARS:
        return text
    half = _MAX_TRACEBACK_CHARS // 2
    return f"{text[:half]}\n... [{len(text) - 2 * half} characters omitted] ...\n{text[-half:]}"


@dataclass(slots=True)
class _SharedSession:
    """One HTTP session per event loop: a tool instance lives as long as a trajectory, its connections should not."""

    session: aiohttp.ClientSession
    users: int = 0


_sessions: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _SharedSession]" = weakref.WeakKeyDictionary()


class _Retryable(Exception):
    """The service failed in a way that another attempt may not. ``ran``: the program may have run all the same."""

    def __init__(self, why: str, retry_after_s: float = 0.0, *, ran: bool = False) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s
        self.ran = ran


class _SessionGone(Exception):
    """The service has ended the session; the text is a word on why."""


class CodeInterpreter(Tool):
    """A Python interpreter as a tool. Stateless, every call is a fresh process; in a session, calls share one.

    Args:
        url: base URL of the service, or the full ``/run_code`` URL.
        sandbox_fusion_url: the same under verl's name.
        default_timeout: seconds of wall time per call; waiting in the service's queue does not count.
        memory_limit_mb: MiB per call.
        echo: "ast" shows the value of a last expression, "off" only what was printed, "verl" its textual rule.
        max_retries: further attempts after an infrastructure failure; a program's own failure is never retried.
        token: bearer token of the service.
        max_code_chars: longer programs are refused with a text for the model.
        mode: "stateless", or "session": variables and files live until the trajectory ends. A session that is lost (a program
            that could not be stopped, memory, too long idle) is replaced, and the model is told that its variables are gone.
        hedge_after_s: stateless only: send a call again when its answer takes this long and use whichever comes first. Cuts
            the tail where several services stand behind one address; costs double runs, so give more than a program usually takes.
        type, default_language, num_workers, rate_limit, enable_global_rate_limit, use_ray_execution_pool: accepted so that
            verl's tool files load unchanged; concurrency belongs to the toolbox and the service.
    """

    name = "code_interpreter"

    def __init__(
        self,
        *,
        url: str | None = None,
        sandbox_fusion_url: str | None = None,
        default_timeout: float = 10,
        memory_limit_mb: int = 512,
        echo: Echo = "ast",
        max_retries: int = 3,
        token: str | None = None,
        max_code_chars: int = 100_000,
        mode: Mode = "stateless",
        hedge_after_s: float | None = None,
        type: str = "native",
        default_language: str = "python",
        num_workers: int | None = None,
        rate_limit: int | None = None,
        enable_global_rate_limit: bool | None = None,
        use_ray_execution_pool: bool | None = None,
    ) -> None:
        if url is not None and sandbox_fusion_url is not None and url != sandbox_fusion_url:
            raise ConfigError(f"code_interpreter: url={url} and sandbox_fusion_url={sandbox_fusion_url} differ; give one")
        if default_timeout <= 0 or memory_limit_mb <= 0 or max_retries < 0:
            raise ConfigError(
                f"code_interpreter: default_timeout={default_timeout} and memory_limit_mb={memory_limit_mb} must be positive, "
                f"max_retries={max_retries} not negative"
            )
        if echo not in ("off", "ast", "verl"):
            raise ConfigError(f"code_interpreter: echo={echo!r} must be one of off, ast, verl")
        if mode not in ("stateless", "session"):
            raise ConfigError(f"code_interpreter: mode={mode!r} must be stateless or session")
        if hedge_after_s is not None and (hedge_after_s <= 0 or mode == "session"):
            raise ConfigError(
                f"code_interpreter: hedge_after_s={hedge_after_s:g} with mode={mode}: it must be positive, and only stateless calls "
                "may be sent twice"
            )
        if mode == "session" and echo == "verl":
            raise ConfigError("code_interpreter: echo=verl rewrites text and is for mode=stateless; use ast")
        if default_language != "python":
            raise ConfigError(f"code_interpreter: default_language={default_language!r}; this tool runs python")
        base = (url or sandbox_fusion_url or DEFAULT_URL).rstrip("/")
        self._base = base.removesuffix("/run_code")
        self._url = f"{self._base}/run_code"
        self._mode: Mode = mode
        self._hedge_after_s = hedge_after_s
        self._session_id: str | None = None
        self._turn = asyncio.Lock()
        self._timeout_s = float(default_timeout)
        self._memory_limit_mb = memory_limit_mb
        self._echo: Echo = echo
        self._max_retries = max_retries
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._max_code_chars = max_code_chars
        self._held: tuple[asyncio.AbstractEventLoop, _SharedSession] | None = None
        self._jitter = random.Random()

    async def open(self, ctx: ToolContext) -> None:
        """Take part in the event loop's HTTP session."""
        self._session()

    async def call(self, code: str) -> str:  # pyright: ignore[reportIncompatibleMethodOverride] - a tool's arguments are its own
        """Run a Python program and return what it prints. Define everything the program needs.

        Args:
            code: The complete Python program. Print the results you need; a last expression is shown too.
        """
        if not code.strip():
            raise ToolError("The code is empty. Pass a complete Python program in `code`.")
        if len(code) > self._max_code_chars:
            raise ToolError(f"The code has {len(code)} characters; at most {self._max_code_chars} are accepted.")
        if self._mode == "session":
            async with self._turn:
                return await self._call_in_session(code)
        return self._render(await self._run(self._prepared(code)))

    async def _call_in_session(self, code: str) -> str:
        """A cell of the trajectory's session, opened when first needed."""
        fenced = _FENCE.match(code)
        cell = {
            "code": (fenced.group(1) if fenced else code).encode("utf-8", "replace").decode(),
            "timeout": self._timeout_s,
            "echo": self._echo == "ast",
        }
        lost = ""
        for _ in range(2):
            if self._session_id is None:
                opened = await self._retried(f"{self._base}/sessions", {"memory_limit_MB": self._memory_limit_mb})
                self._session_id = str(opened["session_id"])
            try:
                # Never sent twice: a cell that has run may have changed the session.
                answer = await self._attempt(f"{self._base}/sessions/{self._session_id}/run", orjson.dumps(cell))
            except _SessionGone as error:
                self._session_id = None
                lost = f"The interpreter was restarted ({error}): variables and files of earlier calls are gone."
                continue
            except _Retryable as error:
                if error.ran:
                    self._session_id = None
                raise SandboxError(f"the sandbox at {self._base} failed during a session's cell: {error}") from error
            text = self._render(answer)
            if not answer.get("session_alive", True):
                self._session_id = None
                text += "\nThe interpreter had to be restarted: variables and files of earlier calls are gone."
            return f"{lost}\n{text}" if lost else text
        raise SandboxError(f"the sandbox at {self._base} loses sessions as soon as they are opened: {lost}")

    async def close(self) -> None:
        """End the session, if there is one, and leave the HTTP session; the last one out closes it."""
        try:
            if self._session_id is not None:
                await self._end_session(self._session_id)
        finally:
            await self._leave()

    async def _end_session(self, session_id: str) -> None:
        """Without an answer the service ends it by itself when it has been idle for long enough."""
        self._session_id = None
        timeout = aiohttp.ClientTimeout(total=_CONNECT_TIMEOUT_S)
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with self._session().delete(f"{self._base}/sessions/{session_id}", headers=self._headers, timeout=timeout):
                pass

    async def _leave(self) -> None:
        if self._held is None:
            return
        loop, shared = self._held
        self._held = None
        shared.users -= 1
        if shared.users == 0:
            if _sessions.get(loop) is shared:
                del _sessions[loop]
            await shared.session.close()

    def _prepared(self, code: str) -> str:
        fenced = _FENCE.match(code)
        program = fenced.group(1) if fenced else code
        if self._echo == "ast":
            return echo_last_value(program)
        return echo_like_verl(program) if self._echo == "verl" else program

    def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._held is not None and self._held[0] is loop and not self._held[1].session.closed:
            return self._held[1].session
        shared = _sessions.get(loop)
        if shared is None or shared.session.closed:
            shared = _SharedSession(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
            _sessions[loop] = shared
        shared.users += 1
        self._held = (loop, shared)
        return shared.session

    async def _run(self, program: str) -> dict[str, Any]:
        """The service's answer about the program; retries only what is the service's failure.

        Raises:
            SandboxError: it failed on every attempt, or refused the request for good.
        """
        return await self._retried(
            self._url,
            {
                "code": program.encode("utf-8", "replace").decode(),
                "language": "python",
                "compile_timeout": self._timeout_s,
                "run_timeout": self._timeout_s,
                "memory_limit_MB": self._memory_limit_mb,
                "stdin": None,
                "files": {},
                "fetch_files": [],
            },
        )

    async def _retried(self, url: str, request: dict[str, Any]) -> dict[str, Any]:
        body = orjson.dumps(request)
        attempts = self._max_retries + 1
        for attempt in range(1, attempts + 1):
            try:
                return await self._hedged(url, body)
            except _Retryable as error:
                if attempt == attempts:
                    raise SandboxError(
                        f"the sandbox at {url} failed {attempts} times, last: {error}. Is it running (agentrl sandbox)?"
                    ) from error
                await asyncio.sleep(self._delay_s(attempt, error.retry_after_s))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _hedged(self, url: str, body: bytes) -> dict[str, Any]:
        """One attempt; with ``hedge_after_s`` a second one beside it when it is late, and the first good answer."""
        if self._hedge_after_s is None:
            return await self._attempt(url, body)
        attempts = {asyncio.ensure_future(self._attempt(url, body))}
        try:
            done, _ = await asyncio.wait(attempts, timeout=self._hedge_after_s)
            if not done:
                attempts.add(asyncio.ensure_future(self._attempt(url, body)))
            while True:
                done, pending = await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
                good = next((attempt for attempt in done if attempt.exception() is None), None)
                if good is not None or not pending:
                    return (good or done.pop()).result()
                attempts = pending
        finally:
            for attempt in attempts:
                attempt.cancel()  # the service ends the run of a client that goes away
            await asyncio.gather(*attempts, return_exceptions=True)

    def _delay_s(self, attempt: int, retry_after_s: float) -> float:
        first, longest = _BACKOFF_S
        ceiling = min(longest, first * 2 ** (attempt - 1))
        return min(longest, max(retry_after_s, ceiling / 2)) + self._jitter.uniform(0, ceiling / 2)

    async def _attempt(self, url: str, body: bytes) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=2 * self._timeout_s + _QUEUE_ALLOWANCE_S
        )
        try:
            async with self._session().post(url, data=body, headers=self._headers, timeout=timeout) as response:
                raw = await response.read()
                status, retry_after = response.status, response.headers.get("Retry-After", "")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _Retryable(f"{type(error).__name__}: {error}", ran=True) from error
        if status in (404, 410) and (ended := _session_end(raw)):
            raise _SessionGone(ended)
        if status == 429 or status >= 500:
            raise _Retryable(f"HTTP {status}: {_text(raw)}", float(retry_after) if retry_after.isdecimal() else 0.0)
        if status != 200:
            raise SandboxError(f"the sandbox at {self._url} refused the request with HTTP {status}: {_text(raw)}")
        try:
            answer = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise SandboxError(f"{self._url} answered something that is not JSON; is it a sandbox? {_text(raw)}") from error
        if not isinstance(answer, dict) or not answer.keys() & {"status", "session_id"}:
            raise SandboxError(f"{self._url} answered without a status; is it a sandbox? {_text(raw)}")
        if answer.get("status") == "SandboxError":
            raise _Retryable(f"SandboxError: {answer.get('message') or 'no message'}")
        return answer

    def _render(self, answer: dict[str, Any]) -> str:
        """What the model reads: stdout, then what went wrong, if anything did."""
        result: dict[str, Any] = answer.get("run_result") or {}
        stdout = (result.get("stdout") or "").rstrip("\n")
        stderr = trim_traceback(result.get("stderr") or "")
        problem = self._problem(result)
        if answer["status"] == "Success":
            problem = ""
            if not stdout and not stderr:
                return "The code ran without error and printed nothing. Use print(...) to see a value."
        return "\n".join(part for part in (stdout, stderr, problem) if part)

    def _problem(self, result: dict[str, Any]) -> str:
        code, reason = result.get("return_code"), result.get("reason")
        if result.get("status") == "TimeLimitExceeded":
            return f"Timeout: the code did not finish within {self._timeout_s:g} seconds."
        if reason == "memory":
            return f"Out of memory: the code used more than {self._memory_limit_mb} MiB."
        if reason == "output":
            return "Stopped: the code printed far too much."
        if isinstance(code, int) and code < 0:
            return f"The code was killed by signal {-code}."
        if result.get("stderr"):
            return ""  # the traceback says it
        return f"The code ended with exit status {code}."


def _session_end(raw: bytes) -> str:
    """Why the service ended the session; empty when the answer is not about a session."""
    try:
        return str(orjson.loads(raw)["reason"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""


def _text(raw: bytes) -> str:
    return raw[:300].decode("utf-8", "replace")
