"""How many runs at once and how many may wait. Past that the answer is 429, at once, instead of a timeout much later."""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass


class QueueFull(Exception):
    """As many requests wait as may. ``retry_after_s`` is when a place is likely."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} requests already wait for the sandbox; retry in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Permit:
    """A place to run. ``slot`` is held by one run at a time; ``queue_time_s`` is how long it took to get."""

    slot: int
    queue_time_s: float


class Admission:
    """``capacity`` slots, first come first served, and a bounded queue before them."""

    def __init__(self, capacity: int, max_queue: int) -> None:
        self.capacity = capacity
        self.max_queue = max_queue
        self._free = deque(range(capacity))
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._typical_run_s = 0.1

    @property
    def running(self) -> int:
        return self.capacity - len(self._free)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def permit(self) -> AsyncGenerator[Permit, None]:
        """Hold a slot for the block; waits in the queue for it.

        Raises:
            QueueFull: the queue is at its limit.
        """
        arrived = time.monotonic()
        slot = await self._acquire()
        started = time.monotonic()
        try:
            yield Permit(slot, started - arrived)
        finally:
            self._typical_run_s += 0.1 * (time.monotonic() - started - self._typical_run_s)
            self._release(slot)

    async def _acquire(self) -> int:
        if self._free:
            return self._free.popleft()
        if len(self._waiting) >= self.max_queue:
            raise QueueFull(len(self._waiting), self._retry_after_s())
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release(turn.result())
            elif turn in self._waiting:  # else a release has already passed it over
                self._waiting.remove(turn)
            raise

    def _release(self, slot: int) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(slot)
                return
        self._free.append(slot)

    def _retry_after_s(self) -> int:
        estimate = self._typical_run_s * (len(self._waiting) + self.running) / self.capacity
        return max(1, min(30, math.ceil(estimate)))
