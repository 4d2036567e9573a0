"""The manager under scarcity: who goes first, how many a server gets, whose count is believed, how often failures repeat."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agentrl.errors import DeadlineExceeded
from agentrl.serving.load_policy import ConcurrencyPolicy
from agentrl.serving.retry_budget import RetryBudget
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.waiting_room import Priority, WaitingRoom
from agentrl.testing.clock import pass_time
from agentrl.testing.fake_sglang import FakeSGLang, pseudo_tokens
from agentrl.testing.waits import until
from agentrl.types import Generation, SamplingParams

LABEL = "e1-v0"


@asynccontextmanager
async def fleet(
    num_servers: int, *, max_running: int | None = None, latency_s: float = 0.0, **options: Any
) -> AsyncGenerator[tuple[AsyncLLMServerManager, list[FakeSGLang]], None]:
    servers = [FakeSGLang(label=LABEL, token_latency_s=latency_s, max_running=max_running) for _ in range(num_servers)]
    async with AsyncLLMServerManager(probe_every_s=0.01, **options) as manager:
        try:
            for server in servers:
                await server.start()
                manager.add_server(server.url)
                manager.set_verified(server.url, LABEL)
            manager.require_version(LABEL)
            yield manager, servers
        finally:
            for server in servers:
                await server.kill()


async def ask(
    manager: AsyncLLMServerManager, name: str, *, num_tokens: int = 10, priority: Priority = Priority.TRAINING
) -> Generation:
    sampling = SamplingParams(max_new_tokens=num_tokens)
    return await manager.generate([1, 2, 3], sampling, trajectory_id=name, group_id=name, deadline=200, priority=priority)


@pytest.mark.asyncio
async def test_evaluation_goes_before_training_and_what_was_begun_before_what_is_new() -> None:
    async with fleet(1, max_requests_per_server=1, latency_s=0.001) as (manager, servers):
        await ask(manager, "begun")  # its later turns are resumed work
        order: list[str] = []

        async def queued(name: str, priority: Priority) -> None:
            await ask(manager, name, num_tokens=5, priority=priority)
            order.append(name)

        async with asyncio.TaskGroup() as group:
            group.create_task(ask(manager, "first", num_tokens=60))
            await until(lambda: servers[0].num_live == 1)
            for name in ("new-1", "new-2", "begun"):
                group.create_task(queued(name, Priority.TRAINING))
            await until(lambda: manager.num_parked() == 3)
            group.create_task(queued("evaluation", Priority.EVALUATION))
            await until(lambda: manager.num_parked() == 4)
        assert order == ["evaluation", "begun", "new-1", "new-2"]
        assert servers[0].max_live == 1


@pytest.mark.asyncio
async def test_a_newcomer_never_overtakes_those_that_wait() -> None:
    async with fleet(1, max_requests_per_server=2) as (manager, _):
        manager.drain(manager.urls[0])
        order: list[int] = []

        async def queued(index: int) -> None:
            await ask(manager, f"t{index}")
            order.append(index)

        async with asyncio.TaskGroup() as group:
            for index in range(20):
                group.create_task(queued(index))
            await until(lambda: manager.num_parked() == 20)
            manager.undrain(manager.urls[0])
            group.create_task(queued(20))
        assert len(order) == 21
        assert order.index(20) >= 19, order


@pytest.mark.asyncio
async def test_one_who_gives_up_passes_the_turn_on() -> None:
    room = WaitingRoom()
    first, second = (room.enter(Priority.TRAINING, is_new=True) for _ in range(2))
    async with asyncio.TaskGroup() as group:
        woken = group.create_task(room.sleep(second, limit_s=30))
        sleeping = group.create_task(room.sleep(first, limit_s=30))
        await asyncio.sleep(0)
        room.wake()
        sleeping.cancel()
        await asyncio.sleep(0)
        room.leave(first)
        await woken
    assert room.is_first(second, Priority.TRAINING, is_new=True)
    assert room.is_first(None, Priority.EVALUATION, is_new=True)
    assert not room.is_first(None, Priority.TRAINING, is_new=True)
    room.leave(second)
    assert len(room) == 0


@pytest.mark.asyncio
async def test_the_limit_of_a_server_follows_its_queue() -> None:
    policy = ConcurrencyPolicy(floor=2, start=4)
    async with fleet(1, max_running=12, latency_s=0.002, concurrency=policy) as (manager, servers):
        stop = asyncio.Event()

        async def demand(index: int) -> None:
            while not stop.is_set():
                assert (await ask(manager, f"t{index}", num_tokens=15)).ids == pseudo_tokens([1, 2, 3], 15)

        async with asyncio.TaskGroup() as group:
            probing = group.create_task(manager.run())
            for index in range(60):
                group.create_task(demand(index))
            await until(lambda: (manager.stats()[0].limit or 0) >= 12)
            seen: list[int] = []
            async with asyncio.timeout(120):
                while len(seen) < 40:
                    seen.append(manager.stats()[0].limit or 0)
                    await asyncio.sleep(0.01)
            stop.set()
            await until(lambda: manager.stats()[0].requests_in_flight == 0)
            probing.cancel()
        assert max(seen) < 30, "60 requests wanted in; the engine runs 12"
        assert servers[0].max_live < 40
        assert manager.num_parked() == 0


@pytest.mark.asyncio
async def test_requests_of_others_count_as_load() -> None:
    async with fleet(2, latency_s=0.001) as (manager, servers):
        servers[0].num_foreign = 50
        async with asyncio.TaskGroup() as group:
            probing = group.create_task(manager.run())
            await until(lambda: manager.stats()[0].foreign_requests == 50)
            answers = [await ask(manager, f"t{index}") for index in range(10)]
            assert {answer.server for answer in answers} == {servers[1].url}
            assert manager.counters()["drifts"] == 1
            servers[0].num_foreign = 0
            await until(lambda: manager.stats()[0].foreign_requests == 0)
            probing.cancel()


@pytest.mark.asyncio
async def test_requests_that_an_engine_lost_are_generated_elsewhere_with_their_tokens() -> None:
    async with fleet(2, latency_s=0.002, lost_after_s=0.2) as (manager, servers):
        async with asyncio.TaskGroup() as group:
            probing = group.create_task(manager.run())
            manager.drain(servers[1].url)
            asked = [group.create_task(ask(manager, f"t{index}", num_tokens=100)) for index in range(4)]
            await until(lambda: servers[0].num_tokens > 40)
            manager.undrain(servers[1].url)
            servers[0].lose_requests()
            generations = [await task for task in asked]
            probing.cancel()
        assert all(generation.ids == pseudo_tokens([1, 2, 3], 100) for generation in generations)
        assert manager.counters()["drifts"] >= 1
        assert manager.counters()["continuations"] == 4
        assert [stats.requests_in_flight for stats in manager.stats()] == [0, 0]


@pytest.mark.asyncio
async def test_a_sick_fleet_is_not_hammered() -> None:
    budget = RetryBudget(burst=3, per_s=1e-6, per_success=0.0)
    async with fleet(2, retry_budget=budget, breaker_failures=10**6, max_attempts=100) as (manager, servers):
        for server in servers:
            server.fail_next(500, times=1000)

        async def doomed(index: int) -> None:
            sampling = SamplingParams(max_new_tokens=5)
            with pytest.raises(DeadlineExceeded):
                await manager.generate([1], sampling, trajectory_id=f"t{index}", group_id="g", deadline=2000)

        async with asyncio.TaskGroup() as group:
            for index in range(20):
                group.create_task(doomed(index))
            await until(lambda: manager.num_parked() == 20)
            calls = sum(len(server.requests) for server in servers)
            # One call and one free retry each, then the bucket, which holds three; time gives next to nothing here.
            assert calls == 40 + 3
            assert manager.counters()["delayed_retries"] >= 20
            pass_time(2000)
        assert manager.num_parked() == 0


@pytest.mark.asyncio
async def test_the_manager_at_another_priority_is_the_same_servers() -> None:
    async with fleet(1) as (manager, _):
        evaluation = manager.at(Priority.EVALUATION)
        sampling = SamplingParams(max_new_tokens=8)
        generation = await evaluation.generate([5, 6], sampling, trajectory_id="t", group_id="g", deadline=120)
        assert generation.ids == pseudo_tokens([5, 6], 8)
        assert manager.stats()[0].requests_served == 1
