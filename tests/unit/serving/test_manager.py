"""AsyncLLMServerManager against fake servers: what is kept, where requests go, who may take them, what is waited for."""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import orjson
import pytest

from agentrl.errors import DeadlineExceeded, GenerationError
from agentrl.serving.retry_budget import RetryBudget
from agentrl.serving.routing import Overload
from agentrl.serving.server_manager import NO_POLICY, AsyncLLMServerManager
from agentrl.serving.server_state import CircuitBreaker
from agentrl.testing.clock import pass_time
from agentrl.testing.fake_sglang import FakeSGLang, pseudo_logprob, pseudo_tokens
from agentrl.testing.waits import until
from agentrl.types import Generation, SampledTokens, SamplingParams

PROMPT = [11, 22, 33]
V0, V1 = "e1-v0", "e1-v1"


@asynccontextmanager
async def fleet(
    num_servers: int, *, label: str = V0, latency_s: float = 0.0, verify: bool = True, **options: Any
) -> AsyncGenerator[tuple[AsyncLLMServerManager, list[FakeSGLang]], None]:
    """Servers that report ``label`` and a manager that requires it."""
    servers = [FakeSGLang(label=label, token_latency_s=latency_s) for _ in range(num_servers)]
    async with AsyncLLMServerManager(**options) as manager:
        try:
            for server in servers:
                await server.start()
                manager.add_server(server.url)
                if verify:
                    manager.set_verified(server.url, label)
            manager.require_version(label)
            yield manager, servers
        finally:
            for server in servers:
                await server.kill()


async def ask(
    manager: AsyncLLMServerManager,
    *,
    num_tokens: int = 20,
    trajectory: str = "t",
    group: str = "g",
    deadline: float = 120.0,
    prompt: list[int] | None = None,
) -> Generation:
    sampling = SamplingParams(max_new_tokens=num_tokens)
    ids = PROMPT if prompt is None else prompt
    return await manager.generate(ids, sampling, trajectory_id=trajectory, group_id=group, deadline=deadline)


def in_flight(manager: AsyncLLMServerManager) -> list[tuple[int, int]]:
    return [(stats.requests_in_flight, stats.tokens_in_flight) for stats in manager.stats()]


@pytest.mark.asyncio
async def test_a_crash_in_mid_generation_continues_elsewhere_with_the_tokens_kept() -> None:
    async with fleet(2, latency_s=0.001) as (manager, servers):
        for server in servers:
            server.crash_after(tokens=6)
        generation = await ask(manager)
    expected = pseudo_tokens(PROMPT, 20)
    assert generation.ids == expected
    assert generation.logprobs == [pseudo_logprob(token) for token in expected]
    assert generation.versions == [0] * 20
    assert generation.finish == "length"
    asked = [request for server in servers for request in server.requests]
    assert sorted(len(request["input_ids"]) for request in asked) == [3, 9, 15]
    assert sorted(request["sampling_params"]["max_new_tokens"] for request in asked) == [8, 14, 20]
    assert manager.counters()["continuations"] == 2
    assert in_flight(manager) == [(0, 0), (0, 0)]


@pytest.mark.asyncio
async def test_a_server_killed_under_load_loses_no_generation() -> None:
    async with fleet(3, latency_s=0.001, breaker_reset_s=600.0) as (manager, servers):

        async def rollout(index: int) -> None:
            prompt = [index, 1, 2]
            generation = await ask(manager, num_tokens=60, trajectory=f"t{index}", group=f"g{index}", prompt=prompt)
            assert generation.ids == pseudo_tokens(prompt, 60)

        async with asyncio.TaskGroup() as group:
            for index in range(30):
                group.create_task(rollout(index))
            await until(lambda: servers[0].num_live > 3 and servers[0].num_tokens > 50)
            await servers[0].kill()
        assert manager.counters()["continuations"] > 0
        assert manager.stats()[0].breaker == "open"
        assert in_flight(manager) == [(0, 0)] * 3


@pytest.mark.asyncio
async def test_a_stream_broken_after_its_last_token_is_complete() -> None:
    async with fleet(1, latency_s=0.001) as (manager, servers):
        servers[0].crash_after(tokens=5)
        generation = await ask(manager, num_tokens=5)
    assert generation.ids == pseudo_tokens(PROMPT, 5)
    assert generation.finish == "length"


