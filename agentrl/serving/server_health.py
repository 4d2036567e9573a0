"""Look at every server again and again: does it answer, does it hold the weights it was verified at, is our count of its
requests true, and how many more can it take?

Waits for one probe per server and period, each with its own limit. It unblocks parked requests when a server answers again
or gets room.
"""

import asyncio
import logging

from agentrl.errors import WeightSyncError
from agentrl.serving.load_policy import LOOKS, ConcurrencyPolicy, Count, Drift, LoadReport, drift_of, next_limit, parse_loads
from agentrl.serving.server_fleet import ServerFleet
from agentrl.serving.server_state import Server

log = logging.getLogger(__name__)


class ServerHealth:
    """The probes of a fleet.

    Args:
        fleet: the servers.
        every_s: period.
        timeout_s: limit of one call.
        unhealthy_after: consecutive failed probes after which a server takes nothing and its requests move on.
        lost_after_s: silence after which a request on a server that reports to be idle is generated elsewhere. Longer than a
            scheduler may be away from its reports (a long prefill, a compilation).
        concurrency: how to set the servers' request limits from their load reports; None sets none.
    """

    def __init__(
        self,
        fleet: ServerFleet,
        *,
        every_s: float,
        timeout_s: float,
        unhealthy_after: int,
        lost_after_s: float,
        concurrency: ConcurrencyPolicy | None,
    ) -> None:
        self._fleet = fleet
        self._every_s, self._timeout_s = every_s, timeout_s
        self._unhealthy_after, self._lost_after_s = unhealthy_after, lost_after_s
        self._concurrency = concurrency

    async def run(self) -> None:
        """Probe every server until cancelled."""
        while True:
            async with asyncio.TaskGroup() as group:
                for server in self._fleet.servers():
                    group.create_task(self._look(server))
            await asyncio.sleep(self._every_s)

    async def _look(self, server: Server) -> None:
        if await self._answers(server):
            await self._look_at_load(server)

    async def _answers(self, server: Server) -> bool:
        """``/model_info``: instant, and live during a pause."""
        mark, verified = server.label_mark(), server.verified
        try:
            info = await server.client.model_info(timeout_s=self._timeout_s)
        except WeightSyncError as error:
            server.failed_probes += 1
            if server.failed_probes >= self._unhealthy_after and not server.unhealthy_reason and not server.is_gone:
                server.unhealthy_reason = str(error)
                log.warning("server unhealthy url=%s probes=%d error=%s", server.url, server.failed_probes, error)
                self._fleet.counters["unhealthy"] += 1
                self._fleet.evict(server)
            return False
        server.failed_probes = 0
        if server.unhealthy_reason:
            log.info("server answers again url=%s", server.url)
            server.unhealthy_reason = ""
            self._fleet.on_change()
        is_settled = server.installing is None and mark == server.label_mark() and verified == server.verified
        is_right = info.label == verified or info.label in server.announced
        if is_settled and verified is not None and not is_right and not server.is_gone:
            server.totals.mismatches += 1
            self._fleet.counters["version_mismatches"] += 1
            self._fleet.quarantine(server.url, f"reports {info.label!r} but was verified at {verified!r}: it restarted")
        return True

    async def _look_at_load(self, server: Server) -> None:
        before, asked = set(server.visits), asyncio.get_running_loop().time()
        try:
            report = parse_loads(await server.client.loads(timeout_s=self._timeout_s))
        except (WeightSyncError, ValueError) as error:
            log.debug("no load report url=%s error=%r", server.url, error)
            return
        if server.is_gone:
            return
        server.report = report
        # A request that began or ended during the call may or may not be in the report.
        least, most = len(before & server.visits), len(before | server.visits)
        server.counts.append(Count(at=asked, least=least, most=most, reported=report.total))
        self._correct(server, drift_of(list(server.counts)))
        if self._concurrency is not None and server.installing is None and not report.held:
            self._set_limit(server, report, most, self._concurrency)

    def _set_limit(self, server: Server, report: LoadReport, in_flight: int, policy: ConcurrencyPolicy) -> None:
        before, server.limit = server.limit, next_limit(server.limit, report, in_flight, policy)
        if before is None or server.limit > before:
            self._fleet.on_change()

    def _correct(self, server: Server, drift: Drift) -> None:
        """Believe the engine where it insists: its other requests count as load, and what it lost is generated elsewhere."""
        if drift.foreign and not server.foreign_requests:
            log.info("server has requests that are not ours url=%s count=%d: they count as load", server.url, drift.foreign)
            self._fleet.counters["drifts"] += 1
        server.foreign_requests = drift.foreign
        if not drift.missing or server.installing is not None:
            return
        now = asyncio.get_running_loop().time()
        since = min(server.counts[-LOOKS].at, now - self._lost_after_s)
        lost = [visit for visit in server.visits if max(visit.started, visit.piece.last_arrival) < since]
        if lost and drift.is_idle:
            log.warning("server lost requests url=%s count=%d: they are generated elsewhere", server.url, len(lost))
            self._fleet.counters["drifts"] += 1
            for visit in lost:
                visit.evict(now)
            server.counts.clear()
