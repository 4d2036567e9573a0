"""Manager, fleet and reconciler with a real SGLang server; skipped where ``AGENTRL_SGLANG_VENV`` names none."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from agentrl.serving.digest import weights_digest
from agentrl.serving.engine_process import EngineFleet, SGLangEngineSpec
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.weight_reconciler import WeightReconciler
from agentrl.testing.tiny_model import make_tiny_model
from agentrl.types import Generation, PolicyRecord, SamplingParams

VENV = os.environ.get("AGENTRL_SGLANG_VENV", "")
SHIM = Path(__file__).parents[1] / "rigs" / "sglang" / "shim"
CPU_FLAGS = "--device cpu --attention-backend torch_native --dtype float32 --max-total-tokens 65536 --max-running-requests 64"

pytestmark = pytest.mark.skipif(not VENV, reason="AGENTRL_SGLANG_VENV names no environment with SGLang")


async def until(condition: Callable[[], bool], limit_s: float = 120.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
async def test_sglang_is_updated_under_load_killed_and_brought_back(
    tmp_path: Path, mode: Literal["in_place", "retract", "abort"]
) -> None:
    paths = [make_tiny_model(tmp_path / f"v{version}", seed=version, num_layers=1) for version in range(2)]
    records = [PolicyRecord(run_epoch=1, version=i, path=str(path), digest=weights_digest(path)) for i, path in enumerate(paths)]
    announced = records[0]

    async def read_policy() -> PolicyRecord:
        return announced

    spec = SGLangEngineSpec(
        model_path=str(paths[0]),
        command_prefix=(f"{VENV}/bin/python", "-m", "sglang.launch_server"),
        extra_args=CPU_FLAGS.split(),
        env={"PYTHONPATH": str(SHIM), "SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )
    async with AsyncLLMServerManager() as manager:
        fleet = EngineFleet([spec], manager=manager, log_dir=tmp_path / "logs", omp_threads=1, backoff_s=0.1)
        reconciler = WeightReconciler(manager, read_policy=read_policy, mode=mode, poll_s=0.02)

        def settled() -> bool:
            return bool(manager.urls) and reconciler.target == announced and reconciler.is_settled

        async def rollout(index: int, num_tokens: int) -> Generation:
            sampling = SamplingParams(max_new_tokens=num_tokens)
            return await manager.generate([7, index, 9], sampling, trajectory_id=f"t{index}", group_id="g", deadline=200)

        async with asyncio.TaskGroup() as group:
            loops = [group.create_task(loop) for loop in (fleet.run(), reconciler.run(), manager.run())]
            await until(settled)
            assert manager.client(manager.urls[0]).span_shift == 1, "the overlap scheduler reports spans one token early"
            tasks = [group.create_task(rollout(index, 1500)) for index in range(4)]
            await until(lambda: manager.stats()[0].requests_in_flight == 4)
            await asyncio.sleep(0.1)
            announced = records[1]
            await until(settled)
            generations = await asyncio.gather(*tasks)
            for generation in generations:
                assert generation.versions == sorted(generation.versions)
                assert len(generation.ids) == len(generation.logprobs) == len(generation.versions)
                assert generation.finish == "stop" or len(generation.ids) == 1500
            seen = {version for generation in generations for version in generation.versions}
            ends = [(generation.finish, len(generation.ids), round(generation.ms)) for generation in generations]
            assert seen == {0, 1}, f"{ends} {reconciler.updates[-1]}"
            assert manager.counters()["version_mismatches"] == 0

            tasks = [group.create_task(rollout(10 + index, 400)) for index in range(3)]
            await asyncio.sleep(0.3)
            victim = fleet.processes()[0]
            assert victim["pid"] is not None
            os.kill(victim["pid"], signal.SIGKILL)
            for generation in await asyncio.gather(*tasks):
                assert set(generation.versions) == {1}
                assert generation.finish == "stop" or len(generation.ids) == 400
            assert fleet.processes()[0]["pid"] != victim["pid"]
            for loop in loops:
                loop.cancel()
