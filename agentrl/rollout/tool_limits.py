"""What one tool may use: time, places, calls per second, tokens, attempts; and the cache of its answers."""

import asyncio
import json
import math
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agentrl.errors import ToolBusy
from agentrl.plugins import Truncate
from agentrl.protocols import ToolResult

BACKOFF_S = (0.2, 5.0)
"""Mean-doubling pauses between attempts: the longest first pause, and the longest of all."""

CacheScope = Literal["trajectory", "process"]
OnTimeout = Literal["observe", "infra"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLimits:
    """How many answers are kept, for how long, and for whom."""

    size: int = 1000
    """Answers; the one that was not asked for the longest goes first."""
    ttl_s: float = 300.0
    """Seconds for which an answer holds."""
    scope: CacheScope = "process"
    """``trajectory``: each rollout remembers its own. ``process``: rollouts share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolLimits:
    """What one tool may use."""

    timeout_s: float = 10.0
    """Of one call, its retries included. Waiting for a place under ``concurrency`` or the rate does not count."""
    on_timeout: OnTimeout = "observe"
    """Whose fault a call is that runs too long: ``observe`` tells the model (its program loops), ``infra`` fails the rollout
    without a reward (a service hangs, whatever the model asked)."""
    concurrency: int = 64
    """Calls at once in this process."""
    calls_per_s: float | None = None
    """Calls of this process that may start per second; None does not limit them."""
    burst: int | None = None
    """Calls that may start at once after a quiet time; by default what one second allows."""
    output_tokens: int = 512
    """Tokens of one result."""
    truncate: Truncate = "middle"
    """The side that is cut away from longer results: ``left`` keeps the tail, ``right`` the head."""
    max_infra_error_rate: float = 0.5
    """Of the latest calls; above it rollouts pause."""
    retries: int = 0
    """Further attempts after an infrastructure error; only for tools that are ``idempotent``."""
    cache: CacheLimits | None = None
    """Answers that are given again without asking; only for tools that are ``idempotent``."""


class RateLimit:
    """A token bucket: at most ``burst`` starts at once and ``per_s`` in the long run. First come, first served.

    Args:
        per_s: starts per second; None only holds the pauses that the service asks for.
        burst: starts after a quiet time; by default what one second allows.
        clock: monotonic seconds.
    """

    def __init__(self, per_s: float | None, burst: int | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._capacity = float(burst or max(1, math.ceil(per_s or 1)))
        self._clock = clock
        self._tokens = self._capacity
        self._refilled_at = clock()
        self._paused_until = 0.0
        self._turn = asyncio.Lock()

    def delay_s(self) -> float:
        """Seconds until a call may start; 0 when it may now."""
        now = self._clock()
        paused = max(0.0, self._paused_until - now)
        if self._per_s is None:
            return paused
        self._tokens = min(self._capacity, self._tokens + (now - self._refilled_at) * self._per_s)
        self._refilled_at = now
        # A wait that ended a rounding error too early would be followed by another of no length.
        return max(paused, 0.0 if self._tokens > 1 - 1e-9 else (1 - self._tokens) / self._per_s)

    def take(self) -> None:
        """Count a call that starts."""
        self._tokens -= 1

    def pause(self, seconds: float) -> None:
        """No call starts for so long: the service asked for it."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)

    async def wait(self, *, longest_pause_s: float = math.inf) -> None:
        """Wait for the turn and take it. A waiter that is cancelled takes nothing.

        Raises:
            ToolBusy: the service asked for a pause of which more than ``longest_pause_s`` is left.
        """
        if self._per_s is None and self._paused_until <= self._clock():
            return  # nothing to wait for, and nothing to take
        async with self._turn:
            while (delay := self.delay_s()) > 0:
                left = self._paused_until - self._clock()
                if left > longest_pause_s:
                    raise ToolBusy(f"asked not to be called for another {left:.0f} s", retry_after_s=left)
                await asyncio.sleep(delay)
            self.take()


class ResultCache:
    """The latest answers of a tool, by key; expired ones are forgotten when they are met.

    Args:
        limits: size and lifetime.
        clock: monotonic seconds.
    """

    def __init__(self, limits: CacheLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._results: OrderedDict[str, tuple[float, ToolResult]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: str) -> ToolResult | None:
        """The answer, if there is one that still holds."""
        found = self._results.get(key)
        if found is None:
            return None
        if found[0] <= self._clock():
            del self._results[key]
            return None
        self._results.move_to_end(key)
        return found[1]

    def put(self, key: str, result: ToolResult) -> None:
        """Remember an answer."""
        self._results[key] = (self._clock() + self._limits.ttl_s, result)
        self._results.move_to_end(key)
        while len(self._results) > self._limits.size:
            self._results.popitem(last=False)


def cache_key(arguments: Mapping[str, Any], kwargs: Mapping[str, Any], ground_truth: Any) -> str | None:
    """What an answer may depend on, as text; None where that cannot be written down, so the call is not cached."""
    try:
        return json.dumps([arguments, kwargs, ground_truth], sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None


def backoff_s(attempt: int, jitter: random.Random) -> float:
    """Pause after attempt ``attempt`` (from 0): uniform up to a bound that doubles, so that clients do not return together."""
    first, longest = BACKOFF_S
    return jitter.uniform(0.0, min(longest, first * 2.0**attempt))
