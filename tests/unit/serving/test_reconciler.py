"""WeightReconciler against fake servers: what is loaded, verified, resumed, refused and retried."""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agentrl.errors import StreamError
from agentrl.serving.server_manager import NO_POLICY, AsyncLLMServerManager
from agentrl.serving.weight_reconciler import PolicyProblem, UpdateMode, WeightReconciler, WeightUpdate
from agentrl.testing.fake_sglang import FakeSGLang, pseudo_tokens
from agentrl.testing.waits import until
from agentrl.types import Generation, PolicyRecord, SamplingParams
from agentrl.weights.digest import weights_digest

PROMPT = [4, 5, 6]


class Policies:
    """The learner's side: a directory per version and the announced record."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.record: PolicyRecord | None = None
        self.errors: list[Exception] = []

    def write(self, version: int, *, epoch: int = 1, kind: Any = "full") -> PolicyRecord:
        path = self.root / f"e{epoch}-v{version}"
        path.mkdir()
        (path / "model.safetensors").write_bytes(f"weights {epoch} {version}".encode())
        return PolicyRecord(run_epoch=epoch, version=version, kind=kind, path=str(path), digest=weights_digest(path))

    def announce(self, version: int, *, epoch: int = 1) -> PolicyRecord:
        self.record = self.write(version, epoch=epoch)
        return self.record

    async def read(self) -> PolicyRecord | None:
        if self.errors:
            raise self.errors.pop()
        return self.record


@asynccontextmanager
async def reconciled(
    tmp_path: Path, num_servers: int, *, mode: UpdateMode = "in_place", latency_s: float = 0.0, **options: Any
) -> AsyncGenerator[tuple[AsyncLLMServerManager, list[FakeSGLang], Policies, WeightReconciler], None]:
    servers = [FakeSGLang(token_latency_s=latency_s) for _ in range(num_servers)]
    policies = Policies(tmp_path)
    async with AsyncLLMServerManager() as manager, asyncio.TaskGroup() as group:
        reconciler = WeightReconciler(
            manager, read_policy=policies.read, mode=mode, poll_s=0.005, backoff_s=0.01, control_timeout_s=60, **options
        )
        for server in servers:
            await server.start()
            manager.add_server(server.url)
        running = group.create_task(reconciler.run())
        try:
            yield manager, servers, policies, reconciler
        finally:
            running.cancel()
            for server in servers:
                await server.kill()


def settled(reconciler: WeightReconciler, policies: Policies) -> bool:
    return reconciler.target == policies.record and reconciler.is_settled


async def ask(manager: AsyncLLMServerManager, *, num_tokens: int = 20, name: str = "t") -> Generation:
    sampling = SamplingParams(max_new_tokens=num_tokens)
    return await manager.generate(PROMPT, sampling, trajectory_id=name, group_id=name, deadline=120)


@pytest.mark.asyncio
async def test_nothing_is_generated_before_a_policy_is_announced_and_then_it_is(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 2) as (manager, servers, policies, reconciler):
        asked = asyncio.ensure_future(ask(manager))
        await until(lambda: manager.wait_reason() == "weights")
        assert manager.required == NO_POLICY
        assert [server.requests for server in servers] == [[], []]
        policies.announce(3)
        assert (await asked).versions == [3] * 20
        await until(lambda: settled(reconciler, policies))
        assert [server.label for server in servers] == ["e1-v3", "e1-v3"]
        assert [update["flush_cache"] for server in servers for update in server.updates] == [True, True]
        assert all(update.is_first for update in reconciler.updates)


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["in_place", "retract", "abort", "rolling"])
async def test_generations_in_flight_survive_updates_and_carry_both_versions(tmp_path: Path, mode: UpdateMode) -> None:
    async with reconciled(tmp_path, 2, mode=mode, latency_s=0.002) as (manager, servers, policies, reconciler):
        policies.announce(0)
        await until(lambda: settled(reconciler, policies))

        async def rollout(index: int) -> Generation:
            return await ask(manager, num_tokens=120, name=f"t{index}")

        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(rollout(index)) for index in range(8)]
            await until(lambda: sum(server.num_tokens for server in servers) > 80)
            policies.announce(1)
            await until(lambda: settled(reconciler, policies))
            later = group.create_task(rollout(8))
        for task in asked:
            generation = task.result()
            assert generation.ids == pseudo_tokens(PROMPT, 120)
            assert generation.versions == sorted(generation.versions)
        versions = {version for task in asked for version in task.result().versions}
        assert versions == ({0} if mode == "rolling" else {0, 1})
        assert set(later.result().versions) == {1}
        assert manager.counters()["version_mismatches"] == 0
        assert manager.counters()["tokens_discarded"] == 0
        assert not any(server.is_paused for server in servers)
        update = reconciler.updates[-1]
        assert (update.version, update.mode, update.error, update.is_first) == (1, mode, "", False)
        assert 0 < update.paused_s <= update.total_s
        flushed = [server.updates[-1]["flush_cache"] for server in servers]
        assert flushed == [mode != "in_place"] * 2


@pytest.mark.asyncio
async def test_rolling_updates_never_take_all_servers_out(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 3, mode="rolling") as (manager, servers, policies, reconciler):
        policies.announce(0)
        await until(lambda: settled(reconciler, policies))
        for server in servers:
            server.update_s = 0.05
        policies.announce(1)
        fewest = 3
        while not settled(reconciler, policies):
            await asyncio.sleep(0.002)
            fewest = min(fewest, sum(stats.state == "ready" for stats in manager.stats()))
        assert fewest == 2


@pytest.mark.asyncio
async def test_a_rolling_update_waits_for_the_requests_of_other_processes(tmp_path: Path) -> None:
    told: list[tuple[bool, str | None]] = []

    async def tell() -> None:
        told.extend((server.is_draining, server.installing) for server in manager.view())

    async with reconciled(tmp_path, 1, mode="rolling", after_drain=tell) as (manager, servers, policies, reconciler):
        policies.announce(0)
        await until(lambda: settled(reconciler, policies))
        servers[0].num_foreign = 1
        looked = servers[0].calls["/v1/loads"]
        policies.announce(1)
        await until(lambda: servers[0].calls["/v1/loads"] > looked + 2)
        assert (servers[0].label, servers[0].is_paused, told) == ("e1-v0", False, [(True, "e1-v1")])
        servers[0].num_foreign = 0
        await until(lambda: settled(reconciler, policies))
        assert servers[0].label == "e1-v1"


@pytest.mark.asyncio
async def test_a_rolling_update_leaves_a_server_drained_that_somebody_drained(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 2, mode="rolling") as (manager, servers, policies, reconciler):
        policies.announce(0)
        await until(lambda: settled(reconciler, policies))
        manager.drain(servers[0].url)
        policies.announce(1)
        await until(lambda: settled(reconciler, policies))
        assert [stats.state for stats in manager.stats()] == ["draining", "ready"]
        manager.undrain(servers[0].url)
        assert [stats.state for stats in manager.stats()] == ["ready", "ready"]


@pytest.mark.asyncio
async def test_a_server_that_is_removed_when_its_rolling_update_begins_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with reconciled(tmp_path, 2, mode="rolling") as (manager, servers, policies, reconciler):
        policies.announce(0)
        await until(lambda: settled(reconciler, policies))
        loop, is_directory = asyncio.get_running_loop(), os.path.isdir

        async def remove() -> None:
            manager.remove_server(servers[0].url)

        def removed_meanwhile(path: Any) -> bool:
            if servers[0].url in manager.urls and threading.current_thread() is not threading.main_thread():
                asyncio.run_coroutine_threadsafe(remove(), loop).result()
            return is_directory(path)

        monkeypatch.setattr(os.path, "isdir", removed_meanwhile)
        policies.announce(1)
        await until(lambda: settled(reconciler, policies))
        assert manager.urls == [servers[1].url]
        assert [server.label for server in servers] == ["e1-v0", "e1-v1"]


@pytest.mark.asyncio
async def test_a_failed_update_is_retried_while_the_other_servers_go_on(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 2) as (manager, servers, policies, reconciler):
        policies.announce(0)
        await until(lambda: settled(reconciler, policies))
        servers[0].fail_next_updates(times=3)
        policies.announce(1)
        await until(lambda: manager.verified_label(servers[1].url) == "e1-v1")
        assert (await ask(manager)).versions == [1] * 20
        await until(lambda: settled(reconciler, policies))
        failed = [update for update in reconciler.updates if update.error]
        assert [update.url for update in failed] == [servers[0].url] * 3
        assert not servers[0].is_paused


@pytest.mark.asyncio
async def test_a_server_that_reports_another_version_after_its_update_stays_out(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 2) as (manager, servers, policies, reconciler):
        servers[0].lying_label = "e1-v7"
        policies.announce(0)
        await until(lambda: any("reports 'e1-v7'" in update.error for update in reconciler.updates))
        for index in range(6):
            assert (await ask(manager, name=f"t{index}")).server == servers[1].url
        # It is tried again all the while, so it may be at that just now.
        await until(lambda: manager.stats()[0].state == "quarantined" and not servers[0].is_paused)
        servers[0].lying_label = None
        await until(lambda: settled(reconciler, policies))


@pytest.mark.asyncio
async def test_a_restarted_engine_gets_no_request_before_it_has_the_policy(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 2) as (manager, servers, policies, reconciler):
        policies.announce(4)
        await until(lambda: settled(reconciler, policies))
        await servers[0].kill()
        manager.quarantine(servers[0].url, "process died")
        servers[0].update_s = 0.05
        await servers[0].start()
        manager.add_server(servers[0].url)
        served_too_early = 0
        while not settled(reconciler, policies):
            served_too_early += len(servers[0].requests)
            assert (await ask(manager)).versions == [4] * 20
        assert served_too_early == 0
        assert servers[0].label == "e1-v4"


@pytest.mark.asyncio
async def test_a_server_added_later_is_brought_to_the_policy(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 1) as (manager, _, policies, reconciler), FakeSGLang() as late:
        policies.announce(2)
        await until(lambda: settled(reconciler, policies))
        manager.add_server(late.url)
        await until(lambda: settled(reconciler, policies))
        assert late.label == "e1-v2"


@pytest.mark.asyncio
async def test_a_server_that_already_has_the_policy_is_only_continued(tmp_path: Path) -> None:
    async with FakeSGLang(label="e1-v2") as old, reconciled(tmp_path, 0) as (manager, _, policies, reconciler):
        manager.add_server(old.url)
        await manager.client(old.url).pause("in_place", timeout_s=60)
        policies.announce(2)
        await until(lambda: settled(reconciler, policies))
        assert old.updates == []
        assert not old.is_paused


@pytest.mark.asyncio
async def test_older_records_are_never_loaded(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 1) as (_, servers, policies, reconciler):
        old = policies.announce(4)
        newer = policies.announce(5)
        await until(lambda: settled(reconciler, policies))
        policies.record = old
        await asyncio.sleep(0.05)
        assert servers[0].label == newer.label
        policies.announce(2, epoch=2)
        await until(lambda: servers[0].label == "e2-v2")
        policies.record = newer
        await asyncio.sleep(0.05)
        assert servers[0].label == "e2-v2"
        assert [update.version for update in reconciler.updates] == [5, 2]


@pytest.mark.asyncio
async def test_files_that_vanished_are_skipped_for_the_next_record(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 1) as (manager, servers, policies, reconciler):
        policies.announce(0)
        await until(lambda: settled(reconciler, policies))
        gone = policies.write(1)
        (Path(gone.path) / "model.safetensors").unlink()
        policies.record = gone
        await asyncio.sleep(0.03)
        assert (await ask(manager)).versions == [0] * 20, "version 0 is served on"
        policies.announce(2)
        await until(lambda: manager.verified_label(servers[0].url) == "e1-v2")
        assert [update.version for update in reconciler.updates] == [0, 2]


@pytest.mark.asyncio
async def test_damaged_files_and_bare_deltas_are_refused_and_the_old_policy_is_served_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with reconciled(tmp_path, 1) as (manager, servers, policies, reconciler):
        policies.announce(0)
        await until(lambda: settled(reconciler, policies))
        damaged = policies.write(1)
        (Path(damaged.path) / "model.safetensors").write_bytes(b"torn")
        policies.record = damaged
        await until(lambda: "overwritten or damaged" in caplog.text)
        policies.record = policies.write(2, kind="delta")
        await until(lambda: "nothing here puts full weights together" in caplog.text)
        assert (await ask(manager)).versions == [0] * 20
        assert len(servers[0].updates) == 1


@pytest.mark.asyncio
async def test_an_unreadable_record_store_is_survived(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 1) as (_, servers, policies, reconciler):
        policies.errors = [StreamError("down"), ConnectionError("refused"), TimeoutError()]
        policies.announce(1)
        await until(lambda: settled(reconciler, policies))
        assert servers[0].label == "e1-v1"


@pytest.mark.asyncio
async def test_cancelling_the_reconciler_in_mid_update_leaves_no_server_paused(tmp_path: Path) -> None:
    async with FakeSGLang(update_s=60) as server, AsyncLLMServerManager() as manager:
        policies = Policies(tmp_path)
        policies.announce(0)
        manager.add_server(server.url)
        reconciler = WeightReconciler(manager, read_policy=policies.read, poll_s=0.005)
        task = asyncio.ensure_future(reconciler.run())
        await until(lambda: len(server.updates) == 1)
        assert server.is_paused
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not server.is_paused


@pytest.mark.asyncio
async def test_a_hung_update_ends_at_its_limit_and_requests_move(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 2, latency_s=0.002, update_timeout_s=0.2) as (manager, servers, policies, reconciler):
        policies.announce(0)
        await until(lambda: settled(reconciler, policies))
        servers[0].update_s = 60
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(manager, num_tokens=100, name=f"t{index}")) for index in range(6)]
            await until(lambda: servers[0].num_tokens > 10)
            policies.announce(1)
        for task in asked:
            assert task.result().ids == pseudo_tokens(PROMPT, 100)
        assert any("no answer within 0.2 s" in update.error for update in reconciler.updates)


@pytest.mark.asyncio
async def test_adapters_are_loaded_beside_the_one_in_use_and_a_generation_keeps_its_own(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 2, latency_s=0.001) as (manager, servers, policies, reconciler):
        policies.record = policies.write(0, kind="lora")
        await until(lambda: settled(reconciler, policies))
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(manager, num_tokens=150, name=f"t{index}")) for index in range(6)]
            await until(lambda: sum(server.num_tokens for server in servers) > 60)
            policies.record = policies.write(1, kind="lora")
            await until(lambda: settled(reconciler, policies))
            later = group.create_task(ask(manager, name="later"))
        for task in asked:
            assert (task.result().ids, set(task.result().versions)) == (pseudo_tokens(PROMPT, 150), {0})
        assert set(later.result().versions) == {1}
        assert {request["lora_path"] for server in servers for request in server.requests} == {"e1-v0", "e1-v1"}
        for version in (2, 3):
            policies.record = policies.write(version, kind="lora")
            await until(lambda: settled(reconciler, policies))
        await until(lambda: all(sorted(server.adapters) == ["e1-v2", "e1-v3"] for server in servers))
        assert [server.calls["/pause_generation"] + server.calls["/update_weights_from_disk"] for server in servers] == [0, 0]
        # A restarted engine has no adapter: requests go elsewhere, and it gets the adapter before it takes any.
        await servers[0].restart_with_base_weights()
        manager.quarantine(servers[0].url, "process died")
        assert set((await ask(manager)).versions) == {3}
        await until(lambda: settled(reconciler, policies))
        assert sorted(servers[0].adapters) == ["e1-v3"]
        assert manager.counters()["tokens_discarded"] == 0


@pytest.mark.asyncio
async def test_a_server_that_lost_its_adapter_is_left_for_another(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 2) as (manager, servers, policies, reconciler):
        policies.record = policies.write(0, kind="lora")
        await until(lambda: settled(reconciler, policies))
        servers[0].adapters.clear()
        generations = [await ask(manager, name=f"t{index}") for index in range(6)]
        assert {generation.server for generation in generations} == {servers[1].url}
        assert all(set(generation.versions) == {0} for generation in generations)


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["in_place", "abort", "rolling"])
async def test_a_policy_that_no_server_loads_is_rolled_back_and_generation_goes_on_truthfully(
    tmp_path: Path, mode: UpdateMode
) -> None:
    problems: list[PolicyProblem | None] = []
    async with reconciled(tmp_path, 2, mode=mode, latency_s=0.001, retry_s=60.0, on_problem=problems.append) as (
        manager,
        servers,
        policies,
        reconciler,
    ):
        good = policies.announce(0)
        await until(lambda: settled(reconciler, policies))
        bad = policies.write(1)
        for server in servers:
            server.refused_paths.add(bad.path)
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(manager, num_tokens=200, name=f"t{index}")) for index in range(6)]
            await until(lambda: sum(server.num_tokens for server in servers) > 40)
            policies.record = bad
            await until(lambda: reconciler.num_rollbacks == 1)
            later = group.create_task(ask(manager, name="later"))
        for task in asked:
            assert task.result().ids == pseudo_tokens(PROMPT, 200)
            assert set(task.result().versions) == {0}
        assert set(later.result().versions) == {0}
        await until(lambda: reconciler.is_settled)
        assert reconciler.target == good
        assert reconciler.announced == bad
        assert [server.label for server in servers] == ["e1-v0"] * 2
        for server in servers:
            paths = [update["model_path"] for update in server.updates]
            assert paths == [good.path, *[bad.path] * (len(paths) - 2), good.path], "what a failed update left is not trusted"
        (problem,) = problems
        assert problem is not None
        assert (problem.label, problem.serving, problem.behind, problem.tries) == ("e1-v1", "e1-v0", 1, 1)
        assert "does not load" in problem.error
        assert not any(server.is_paused for server in servers)
        policies.announce(2)
        await until(lambda: settled(reconciler, policies))
        assert problems[-1] is None
        assert reconciler.problem is None
        assert set((await ask(manager, name="last")).versions) == {2}


@pytest.mark.asyncio
async def test_a_policy_that_was_given_up_is_tried_on_one_server_until_it_holds(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 3, retry_s=0.05, max_retry_s=0.05) as (manager, servers, policies, reconciler):
        policies.announce(0)
        await until(lambda: settled(reconciler, policies))
        bad = policies.write(1)
        for server in servers:
            server.refused_paths.add(bad.path)
        policies.record = bad
        await until(lambda: reconciler.problem is not None and reconciler.problem.tries >= 3)
        out = 0
        for _ in range(50):
            await asyncio.sleep(0.004)
            out = max(out, sum(stats.state in ("quarantined", "updating") for stats in manager.stats()))
            assert set((await ask(manager)).versions) == {0}
        assert out <= 1, "the others go on meanwhile"
        assert reconciler.num_rollbacks == 1
        for server in servers:
            server.refused_paths.clear()
        await until(lambda: settled(reconciler, policies))
        assert reconciler.problem is None
        assert set((await ask(manager)).versions) == {1}


@pytest.mark.asyncio
async def test_dead_servers_say_nothing_against_a_policy_and_come_back_to_it(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 2) as (manager, servers, policies, reconciler):
        for version in range(2):
            policies.announce(version)
            await until(lambda: settled(reconciler, policies))
        for server in servers:
            await server.kill()
            manager.quarantine(server.url, "its process died")
        await until(lambda: sum(bool(update.error) for update in reconciler.updates) >= 8)
        assert (reconciler.num_rollbacks, reconciler.problem, reconciler.target) == (0, None, policies.record)
        for server in servers:
            await server.start()
        await until(lambda: settled(reconciler, policies))
        assert set((await ask(manager)).versions) == {1}


@pytest.mark.asyncio
async def test_without_an_earlier_policy_of_the_same_learner_nothing_is_rolled_back(tmp_path: Path) -> None:
    async with reconciled(tmp_path, 1) as (manager, servers, policies, reconciler):
        policies.announce(7)
        await until(lambda: settled(reconciler, policies))
        bad = policies.write(5, epoch=2)
        servers[0].refused_paths.add(bad.path)
        policies.record = bad
        await until(lambda: sum(bool(update.error) for update in reconciler.updates) >= 4)
        assert (reconciler.num_rollbacks, manager.stats()[0].state) == (0, "quarantined")
        servers[0].refused_paths.clear()
        await until(lambda: settled(reconciler, policies))


@pytest.mark.asyncio
async def test_every_update_is_reported(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def note(update: WeightUpdate) -> None:
        seen.append((update.url, update.version))

    async with reconciled(tmp_path, 2, on_update=note) as (
        _,
        servers,
        policies,
        reconciler,
    ):
        policies.announce(0)
        await until(lambda: settled(reconciler, policies))
    assert sorted(seen) == sorted((server.url, 0) for server in servers)
