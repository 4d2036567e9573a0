"""One MCP server and one session with it, for the whole process, by the official SDK; stdio or streamable HTTP.

The session lives in a thread with an event loop of its own: tools are then declared without a running loop, and the tasks that
hold a child process outlive the rollout that happened to make the first call. A session that breaks is replaced at the next call.
Waits for: the server's start (``start_timeout_s``) and its answers (the caller's deadline, which cancels the request).
"""

import asyncio
import atexit
import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agentrl.errors import AgentRLError, ConfigError, ToolError, ToolInfraError
from agentrl.protocols import ToolResult
from agentrl.rollout.env_values import EnvValues

if TYPE_CHECKING:
    from mcp import Client

logger = logging.getLogger(__name__)

RECONNECT_PAUSE_S = 1.0
"""After a start that failed, calls fail at once for so long instead of starting the server again and again."""
STOP_TIMEOUT_S = 15.0
"""The SDK closes stdin, waits 2 s, sends SIGTERM, waits 2 s, sends SIGKILL; every step is bounded."""
_STDERR_BYTES = 4096
_MAX_PAGES = 100
_HTTP_TIMEOUT_S, _HTTP_READ_TIMEOUT_S = 30.0, 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class McpAddress:
    """How to reach one server: a command to start it, or the url where it runs. Texts may hold ``${env:NAME}``."""

    command: Sequence[str] = ()
    env: Mapping[str, str] | None = None
    """Of the child, besides PATH, HOME and the like: nothing else is inherited."""
    cwd: Path | None = None
    url: str | None = None
    headers: Mapping[str, str] | None = None
    start_timeout_s: float = 60.0

    def __str__(self) -> str:
        if self.url is None:
            return " ".join(self.command)
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedTool:
    """A tool as the server describes it."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    is_idempotent: bool
    """By the server's own annotations: it only reads, or asking twice does no more than asking once."""


