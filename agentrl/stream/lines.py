"""Connections with many commands in flight.

redis-py's client takes a connection out of its pool for each command and keeps it until the reply. A put then costs more for that
than for encoding a trajectory. Here commands are written as they come and replies are read in their order, so small puts that wait for
the same fsync share writes and reads. What fills a socket's buffer goes to the next connection instead of waiting for its reader.

No task runs in the background: of the calls that wait, one reads for all until its own reply is there, then the next. A call that is
cancelled leaves its place in the order, and its reply is skipped.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

import hiredis
import redis.asyncio
from redis.exceptions import NoScriptError, RedisError

_MAX_LINES: Final = 8
_LINE_BYTES: Final = 128 << 10
"""In flight on one connection: below what Linux buffers for a socket, so that a write needs no second turn of the event loop."""


@dataclass(slots=True, eq=False)
class _Call:
    """A command that was sent, and the task that waits for it."""

    wake: asyncio.Future[None]
    done: bool = False
    answer: Any = None
    """The reply, or the error to raise."""
    is_abandoned: bool = False
    """Cancelled: somebody else has to read past its reply."""

    def rouse(self) -> None:
        if not self.wake.done():
            self.wake.set_result(None)

    def end(self, answer: Any) -> None:
        self.done, self.answer = True, answer
        self.rouse()


class Lines:
    """Runs scripts over as few connections as hold what is in flight. They live as long as the client, whose pool they are from.

    Args:
        client: from ``connect_async``.
        timeout_s: seconds without a reply after which a connection is given up and all its calls fail.
    """

    def __init__(self, client: redis.asyncio.Redis, *, timeout_s: float) -> None:
        self._lines = [_Line(client, timeout_s) for _ in range(_MAX_LINES)]

    async def script(self, text: str, sha: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        """The reply of a script, which is sent in full when the server does not know it.

        Raises:
            ResponseError: the server refused it.
            redis.ConnectionError, redis.TimeoutError: the reply may be lost; whether it ran is unknown.
        """
        try:
            return await self._call(_packed("EVALSHA", sha, len(keys), *keys, *args))
        except NoScriptError:
            return await self._call(_packed("EVAL", text, len(keys), *keys, *args))

    async def _call(self, packed: bytes) -> Any:
        has_room = (line for line in self._lines if not line.num_bytes or line.num_bytes + len(packed) <= _LINE_BYTES)
        line = next(has_room, None) or min(self._lines, key=attrgetter("num_bytes"))
        return await line.call(packed)


class _Line:
    """One connection, made at its first call and again after any failure."""

    def __init__(self, client: redis.asyncio.Redis, timeout_s: float) -> None:
        self._pool: Any = client.connection_pool
        self._timeout_s = timeout_s
        self._connection: Any = None
        self._connecting = asyncio.Lock()
        self._calls: deque[_Call] = deque()
        self._is_reading = False
        self.num_bytes = 0
        """Of commands without a reply."""

    async def call(self, packed: bytes) -> Any:
        self.num_bytes += len(packed)
        connection = self._connection
        try:
            async with asyncio.timeout(self._timeout_s):
                if connection is None or not connection.is_connected:
                    connection = await self._connect()
                answer = await self._answer_to(packed, connection)
        except TimeoutError:
            error = redis.TimeoutError(f"no reply for {self._timeout_s:g} s")
            await self._give_up(connection, error)
            raise error from None
        finally:
            self.num_bytes -= len(packed)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _answer_to(self, packed: bytes, connection: Any) -> Any:
        call = _Call(asyncio.get_running_loop().create_future())
        # In one step, with nothing awaited between them: replies come in the order of the writes.
        self._calls.append(call)
        try:
            try:
                await connection.send_packed_command([packed], check_health=False)
            except RedisError as error:
                await self._give_up(connection, error)
            while not call.done:
                if self._is_reading:
                    call.wake = asyncio.get_running_loop().create_future()
                    await call.wake
                else:
                    await self._read_until(call, connection)
        except BaseException:
            call.is_abandoned = True
            if not connection.is_connected:  # redis-py hangs up when a write is interrupted
                await self._give_up(connection, redis.ConnectionError("a write was interrupted"))
            self._rouse_a_reader()
            raise
        return call.answer

    async def _read_until(self, call: _Call, connection: Any) -> None:
        self._is_reading = True
        try:
            while not call.done:
                try:
                    answer = await connection.read_response(disconnect_on_error=False)
                except redis.ConnectionError as error:
                    await self._give_up(connection, error)
                    return
                except RedisError as error:
                    answer = error
                if connection is self._connection:
                    self._calls.popleft().end(answer)
        finally:
            self._is_reading = False
            self._rouse_a_reader()

    def _rouse_a_reader(self) -> None:
        if not self._is_reading:
            waiting = next((c for c in self._calls if not c.is_abandoned), None)
            if waiting is not None:
                waiting.rouse()

    async def _connect(self) -> Any:
        async with self._connecting:
            if self._connection is not None and not self._connection.is_connected:
                await self._give_up(self._connection, redis.ConnectionError("the connection was closed"))
            if self._connection is None:
                connection = await self._pool.get_connection()
                # With a timeout of its own it would write in another task, and the order of the writes would be lost.
                connection.socket_timeout = None
                self._connection = connection
            return self._connection

    async def _give_up(self, connection: Any, error: Exception) -> None:
        """Fail everything that waits for this connection."""
        if connection is None or connection is not self._connection:
            return
        self._connection = None
        calls, self._calls = self._calls, deque()
        for call in calls:
            call.end(error)
        connection.socket_timeout = self._timeout_s
        await connection.disconnect(nowait=True)
        await self._pool.release(connection)


def _packed(*command: str | bytes | int) -> bytes:
    return hiredis.pack_command(command)  # pyright: ignore[reportArgumentType]  # its stub has room for one