@pytest.mark.asyncio
async def test_nothing_follows_the_end_of_a_generation_whose_connection_broke_after_it() -> None:
    num_asked = 0

    async def end_by_own_token_and_break(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_asked
        num_asked += 1
        await reader.readuntil(b"input_ids")
        meta = {
            "completion_tokens": 1,
            "output_token_logprobs": [[-0.5, 9, None]],
            "finish_reason": {"type": "stop", "matched": 9},
        }
        event = b"data: " + orjson.dumps({"output_ids": [9], "meta_info": meta | {"weight_version": V0}}) + b"\n\n"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        await writer.drain()
        writer.close()

    engine = await asyncio.start_server(end_by_own_token_and_break, "127.0.0.1", 0)
    async with engine, AsyncLLMServerManager() as manager:
        manager.add_server(f"http://127.0.0.1:{engine.sockets[0].getsockname()[1]}")
        generation = await ask(manager)
    assert (generation.ids, generation.finish, num_asked) == ([9], "stop", 1)


@pytest.mark.asyncio
async def test_an_abort_by_a_pause_resumes_with_the_partial_generation() -> None:
    async with fleet(1, latency_s=0.002) as (manager, servers):
        client = manager.client(servers[0].url)
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(ask(manager, num_tokens=30))
            await until(lambda: servers[0].num_tokens >= 5)
            await client.pause("abort", timeout_s=60)
            await until(lambda: len(servers[0].requests) == 2)
            await client.continue_generation(timeout_s=60)
        assert asked.result().ids == pseudo_tokens(PROMPT, 30)
        assert len(servers[0].requests[1]["input_ids"]) >= 8


@pytest.mark.asyncio
async def test_a_server_that_never_answers_ends_at_the_deadline() -> None:
    async with fleet(1) as (manager, servers):
        servers[0].stall()
        asked = asyncio.ensure_future(ask(manager, deadline=200))
        await until(lambda: servers[0].num_live == 1)
        pass_time(200)
        with pytest.raises(DeadlineExceeded, match=r"generation \(waiting for server\) did not finish within 200 s"):
            await asked
        assert in_flight(manager) == [(0, 0)]
        assert manager.wait_reason() is None
        await until(lambda: servers[0].num_live == 0)


@pytest.mark.asyncio
async def test_with_a_stall_limit_a_silent_server_is_left_for_another() -> None:
    async with fleet(2, stall_timeout_s=0.2) as (manager, servers):
        servers[0].stall()
        manager.drain(servers[1].url)
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(ask(manager))
            await until(lambda: servers[0].num_live == 1)
            manager.undrain(servers[1].url)
        assert asked.result().server == servers[1].url


@pytest.mark.asyncio
async def test_a_rejected_request_is_not_tried_elsewhere() -> None:
    async with fleet(3) as (manager, servers):
        for server in servers:
            server.fail_next(400, message="too long")
        with pytest.raises(GenerationError, match="too long"):
            await ask(manager)
        assert sum(len(server.requests) for server in servers) == 1


@pytest.mark.asyncio
async def test_a_busy_server_is_left_for_another_without_blame() -> None:
    async with fleet(2) as (manager, servers):
        servers[0].fail_next(503, times=1)
        servers[1].fail_next(503, times=1)
        assert (await ask(manager)).ids == pseudo_tokens(PROMPT, 20)
        assert [stats.errors for stats in manager.stats()] == [0, 0]
        assert {stats.breaker for stats in manager.stats()} == {"closed"}


@pytest.mark.asyncio
async def test_servers_without_room_are_waited_for_until_the_deadline() -> None:
    async with fleet(2, max_attempts=2, retry_budget=RetryBudget(burst=1, per_s=1e-6)) as (manager, servers):
        for server in servers:
            server.fail_next(503, times=3)
        assert (await ask(manager)).ids == pseudo_tokens(PROMPT, 20)
        assert sum(len(server.requests) for server in servers) == 7
        assert manager.counters()["delayed_retries"] == 0
        for server in servers:
            server.fail_next(503, times=10**3)
        asked = asyncio.ensure_future(ask(manager, deadline=1000))
        await until(lambda: manager.num_parked() == 1)
        assert manager.wait_reason() == "server"
        pass_time(1000)
        with pytest.raises(DeadlineExceeded, match="waiting for server"):
            await asked


@pytest.mark.asyncio
async def test_attempts_are_bounded() -> None:
    async with fleet(2, max_attempts=3, breaker_failures=100) as (manager, servers):
        for server in servers:
            server.fail_next(500, times=50)
        with pytest.raises(GenerationError, match="3 attempts failed over 2 servers with 0 of 20 tokens"):
            await ask(manager)
        assert sum(len(server.requests) for server in servers) == 3


@pytest.mark.asyncio
async def test_the_members_of_a_group_share_a_server_and_later_turns_stay_there() -> None:
    async with fleet(4, latency_s=0.0005) as (manager, _):
        async with asyncio.TaskGroup() as tasks:
            first = [
                tasks.create_task(ask(manager, trajectory=f"{group}/{member}", group=group))
                for group in ("a", "b", "c", "d")
                for member in range(4)
            ]
        homes = [task.result().server for task in first]
        for group in range(4):
            assert len(set(homes[4 * group : 4 * group + 4])) == 1
        assert len(set(homes)) == 4, "four groups over four idle servers"
        again = await ask(manager, trajectory="b/2", group="b", prompt=[*PROMPT, 1, 2])
        assert again.server == homes[6]


@pytest.mark.asyncio
async def test_an_overloaded_home_is_left_for_the_best_alternative() -> None:
    async with fleet(2, overload=Overload(tokens=0, ratio=1.0)) as (manager, servers):
        home = (await ask(manager, trajectory="x")).server
        busy = next(server for server in servers if server.url == home)
        busy.stall()
        async with asyncio.TaskGroup() as tasks:
            blocked = [
                tasks.create_task(ask(manager, trajectory=f"x{i}", group="g", prompt=[1] * 500, deadline=60)) for i in range(1)
            ]
            await until(lambda: busy.num_live == 1)
            moved = await ask(manager, trajectory="x")
            assert moved.server != home
            busy.stall(stalled=False)
            for task in blocked:
                task.cancel()
        assert manager.counters()["moves"] == 1


@pytest.mark.asyncio
async def test_only_verified_servers_take_traffic_and_waiting_says_weights() -> None:
    async with fleet(2, verify=False) as (manager, servers):
        asked = asyncio.ensure_future(ask(manager))
        await until(lambda: manager.wait_reason() == "weights")
        assert manager.num_parked() == 1
        assert [stats.state for stats in manager.stats()] == ["quarantined", "quarantined"]
        manager.set_verified(servers[1].url, V0)
        assert (await asked).server == servers[1].url
        assert servers[0].requests == []
        assert manager.wait_reason() is None
        manager.require_version(V1)
        with pytest.raises(DeadlineExceeded, match="waiting for weights"):
            await ask(manager, deadline=0.05)
        assert manager.stats()[1].state == "stale"


@pytest.mark.asyncio
async def test_without_any_server_the_wait_says_server() -> None:
    async with AsyncLLMServerManager() as manager:
        manager.require_version(NO_POLICY)
        with pytest.raises(DeadlineExceeded, match="waiting for server"):
            await ask(manager, deadline=0.05)


@pytest.mark.asyncio
async def test_a_restart_with_base_weights_is_quarantined_and_its_tokens_are_discarded() -> None:
    async with fleet(2) as (manager, servers):
        home = (await ask(manager, trajectory="x")).server
        restarted = next(server for server in servers if server.url == home)
        other = next(server for server in servers if server.url != home)
        restarted.base_label = "default"
        await restarted.restart_with_base_weights()
        restarted.requests.clear()
        generation = await ask(manager, trajectory="x")
        assert generation.server == other.url
        assert generation.versions == [0] * 20
        counters = manager.counters()
        assert (counters["version_mismatches"], counters["tokens_discarded"], counters["quarantines"]) == (1, 20, 1)
        assert "'default'" in next(stats.reason for stats in manager.stats() if stats.url == home)
        for index in range(20):
            await ask(manager, trajectory=f"y{index}", group=f"h{index}")
        assert len(restarted.requests) == 1, "only the one that revealed it"
        restarted.label = V0
        manager.set_verified(home, V0)
        await asyncio.gather(*(ask(manager, trajectory=f"z{i}", group=f"z{i}") for i in range(8)))
        assert len(restarted.requests) > 1


@pytest.mark.asyncio
async def test_the_health_loop_notices_a_restart_before_any_request() -> None:
    async with fleet(2, probe_every_s=0.01) as (manager, servers):
        servers[0].base_label = "default"
        async with asyncio.TaskGroup() as tasks:
            health = tasks.create_task(manager.run())
            await until(lambda: servers[0].calls["/model_info"] > 0)
            await servers[0].restart_with_base_weights()
            await until(lambda: manager.stats()[0].state == "quarantined")
            for index in range(10):
                await ask(manager, trajectory=f"t{index}", group=f"g{index}")
            health.cancel()
        assert servers[0].requests == []


@pytest.mark.asyncio
async def test_an_unreachable_server_loses_its_requests_to_others_and_returns_when_it_answers() -> None:
    options: dict[str, Any] = {"probe_every_s": 0.01, "probe_timeout_s": 0.5, "unhealthy_after": 2}
    async with fleet(2, **options) as (manager, servers), asyncio.TaskGroup() as tasks:
        health = tasks.create_task(manager.run())
        await servers[0].kill()
        await until(lambda: manager.stats()[0].state == "unhealthy")
        assert (await ask(manager)).server == servers[1].url
        await servers[0].start()
        await until(lambda: manager.stats()[0].state == "ready")
        health.cancel()


@pytest.mark.asyncio
async def test_tokens_of_the_version_being_installed_are_legal_in_flight() -> None:
    async with fleet(1, latency_s=0.002) as (manager, servers):
        server = servers[0]
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(ask(manager, num_tokens=30))
            await until(lambda: server.num_tokens >= 5)
            manager.require_version(V1)
            manager.begin_update(server.url, V1)
            server.label = V1
            await until(lambda: server.num_tokens >= 10)
            manager.set_verified(server.url, V1)
        versions = asked.result().versions
        assert versions == sorted(versions)
        assert set(versions) == {0, 1}
        assert asked.result().ids == pseudo_tokens(PROMPT, 30)
        assert manager.counters()["version_mismatches"] == 0


@pytest.mark.asyncio
async def test_a_failed_update_keeps_the_legal_prefix_and_moves_the_rest() -> None:
    async with fleet(2, latency_s=0.002) as (manager, servers):
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(ask(manager, num_tokens=60))
            await until(lambda: max(server.num_tokens for server in servers) >= 5)
            first, other = sorted(servers, key=lambda server: -server.num_live)
            manager.begin_update(first.url, V1)
            first.label = V1
            await until(lambda: first.num_tokens >= 15)
            manager.quarantine(first.url, "digest differs")
        generation = asked.result()
        assert generation.server == other.url
        assert generation.versions == [0] * 60
        assert generation.ids == pseudo_tokens(PROMPT, 60)
        assert manager.counters()["tokens_discarded"] > 0
        assert manager.counters()["version_mismatches"] == 0


@pytest.mark.asyncio
async def test_each_policy_version_has_its_own_cache_namespace() -> None:
    async with fleet(1) as (manager, servers):
        await ask(manager)
        servers[0].label = V1
        manager.require_version(V1)
        manager.set_verified(servers[0].url, V1)
        await ask(manager)
        assert [request["extra_key"] for request in servers[0].requests] == [V0, V1]


@pytest.mark.asyncio
async def test_servers_come_drain_and_go_while_requests_run() -> None:
    async with fleet(1, latency_s=0.001) as (manager, servers):
        extra = FakeSGLang(label=V0, token_latency_s=0.001)
        await extra.start()
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(ask(manager, num_tokens=50, trajectory="old"))
            await until(lambda: servers[0].num_live == 1)
            manager.add_server(extra.url, capacity=2.0)
            manager.set_verified(extra.url, V0)
            manager.drain(servers[0].url)
            fresh = tasks.create_task(ask(manager, trajectory="new", group="h"))
            assert await manager.wait_drained(servers[0].url, timeout_s=120)
        assert running.result().server == servers[0].url
        assert fresh.result().server == extra.url
        manager.undrain(servers[0].url)
        async with asyncio.TaskGroup() as tasks:
            moved = tasks.create_task(ask(manager, num_tokens=200, trajectory="new", group="h"))
            await until(lambda: extra.num_live == 1)
            manager.remove_server(extra.url)
        assert moved.result().server == servers[0].url
        assert moved.result().ids == pseudo_tokens(PROMPT, 200)
        assert manager.urls == [servers[0].url]
        await until(lambda: extra.num_live == 0)
        await extra.kill()


@pytest.mark.asyncio
async def test_a_drain_that_takes_too_long_moves_the_rest() -> None:
    async with fleet(2, latency_s=0.002) as (manager, servers):
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(ask(manager, num_tokens=300))
            await until(lambda: any(server.num_live for server in servers))
            busy = next(server for server in servers if server.num_live)
            manager.drain(busy.url)
            assert not await manager.wait_drained(busy.url, timeout_s=0.02)
        assert asked.result().server != busy.url
        assert asked.result().ids == pseudo_tokens(PROMPT, 300)


@pytest.mark.asyncio
async def test_what_runs_on_a_server_that_is_taken_back_while_it_drains_stays_there() -> None:
    async with fleet(2, latency_s=0.0001) as (manager, servers):
        for server in servers:
            server.hold_after(tokens=5)
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(ask(manager))
            await until(lambda: any(server.num_live for server in servers))
            busy = next(server for server in servers if server.num_live)
            manager.drain(busy.url)
            drained = tasks.create_task(manager.wait_drained(busy.url, timeout_s=0.02))
            await asyncio.sleep(0)
            manager.undrain(busy.url)
            assert not await drained
            for server in servers:
                server.let_go()
        assert asked.result().server == busy.url
        assert manager.counters()["continuations"] == 0


@pytest.mark.asyncio
async def test_a_drained_server_stays_drained_when_its_engine_is_started_again() -> None:
    async with fleet(2) as (manager, servers):
        manager.drain(servers[0].url)
        manager.add_server(servers[0].url)
        manager.set_verified(servers[0].url, V0)
        assert [stats.state for stats in manager.stats()] == ["draining", "ready"]
        manager.remove_server(servers[0].url)
        manager.add_server(servers[0].url)
        manager.set_verified(servers[0].url, V0)
        assert [stats.state for stats in manager.stats()] == ["ready", "ready"]


@pytest.mark.asyncio
async def test_a_server_never_holds_more_requests_than_it_may() -> None:
    async with fleet(2, latency_s=0.001, max_requests_per_server=3) as (manager, servers):
        await asyncio.gather(*(ask(manager, num_tokens=5, trajectory=f"t{i}", group=f"g{i}") for i in range(40)))
        assert [server.max_live <= 3 for server in servers] == [True, True]
        assert sum(stats.requests_served for stats in manager.stats()) == 40


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(4))
async def test_counters_return_to_zero_after_a_storm_of_cancellations(seed: int) -> None:
    rng = random.Random(seed)
    options: dict[str, Any] = {"max_requests_per_server": 4, "breaker_reset_s": 0.01, "max_attempts": 50}
    async with fleet(3, latency_s=0.001, **options) as (manager, servers):

        async def rollout(index: int) -> None:
            with suppress(DeadlineExceeded, GenerationError):
                await ask(
                    manager,
                    num_tokens=rng.randrange(1, 40),
                    trajectory=f"t{index}",
                    group=f"g{index % 7}",
                    deadline=rng.uniform(0.0, 0.3),
                )

        tasks = [asyncio.ensure_future(rollout(index)) for index in range(120)]
        for step in range(60):
            await asyncio.sleep(0.002)
            rng.choice(tasks).cancel()
            if step % 10 == 0:
                rng.choice(servers).crash_after(tokens=2)
            if step == 20:
                manager.quarantine(servers[0].url, "storm")
            if step == 30:
                manager.set_verified(servers[0].url, V0)
            if step == 40:
                manager.add_server(servers[1].url)
                manager.set_verified(servers[1].url, V0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert in_flight(manager) == [(0, 0)] * 3
        assert manager.num_parked() == 0
        assert manager.wait_reason() is None
        await until(lambda: all(server.num_live == 0 for server in servers))
        assert (await ask(manager)).ids == pseudo_tokens(PROMPT, 20)


@pytest.mark.asyncio
async def test_stats_count_tokens_latency_and_cache() -> None:
    async with fleet(1) as (manager, _):
        prompt = list(range(100, 164))
        first = await ask(manager, prompt=prompt)
        second = await ask(manager, prompt=prompt)
        stats = manager.stats()[0]
    assert (first.cached_tokens, second.cached_tokens) == (0, 63)
    assert stats.cached_token_ratio == pytest.approx(63 / 128)
    assert (stats.requests_served, stats.tokens_served, stats.version) == (2, 40, V0)
    assert 0 < stats.p50_ms <= stats.p99_ms


def test_the_breaker_opens_probes_once_and_doubles_its_pause() -> None:
    breaker = CircuitBreaker(failures=2, reset_s=1.0, max_reset_s=3.0)
    breaker.failed(0.0)
    assert breaker.state(0.0) == "closed"
    breaker.failed(0.0)
    assert breaker.state(0.5) == "open"
    assert not breaker.allows(0.5)
    assert breaker.retry_in_s(0.25) == 0.75
    assert breaker.allows(1.0)
    breaker.start()
    assert breaker.state(1.0) == "half_open"
    assert not breaker.allows(1.0), "one probe at a time"
    breaker.failed(1.0)
    assert not breaker.allows(2.9)
    assert breaker.allows(3.0)
    breaker.start()
    breaker.cancelled()
    assert breaker.allows(3.0), "a probe that said nothing makes room for another"
    breaker.start()
    breaker.failed(3.0)
    assert breaker.allows(6.0), "the pause is capped at 3 s"
    breaker.start()
    breaker.succeeded()
    assert breaker.state(6.0) == "closed"


@pytest.mark.asyncio
async def test_without_a_required_version_any_server_serves_unless_it_is_quarantined() -> None:
    async with fleet(2, label="base", verify=False) as (manager, servers):
        manager.require_version(None)
        manager.quarantine(servers[0].url, "under repair")
        for index in range(6):
            generation = await ask(manager, trajectory=f"t{index}", group=f"g{index}")
            assert generation.server == servers[1].url
            assert generation.versions == [-1] * 20
        assert servers[0].requests == []


@pytest.mark.asyncio
async def test_a_deadline_says_for_how_long_nothing_was_heard() -> None:
    heard: list[int] = []
    async with fleet(1) as (manager, (server,)):
        server.stall_after(tokens=5)
        asking = asyncio.create_task(
            manager.generate(
                PROMPT,
                SamplingParams(max_new_tokens=20),
                trajectory_id="t",
                group_id="g",
                deadline=500.0,
                on_tokens=lambda tokens: heard.extend(tokens.ids),
            )  # fmt: skip
        )
        await until(lambda: len(heard) == 5)
        pass_time(500)
        with pytest.raises(DeadlineExceeded) as caught:
            await asking
    assert caught.value.silent_s is not None
    assert caught.value.silent_s >= 500


@pytest.mark.asyncio
async def test_what_is_heard_late_ends_the_silence() -> None:
    async with fleet(1, latency_s=0.01) as (manager, _):

        def hear(tokens: SampledTokens) -> None:
            pass_time(100)  # each time: the deadline passes while it goes on

        with pytest.raises(DeadlineExceeded) as caught:
            await manager.generate(
                PROMPT, SamplingParams(max_new_tokens=1000), trajectory_id="t", group_id="g", deadline=450.0, on_tokens=hear
            )  # fmt: skip
    assert caught.value.silent_s is not None
    assert caught.value.silent_s < 250, "of 450 s; the clock moves by 100 s behind each token"
