"""The servers of a manager: who is there, what each was verified at, who may take a request, what each has done.

State and decisions only: nothing here waits but ``wait_drained``. ``server_manager`` generates, ``server_health`` looks
after the servers, ``weight_reconciler`` (through the manager) brings them to the announced policy.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Literal, TypeAlias

from agentrl.serving.server_state import (
    LABELS_TOLD,
    CircuitBreaker,
    DrainedBy,
    Server,
    ServerState,
    ServerStats,
    ServerView,
    Totals,
)
from agentrl.serving.sglang_client import SGLangClient

log = logging.getLogger(__name__)

WaitReason: TypeAlias = Literal["server", "weights"]

ClientFactory: TypeAlias = Callable[[str, str | None, str | None], SGLangClient]
"""(url, api key, admin key) -> a client of that server."""

COUNTERS = (
    "retries",
    "continuations",
    "moves",
    "deadlines",
    "quarantines",
    "version_mismatches",
    "tokens_discarded",
    "unhealthy",
    "delayed_retries",
    "drifts",
)


class ServerFleet:
    """The servers and their labels.

    Args:
        make_client: opens a client.
        make_breaker: a new server's circuit breaker.
        max_requests: requests in flight per unit of capacity; None sets no fixed limit.
        start_limit: requests a server may hold before its first load report; None sets no limit until then.
        on_change: called when somebody who waits for a server should look again.
    """

    def __init__(
        self,
        *,
        make_client: ClientFactory,
        make_breaker: Callable[[], CircuitBreaker],
        max_requests: int | None,
        start_limit: int | None = None,
        on_change: Callable[[], None],
    ) -> None:
        self._make_client, self._make_breaker = make_client, make_breaker
        self._max_requests, self._start_limit = max_requests, start_limit
        self.on_change = on_change
        self._servers: dict[str, Server] = {}
        self._required: str | None = None
        self._also: frozenset[str] = frozenset()
        self._incarnations = 0
        self.counters: Counter[str] = Counter()

    # ---- who is there

    @property
    def urls(self) -> list[str]:
        return list(self._servers)

    def servers(self) -> list[Server]:
        return list(self._servers.values())

    def add(self, url: str, *, capacity: float, api_key: str | None, admin_key: str | None) -> None:
        """Add a server, or start a known url anew: unverified, its requests sent elsewhere, drained if somebody asked for that."""
        if capacity <= 0:
            raise ValueError(f"capacity={capacity} of {url} must be positive; it is the server's relative speed")
        url = url.rstrip("/")
        previous = self._servers.get(url)
        self._incarnations += 1
        self._servers[url] = Server(
            client=self._make_client(url, api_key, admin_key),
            capacity=capacity,
            breaker=self._make_breaker(),
            totals=previous.totals if previous else Totals(),
            incarnation=self._incarnations,
            drained_by=previous.drained_by & {"request"} if previous else set(),
        )
        if previous is not None:
            self._leave(previous)
        self.on_change()

    def remove(self, url: str) -> None:
        """Forget a server; unknown urls are ignored."""
        server = self._servers.pop(url.rstrip("/"), None)
        if server is not None:
            self._leave(server)
            self.on_change()

    def get(self, url: str) -> Server:
        server = self._servers.get(url.rstrip("/"))
        if server is None:
            raise KeyError(f"{url} is not among the {len(self._servers)} servers {self.urls}; add_server it first")
        return server

    def is_current(self, server: Server) -> bool:
        """False once its url was removed or stands for a new process."""
        return self._servers.get(server.url) is server

    def drain(self, url: str, by: DrainedBy) -> None:
        self.get(url).drained_by.add(by)

    def undrain(self, url: str, by: DrainedBy) -> None:
        self.get(url).drained_by.discard(by)
        self.on_change()

    async def wait_drained(self, url: str, *, timeout_s: float) -> bool:
        """Wait until nothing runs on a draining server; after ``timeout_s`` move the rest elsewhere and return False.

        What runs on a server that was taken back meanwhile stays there.
        """
        server = self.get(url)
        try:
            async with asyncio.timeout(timeout_s):
                await server.idle.wait()
        except TimeoutError:
            if server.is_draining:
                self.evict(server)
            return False
        return True

    def evict(self, server: Server) -> None:
        """End the requests on a server from our side; they continue elsewhere with what they have."""
        now = asyncio.get_running_loop().time()
        for visit in list(server.visits):
            visit.evict(now)

    def _leave(self, server: Server) -> None:
        server.is_gone = True
        server.client.close()
        self.evict(server)

    # ---- policy versions

    @property
    def required(self) -> str | None:
        return self._required

    @property
    def also(self) -> frozenset[str]:
        return self._also

    def require(self, label: str | None, *, also: Collection[str] = ()) -> None:
        self._required, self._also = label, frozenset(also)
        self.on_change()

    def set_verified(self, url: str, label: str, *, adapter: str | None = None) -> None:
        server = self.get(url)
        server.adapter = adapter
        if server.verified != label or not server.labels:
            server.remember(label)
        server.verified, server.quarantine_reason = label, ""
        server.installing, server.announced = None, frozenset()
        self.on_change()

    def quarantine(self, url: str, reason: str) -> None:
        server = self.get(url)
        if not server.quarantine_reason:
            log.warning("server quarantined url=%s verified=%s reason=%s", url, server.verified, reason)
            self.counters["quarantines"] += 1
        server.verified, server.quarantine_reason = None, reason or "unverified"
        server.installing, server.announced = None, frozenset()
        self.evict(server)
        self.on_change()

    # ---- who may take a request

    def routable(self) -> list[Server]:
        now = asyncio.get_running_loop().time()
        return [server for server in self._servers.values() if self._is_routable(server, now)]

    def has_limits(self) -> bool:
        """Whether the end of a request can make room for another."""
        return self._max_requests is not None or self._start_limit is not None

    def why_none(self) -> WaitReason:
        """Servers that would do but for their weights: ``weights``; otherwise ``server``."""
        now = asyncio.get_running_loop().time()
        alive = [server for server in self._servers.values() if server.breaker.allows(now) and not server.unhealthy_reason]
        if not alive:
            return "server"
        return "server" if any(self._has_version(server) for server in alive) else "weights"

    def next_retry_in_s(self) -> float | None:
        """Seconds until time alone makes a server routable; None when it does not."""
        now = asyncio.get_running_loop().time()
        waits: list[float] = []
        for server in self._servers.values():
            wait = server.breaker.retry_in_s(now)
            if wait is not None:
                waits.append(wait)
            if server.busy_until > now:
                waits.append(server.busy_until - now)
        return min(waits, default=None)

    def _is_routable(self, server: Server, now: float) -> bool:
        return (
            not server.is_draining
            and not server.unhealthy_reason
            and server.breaker.allows(now)
            and now >= server.busy_until
            and self._has_room(server)
            and self._has_version(server)
        )

    def _has_room(self, server: Server) -> bool:
        limit = self._limit_of(server)
        return limit is None or len(server.visits) < limit

    def _limit_of(self, server: Server) -> float | None:
        """The smaller of the fixed limit and the one that the server's load reports suggest."""
        if server.limit is None and not self.has_limits():
            return None
        limits = (
            self._start_limit if server.limit is None else server.limit,
            self._max_requests and self._max_requests * server.capacity,
        )
        return min((limit for limit in limits if limit is not None), default=None)

    def _has_version(self, server: Server) -> bool:
        if server.quarantine_reason:
            return False
        if self._required is None:
            return True
        if server.verified is None:
            return False
        return self._required in (server.verified, server.installing) or server.verified in self._also

    # ---- what others see

    def view(self) -> list[ServerView]:
        """What another process must know to use the servers."""
        return [
            ServerView(
                url=server.url,
                capacity=server.capacity,
                incarnation=server.incarnation,
                verified=server.verified,
                installing=server.installing,
                is_draining=server.is_draining,
                labels=tuple(server.labels[-LABELS_TOLD:]),
                adapter=server.adapter,
            )
            for server in self._servers.values()
        ]

    def stats(self) -> list[ServerStats]:
        """One entry per server, in the order they were added."""
        return [self._stats_of(server) for server in self._servers.values()]

    def _stats_of(self, server: Server) -> ServerStats:
        totals, report = server.totals, server.report
        ms, limit = sorted(totals.ms), self._limit_of(server)
        return ServerStats(
            url=server.url,
            state=self._state_of(server),
            version=server.verified or "",
            capacity=server.capacity,
            requests_in_flight=len(server.visits),
            tokens_in_flight=server.tokens_in_flight,
            cached_token_ratio=totals.cached_tokens / totals.prompt_tokens if totals.prompt_tokens else 0.0,
            p50_ms=_percentile(ms, 0.50),
            p99_ms=_percentile(ms, 0.99),
            breaker=server.breaker.state(asyncio.get_running_loop().time()),
            requests_served=totals.requests,
            tokens_served=totals.tokens,
            errors=totals.errors,
            version_mismatches=totals.mismatches,
            reason=server.quarantine_reason or server.unhealthy_reason,
            limit=None if limit is None else int(limit),
            engine_running=None if report is None else report.running,
            engine_waiting=None if report is None else report.waiting,
            foreign_requests=server.foreign_requests,
        )

    def _state_of(self, server: Server) -> ServerState:
        if server.unhealthy_reason:
            return "unhealthy"
        if server.installing is not None:
            return "updating"
        if server.quarantine_reason or (self._required is not None and server.verified is None):
            return "quarantined"
        if server.is_draining:
            return "draining"
        return "ready" if self._has_version(server) else "stale"


def _percentile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")
