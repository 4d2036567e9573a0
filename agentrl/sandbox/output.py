"""What passes between the service and a run: bounded capture of its output, and memory files that it cannot change."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable
from typing import Self

_READ_SIZE = 65536


class CappedOutput:
    """Reads one descriptor until every writer is gone: head and tail are kept, the rest is counted, no writer waits.

    Owns and closes it.
    """

    @classmethod
    def pipe(cls, *, keep_bytes: int, limit_bytes: int, on_limit: Callable[[], None]) -> tuple[Self, int]:
        """A new pipe: what reads it, and the writer's end, which the caller closes."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        return cls(reader, keep_bytes=keep_bytes, limit_bytes=limit_bytes, on_limit=on_limit), writer

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

    def drain(self) -> None:
        """Take what is in the pipe now, without waiting for its end: the writer has said that it is done."""
        while self._fd >= 0:
            before = self._total
            self._read()
            if self._total == before:
                return

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


def sealed_memory(stack: contextlib.ExitStack, data: bytes) -> int:
    """A memory file that its receiver can read but neither write nor grow; closed with the stack."""
    fd = os.memfd_create("job", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, fd)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return fd
