"""Manager, fleet and reconciler with two real embedded engines (processes of their own) and a real tiny model."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from engine_kit import Ears, make_endless_model

from agentrl.serving.engine_process import EmbeddedEngineSpec, EngineFleet
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.weight_reconciler import WeightReconciler
from agentrl.testing.waits import until
from agentrl.types import Generation, PolicyRecord, SamplingParams
from agentrl.weights.digest import weights_digest


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[PolicyRecord]:
    """Three versions of one small model."""
    root = tmp_path_factory.mktemp("policies")
    paths = [make_endless_model(root / f"v{version}", seed=version) for version in range(3)]
    return [
        PolicyRecord(run_epoch=1, version=version, path=str(path), digest=weights_digest(path))
        for version, path in enumerate(paths)
    ]


@pytest.mark.slow
@pytest.mark.asyncio
async def test_an_engine_killed_in_mid_generation_costs_nothing_and_returns_with_the_policy(
    tmp_path: Path, policies: list[PolicyRecord]
) -> None:
    announced = policies[0]

    async def read_policy() -> PolicyRecord:
        return announced

    ears = Ears()
    async with AsyncLLMServerManager(probe_every_s=0.2) as manager:
        specs = [EmbeddedEngineSpec(model_path=policies[0].path) for _ in range(2)]
        fleet = EngineFleet(specs, manager=manager, log_dir=tmp_path, omp_threads=1, backoff_s=0.1)
        reconciler = WeightReconciler(manager, read_policy=read_policy, poll_s=0.02)

        def settled() -> bool:
            return len(manager.urls) == 2 and reconciler.target == announced and reconciler.is_settled

        async def rollout(index: int, num_tokens: int) -> Generation:
            sampling = SamplingParams(max_new_tokens=num_tokens)
            prompt = [10 + index, 20, 30, 40]
            return await manager.generate(
                prompt, sampling, trajectory_id=f"t{index}", group_id=f"g{index}", deadline=280, on_tokens=ears[index]
            )

        async with asyncio.TaskGroup() as group:
            loops = [group.create_task(loop) for loop in (fleet.run(), reconciler.run(), manager.run())]
            await until(settled)

            # Balance: both engines work.
            first = await asyncio.gather(*(rollout(index, 8) for index in range(8)))
            assert {generation.server for generation in first} == set(manager.urls)
            assert all(set(generation.versions) == {0} for generation in first)

            # SIGKILL one engine while it generates.
            ears.forget()
            tasks = [group.create_task(rollout(index, 250)) for index in range(6)]
            await until(lambda: ears.heard(6))
            victim = fleet.processes()[0]
            assert victim["pid"] is not None
            os.kill(victim["pid"], signal.SIGKILL)
            announced = policies[1]  # the restarted engine must come up at version 1, though it starts from version 0's files
            for generation in await asyncio.gather(*tasks):
                assert len(generation.ids) == len(generation.logprobs) == len(generation.versions)
                assert (generation.finish, len(generation.ids)) == ("length", 250)
                assert generation.versions == sorted(generation.versions)
                assert set(generation.versions) <= {0, 1}
            assert manager.counters()["continuations"] > 0

            # It comes back, at the announced version, before it takes traffic.
            await until(lambda: settled() and fleet.processes()[0]["pid"] != victim["pid"])
            again = await asyncio.gather(*(rollout(100 + index, 8) for index in range(8)))
            assert {generation.server for generation in again} == set(manager.urls)
            assert all(set(generation.versions) == {1} for generation in again)
            assert manager.counters()["version_mismatches"] == 0

            for loop in loops:
                loop.cancel()


@pytest.mark.asyncio
async def test_an_in_place_update_under_load_labels_every_token(tmp_path: Path, policies: list[PolicyRecord]) -> None:
    announced = policies[0]

    async def read_policy() -> PolicyRecord:
        return announced

    ears = Ears()
    async with AsyncLLMServerManager() as manager:
        specs = [EmbeddedEngineSpec(model_path=policies[0].path)]
        fleet = EngineFleet(specs, manager=manager, log_dir=tmp_path, omp_threads=1)
        reconciler = WeightReconciler(manager, read_policy=read_policy, poll_s=0.01)

        async def rollout(index: int, num_tokens: int) -> Generation:
            sampling = SamplingParams(max_new_tokens=num_tokens)
            return await manager.generate(
                [7, index, 9], sampling, trajectory_id=f"t{index}", group_id="g", deadline=280, on_tokens=ears[index]
            )

        async with asyncio.TaskGroup() as group:
            loops = [group.create_task(loop) for loop in (fleet.run(), reconciler.run())]
            await until(lambda: bool(manager.urls) and reconciler.is_settled)
            tasks = [group.create_task(rollout(index, 800)) for index in range(4)]
            await until(lambda: ears.heard(4))
            for record in policies[1:]:
                announced = record
                await until(lambda record=record: reconciler.target == record and reconciler.is_settled)
            generations = await asyncio.gather(*tasks)
            assert all(set(generation.versions) >= {0, 2} for generation in generations)
            assert all(generation.versions == sorted(generation.versions) for generation in generations)
            assert set((await rollout(50, 5)).versions) == {2}
            updates = [update for update in reconciler.updates if not update.is_first]
            assert [update.version for update in updates] == [1, 2]
            assert all(update.error == "" for update in updates)
            assert manager.counters()["tokens_discarded"] == 0
            for loop in loops:
                loop.cancel()
