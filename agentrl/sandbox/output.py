"""Bounded capture of a pipe on the event loop: head and tail are kept, the rest is counted, nothing blocks the writer."""

import asyncio
import os
from collections.abc import Callable

_READ_SIZE = 65536


class CappedOutput:
    """Reads one descriptor until every writer is gone. Owns and closes it."""

    def __init__(self, fd: int, *, keep_bytes: int, limit_bytes: int, on_limit: Callable[[], None]) -> None:
        self._fd = fd
        self._head_size = keep_bytes * 3 // 4
        self._tail_size = keep_bytes - self._head_size
        self._limit = limit_bytes
        self._on_limit = on_limit
        self._head = bytearray()
        self._tail = bytearray()
        self._total = 0
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    async def ended(self) -> None:
        """Wait until the last writer has closed its end."""
        await self._ended.wait()

    def close(self) -> None:
        """Stop reading. Safe to call twice."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._ended.set()

    @property
    def truncated(self) -> bool:
        return self._total > len(self._head) + len(self._tail)

    def text(self) -> str:
        """What was kept, with a note where the middle is missing; invalid UTF-8 becomes U+FFFD."""
        missing = self._total - len(self._head) - len(self._tail)
        if missing <= 0:
            return (self._head + self._tail).decode("utf-8", "replace")
        note = f"\n... [{missing} bytes omitted] ...\n"
        return self._head.decode("utf-8", "replace") + note + self._tail.decode("utf-8", "replace")

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _READ_SIZE)
        except BlockingIOError:
            return
        if not data:
            self.close()
            return
        was_below = self._total <= self._limit
        self._total += len(data)
        room = self._head_size - len(self._head)
        self._head += data[:room] if room > 0 else b""
        rest = data[max(room, 0) :]
        if rest:
            self._tail += rest
            del self._tail[: -self._tail_size]
        if was_below and self._total > self._limit:
            self._on_limit()