class McpServer:
    """See the module. Start it, call it from any event loop, stop it.

    Args:
        address: where it is, or how to start it.
        values: fills in and hides what comes from the environment.

    Raises:
        ConfigError: a variable of the environment is missing.
    """

    def __init__(self, address: McpAddress, values: EnvValues) -> None:
        self.address = address
        self._values = values
        self._command = [values.fill(part) for part in address.command]
        self._env = values.fill_all(address.env or {})
        self._headers = values.fill_all(address.headers or {})
        self._url = None if address.url is None else values.fill(address.url)
        self._thread = threading.Thread(target=self._main, name=f"mcp {address}", daemon=True)
        self._is_up = threading.Event()
        self._is_stopped = False
        self._loop: asyncio.AbstractEventLoop
        self._group: asyncio.TaskGroup
        self._stopping: asyncio.Event
        self._current: _Connection | None = None
        self._connections: set[_Connection] = set()

    def start(self) -> list[ListedTool]:
        """Connect and ask for the tools. Blocks for at most ``start_timeout_s`` and the end of a failed child.

        Raises:
            ConfigError: no server there; holds the end of its stderr.
        """
        self._thread.start()
        self._is_up.wait()
        atexit.register(self.stop)  # also when nobody calls aclose: a child must not outlive this process
        try:
            return asyncio.run_coroutine_threadsafe(self._connected(), self._loop).result().tools
        except AgentRLError as error:
            self.stop()
            raise ConfigError(str(error)) from error
        except BaseException:
            self.stop()
            raise

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """One call, from any event loop. Cancelling it cancels the request.

        Raises:
            ToolError: the server says that the call was wrong.
            ToolInfraError: it could not be reached, or broke off.
        """
        if self._is_stopped:
            raise ToolInfraError(f"MCP server `{self.address}` was stopped")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._call(name, arguments), self._loop))

    def stop(self) -> None:
        """End the session and the child process. May be called twice."""
        if not self._is_stopped:
            self._is_stopped = True
            atexit.unregister(self.stop)
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning("mcp_server_lingers server=%s: it did not end within %g s", self.address, STOP_TIMEOUT_S)

    async def aclose(self) -> None:
        """`stop`, without blocking the event loop."""
        await asyncio.to_thread(self.stop)

    # Within the thread

    def _main(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        async with asyncio.TaskGroup() as self._group:
            self._is_up.set()
            await self._stopping.wait()
            for connection in list(self._connections):
                connection.over.set()

    async def _connected(self) -> "_Connection":
        connection = self._current
        if connection is None or (connection.error is not None and time.monotonic() > connection.failed_at + RECONNECT_PAUSE_S):
            connection = self._current = _Connection()
            self._group.create_task(self._hold(connection), name=f"mcp {self.address}")
        await connection.settled.wait()
        if connection.error is not None:
            raise ToolInfraError(connection.error)
        return connection

    async def _call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED, INVALID_PARAMS, INVALID_REQUEST

        connection = await self._connected()
        connection.in_flight += 1
        try:
            result = await connection.client.call_tool(name, arguments)
        except MCPError as error:
            text = self._values.hide(error.message)
            if error.code == INVALID_PARAMS:
                raise ToolError(text) from None
            if error.code in (CONNECTION_CLOSED, INVALID_REQUEST):  # the latter: a restarted server does not know the session
                self._retire(connection)
            raise ToolInfraError(f"MCP server `{self.address}`: {text} (code {error.code}).{connection.stderr()}") from None
        finally:
            connection.in_flight -= 1
            if connection is not self._current and not connection.in_flight:
                connection.over.set()
        text = self._values.hide(text_of(result.content, result.structured_content))
        if result.is_error:
            raise ToolError(text or f"{name} failed")
        return ToolResult(text=text)

    def _retire(self, connection: "_Connection") -> None:
        """The next call gets a new session; calls in flight may finish in this one."""
        if connection is self._current:
            self._current = None
            logger.warning("mcp_session_lost server=%s: the next call makes a new one.%s", self.address, connection.stderr())

    async def _hold(self, connection: "_Connection") -> None:
        """A session from its start to its end; the child process ends with it."""
        import anyio
        import httpx2
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamable_http_client

        self._connections.add(connection)
        tail = _Tail(self._values)
        connection.stderr = tail.text
        scope = anyio.CancelScope(deadline=anyio.current_time() + self.address.start_timeout_s)
        try:
            with scope, tail as errlog:
                async with contextlib.AsyncExitStack() as stack:
                    if self._url is not None:
                        timeout = httpx2.Timeout(_HTTP_TIMEOUT_S, read=_HTTP_READ_TIMEOUT_S)
                        http = await stack.enter_async_context(httpx2.AsyncClient(headers=self._headers, timeout=timeout))
                        transport = streamable_http_client(self._url, http_client=http)
                    else:
                        parameters = StdioServerParameters(
                            command=self._command[0], args=self._command[1:], env=self._env, cwd=self.address.cwd
                        )
                        transport = stdio_client(parameters, errlog=errlog)
                    client = await stack.enter_async_context(Client(transport, cache=None))
                    connection.client = client
                    connection.tools = await _listed(client)
                    scope.deadline = math.inf
                    connection.settled.set()
                    await connection.over.wait()
            if scope.cancelled_caught:
                connection.fail(f"did not answer within start_timeout_s={self.address.start_timeout_s:g}", self)
        except Exception as error:  # noqa: BLE001  # of a library and a foreign process; told to whoever calls next
            connection.fail(self._values.hide(_causes(error)), self)
        finally:
            if self._current is connection and connection.error is None:
                self._current = None
            self._connections.discard(connection)


class _Connection:
    """One session's life. It is settled when its tools are known or it failed; it ends when ``over`` is set."""

    client: "Client"

    def __init__(self) -> None:
        self.tools: list[ListedTool] = []
        self.settled = asyncio.Event()
        self.over = asyncio.Event()
        self.error: str | None = None
        self.failed_at = 0.0
        self.in_flight = 0
        self.stderr: Callable[[], str] = str

    def fail(self, cause: str, server: McpServer) -> None:
        how = "could not be reached" if server.address.url else "did not start"
        self.error = f"MCP server `{server.address}` {how}: {cause}.{self.stderr()}"
        self.failed_at = time.monotonic()
        self.settled.set()


class _Tail:
    """The end of what a child writes to stderr, read as it comes so that the child never blocks on a full pipe."""

    def __init__(self, values: EnvValues) -> None:
        self._values = values
        self._kept = b""

    def __enter__(self) -> Any:
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        self._file = os.fdopen(write, "w")
        asyncio.get_running_loop().add_reader(self._read, self._drain)
        return self._file

    def __exit__(self, *_: object) -> None:
        self._drain()
        asyncio.get_running_loop().remove_reader(self._read)
        self._file.close()
        os.close(self._read)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._read, 65536):
                self._kept = (self._kept + part)[-_STDERR_BYTES:]

    def text(self) -> str:
        """The last lines, as the end of a message; empty where there are none."""
        lines = self._values.hide(self._kept.decode(errors="replace")).strip().splitlines()[-12:]
        return " Its stderr ends:\n" + "\n".join(lines) if lines else ""


async def _listed(client: "Client") -> list[ListedTool]:
    tools: list[ListedTool] = []
    cursor: str | None = None
    for _ in range(_MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            hints = tool.annotations
            tools.append(
                ListedTool(
                    name=tool.name,
                    description=tool.description or tool.title or "",
                    parameters=tool.input_schema,
                    is_idempotent=hints is not None and bool(hints.read_only_hint or hints.idempotent_hint),
                )
            )
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


def text_of(content: Sequence[Any], structured: Any) -> str:
    """What the model reads of a result: its texts; other content is named, not shown."""
    parts: list[str] = []
    for block in content:
        if block.type == "text":
            parts.append(block.text)
        elif block.type == "resource" and getattr(block.resource, "text", None) is not None:
            parts.append(block.resource.text)
        elif block.type == "resource_link":
            parts.append(f"{block.name}: {block.uri}")
        else:
            kind = getattr(block, "mime_type", None) or block.type
            parts.append(f"[{kind}: not text]")
    if not parts and structured is not None:
        return json.dumps(structured, ensure_ascii=False)
    return "\n".join(parts)


def _causes(error: BaseException) -> str:
    """The first cause inside groups of exceptions."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def command_of(command: str | Sequence[str], args: Sequence[str]) -> list[str]:
    """A command line; a bare ``python`` is the interpreter that runs agentrl, where the SDK is installed."""
    words = [command] if isinstance(command, str) else list(command)
    if words and words[0] in ("python", "python3"):
        words[0] = sys.executable
    return [*words, *args]
