"""What the manager knows of each server: its breaker, its policy labels, the requests on it, its totals."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from agentrl.serving.load_policy import Count, LoadReport
from agentrl.serving.sglang_client import PartialGeneration, SGLangClient

BreakerState: TypeAlias = Literal["closed", "open", "half_open"]
ServerState: TypeAlias = Literal["ready", "updating", "quarantined", "draining", "unhealthy", "stale"]
"""``stale`` is verified, but at a label other than the required one."""

DrainedBy: TypeAlias = Literal["request", "update"]
"""``request``: somebody asked for it and takes it back. ``update``: a rolling update, for its own time."""

_LATENCY_WINDOW = 512
_COUNTS_KEPT = 8
_LABELS_KEPT = 64
LABELS_TOLD = 8
"""Labels of `ServerView`; whoever looks more rarely than they change has requests in flight that carry unknown ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStats:
    """One server as telemetry and ``doctor`` see it."""

    url: str
    state: ServerState
    version: str
    """Last verified label; empty when quarantined or never verified."""
    capacity: float
    requests_in_flight: int
    tokens_in_flight: int
    cached_token_ratio: float
    """Prompt tokens served from cache, of all prompt tokens."""
    p50_ms: float
    p99_ms: float
    """Of the last 512 requests, whole request; nan before the first."""
    breaker: BreakerState
    requests_served: int
    tokens_served: int
    errors: int
    version_mismatches: int
    reason: str
    """Why it is quarantined or unhealthy."""
    limit: int | None = None
    """Requests it may hold at the moment; None leaves queueing to the engine."""
    engine_running: int | None = None
    """Requests that the engine itself says it runs; None before it was asked."""
    engine_waiting: int | None = None
    foreign_requests: int = 0
    """Requests that the engine has besides ours."""


class ServerView(NamedTuple):
    """One server as another process must know it to use it."""

    url: str
    capacity: float
    incarnation: int
    verified: str | None
    installing: str | None
    is_draining: bool
    labels: tuple[str, ...]
    """The newest that were verified there, oldest first."""
    adapter: str | None
    """LoRA adapter that requests ask for."""


class CircuitBreaker:
    """Stops sending to a server that keeps failing; lets one request through after a pause to see whether it recovered."""

    def __init__(self, *, failures: int, reset_s: float, max_reset_s: float) -> None:
        self._limit, self._reset_s, self._max_reset_s = failures, reset_s, max_reset_s
        self._failures = 0
        self._pause_s = reset_s
        self._opened_at: float | None = None
        self._probing = False

    def state(self, now: float) -> BreakerState:
        if self._opened_at is None:
            return "closed"
        return "half_open" if self._probing or now >= self._opened_at + self._pause_s else "open"

    def allows(self, now: float) -> bool:
        return self._opened_at is None or (not self._probing and now >= self._opened_at + self._pause_s)

    def retry_in_s(self, now: float) -> float | None:
        """Seconds until a half-open probe is allowed; None when time alone changes nothing."""
        if self._opened_at is None or self._probing:
            return None
        return max(0.0, self._opened_at + self._pause_s - now)

    def start(self) -> None:
        """A request goes out."""
        self._probing = self._opened_at is not None

    def succeeded(self) -> None:
        self._failures, self._pause_s, self._opened_at, self._probing = 0, self._reset_s, None, False

    def failed(self, now: float) -> None:
        self._failures += 1
        if self._probing:
            self._pause_s = min(self._pause_s * 2, self._max_reset_s)
            self._opened_at, self._probing = now, False
        elif self._opened_at is None and self._failures >= self._limit:
            self._opened_at = now

    def cancelled(self) -> None:
        """A request ended without saying anything about the server."""
        self._probing = False


@dataclass(slots=True, eq=False)
class Visit:
    """One request on one server."""

    cost: int
    started: float
    label_mark: int
    """Number of labels verified on the server before the current one."""
    is_probe: bool
    scope: asyncio.Timeout
    piece: PartialGeneration = field(default_factory=PartialGeneration)
    is_evicted: bool = False

    def evict(self, now: float) -> None:
        if not self.is_evicted and not self.scope.expired():
            self.is_evicted = True
            self.scope.reschedule(now)


@dataclass(slots=True)
class Totals:
    """Counters that survive a restart of the engine behind a url."""

    requests: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    errors: int = 0
    mismatches: int = 0
    ms: deque[float] = field(default_factory=lambda: deque[float](maxlen=_LATENCY_WINDOW))


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(slots=True, eq=False)
class Server:
    """One incarnation of a server."""

    client: SGLangClient
    capacity: float
    breaker: CircuitBreaker
    totals: Totals
    incarnation: int
    verified: str | None = None
    adapter: str | None = None
    """LoRA adapter that requests ask for, where the policy is one; named like its label."""
    installing: str | None = None
    announced: frozenset[str] = frozenset()
    """Labels that another process, which updates the server, may install at any time: responses may carry them before we hear of it."""
    quarantine_reason: str = ""
    unhealthy_reason: str = ""
    drained_by: set[DrainedBy] = field(default_factory=set[DrainedBy])
    """Who wants nothing new sent there."""
    is_gone: bool = False
    failed_probes: int = 0
    tokens_in_flight: int = 0
    """Of our requests."""
    foreign_requests: int = 0
    """What the engine has besides ours, as its load reports agree."""
    limit: float | None = None
    """Requests it may hold, as its load reports suggest."""
    report: LoadReport | None = None
    counts: deque[Count] = field(default_factory=lambda: deque[Count](maxlen=_COUNTS_KEPT))
    busy_until: float = 0.0
    labels: list[str] = field(default_factory=list[str])
    """Every label verified here, oldest first."""
    num_labels_dropped: int = 0
    visits: set[Visit] = field(default_factory=set[Visit])
    idle: asyncio.Event = field(default_factory=_set_event)
    """Set while no request is here."""

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def is_draining(self) -> bool:
        return bool(self.drained_by)

    def label_mark(self) -> int:
        return max(0, self.num_labels_dropped + len(self.labels) - 1)

    def verified_labels(self, visit: Visit) -> set[str]:
        """The labels verified since the visit began, and the one before: tokens that carry them stay legal."""
        return set(self.labels[max(0, visit.label_mark - self.num_labels_dropped) :])

    def legal_labels(self, visit: Visit) -> set[str]:
        """The same and the one being installed, which may still turn out otherwise."""
        legal = self.verified_labels(visit) | self.announced
        return legal if self.installing is None else legal | {self.installing}

    def begin(self, visit: Visit) -> None:
        """A request goes out. ``end`` must follow, whatever happens."""
        self.visits.add(visit)
        self.idle.clear()
        self.tokens_in_flight += visit.cost
        self.breaker.start()

    def end(self, visit: Visit) -> None:
        """It is over."""
        self.visits.discard(visit)
        self.tokens_in_flight -= visit.cost
        if not self.visits:
            self.idle.set()

    def remember(self, label: str) -> None:
        self.labels.append(label)
        if len(self.labels) > 2 * _LABELS_KEPT and not self.visits:
            self.num_labels_dropped += len(self.labels) - _LABELS_KEPT
            del self.labels[:-_LABELS_KEPT]
