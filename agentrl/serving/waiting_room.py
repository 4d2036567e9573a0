"""Where requests wait while no server may take them, in the order in which they will be served.

Evaluation before training, what was begun before what is new, and within that first come, first served. Only the front
is woken; whoever is served wakes the next, so nobody overtakes and nobody is woken for nothing.
"""

import asyncio
from bisect import insort
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count


class Priority(IntEnum):
    """Whose requests go first when not all can go."""

    EVALUATION = 0
    TRAINING = 1


@dataclass(slots=True, order=True)
class Place:
    """One request's place in the queue; it keeps it until it is served or gives up."""

    priority: int
    is_new: bool
    """Nothing of its trajectory was generated yet."""
    number: int
    woken: asyncio.Future[None] | None = field(default=None, compare=False)


class WaitingRoom:
    """Parked requests. It belongs to one event loop."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._places)

    def enter(self, priority: Priority, *, is_new: bool) -> Place:
        """Queue up. ``leave`` must follow, whatever happens."""
        place = Place(int(priority), is_new, next(self._numbers))
        insort(self._places, place)
        return place

    def is_first(self, place: Place | None, priority: Priority, *, is_new: bool) -> bool:
        """Whether nobody has to be served before; without a place, whether one may go past the queue."""
        if not self._places:
            return True
        front = self._places[0]
        return front is place if place is not None else (int(priority), is_new) < (front.priority, front.is_new)

    def leave(self, place: Place) -> None:
        """Give the place up and let the next in line look."""
        self._places.remove(place)
        self.wake()

    async def sleep(self, place: Place, *, limit_s: float) -> None:
        """Sleep until woken, at most ``limit_s`` seconds."""
        loop = asyncio.get_running_loop()
        place.woken = loop.create_future()
        timer = loop.call_later(max(limit_s, 0.001), _resolve, place.woken)
        try:
            await place.woken
        finally:
            timer.cancel()
            place.woken = None

    def wake(self) -> None:
        """Something changed: the front looks again."""
        if self._places and self._places[0].woken is not None:
            _resolve(self._places[0].woken)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
