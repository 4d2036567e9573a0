"""How often failed requests may be tried again, over all requests together: a fleet that is sick is not hammered.

A token bucket (as in Google's SRE book, "Handling Overload", per-client retry budgets; ours also refills with time, so
that a fleet without any success is still probed). It bounds *repeated* failures only: the first failure of a request is
free, since a server that dies fails everything it held at once and all of it belongs elsewhere immediately.
"""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class RetryBudget:
    """One bucket for all requests of a manager. Times are seconds of any monotonic clock."""

    burst: float = 64.0
    """Most retries that may happen at once."""
    per_s: float = 4.0
    """Retries that become possible per second, whatever succeeds."""
    per_success: float = 0.2
    """Retries that each completed generation adds."""
    tokens: float = -1.0
    """Retries possible now; negative means a full bucket at the start."""
    _at: float | None = None

    def __post_init__(self) -> None:
        if self.burst < 1 or self.per_s <= 0 or self.per_success < 0:
            raise ValueError(
                f"retry budget burst={self.burst} must be >= 1, per_s={self.per_s} > 0 and per_success={self.per_success} >= 0: "
                "otherwise a failed request would wait for ever"
            )
        if self.tokens < 0:
            self.tokens = self.burst

    def try_take(self, now: float) -> float:
        """Take one retry. Returns 0 when it may happen now, else the seconds after which to ask again."""
        if self._at is not None:
            self._add((now - self._at) * self.per_s)
        self._at = now
        if self.tokens >= 1.0:
            self.tokens -= 1.0
            return 0.0
        return (1.0 - self.tokens) / self.per_s

    def succeeded(self) -> None:
        """A generation completed."""
        self._add(self.per_success)

    def _add(self, tokens: float) -> None:
        self.tokens = min(self.burst, self.tokens + max(0.0, tokens))
