"""When to stop trying: a run whose rollouts all fail, probe after probe, ends with what failed instead of probing for ever."""

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agentrl.errors import StalledError

EXIT_GAVE_UP = 3
"""Exit code of a process that gave up after long trying: its supervisor does not start it again."""
LOOK_EVERY_S = 5.0


class FailureBudgetSpent(StalledError):
    """For longer than ``serve.failure_budget_s`` every rollout failed."""

    exit_code = EXIT_GAVE_UP


class FailureBudget:
    """Adds up the time of one wave of failures. A rollout that finishes ends the wave; time in which the learner has to make room
    does not count, for nothing is tried then.

    Args:
        limit_s: seconds of one wave; None never gives up.
        events: where the failures are recorded, for the message.
        clock: monotonic seconds.
    """

    def __init__(self, limit_s: float | None, *, events: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._events, self._clock = limit_s, events, clock
        self._finished: object = None
        self._failed_before: dict[str, int] = {}
        self._failed_last: dict[str, int] = {}
        self._looked_at = clock()
        self.spent_s = 0.0

    async def watch(self, status: Callable[[], Mapping[str, Any]]) -> None:
        """Look every few seconds until cancelled.

        Raises:
            FailureBudgetSpent: the budget is spent.
        """
        while True:
            await asyncio.sleep(LOOK_EVERY_S if self._limit_s is None else min(LOOK_EVERY_S, self._limit_s / 4))
            self.look(status())

    def look(self, status: Mapping[str, Any]) -> None:
        """Take note of what ``status/serve.json`` says: ``failing``, ``finished``, ``failed`` and ``waits``.

        Raises:
            FailureBudgetSpent: with the kinds of failures of this wave.
        """
        now, failed = self._clock(), dict(status.get("failed") or {})
        passed, self._looked_at = now - self._looked_at, now
        failed_last, self._failed_last = self._failed_last, failed
        if not status.get("failing") or status.get("finished") != self._finished:
            # A wave that began since the last look counts with what failed since then.
            self._failed_before = failed_last if status.get("failing") else failed
            self._finished, self.spent_s = status.get("finished"), 0.0
            return
        if "trainer" not in (status.get("waits") or {}):
            self.spent_s += passed
        if self._limit_s is None or self.spent_s < self._limit_s:
            return
        counts = {kind: count - self._failed_before.get(kind, 0) for kind, count in failed.items()}
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items(), key=lambda kv: -kv[1]) if count > 0)
        raise FailureBudgetSpent(
            f"every rollout failed for {self.spent_s:.0f} s, which is all that serve.failure_budget_s={self._limit_s:g} allows; rollouts "
            f"lost by kind: {kinds or 'none'}, the last failure: {status['failing']}. Nothing of them was trained on. Their errors are "
            f"in {self._events} (rollout_failed). Repair the cause and give the same command again: it goes on where it stands"
        )
