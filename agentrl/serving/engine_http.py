"""Requests to one engine over kept connections: as much of HTTP/1.1 as engines speak, and no more.

Only generation goes this way; control calls use the shared session. A general client makes a request, a response, a stream
and a task for every request and wakes its caller at every piece of the answer, which costs more than all that the manager
does besides. Here the pieces go to a function as they arrive, and the caller wakes once, when the answer is whole.

What is spoken: a POST with its length; answers with a length, in chunks, or until the connection ends; interim answers (1xx)
are passed over. No redirects, proxies or compression: none is asked for, and an engine that answers so is refused by its
status or its bytes. Whatever is not HTTP is a `BrokenAnswer`.

Waits for: a connection (bounded here), and the answer, bounded by its caller and, where asked for, by the longest silence.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

from yarl import URL

_KEPT_S = 4.0
"""Idle connections are used again for so long. Uvicorn closes them after 5 s, and what is sent into a closing connection is lost."""
_MAX_HEAD = 64 << 10
_MAX_LINE = 4 << 10
"""Bytes of an answer's head, and of the size line of a chunk; more is no HTTP."""
_HEX = frozenset(b"0123456789abcdefABCDEF")


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
        oldest = asyncio.get_running_loop().time() - _KEPT_S
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
    """One answer, read as it arrives."""

    def __init__(self, read: Reader) -> None:
        self._read = read
        self._take: Callable[[bytes], None] | None = None
        self._rest = b""
        self._left = 0
        """Bytes of the body, or of the chunk, that are still to come."""
        self._part: Literal["body", "size", "chunk", "chunk end", "trailer", "until close"] = "body"
        self.head: Head | None = None
        self.leaves_connection = True

    @property
    def ends_with_connection(self) -> bool:
        return self.head is not None and self._part == "until close"

    def feed(self, data: bytes) -> bool:
        """Read on. True when the answer is whole.

        Raises:
            BrokenAnswer: this is not HTTP/1.1.
        """
        if self._rest:
            data, self._rest = self._rest + data, b""
        at = 0
        while self.head is None:
            end = data.find(b"\r\n\r\n", at)
            if end < 0:
                self._keep(data[at:], _MAX_HEAD)
                return False
            self._begin(data[at:end])
            at = end + 4
        pieces: list[bytes] = []
        is_whole = self._read_body(data, at, pieces)
        if pieces:
            assert self._take is not None
            self._take(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        return is_whole

    def _keep(self, rest: bytes, limit: int) -> None:
        if len(rest) > limit:
            raise BrokenAnswer(f"{len(rest)} bytes without an end of line: {rest[:80]!r}")
        self._rest = rest

    def _begin(self, text: bytes) -> None:
        first, *lines = text.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        code = rest[:3]
        if version not in ("HTTP/1.1", "HTTP/1.0") or len(code) != 3 or not code.isascii() or not code.isdigit():
            raise BrokenAnswer(f"the answer begins with {first[:80]!r}, which is not HTTP/1.1")
        status = int(code)
        if 100 <= status < 200:
            return
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        is_asked_to_close = "close" in headers.get("connection", "").lower()
        self.leaves_connection = version == "HTTP/1.1" and not is_asked_to_close
        length, coding = headers.get("content-length"), headers.get("transfer-encoding")
        if coding is not None:
            if coding.lower() != "chunked":
                raise BrokenAnswer(f"the answer comes as {coding[:80]!r}, which was not asked for")
            self._part = "size"
        elif length is not None or status in (204, 304):
            if length is not None and not (length.isascii() and length.isdigit()):
                raise BrokenAnswer(f"the answer's length is {length[:80]!r}")
            self._left = 0 if status in (204, 304) else int(length or 0)
        else:
            self._part, self.leaves_connection = "until close", False
        self.head = Head(status, headers.get("content-type", "").partition(";")[0].strip().lower())
        self._take = self._read(self.head)

    def _read_body(self, data: bytes, at: int, pieces: list[bytes]) -> bool:
        """Collect what belongs to the body; returns whether it is whole."""
        if self._part == "until close":
            pieces.append(data[at:])
            return False
        if self._part == "body":
            pieces.append(data[at : at + self._left])
            self._left -= len(pieces[0])
            return self._left == 0 and self._ends_at(at + len(pieces[0]), data)
        return self._read_chunks(data, at, pieces)

    def _read_chunks(self, data: bytes, at: int, pieces: list[bytes]) -> bool:
        while True:
            if self._part == "chunk":
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    return False
                self._part = "chunk end"
            end = data.find(b"\r\n", at)
            if end < 0:
                self._keep(data[at:], _MAX_LINE)
                return False
            line, at = data[at:end], end + 2
            if self._part == "chunk end":
                if line:
                    raise BrokenAnswer(f"a chunk is longer than it says: {line[:80]!r}")
                self._part = "size"
            elif self._part == "size":
                self._left = _chunk_size(line)
                self._part = "chunk" if self._left else "trailer"
            elif not line:  # the end of the trailer
                return self._ends_at(at, data)

    def _ends_at(self, at: int, data: bytes) -> bool:
        if at < len(data):  # what follows belongs to no request
            self.leaves_connection = False
        return True


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not 0 < len(digits) <= 8 or not _HEX.issuperset(digits):
        raise BrokenAnswer(f"{line[:80]!r} is not the size of a chunk")
    return int(digits, 16)
