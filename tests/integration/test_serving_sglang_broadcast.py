"""Weights broadcast to a real SGLang over gloo; skipped where ``AGENTRL_SGLANG_VENV`` names none."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
import torch

from agentrl.errors import WeightSyncError
from agentrl.serving.engine_process import EngineFleet, SGLangEngineSpec
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.weight_broadcast import WeightBroadcaster
from agentrl.serving.weight_reconciler import WeightReconciler
from agentrl.testing.tiny_model import make_tiny_model
from agentrl.testing.waits import until
from agentrl.types import Generation, PolicyRecord, SamplingParams
from agentrl.weights.digest import weights_digest

VENV = os.environ.get("AGENTRL_SGLANG_VENV", "")
SHIM = Path(__file__).parents[1] / "rigs" / "sglang" / "shim"
CPU_FLAGS = "--device cpu --attention-backend torch_native --dtype float32 --max-total-tokens 65536 --max-running-requests 64"
PROMPT = [7, 11, 9]

pytestmark = pytest.mark.skipif(not VENV, reason="AGENTRL_SGLANG_VENV names no environment with SGLang")


def spec(model: Path) -> SGLangEngineSpec:
    return SGLangEngineSpec(
        model_path=str(model),
        command_prefix=(f"{VENV}/bin/python", "-m", "sglang.launch_server"),
        extra_args=CPU_FLAGS.split(),
        env={"PYTHONPATH": str(SHIM), "SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )


def off_by(path: Path, generation: Generation) -> float:
    """Largest difference of the reported logprobs from a plain forward pass of the checkpoint."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *generation.ids]])).logits[0, len(PROMPT) - 1 : -1]
    wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(generation.ids)[:, None])[:, 0]
    return float((wanted - torch.tensor(generation.logprobs)).abs().max())


@pytest.mark.asyncio
async def test_sglang_serves_exactly_what_was_broadcast_and_recovers_by_disk_from_a_dead_sender_and_a_wrong_shape(
    tmp_path: Path,
) -> None:
    paths = [make_tiny_model(tmp_path / f"v{version}", seed=version, num_layers=2) for version in range(5)]
    wide = make_tiny_model(tmp_path / "wide", seed=9, num_layers=2, hidden_size=96)
    records = [PolicyRecord(run_epoch=1, version=i, path=str(path), digest=weights_digest(path)) for i, path in enumerate(paths)]
    announced = records[0]

    async def read_policy() -> PolicyRecord:
        return announced

    async with (
        AsyncLLMServerManager() as manager,
        WeightBroadcaster(bucket_bytes=200_000, log_dir=tmp_path / "logs") as broadcast,
    ):
        engine = spec(paths[4])  # what it starts with is no version that is announced
        fleet = EngineFleet([engine], manager=manager, log_dir=tmp_path / "logs", omp_threads=1, backoff_s=0.1)
        reconciler = WeightReconciler(manager, read_policy=read_policy, poll_s=0.02, broadcast=broadcast)

        async def rollout(name: str, num_tokens: int) -> Generation:
            sampling = SamplingParams(max_new_tokens=num_tokens)
            return await manager.generate(PROMPT, sampling, trajectory_id=name, group_id=name, deadline=200)

        async def settle_at(version: int) -> None:
            nonlocal announced
            announced = records[version]
            await until(lambda: bool(manager.urls) and reconciler.target == announced and reconciler.is_settled)

        async def assert_serves(version: int) -> None:
            generation = await rollout(f"v{version}", 24)
            assert set(generation.versions) == {version}
            assert off_by(paths[version], generation) < 1e-3

        async with asyncio.TaskGroup() as group:
            loops = [group.create_task(loop) for loop in (fleet.run(), reconciler.run(), manager.run())]
            await settle_at(0)
            (url,) = manager.urls
            await assert_serves(0)

            held = group.create_task(rollout("held", 400))
            await until(lambda: manager.stats()[0].requests_in_flight == 1)
            await asyncio.sleep(0.2)
            await settle_at(1)
            assert set((await held).versions) <= {0, 1}
            await assert_serves(1)
            assert [(update.transport, update.error) for update in reconciler.updates] == [("broadcast", "")] * 2

            sender = broadcast.sender_pids[url]
            engine_pid = fleet.processes()[0]["pid"]
            os.kill(sender, signal.SIGSTOP)  # the server waits for bytes that do not come
            announced = records[2]
            while await manager.client(url).is_ready(timeout_s=30):  # until it is paused
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)
            assert manager.verified_label(url) != "e1-v2"
            os.kill(sender, signal.SIGKILL)
            await settle_at(2)
            await assert_serves(2)
            attempts = [(update.transport, bool(update.error)) for update in reconciler.updates if update.version == 2]
            assert attempts == [("broadcast", True), ("disk", False)]
            assert fleet.processes()[0]["pid"] == engine_pid, "the server lives on"

            await settle_at(3)
            await assert_serves(3)
            assert reconciler.updates[-1].transport == "broadcast"
            for loop in loops[1:2]:
                loop.cancel()
            await asyncio.wait(loops[1:2])

            # Below the reconciler: tensors of another shape are refused by the server, which lives on and loads from disk.
            client = manager.client(url)
            broken = PolicyRecord(run_epoch=1, version=9, path=str(wide), digest=weights_digest(wide))
            await client.pause("retract", timeout_s=30)
            with pytest.raises(WeightSyncError, match="Failed to update parameter online"):
                await broadcast.send(client, broken, flush_cache=True, timeout_s=60)
            assert (await client.model_info(timeout_s=30)).label == "e1-v3"
            await client.update_weights_from_disk(str(paths[3]), label="e1-v3", flush_cache=True, timeout_s=60)
            await client.continue_generation(timeout_s=30)
            await assert_serves(3)
            assert fleet.processes()[0]["pid"] == engine_pid
            await broadcast.disconnect(url)
            for loop in loops:
                loop.cancel()
