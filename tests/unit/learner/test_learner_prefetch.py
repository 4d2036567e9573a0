"""Reading ahead: order kept, bounded, errors come out where groups do, and nothing is lost at the end."""

import threading
import time
from collections.abc import Callable

import pytest
from learner_rig import random_group

from agentrl.errors import StreamError
from agentrl.learner.prefetch import Prefetcher
from agentrl.testing.waits import wait_until
from agentrl.types import TrajectoryGroup


class Source:
    def __init__(self, groups: list[TrajectoryGroup], *, then: Callable[[], None] = lambda: None) -> None:
        self.groups, self.taken, self._then = groups, 0, then
        self.threads: set[str] = set()

    def next_group(self, timeout_s: float) -> TrajectoryGroup | None:
        self.threads.add(threading.current_thread().name)
        if self.taken == len(self.groups):
            self._then()
            return None
        self.taken += 1
        return self.groups[self.taken - 1]


def test_groups_come_in_order_from_another_thread_and_no_more_than_the_capacity_is_read_ahead() -> None:
    source = Source([random_group(g, size=2) for g in range(6)])
    reader = Prefetcher(source, capacity=2)
    wait_until(lambda: source.taken == 3)  # two in the queue, one in hand
    time.sleep(0.05)
    assert source.taken == 3
    got = [reader.next_group(120.0) for _ in range(6)]
    assert [g.close.ordinal for g in got if g] == [0, 1, 2, 3, 4, 5]
    assert reader.next_group(0.01) is None
    assert reader.close() == 0
    assert source.threads == {"prefetch"}


def test_an_error_while_reading_is_raised_where_the_groups_are_taken() -> None:
    def fail() -> None:
        raise StreamError("the server is gone")

    reader = Prefetcher(Source([random_group(0, size=2)], then=fail), capacity=4)
    assert reader.next_group(120.0) is not None
    for _ in range(2):
        with pytest.raises(StreamError, match="gone"):
            reader.next_group(120.0)
    reader.close()


def test_closing_while_the_queue_is_full_ends_the_thread() -> None:
    reader = Prefetcher(Source([random_group(g, size=2) for g in range(5)]), capacity=1)
    assert reader.close() <= 1
    assert not any(t.name == "prefetch" and t.is_alive() for t in threading.enumerate())
