"""What a follower makes of its owner's posts while requests are in flight; engines are fakes over HTTP, the board is a list."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agentrl.assembly.fleet import FleetFollower, FleetOwner, Keyring
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.stream.fleet_board import FleetState, Posted, PostedServer
from agentrl.testing.fake_sglang import FakeSGLang, pseudo_tokens
from agentrl.testing.waits import until
from agentrl.types import Generation, SamplingParams

PROMPT = [7, 8, 9]
V1, V2, V3, V4 = (f"e1-v{version}" for version in range(1, 5))


class Board:
    """The owner's last post, and what happens before a follower says that it has seen one."""

    def __init__(self, url: str) -> None:
        self._url, self._number = url, 0
        self.posted: Posted | None = None
        self.when_seen: dict[int, Callable[[], Awaitable[Any]]] = {}
        self.seen = 0

    def say(self, *, verified: str, installing: str | None = None, coming: tuple[str, ...] = (), labels: tuple[str, ...]) -> int:
        self._number += 1
        server = PostedServer(
            url=self._url, capacity=1.0, incarnation=1, verified=verified, installing=installing, is_draining=False, labels=labels
        )
        self.posted = Posted(self._number, FleetState(servers=(server,), required=verified, coming=coming))
        return self._number

    async def post(self, number: int, state: FleetState) -> None:
        self.posted = Posted(number, state)

    async def clear(self) -> None:
        self.posted = None

    async def read(self) -> Posted | None:
        return self.posted

    async def saw(self, reader: str, number: int) -> None:
        if number in self.when_seen:
            await self.when_seen.pop(number)()
        self.seen = number

    async def leave(self, reader: str) -> None:
        pass


@asynccontextmanager
async def followed(
    num_held: int = 4,
) -> AsyncGenerator[tuple[AsyncLLMServerManager, FakeSGLang, Board, asyncio.Task[Generation]]]:
    """A follower that knows a server at V1 and has a request there, which has sampled some tokens and is held."""
    async with FakeSGLang(label=V1) as server, AsyncLLMServerManager(probe_every_s=0.01) as manager:
        board: Any = Board(server.url)
        server.hold_after(tokens=num_held)
        board.say(verified=V1, labels=(V1,))
        following = asyncio.ensure_future(FleetFollower("w", board, manager, keys=Keyring()).run())
        asked = asyncio.ensure_future(
            manager.generate(PROMPT, SamplingParams(max_new_tokens=10), trajectory_id="t", group_id="g", deadline=120)
        )
        try:
            await until(lambda: server.num_tokens == num_held)
            yield manager, server, board, asked
            assert (await asked).ids == pseudo_tokens(PROMPT, 10)
            assert (manager.counters()["tokens_discarded"], manager.counters()["continuations"]) == (0, 0)
        finally:
            following.cancel()
            asked.cancel()
            await asyncio.gather(following, asked, return_exceptions=True)


@pytest.mark.asyncio
async def test_a_label_is_not_forgotten_for_the_next_before_it_was_verified_here() -> None:
    async with followed() as (_, server, board, asked):

        async def answer_all() -> None:
            server.let_go()
            await asyncio.wait({asked})

        server.label = V2
        board.when_seen[board.say(verified=V2, coming=(V3,), labels=(V1, V2))] = answer_all
        assert (await asked).versions == [1] * 4 + [2] * 6


@pytest.mark.asyncio
async def test_an_update_that_is_overtaken_by_the_next_announcement_stays_legal() -> None:
    async with followed() as (_, server, board, asked):
        number = board.say(verified=V1, installing=V2, coming=(V3,), labels=(V1,))
        await until(lambda: board.seen == number)
        server.label = V2
        server.let_go()
        assert (await asked).versions == [1] * 4 + [2] * 6


@pytest.mark.asyncio
async def test_versions_that_passed_between_two_looks_of_a_follower_stay_legal() -> None:
    async with followed() as (manager, server, board, asked):
        server.label = V4
        number = board.say(verified=V4, labels=(V1, V2, V3, V4))
        await until(lambda: board.seen == number and manager.verified_label(server.url) == V4)
        server.label = V3  # of tokens that were sampled in between, and arrive only now
        server.let_go()
        assert (await asked).versions == [1] * 4 + [3] * 6


@pytest.mark.asyncio
async def test_a_policy_that_was_announced_and_not_served_leaves_the_servers_ready_and_looked_after() -> None:
    async with followed() as (manager, server, board, asked):
        number = board.say(verified=V1, coming=(V2,), labels=(V1,))
        await until(lambda: board.seen == number)
        assert manager.stats()[0].state == "ready"
        server.label = V2  # tried on this server, which we have not heard of
        health = asyncio.ensure_future(manager.run())
        probed = server.calls["/model_info"]
        await until(lambda: server.calls["/model_info"] > probed + 1)
        assert manager.verified_label(server.url) == V1
        server.let_go()
        assert (await asked).versions == [1] * 4 + [2] * 6
        server.label = "default"
        await until(lambda: manager.stats()[0].state == "quarantined")
        health.cancel()


@pytest.mark.asyncio
async def test_followers_ask_for_the_adapter_that_the_servers_were_verified_with() -> None:
    async with FakeSGLang(label=V1) as server, AsyncLLMServerManager() as owning, AsyncLLMServerManager() as following:
        server.adapters[V1] = "/adapters/1"
        owning.add_server(server.url)
        owning.set_verified(server.url, V1, adapter=V1)
        owning.require_version(V1)
        board: Any = Board(server.url)
        posting = FleetOwner(board, owning)
        loops = [posting.run(lambda: (1, 1)), FleetFollower("w", board, following, keys=Keyring()).run()]
        running = [asyncio.ensure_future(loop) for loop in loops]
        try:
            await following.generate(PROMPT, SamplingParams(max_new_tokens=3), trajectory_id="t", group_id="g", deadline=120)
        finally:
            for loop in running:
                loop.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        assert [request.get("lora_path") for request in server.requests] == [V1]
