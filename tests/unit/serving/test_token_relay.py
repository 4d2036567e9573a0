"""Tokens that a caller is told while they are sampled: the generation's, once each, whatever happens to servers and labels."""

import asyncio

import pytest

from agentrl.errors import DeadlineExceeded, GenerationError
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.sglang_client import PartialGeneration
from agentrl.serving.token_relay import TokenRelay
from agentrl.serving.waiting_room import Priority
from agentrl.testing.clock import pass_time
from agentrl.testing.fake_sglang import FakeSGLang, pseudo_logprob, pseudo_tokens
from agentrl.testing.waits import until
from agentrl.types import Generation, SampledTokens, SamplingParams

PROMPT = [11, 22, 33]
V0, V1 = "e1-v0", "e1-v1"


class Ear:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.servers: list[str] = []

    def __call__(self, tokens: SampledTokens) -> None:
        assert len(tokens.ids) == len(tokens.logprobs) == len(tokens.versions) > 0
        self.ids += tokens.ids
        self.logprobs += tokens.logprobs
        self.versions += tokens.versions
        self.servers.append(tokens.server)


async def ask(manager: AsyncLLMServerManager, ear: Ear, *, num_tokens: int = 20, deadline: float = 200.0) -> Generation:
    return await manager.at(Priority.EVALUATION).generate(
        PROMPT,
        SamplingParams(max_new_tokens=num_tokens),
        trajectory_id="t",
        group_id="g",
        deadline=deadline,
        on_tokens=ear,
    )


def add(manager: AsyncLLMServerManager, server: FakeSGLang, label: str = V0) -> None:
    manager.add_server(server.url)
    manager.set_verified(server.url, label)


@pytest.mark.asyncio
async def test_tokens_are_told_before_the_rest_is_sampled_and_a_killed_server_goes_unnoticed() -> None:
    ear = Ear()
    async with FakeSGLang(label=V0) as first, FakeSGLang(label=V0) as second, AsyncLLMServerManager() as manager:
        for server in (first, second):
            add(manager, server)
            server.hold_after(tokens=6)
        manager.require_version(V0)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(ask(manager, ear))
            await until(lambda: len(ear.ids) == 6)
            (server,) = (s for s in (first, second) if s.num_live)
            assert server.num_tokens == 6
            await server.kill()
            await until(lambda: len(ear.ids) == 12)
            for server in (first, second):
                server.let_go()
        generation = running.result()
    assert generation.ids == ear.ids == pseudo_tokens(PROMPT, 20)
    assert generation.logprobs == ear.logprobs == [pseudo_logprob(i) for i in ear.ids]
    assert (generation.versions, ear.versions) == ([0] * 20, [0] * 20)
    assert set(ear.servers) == {first.url, second.url}


@pytest.mark.asyncio
async def test_tokens_of_weights_that_nobody_verified_are_never_told() -> None:
    ear = Ear()
    async with FakeSGLang(label="default") as first, FakeSGLang(label=V0) as second, AsyncLLMServerManager() as manager:
        add(manager, first)  # it restarted with its base weights since
        manager.require_version(V0)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(ask(manager, ear))
            await until(lambda: manager.counters()["version_mismatches"] == 1)
            assert ear.ids == []
            add(manager, second)
        assert running.result().ids == ear.ids == pseudo_tokens(PROMPT, 20)
    assert set(ear.servers) == {second.url}


@pytest.mark.asyncio
async def test_tokens_of_an_update_under_way_wait_until_it_is_verified() -> None:
    ear = Ear()
    async with FakeSGLang(label=V0) as server, AsyncLLMServerManager() as manager:
        add(manager, server)
        manager.require_version(V0)
        server.hold_after(tokens=5)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(ask(manager, ear, num_tokens=8))
            await until(lambda: len(ear.ids) == 5)
            manager.begin_update(server.url, V1)
            server.label = V1
            server.let_go()
            manager.set_verified(server.url, V1)
        generation = running.result()
    assert ear.ids == generation.ids == pseudo_tokens(PROMPT, 8)
    assert ear.versions == generation.versions == [0] * 5 + [1] * 3


@pytest.mark.asyncio
async def test_tokens_of_an_adapter_are_told_with_its_version_while_they_arrive() -> None:
    ear = Ear()
    async with FakeSGLang(label="base") as server, AsyncLLMServerManager() as manager:
        server.adapters[V1] = "somewhere"
        manager.add_server(server.url)
        manager.set_verified(server.url, V1, adapter=V1)
        manager.require_version(V1)
        server.hold_after(tokens=5)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(ask(manager, ear, num_tokens=8))
            await until(lambda: len(ear.ids) == 5)
            server.let_go()
    assert ear.ids == running.result().ids == pseudo_tokens(PROMPT, 8)
    assert ear.versions == running.result().versions == [1] * 8


def test_only_verified_labels_are_told_as_they_arrive() -> None:
    ear = Ear()
    relay = TokenRelay(ear)
    piece = PartialGeneration(ids=[1, 2, 3], logprobs=[-1.0, -2.0, -3.0], labels=[V0, V0, V1])
    relay.arrived(piece, num_before=0, server="s", certain={V0})
    relay.arrived(piece, num_before=0, server="s", certain={V0})
    assert ear.ids == [1, 2]
    relay.arrived(piece, num_before=0, server="s", certain={V0, V1})
    assert (ear.ids, ear.versions) == ([1, 2, 3], [0, 0, 1])
    relay.arrived(PartialGeneration(ids=[4], logprobs=[-4.0], labels=[V1]), num_before=3, server="s", certain=None)
    assert ear.ids == [1, 2, 3, 4]
    with pytest.raises(GenerationError, match="2 tokens that were passed on already are of unknown weights"):
        relay.settled(PartialGeneration(ids=[1, 2], logprobs=[-1.0, -2.0], labels=[V0, V0]), server="s")


@pytest.mark.asyncio
async def test_what_was_told_outlives_a_deadline_and_a_cancellation() -> None:
    ear = Ear()
    async with FakeSGLang(label=V0) as server, AsyncLLMServerManager() as manager:
        add(manager, server)
        manager.require_version(V0)
        server.hold_after(tokens=4)
        running = asyncio.ensure_future(ask(manager, ear, deadline=200))
        await until(lambda: len(ear.ids) == 4)
        pass_time(200)
        with pytest.raises(DeadlineExceeded):
            await running
        assert ear.ids == pseudo_tokens(PROMPT, 4)
        server.hold_after(tokens=3)
        running = asyncio.ensure_future(ask(manager, ear))
        await until(lambda: len(ear.ids) == 7)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await until(lambda: server.num_live == 0)
    assert ear.ids[4:] == pseudo_tokens(PROMPT, 3)
