"""Rollouts in several processes: over one fleet on this machine, and as actors on a Ray cluster of two nodes."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from agentrl.assembly.audit import audit_run
from agentrl.assembly.fleet import FleetFollower, FleetOwner, Keyring
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.weight_reconciler import WeightReconciler
from agentrl.stream.fleet_board import FleetBoard
from agentrl.stream.keys import Keys
from agentrl.supervise import running
from agentrl.telemetry.run_dir import is_alive, read_jsonl
from agentrl.testing.fake_sglang import FakeSGLang
from agentrl.testing.waits import until
from agentrl.types import PolicyRecord, SamplingParams
from agentrl.weights.digest import weights_digest

KEYS = Keys("fleet")
SMALL = {"n": 4, "in_flight": 32}
STEPS = {"steps": 4, "groups": 4, "save_every": 2}


@pytest.mark.asyncio
async def test_a_follower_samples_through_updates_that_another_process_makes_and_never_meets_an_unknown_label(
    aclient: redis.asyncio.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The owner's patience is not what is tested.
    monkeypatch.setattr("agentrl.assembly.fleet.FOLLOWERS_LIMIT_S", 120.0)
    monkeypatch.setattr("agentrl.stream.fleet_board.READER_GONE_S", 120.0)
    record: PolicyRecord | None = None

    def announce(version: int) -> PolicyRecord:
        path = tmp_path / f"v{version}"
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"weights %d" % version)
        return PolicyRecord(run_epoch=1, version=version, path=str(path), digest=weights_digest(path))

    async def read_policy() -> PolicyRecord | None:
        return record

    async def sample(manager: AsyncLLMServerManager, versions: list[list[int]]) -> None:
        while True:
            asked = manager.generate(
                [1, 2, 3], SamplingParams(max_new_tokens=40), trajectory_id=f"t{len(versions)}", group_id="g", deadline=120
            )
            versions.append((await asked).versions)

    servers = [FakeSGLang(token_latency_s=0.002) for _ in range(2)]
    async with servers[0], servers[1], AsyncLLMServerManager() as owning, AsyncLLMServerManager() as following:
        for server in servers:
            owning.add_server(server.url)
        owner = FleetOwner(FleetBoard(aclient, KEYS), owning)
        reconciler = WeightReconciler(owning, read_policy=read_policy, poll_s=0.01, before_update=owner.announce)
        follower = FleetFollower("serve-0", FleetBoard(aclient, KEYS), following, keys=Keyring())
        versions: list[list[int]] = []
        loops = {f"rollout_{i}": sample(following, versions) for i in range(4)}
        async with running(
            fleet=owner.run(lambda: (1, record.version) if record else None),
            policy=reconciler.run(),
            follow=follower.run(),
            **loops,
        ):
            version = -1
            # Five updates, and as many more as it takes until one met a request in mid-flight.
            while version < 4 or not any(len(set(v)) > 1 for v in versions):
                version += 1
                record = announce(version)
                await until(lambda version=version: any(v and v[-1] == version for v in versions))
            assert follower.served == (1, version)
            owning.remove_server(servers[0].url)
            await until(lambda: following.urls == [servers[1].url])
        assert following.counters()["version_mismatches"] == 0
        assert following.counters()["tokens_discarded"] == 0
        assert all(sorted(v) == v for v in versions)


@pytest.mark.asyncio
async def test_a_follower_that_no_longer_answers_holds_an_update_up_for_a_while_only(
    aclient: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentrl.assembly.fleet.FOLLOWERS_LIMIT_S", 0.3)
    board = FleetBoard(aclient, KEYS)
    await FleetBoard(aclient, KEYS).saw("halted", 0)
    async with AsyncLLMServerManager() as manager:
        owner = FleetOwner(board, manager)
        started = time.monotonic()
        await owner.announce(PolicyRecord(run_epoch=1, version=0, path="/p", digest="d"))
        assert time.monotonic() - started >= 0.3
        assert await board.lagging(1) == ["halted"]


def test_a_killed_worker_comes_back_to_its_tasks_and_nothing_is_lost_or_repeated(
    quickstart_config: Callable[..., Path], start_run: Any
) -> None:
    run = start_run(quickstart_config(serve={**SMALL, "workers": 2}, learn={**STEPS, "steps": 1000}))
    logs = [run.directory.trajectories / f"rollouts-{worker}.jsonl" for worker in range(2)]
    run.wait_for(lambda: run.step() >= 1, seconds=240, name="step 1")
    run.wait_for(lambda: all(log.is_file() and log.stat().st_size for log in logs), seconds=240, name="rollouts of both workers")
    killed, written = run.kill("serve-0"), logs[0].stat().st_size
    at_step = run.step()
    run.wait_for(lambda: run.pid_of("serve-0") not in (None, killed), seconds=240, name="worker again")
    run.wait_for(lambda: logs[0].stat().st_size > written, seconds=240, name="rollouts of the worker that came back")
    run.wait_for(lambda: run.step() >= max(at_step + 1, STEPS["steps"]), seconds=240, name="further steps")
    run.process.terminate()
    assert run.finish(seconds=240) == 128 + signal.SIGTERM, run.logs()
    assert [e["role"] for e in read_jsonl(run.directory.events) if e["event"] == "child_exited"] == ["serve-0"]
    report = audit_run(run.directory.root)
    assert report.clean, report.text()
    assert report.step >= STEPS["steps"]
    assert run.directory.processes() == []


@pytest.mark.slow
def test_engines_and_workers_are_placed_on_a_ray_cluster_of_two_nodes(
    quickstart_config: Callable[..., Path], start_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs the extra `ray`")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
        ray = {"launcher": "ray", "ray_address": cluster.address, "workers": 2, "replicas": 2}
        run = start_run(quickstart_config(serve={**SMALL, **ray}, learn={**STEPS, "steps": 1000}))
        roles = ["engine-0", "engine-1", "serve-0", "serve-1"]
        run.wait_for(lambda: None not in map(run.pid_of, roles), seconds=600, name="two engines and two workers")
        engines = [entry for entry in run.directory.processes() if entry["role"].startswith("engine-")]
        run.wait_for(lambda: run.step() >= 3, seconds=600, name="three steps")
        run.process.terminate()
        assert run.finish(seconds=900) == 128 + signal.SIGTERM, run.logs()
        report = audit_run(run.directory.root)
        assert report.clean, report.text()
        assert report.step >= 3
        assert run.directory.processes() == []
        assert not any(map(is_alive, engines))
    finally:
        cluster.shutdown()
