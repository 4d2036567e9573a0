"""Manager, fleet and reconciler with a real SGLang server; skipped where ``AGENTRL_SGLANG_VENV`` names none."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file

from agentrl.serving.engine_process import EngineFleet, SGLangEngineSpec
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.weight_reconciler import WeightReconciler
from agentrl.testing.tiny_model import make_tiny_model
from agentrl.testing.waits import until
from agentrl.types import Generation, PolicyRecord, SamplingParams
from agentrl.weights.digest import weights_digest

VENV = os.environ.get("AGENTRL_SGLANG_VENV", "")
SHIM = Path(__file__).parents[1] / "rigs" / "sglang" / "shim"
CPU_FLAGS = "--device cpu --attention-backend torch_native --dtype float32 --max-total-tokens 65536 --max-running-requests 64"

pytestmark = pytest.mark.skipif(not VENV, reason="AGENTRL_SGLANG_VENV names no environment with SGLang")


@pytest.mark.asyncio
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


LORA_FLAGS = (
    "--enable-lora --lora-backend torch_native --max-lora-rank 4 --lora-target-modules q_proj v_proj --max-loras-per-batch 4"
)


def write_adapter(folder: Path, model: Path, *, seed: int) -> Path:
    """A peft directory with random adapters of rank 4, large enough to change what is sampled."""
    config = json.loads((model / "config.json").read_text())
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    hidden = config["hidden_size"]
    head = config.get("head_dim") or hidden // heads
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, rows in (("q_proj", heads * head), ("v_proj", kv * head)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, hidden, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.3
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**described, "task_type": "CAUSAL_LM", "lora_dropout": 0.0}))
    return folder


@pytest.mark.asyncio
async def test_sglang_serves_each_adapter_exactly_and_a_generation_keeps_its_own(tmp_path: Path) -> None:
    from agentrl.serving.embedded.checkpoint import CheckpointReader, copy_into
    from agentrl.serving.embedded_engine import load_model

    base = make_tiny_model(tmp_path / "base", seed=0, num_layers=1)
    paths = [write_adapter(tmp_path / f"adapter{version}", base, seed=version) for version in range(4)]
    records = [
        PolicyRecord(run_epoch=1, version=version, kind="lora", path=str(path), digest=weights_digest(path))
        for version, path in enumerate(paths)
    ]
    announced = records[0]

    async def read_policy() -> PolicyRecord:
        return announced

    def off_by(version: int, generation: Generation, prompt: list[int]) -> float:
        model = load_model(base, device="cpu", dtype="float32")
        copy_into(model, CheckpointReader(model, base).stage(paths[version]))
        ids = torch.tensor([[*prompt, *generation.ids]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
        wanted = logprobs.gather(1, torch.tensor(generation.ids)[:, None])[:, 0]
        return float((wanted - torch.tensor(generation.logprobs)).abs().max())

    spec = SGLangEngineSpec(
        model_path=str(base),
        command_prefix=(f"{VENV}/bin/python", "-m", "sglang.launch_server"),
        extra_args=[*CPU_FLAGS.split(), *LORA_FLAGS.split()],
        env={"PYTHONPATH": str(SHIM), "SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )
    async with AsyncLLMServerManager() as manager:
        fleet = EngineFleet([spec], manager=manager, log_dir=tmp_path / "logs", omp_threads=1, backoff_s=0.1)
        reconciler = WeightReconciler(manager, read_policy=read_policy, poll_s=0.02)

        def settled() -> bool:
            return bool(manager.urls) and reconciler.target == announced and reconciler.is_settled

        async def rollout(index: int, num_tokens: int) -> Generation:
            sampling = SamplingParams(max_new_tokens=num_tokens)
            return await manager.generate([7, index, 9], sampling, trajectory_id=f"t{index}", group_id="g", deadline=200)

        async with asyncio.TaskGroup() as group:
            loops = [group.create_task(loop) for loop in (fleet.run(), reconciler.run(), manager.run())]
            await until(settled)
            tasks = [group.create_task(rollout(index, 800)) for index in range(4)]
            await until(lambda: manager.stats()[0].requests_in_flight == 4)
            announced = records[1]
            await until(settled)
            assert manager.stats()[0].requests_in_flight > 0, "the adapter was loaded beside running requests"
            for index, generation in enumerate(await asyncio.gather(*tasks)):
                assert set(generation.versions) == {0}
                assert off_by(0, generation, [7, index, 9]) < 1e-3
            for record in records[1:]:
                announced = record
                await until(settled)
                later = await rollout(50 + record.version, 40)
                assert set(later.versions) == {record.version}
                assert off_by(record.version, later, [7, 50 + record.version, 9]) < 1e-3
                assert off_by(record.version - 1, later, [7, 50 + record.version, 9]) > 0.05
            assert [update.paused_s for update in reconciler.updates] == [0.0] * 4
            assert manager.counters()["version_mismatches"] == 0
            for loop in loops:
                loop.cancel()
