"""What became of a tool's calls, and the circuit that opens when most of them fail."""

import logging
from collections import deque
from typing import Literal

from agentrl.rollout.circuit import CircuitBreaker

logger = logging.getLogger(__name__)

BREAKER_WINDOW = 50
"""Latest calls of a tool that its circuit breaker looks at."""
BREAKER_MIN_CALLS = 20
"""Calls before it may open: two failures of three say little."""
COOLDOWN_S = 15.0
"""Longest pause between probes while a circuit is open."""
_LATENCIES = 1000


class ToolStats:
    """Counters of one tool, and its circuit breaker.

    Args:
        name: of the tool.
        max_infra_error_rate: share of the latest calls above which the circuit opens.
    """

    def __init__(self, name: str, max_infra_error_rate: float) -> None:
        self.name = name
        self.calls = self.ok = self.model_errors = self.timeouts = self.infra_errors = self.retries = self.cache_hits = 0
        self._limit = max_infra_error_rate
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self.breaker = CircuitBreaker(
            window=BREAKER_WINDOW, min_calls=BREAKER_MIN_CALLS, max_rate=max_infra_error_rate, cooldown_s=COOLDOWN_S
        )

    def record(self, kind: Literal["ok", "model_errors", "timeouts"], ms: float) -> None:
        """Count one call that the tool answered, or that ran out of time."""
        self.calls += 1
        setattr(self, kind, getattr(self, kind) + 1)
        self._latencies.append(ms)
        if kind == "timeouts" and self.breaker.is_open:
            return  # a hanging service is no sign of life
        if self.breaker.record(ok=True) == "closed":
            logger.warning("tool_circuit_closed tool=%s: a call succeeded; rollouts go on", self.name)

    def count_refused(self) -> None:
        """Count a call that never reached the tool: its arguments did not fit."""
        self.calls += 1
        self.model_errors += 1

    def count_cached(self) -> None:
        """Count a call that was answered from the cache: it says nothing about the tool's health or speed."""
        self.calls += 1
        self.ok += 1
        self.cache_hits += 1

    def record_infra(self, error: BaseException, ms: float) -> None:
        """Count one call that failed outside the model's control."""
        self.calls += 1
        self.infra_errors += 1
        self._latencies.append(ms)
        if self.breaker.record(ok=False) == "opened":
            logger.error(
                "tool_circuit_open tool=%s: %d of the last %d calls failed outside the model's control (last: %s). New rollouts "
                "pause; nothing of these was trained on. Repair or start the tool's service; probes go out, in the end every %g s "
                "(limit: max_infra_error_rate=%g)",
                self.name, self.breaker.failed, self.breaker.seen, error, COOLDOWN_S, self._limit,
            )  # fmt: skip

    def summary(self) -> dict[str, float]:
        ordered = sorted(self._latencies)
        return {
            "calls": self.calls,
            "ok": self.ok,
            "model_errors": self.model_errors,
            "timeouts": self.timeouts,
            "infra_errors": self.infra_errors,
            "infra_error_rate": self.infra_errors / self.calls if self.calls else 0.0,
            "retries": self.retries,
            "cache_hits": self.cache_hits,
            "p50_ms": ordered[len(ordered) // 2] if ordered else 0.0,
            "p99_ms": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] if ordered else 0.0,
            "circuit_open": float(self.breaker.is_open),
        }
