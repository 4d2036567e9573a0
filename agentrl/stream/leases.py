"""Which of several rollout processes plays which task: ordinals are leased, so none is played twice and none is skipped.

One Lua script decides everything that would otherwise be agreed between processes: the lowest ordinal that nobody plays, and whether
the run as a whole may start another group (the budget of ``rollout.admission``, over the groups of every process). Time is the
server's own, so the machines' clocks need not agree.

A lease ends when its group closes. One that is not renewed expires, and the next process that asks plays the group: the
members that reached the stream keep their ids, so only what is missing is rolled out. A process that stalled beyond its lease and
wakes up finishes the same members under the same ids, and the stream keeps one of each.
"""

import asyncio
import logging
from typing import Any, Final, cast

import redis.asyncio

from agentrl.stream import scripts
from agentrl.stream.connection import retry_async
from agentrl.stream.keys import Keys

log = logging.getLogger(__name__)

TTL_S: Final = 30.0


class TaskLeases:
    """The leases of one rollout process. Keep ``run()`` going beside the rollouts.

    Args:
        client: from ``connect_async``.
        keys: of the run.
        owner: names this process; a process that restarts under the same name takes its own leases back at once.
        budget: groups that may be open or unconsumed in the whole run; see ``rollout.admission.group_budget``.
        ttl_s: seconds without a renewal after which others may play a group.
    """

    def __init__(self, client: redis.asyncio.Redis, keys: Keys, *, owner: str, budget: int, ttl_s: float = TTL_S) -> None:
        if not owner or budget < 1 or ttl_s <= 0:
            raise ValueError(f"owner={owner!r}, budget={budget}, ttl_s={ttl_s}: a name, and numbers above 0 are needed")
        untyped: Any = client
        self._keys = [keys.leases, keys.lease_owners, keys.closed, keys.requeued, keys.stats]
        self._owner, self._budget, self._ttl_s = owner, budget, ttl_s
        self._lease = untyped.register_script(scripts.LEASE)
        self._renew = untyped.register_script(scripts.RENEW)
        self._held: set[int] = set()
        self._is_first = True
        self._one_at_a_time = asyncio.Lock()
        self.lost = 0
        """Leases that expired here while their group was still played."""

    @property
    def held(self) -> frozenset[int]:
        """Ordinals this process plays."""
        return frozenset(self._held)

    async def claim(self, want: int, *, consumed_groups: int) -> dict[int, int]:
        """Up to ``want`` groups to play now, ordinal -> round (how often the learner gave it back), lowest first; none while the run is as far ahead as it may be.

        Args:
            want: groups this process has room for.
            consumed_groups: groups that have left for any reason, as this process may count on; an older number is only careful.

        Raises:
            StreamError: the server refuses.
        """
        async with self._one_at_a_time:
            args = [self._owner, want, self._budget, consumed_groups, int(self._ttl_s * 1000), int(self._is_first)]
            # A lost reply leaves leases that nobody renews: they expire and are dealt again.
            answer = await retry_async(lambda: self._lease(keys=self._keys, args=args), "leasing tasks", patience_s=None)
            self._is_first = False
        flat = [int(value) for value in cast("list[bytes]", answer)]
        leased = dict(sorted(zip(flat[::2], flat[1::2], strict=True)))
        self._held.update(leased)
        return leased

    def release(self, ordinal: int) -> None:
        """This process plays the group no longer. A closed group's lease is over; an open one's expires."""
        self._held.discard(ordinal)

    async def run(self) -> None:
        """Renew until cancelled."""
        while True:
            await asyncio.sleep(self._ttl_s / 3)
            await self.renew()

    async def renew(self) -> None:
        """Hold on to what is being played, for another ``ttl_s``."""
        held = sorted(self._held)
        if not held:
            return
        args = [self._owner, int(self._ttl_s * 1000), *held]
        answer = await retry_async(lambda: self._renew(keys=self._keys, args=args), "renewing leases", patience_s=None)
        for ordinal in map(int, cast("list[bytes]", answer)):
            self.lost += 1
            self._held.discard(ordinal)
            log.warning("lease lost ordinal=%d owner=%s: another process plays its missing members too", ordinal, self._owner)
