"""What the engines' own load reports (``/v1/loads``) change: how many requests a server gets, and whether our counters are true.

Pure: reports in, decisions out. ``server_health`` asks the servers and acts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LOOKS = 3
"""Reports in a row that must agree before a difference is believed: a report and our counter are never of one instant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One server's own word on how busy it is."""

    running: int
    waiting: int
    """In its queue, put back for lack of cache included."""
    held: int
    """Frozen by a pause."""
    cache_usage: float
    """Share of its cache in use, 0..1."""
    max_running: int | None
    """Requests it batches at once, where it says so."""

    @property
    def total(self) -> int:
        return self.running + self.waiting + self.held


def parse_loads(body: Mapping[str, Any]) -> LoadReport:
    """Add up ``/v1/loads`` over data-parallel ranks.

    Raises:
        ValueError: the body is not a load report.
    """
    try:
        return _parse_loads(body["loads"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a load report: {error!r}") from error


def _parse_loads(loads: Sequence[Mapping[str, Any]]) -> LoadReport:
    if not loads:
        raise ValueError("the load report names no rank")
    queues = [load.get("queues") or {} for load in loads]
    most = [load.get("max_running_requests") for load in loads]
    return LoadReport(
        running=sum(int(load["num_running_reqs"]) for load in loads),
        waiting=sum(int(load["num_waiting_reqs"]) for load in loads) + sum(int(queue.get("retracted") or 0) for queue in queues),
        held=sum(int(queue.get("paused") or 0) for queue in queues),
        cache_usage=max(float(load.get("token_usage") or 0.0) for load in loads),
        max_running=sum(int(value) for value in most if value) if all(most) else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConcurrencyPolicy:
    """Additive increase, multiplicative decrease of the requests in flight on one server."""

    floor: int = 4
    ceiling: int = 4096
    start: int = 32
    """Limit before the first report of a server that does not say how many requests it batches."""
    queue_share: float = 0.1
    """Queue that is wanted, as a share of what runs: a little, so that a free place is filled at once."""
    cache_limit: float = 0.97
    """Cache usage above which the engine soon throws requests out of it."""
    increase: float = 0.1
    """Share of the limit added per report, at least one request, while the limit is what holds requests back."""
    decrease: float = 0.8

    def __post_init__(self) -> None:
        if not 1 <= self.floor <= self.start <= self.ceiling:
            raise ValueError(
                f"concurrency floor={self.floor} <= start={self.start} <= ceiling={self.ceiling} must hold, from 1 up"
            )
        if not 0 < self.decrease < 1 or self.increase <= 0:
            raise ValueError(f"concurrency decrease={self.decrease} must be in (0, 1) and increase={self.increase} positive")


DEFAULT_CONCURRENCY = ConcurrencyPolicy()


def next_limit(limit: float | None, report: LoadReport, in_flight: int, policy: ConcurrencyPolicy = DEFAULT_CONCURRENCY) -> float:
    """Requests that the server may hold until the next report.

    Args:
        limit: the limit so far; None before the first report.
        report: the server's word.
        in_flight: our requests there, when the report was asked for.
        policy: the constants.
    """
    if limit is None:
        limit = float(report.max_running or policy.start)
    wanted_queue = max(1.0, policy.queue_share * report.running)
    is_full = report.running > 0 and report.cache_usage > policy.cache_limit
    if report.waiting > wanted_queue or (is_full and report.waiting > 0):
        # From what is really there: a limit far above it would need many reports to bite.
        limit = min(limit, max(1.0, float(in_flight))) * policy.decrease
    elif in_flight >= int(limit) and not is_full:
        limit += max(1.0, policy.increase * limit)
    return min(max(limit, float(policy.floor)), float(policy.ceiling))


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Our counter beside the server's, of about one instant."""

    at: float
    """Event-loop time at which the report was asked for."""
    least: int
    """Our requests there during the whole call."""
    most: int
    """Our requests there at any time during it."""
    reported: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """A difference that lasted."""

    foreign: int = 0
    """Requests on the server that are not ours: another manager's, or orphans of connections that we closed."""
    missing: int = 0
    """Requests we count that the server does not have."""
    is_idle: bool = False
    """It has none at all: every request of ours that heard nothing since is lost there."""


def drift_of(counts: Sequence[Count]) -> Drift:
    """What the last ``LOOKS`` counts agree on; nothing before there are as many."""
    last = counts[-LOOKS:]
    if len(last) < LOOKS:
        return Drift()
    return Drift(
        foreign=min(max(0, count.reported - count.most) for count in last),
        missing=min(max(0, count.least - count.reported) for count in last),
        is_idle=all(count.reported == 0 for count in last),
    )
