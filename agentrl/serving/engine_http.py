"""Requests to one engine over kept connections: as much of HTTP/1.1 as engines speak, and no more.

Only generation goes this way; control calls use the shared session. A general client makes a request, a response, a stream
and a task for every request and wakes its caller at every piece of the answer, which costs more than all that the manager
does besides. Here the pieces go to a function as they arrive, and the caller wakes once, when the answer is whole.

The parser is llhttp, by httptools. What is spoken: a POST with its length; answers with a length, in chunks, or until the
connection ends; interim answers (1xx) are passed over. No redirects, proxies or compression: none is asked for, and an engine
that answers so is refused by its status or its bytes. Whatever is not HTTP is a `BrokenAnswer`.

Waits for: a connection (bounded here), and the answer, bounded by its caller and, where asked for, by the longest silence.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import httptools
from yarl import URL

from agentrl.process import REUSED_WITHIN_S

_MAX_HEAD = 64 << 10
"""Bytes of an answer's head; more is no HTTP."""


class BrokenAnswer(ConnectionError):
    """The connection ended before the answer did, or what came is not HTTP/1.1."""


class Head(NamedTuple):
    """Begin of an answer."""

    status: int
    content_type: str
    """Without parameters, in small letters."""


Reader: TypeAlias = Callable[[Head], Callable[[bytes], None]]
"""Given the head, says who takes the pieces of the body. What it raises ends the request."""


