"""A circuit breaker: most of the latest calls failed, so stop making them, and probe now and then. Pure but for the clock."""

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

FIRST_PAUSE_SHARE = 1 / 8
"""Of the longest pause. Most outages are a restart of seconds, after which every second of a pause is lost."""


class CircuitBreaker:
    """Open while more than ``max_rate`` of the latest calls failed; closed again by the first success.

    Args:
        window: latest calls that count.
        min_calls: calls before it may open: two failures of three say little.
        max_rate: share of failures above which it opens.
        cooldown_s: longest pause between probes while open, in seconds; the first is an eighth of it, each further one twice the last.
        clock: monotonic seconds.
    """

    def __init__(
        self, *, window: int, min_calls: int, max_rate: float, cooldown_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._latest: deque[bool] = deque(maxlen=window)
        self._min_calls = min_calls
        self._max_rate = max_rate
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._pause_s = cooldown_s
        self._probe_at = 0.0
        self.is_open = False

    @property
    def failed(self) -> int:
        """Failures among the latest calls."""
        return sum(self._latest)

    @property
    def seen(self) -> int:
        return len(self._latest)

    def record(self, *, ok: bool) -> Literal["opened", "closed", ""]:
        """Count one call; says whether the circuit changed."""
        self._latest.append(not ok)
        if self.is_open:
            if not ok:
                return ""
            self.is_open = False
            self._latest.clear()
            return "closed"
        if self.seen >= self._min_calls and self.failed / self.seen > self._max_rate:
            self.is_open = True
            self._pause_s = FIRST_PAUSE_SHARE * self._cooldown_s
            self._probe_at = self._clock() + self._pause_s
            return "opened"
        return ""

    @property
    def is_blocking(self) -> bool:
        """Open, and not time for a probe yet. Asking changes nothing."""
        return self.is_open and self._clock() < self._probe_at

    def allows(self) -> bool:
        """Whether to go on; while open, True once per pause, for a probe."""
        if self.is_blocking:
            return False
        self._pause_s = min(2 * self._pause_s, self._cooldown_s)
        self._probe_at = self._clock() + self._pause_s
        return True
