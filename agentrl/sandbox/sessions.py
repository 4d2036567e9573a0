"""Sessions by id: how many there may be, how long they live, and why one is gone."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from agentrl.errors import SandboxError
from agentrl.sandbox.job import CellOutcome, Limits
from agentrl.sandbox.kernel import Kernel
from agentrl.sandbox.pool import Pool

log = logging.getLogger(__name__)

_CHECK_INTERVAL_S = 0.5
_REMEMBERED_ENDS = 10_000
_MIN_FREE_MEMORY = 0.1
"""Below this share of the machine's memory, idle sessions are given up, least recently used first."""

WHY_ENDED: Mapping[str, str] = {
    "idle": "it was idle for too long",
    "ttl": "it reached its total time to live",
    "evicted": "it was the least recently used when a place was needed",
    "low_memory": "it was idle when the machine ran short of memory",
    "deleted": "it was deleted",
    "disconnected": "its client went away during a cell",
    "wall": "a cell did not stop at its timeout",
    "cpu": "it used up its CPU time",
    "memory": "its processes held more memory than its limit",
    "output": "a cell printed far too much and did not stop",
    "signal": "its process was killed by a signal",
    "exit": "its process exited",
    "ok": "its process exited",
    "lost": "its fork server died",
    "shutdown": "the service is shutting down",
}


class SessionGone(Exception):
    """There is no such session any more; ``reason`` is a key of ``WHY_ENDED``, or "unknown"."""

    def __init__(self, session_id: str, reason: str) -> None:
        why = WHY_ENDED.get(reason, "no session of that id is known")
        super().__init__(f"session {session_id[:40]!r} is gone: {why}. Open a new one; its variables and files are lost.")
        self.reason = reason


class NoSessionFree(Exception):
    """All sessions are in use."""


@dataclass(slots=True, kw_only=True)
class Session:
    """One open session."""

    id: str
    kernel: Kernel
    slot: int
    limits: Limits
    idle_ttl_s: float
    expires: float
    """Monotonic time of its total end."""
    last_used: float
    cells: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Sessions:
    """All sessions of one pool. Use ``async with sessions.running()`` inside the pool's own."""

    def __init__(self, pool: Pool, *, max_sessions: int, first_slot: int, id_prefix: str = "") -> None:
        self.max_sessions = max_sessions
        self.ended: dict[str, int] = {}
        """How many ended, by reason."""
        self._pool = pool
        self._prefix = id_prefix
        self._open: OrderedDict[str, Session] = OrderedDict()  # least recently used first
        self._free_slots = deque(range(first_slot, first_slot + max_sessions))
        self._graves: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Watch over the sessions' ages; end them all with the block."""
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(self._keep())
            try:
                yield
            finally:
                keeper.cancel()
                for session in list(self._open.values()):
                    await self._end(session, "shutdown")

    async def open(self, limits: Limits, *, idle_ttl_s: float, ttl_s: float) -> Session:
        """Start one; the least recently used idle one makes place when there are as many as may be.

        Raises:
            NoSessionFree: all are running a cell.
            SandboxError: the service could not start it.
        """
        if not self._free_slots:
            await self._evict("evicted")
        if not self._free_slots:
            raise NoSessionFree(f"all {self.max_sessions} sessions are running a cell")
        slot = self._free_slots.popleft()
        try:
            kernel = await self._pool.open_session(limits, slot)
        except BaseException:
            self._free_slots.append(slot)
            raise
        now = time.monotonic()
        session = Session(
            id=f"{self._prefix}{secrets.token_hex(16)}",
            kernel=kernel,
            slot=slot,
            limits=limits,
            idle_ttl_s=idle_ttl_s,
            expires=now + ttl_s,
            last_used=now,
        )
        self._open[session.id] = session
        return session

    @asynccontextmanager
    async def use(self, session_id: str) -> AsyncGenerator[Session, None]:
        """Hold a session for one cell; others wait their turn.

        Raises:
            SessionGone: there is none of that id, or it ended while this waited.
        """
        session = self._find(session_id)
        async with session.lock:
            session = self._find(session_id)
            self._open.move_to_end(session_id)
            try:
                yield session
            except asyncio.CancelledError:
                await self._end(session, "disconnected")
                raise
            except SandboxError as error:
                await self._end(session, "lost")
                raise SessionGone(session_id, "lost") from error
            finally:
                session.last_used = time.monotonic()

    async def finish_cell(self, session: Session, outcome: CellOutcome) -> None:
        """Count a cell, and bury the session when the cell was its end."""
        session.cells += 1
        if not outcome.is_alive:
            await self._end(session, session.kernel.end_reason)

    async def delete(self, session_id: str) -> None:
        """End one now, also while it runs a cell.

        Raises:
            SessionGone: it has ended before.
        """
        await self._end(self._find(session_id), "deleted")

    def _find(self, session_id: str) -> Session:
        session = self._open.get(session_id)
        if session is None:
            raise SessionGone(session_id, self._graves.get(session_id, "unknown"))
        return session

    async def _end(self, session: Session, reason: str) -> None:
        if self._open.pop(session.id, None) is None:
            return
        self._graves[session.id] = reason
        while len(self._graves) > _REMEMBERED_ENDS:
            self._graves.popitem(last=False)
        self.ended[reason] = self.ended.get(reason, 0) + 1
        try:
            await asyncio.shield(self._release(session))
        except asyncio.CancelledError:
            log.debug("the end of a session was not awaited id=%s", session.id)
            raise

    async def _release(self, session: Session) -> None:
        await session.kernel.close()
        self._free_slots.append(session.slot)

    async def _evict(self, reason: str) -> None:
        idle = next((session for session in self._open.values() if not session.lock.locked()), None)
        if idle is not None:
            log.info("session given up reason=%s idle_s=%.0f", reason, time.monotonic() - idle.last_used)
            await self._end(idle, reason)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            now = time.monotonic()
            for session in list(self._open.values()):
                idle = not session.lock.locked()
                if not session.kernel.is_alive and idle:
                    await self._end(session, session.kernel.end_reason)
                elif idle and now - session.last_used > session.idle_ttl_s:
                    await self._end(session, "idle")
                elif now > session.expires:
                    await self._end(session, "ttl")
            if self._open and _free_memory_share() < _MIN_FREE_MEMORY:
                await self._evict("low_memory")


def _free_memory_share() -> float:
    """Available memory as a share of the machine's."""
    sizes: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines()[:5]:
            name, _, value = line.partition(":")
            sizes[name] = int(value.split()[0])
    return sizes["MemAvailable"] / sizes["MemTotal"] if {"MemAvailable", "MemTotal"} <= sizes.keys() else 1.0
