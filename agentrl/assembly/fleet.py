"""Several rollout processes over one set of servers: one owns them, the others follow what it posts.

The owner starts the engines and brings them to the policy. Before it begins an update it posts the coming label and waits for the
followers to have seen it (``FleetBoard``), so that no follower meets a label it does not expect. A follower believes no post about
a server's weights: it asks the server itself before sending anything there.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from agentrl.errors import StreamError, WeightSyncError
from agentrl.serving.server_manager import NO_POLICY, AsyncLLMServerManager
from agentrl.stream.fleet_board import FleetBoard, FleetState, Posted, PostedServer
from agentrl.types import PolicyRecord

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.05
FOLLOWERS_LIMIT_S = 5.0
"""Longest wait for followers before an update. One that comes later discards the tokens it does not understand, and says so."""
ASK_TIMEOUT_S = 2.0
"""Well below the silence after which a follower counts as gone: it gives no sign of life while it asks."""
BEAT_S = 1.0
"""Between a follower's signs of life while nothing changes: each is a write that the server syncs to disk."""


class FleetOwner:
    """Posts the manager's servers. ``announce`` is the reconciler's ``before_update``; keep ``run()`` going."""

    def __init__(self, board: FleetBoard, manager: AsyncLLMServerManager) -> None:
        self._board, self._manager = board, manager
        self._served: Callable[[], tuple[int, int] | None] = lambda: None
        self._number = 0
        self._posted: FleetState | None = None
        self._coming: tuple[str, ...] = ()
        self._one_at_a_time = asyncio.Lock()

    async def run(self, served: Callable[[], tuple[int, int] | None]) -> None:
        """Keep the board true until cancelled, then take it down.

        Args:
            served: run epoch and version that admission may count on as adopted.
        """
        self._served = served
        await self._board.clear()  # an owner that was killed left its own
        try:
            while True:
                await self._post()
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            with suppress(StreamError):
                await self._board.clear()

    async def announce(self, record: PolicyRecord) -> None:
        """Say which label comes, and wait until every living follower knows it."""
        self._coming = (*(label for label in self._coming if label != record.label), record.label)[-2:]
        await self.settle()

    async def settle(self) -> None:
        """Wait until every living follower knows the servers as they are now."""
        await self._post()
        give_up_at = asyncio.get_running_loop().time() + FOLLOWERS_LIMIT_S
        while behind := await self._board.lagging(self._number):
            if asyncio.get_running_loop().time() > give_up_at:
                log.warning("updating without followers=%s: they did not answer within %g s", behind, FOLLOWERS_LIMIT_S)
                return
            await asyncio.sleep(LOOK_EVERY_S / 2)

    async def _post(self) -> None:
        async with self._one_at_a_time:
            state = self._state()
            if state == self._posted:
                return
            self._number += 1
            await self._board.post(self._number, state)
            self._posted = state

    def _state(self) -> FleetState:
        run_epoch, version = self._served() or (0, -1)
        return FleetState(
            servers=tuple(PostedServer(**server._asdict()) for server in self._manager.view()),
            required=self._manager.required,
            also=tuple(sorted(self._manager.also)),
            coming=self._coming,
            run_epoch=run_epoch,
            version=version,
        )


@dataclass(frozen=True, slots=True)
class Keyring:
    """Bearer keys of the servers; they travel by file or environment, never over the stream."""

    api_key: str | None = None
    admin_key: str | None = None


class FleetFollower:
    """Keeps a manager's servers as their owner posts them.

    Args:
        name: of this process, for the owner.
        board: of the run.
        manager: gets the servers; nothing else may add or remove any.
        keys: to talk to them.
    """

    def __init__(self, name: str, board: FleetBoard, manager: AsyncLLMServerManager, *, keys: Keyring) -> None:
        self._name, self._board, self._manager, self._keys = name, board, manager, keys
        self._incarnations: dict[str, int] = {}
        self._draining: dict[str, bool] = {}
        self._state = FleetState()
        manager.require_version(NO_POLICY)

    @property
    def served(self) -> tuple[int, int] | None:
        """Run epoch and version that admission may count on as adopted, as last read."""
        return (self._state.run_epoch, self._state.version) if self._state.version >= 0 else None

    async def run(self) -> None:
        """Follow until cancelled."""
        seen, beat_at = -1, 0.0
        try:
            while True:
                posted = await self._board.read()
                self._apply(posted)
                # Before saying so: a label that was not verified here yet would be forgotten for the coming one.
                await self._verify()
                number, now = posted.number if posted else 0, asyncio.get_running_loop().time()
                if number != seen or now >= beat_at:
                    await self._board.saw(self._name, number)
                    seen, beat_at = number, now + BEAT_S
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            with suppress(StreamError):
                await self._board.leave(self._name)

    def _apply(self, posted: Posted | None) -> None:
        """Everything but trust, without an await: what is legal changes at one moment."""
        state = self._state = posted.state if posted else FleetState(required=NO_POLICY)
        servers = {server.url: server for server in state.servers}
        for url in set(self._manager.urls) - set(servers):
            self._manager.remove_server(url)
            self._incarnations.pop(url, None)
        for url, server in servers.items():
            if self._incarnations.get(url) != server.incarnation:
                self._manager.add_server(
                    url, capacity=server.capacity, api_key=self._keys.api_key, admin_key=self._keys.admin_key
                )
                self._incarnations[url] = server.incarnation
            if server.verified is None and self._manager.verified_label(url) is not None:
                self._manager.quarantine(url, "its owner took it out of rotation")
            if server.verified is not None and server.verified == self._manager.verified_label(url):
                self._expect_update(server)
            if server.is_draining:
                self._manager.drain(url)
            elif self._draining.get(url):
                self._manager.undrain(url)
            self._draining[url] = server.is_draining
        self._manager.require_version(state.required, also=state.also)

    def _expect_update(self, server: PostedServer) -> None:
        """The label being installed may not be the coming one yet: an update that takes long is overtaken. And one that was
        announced may never come, or only after a while: a policy that could not be served is tried again now and then."""
        announced = [label for label in self._state.coming if label != server.verified]
        self._manager.follow_updates(server.url, installing=server.installing, announced=announced)

    async def _verify(self) -> None:
        """Ask every server that this process and its owner see differently."""
        differing = [s for s in self._state.servers if s.verified not in (None, self._manager.verified_label(s.url))]
        async with asyncio.TaskGroup() as group:
            for server in differing:
                group.create_task(self._ask(server))

    async def _ask(self, server: PostedServer) -> None:
        assert server.verified is not None
        try:
            info = await self._manager.client(server.url).describe(timeout_s=ASK_TIMEOUT_S)
        except WeightSyncError as error:
            log.info("server does not answer url=%s error=%s", server.url, error)
            return
        if info.label not in (server.verified, server.installing, *self._state.coming):
            return  # restarted, or updated by others: its owner will notice too
        if self._incarnations.get(server.url) == server.incarnation:
            known = self._manager.verified_label(server.url)
            missed = server.labels[server.labels.index(known) + 1 :] if known in server.labels else ()
            for label in (*missed, server.verified):
                self._manager.set_verified(server.url, label, adapter=server.adapter)
            self._expect_update(server)
