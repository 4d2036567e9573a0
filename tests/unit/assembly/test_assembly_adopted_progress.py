"""Room for new groups follows the policy that serve serves, and goes on at an older one only within the staleness bound."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from agentrl.assembly.adopted_progress import AdoptedProgress, counted_on
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.weight_reconciler import WeightReconciler
from agentrl.stream.policy import Progress
from agentrl.testing.fake_sglang import FakeSGLang
from agentrl.types import PolicyRecord
from agentrl.weights.digest import weights_digest

START = Progress(run_epoch=1, version=0, consumed_groups=0, closed_groups=0, committed_groups=0, items=0, bytes=0)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.005)


@pytest.mark.asyncio
@pytest.mark.parametrize("max_behind", [0, 1])
async def test_after_a_rollback_groups_are_admitted_only_within_the_staleness_bound(tmp_path: Path, max_behind: int) -> None:
    progress, announced = START, None

    def record(version: int) -> PolicyRecord:
        path = tmp_path / f"v{version}"
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"%d" % version)
        return PolicyRecord(run_epoch=1, version=version, path=str(path), digest=weights_digest(path))

    async def read_policy() -> PolicyRecord | None:
        return announced

    async def read() -> Progress:
        return progress

    async with FakeSGLang() as server, AsyncLLMServerManager() as manager, asyncio.TaskGroup() as group:
        manager.add_server(server.url)
        reconciler = WeightReconciler(manager, read_policy=read_policy, poll_s=0.005, backoff_s=0.01, retry_s=60.0)
        loop = group.create_task(reconciler.run())
        adopted = AdoptedProgress(read, partial(counted_on, reconciler, max_behind=max_behind))
        announced = record(0)

        async def is_settled() -> bool:
            return reconciler.is_settled

        async def has_rolled_back() -> bool:
            return reconciler.num_rollbacks == 1

        await until(is_settled)
        assert (await adopted()).consumed_groups == 0
        progress = replace(START, version=1, consumed_groups=8)
        assert (await adopted()).consumed_groups == 0, "no server has version 1 yet"
        bad = record(1)
        server.refused_paths.add(bad.path)
        announced = bad
        await until(has_rolled_back)
        assert (await adopted()).consumed_groups == (8 if max_behind else 0)
        announced = record(2)
        progress = replace(START, version=2, consumed_groups=16)

        async def follows() -> bool:
            return (await adopted()).consumed_groups == 16

        await until(follows)
        loop.cancel()