class EngineConnections:
    """Connections to one address, opened as they are needed and used again.

    Args:
        url: where requests go; ``https`` verifies the server's certificate.
        headers: sent with each request, besides its host and length.
        connect_timeout_s: limit for opening a connection.
        stall_timeout_s: longest silence while an answer is awaited; None leaves it to the caller.
    """

    def __init__(self, url: URL, *, headers: dict[str, str], connect_timeout_s: float, stall_timeout_s: float | None) -> None:
        if url.host is None or url.port is None:
            raise ValueError(f"{url} names no host; give http://host:port")
        if any(c in "\r\n" for value in headers.values() for c in value):
            raise ValueError("a header (an API key?) holds a line break")
        self._host, self._port = url.host, url.port
        self._ssl = ssl.create_default_context() if url.scheme == "https" else None
        lines = [f"POST {url.raw_path_qs} HTTP/1.1", f"Host: {url.host_subcomponent}:{url.port}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._head = "\r\n".join([*lines, "Content-Length: "]).encode("latin-1")
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._idle: list[_Connection] = []
        self._is_closed = False

    async def post(self, body: bytes, read: Reader) -> Head:
        """Send a request and hand the answer to ``read`` as it arrives; returns when it is whole.

        Cancelling it closes the connection.

        Raises:
            OSError: no connection within its limit, it broke, or what came is not HTTP (`BrokenAnswer`).
            TimeoutError: the server was silent for too long.
        """
        if self._is_closed:
            raise BrokenAnswer("the connections to this server were closed")
        connection = self._take_idle() or await self._connect()
        try:
            head = await connection.exchange(b"%b%d\r\n\r\n" % (self._head, len(body)), body, read, self._stall_timeout_s)
        except BaseException:
            connection.abort()
            raise
        if connection.can_be_kept and not self._is_closed:
            self._idle.append(connection)
        else:
            connection.abort()
        return head

    def close(self) -> None:
        """Close what is idle now, and the others at the end of their requests."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().abort()

    def _take_idle(self) -> "_Connection | None":
        """The one that was used last: what it leaves to grow old is closed when it is met."""
        oldest = asyncio.get_running_loop().time() - REUSED_WITHIN_S
        while self._idle:
            connection = self._idle.pop()
            if connection.can_be_kept and connection.idle_since >= oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._connect_timeout_s):
            _, connection = await loop.create_connection(lambda: _Connection(loop), self._host, self._port, ssl=self._ssl)
        return connection


class _Connection(asyncio.Protocol):
    """One connection; it carries one request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._answer: _Answer | None = None
        self._whole: asyncio.Future[Head] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._last_arrival = 0.0
        self.can_be_kept = True
        """Another request may follow."""
        self.idle_since = 0.0

    async def exchange(self, head: bytes, body: bytes, read: Reader, stall_timeout_s: float | None) -> Head:
        assert self._transport is not None
        assert self._whole is None, "a connection carries one request at a time"
        self._answer, self._whole = _Answer(read), self._loop.create_future()
        self._transport.writelines((head, body))
        if stall_timeout_s is not None:
            self._last_arrival = self._loop.time()
            self._end_when_silent(stall_timeout_s)
        try:
            answered = await self._whole
        finally:
            if self._watch is not None:
                self._watch.cancel()
            self._answer = self._whole = self._watch = None
        self.idle_since = self._loop.time()
        return answered

    def abort(self) -> None:
        """Close without another word; what was not sent yet is not waited for."""
        self.can_be_kept = False
        if self._transport is not None:
            self._transport.abort()

    def _end_when_silent(self, limit_s: float) -> None:
        left_s = self._last_arrival + limit_s - self._loop.time()
        if left_s <= 0:
            self._fail(TimeoutError(f"nothing came for {limit_s:g} s"))
        else:
            self._watch = self._loop.call_later(left_s, self._end_when_silent, limit_s)

    def _fail(self, error: Exception) -> None:
        self.can_be_kept = False
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(error)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # pyright: ignore[reportAttributeAccessIssue]  # uvloop's are not subclasses

    def data_received(self, data: bytes) -> None:
        answer, whole = self._answer, self._whole
        if answer is None or whole is None or whole.done():
            self.abort()  # nobody asked
            return
        self._last_arrival = self._loop.time()
        try:
            is_whole = answer.feed(data)
        except Exception as error:  # noqa: BLE001  # of the reader, or of what was read: the caller's, who waits for it
            self._fail(error)
            return
        if is_whole:
            self._end(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.can_be_kept = False
        if self._answer is not None and exc is None and self._answer.ends_with_connection:
            self._end(self._answer)
        else:
            self._fail(exc if isinstance(exc, OSError) else BrokenAnswer("the connection ended before the answer did"))

    def _end(self, answer: "_Answer") -> None:
        self.can_be_kept = self.can_be_kept and answer.leaves_connection
        assert answer.head is not None
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(answer.head)


class _Answer:
    """One answer, read as it arrives. The methods ``on_...`` are called by the parser, and must not raise."""

    def __init__(self, read: Reader) -> None:
        self._read = read
        self._take: Callable[[bytes], None] | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self._num_head_bytes = 0
        self._is_whole = False
        self.head: Head | None = None
        self.ends_with_connection = False
        """It says no other end."""
        self.leaves_connection = True
        """Another request may follow on its connection."""

    def feed(self, data: bytes) -> bool:
        """Read on. True when the answer is whole.

        Raises:
            BrokenAnswer: this is not HTTP/1.1, or comes in a coding that nobody asked for.
        """
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._is_whole:
                raise BrokenAnswer(f"the answer is not HTTP/1.1 ({error}): {data[:80]!r}") from error
            self.leaves_connection = False  # what follows belongs to no request
        if self.head is None:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > _MAX_HEAD:
                raise BrokenAnswer(f"{self._num_head_bytes} bytes and no end of the answer's head")
            return False
        if self._take is None:
            coding = self._headers.get(b"transfer-encoding", b"chunked")
            if coding.lower() != b"chunked":
                raise BrokenAnswer(f"the answer comes as {coding[:80]!r}, which was not asked for")
            self._take = self._read(self.head)
        if self._pieces:
            self._take(self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces))
            self._pieces.clear()
        if self._is_whole:
            self._parser = None  # it holds this object, too
        return self._is_whole

    def on_message_begin(self) -> None:
        self._headers.clear()  # of an interim answer
        if self._is_whole:
            self.leaves_connection = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head is None:
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self.head is None and status >= 200:
            content_type = self._headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            self.head = Head(status, content_type.decode("latin-1"))
            has_end = b"content-length" in self._headers or b"transfer-encoding" in self._headers
            self.ends_with_connection = not has_end and status not in (204, 304)

    def on_body(self, body: bytes) -> None:
        if not self._is_whole:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        if self.head is not None and not self._is_whole:
            self._is_whole = True
            self.leaves_connection = bool(self._parser.should_keep_alive())
