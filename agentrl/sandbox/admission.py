"""How many runs at once and how many may wait. Past that the answer is 429, at once, instead of a timeout much later.

Clients take turns: a flood of one delays the others by one run each, and gives its own places up when the queue is full.
"""

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass


class QueueFull(Exception):
    """As many requests wait as may. ``retry_after_s`` is when a place is likely."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} requests already wait for the sandbox; retry in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Draining(Exception):
    """The service is about to stop and takes nothing new."""

    def __init__(self) -> None:
        super().__init__("the sandbox is shutting down and takes no more runs")


class WaitedTooLong(Exception):
    """The request's own deadline passed while it waited."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no slot became free within the request's total_timeout of {seconds:g} s")


@dataclass(frozen=True, slots=True)
class Permit:
    """A place to run. ``slot`` is held by one run at a time; ``queue_time_s`` is how long it took to get."""

    slot: int
    queue_time_s: float


class Admission:
    """``capacity`` slots and a bounded queue before them: clients in turn, each client's requests in order of arrival."""

    def __init__(self, capacity: int, max_queue: int) -> None:
        self.capacity = capacity
        self.max_queue = max_queue
        self._free = deque(range(capacity))
        self._waiting: OrderedDict[str, deque[asyncio.Future[int]]] = OrderedDict()  # the next client's turn is first
        self._num_waiting = 0
        self._typical_run_s = 0.1
        self._draining = False

    @property
    def running(self) -> int:
        return self.capacity - len(self._free)

    @property
    def waiting(self) -> int:
        return self._num_waiting

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Refuse what waits and what comes; what runs goes on."""
        self._draining = True
        for turns in self._waiting.values():
            for turn in turns:
                if not turn.done():
                    turn.set_exception(Draining())
        self._waiting.clear()
        self._num_waiting = 0

    @asynccontextmanager
    async def permit(self, client: str = "", *, timeout_s: float | None = None) -> AsyncGenerator[Permit, None]:
        """Hold a slot for the block; waits in the queue for it.

        Args:
            client: whose turn it uses.
            timeout_s: the longest it may wait; None waits for ever.

        Raises:
            QueueFull: the queue is at its limit.
            WaitedTooLong: ``timeout_s`` passed.
            Draining: the service is about to stop.
        """
        arrived = time.monotonic()
        scope = asyncio.timeout(timeout_s)
        try:
            async with scope:
                slot = await self._acquire(client)
        except TimeoutError as error:
            if timeout_s is not None and scope.expired():
                raise WaitedTooLong(timeout_s) from error
            raise
        started = time.monotonic()
        try:
            yield Permit(slot, started - arrived)
        finally:
            self._typical_run_s += 0.1 * (time.monotonic() - started - self._typical_run_s)
            self._release(slot)

    async def _acquire(self, client: str) -> int:
        if self._draining:
            raise Draining
        if self._free:
            return self._free.popleft()
        if self._num_waiting >= self.max_queue:
            self._make_place_for(client)
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self._num_waiting += 1
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._release(turn.result())
            else:
                self._forget(client, turn)
            raise

    def _make_place_for(self, client: str) -> None:
        """The newest request of the client with the most gives way, if that client has at least two more than this one."""
        greedy = max(self._waiting, key=lambda name: len(self._waiting[name]), default="")
        fewer = len(self._waiting.get(client, ())) + 1 < len(self._waiting.get(greedy, ()))
        full = QueueFull(self._num_waiting, self._retry_after_s())
        if not fewer:
            raise full
        turn = self._waiting[greedy][-1]
        self._forget(greedy, turn)
        if not turn.done():
            turn.set_exception(full)

    def _forget(self, client: str, turn: asyncio.Future[int]) -> None:
        turns = self._waiting.get(client)
        if turns is None or turn not in turns:
            return  # a release or a drain has already passed it over
        turns.remove(turn)
        self._num_waiting -= 1
        if not turns:
            del self._waiting[client]

    def _release(self, slot: int) -> None:
        while self._waiting:
            client, turns = next(iter(self._waiting.items()))
            turn = turns.popleft()
            self._num_waiting -= 1
            if turns:
                self._waiting.move_to_end(client)
            else:
                del self._waiting[client]
            if not turn.done():
                turn.set_result(slot)
                return
        self._free.append(slot)

    def _retry_after_s(self) -> int:
        estimate = self._typical_run_s * (self._num_waiting + self.running) / self.capacity
        return max(1, min(30, math.ceil(estimate)))
