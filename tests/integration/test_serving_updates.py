"""Weight updates under load on real embedded engines, in every mode, and what happens when no engine can load them."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import Ears, make_endless_model
from safetensors.torch import load_file, save_file

from agentrl.serving.engine_process import EmbeddedEngineSpec, EngineFleet
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.weight_reconciler import PolicyProblem, UpdateMode, WeightReconciler
from agentrl.testing.waits import until
from agentrl.types import Generation, PolicyRecord, SamplingParams
from agentrl.weights.digest import weights_digest

TOLERANCE = 1e-4
NUM_TOKENS = 300
MODES: Sequence[UpdateMode] = ("retract", "abort", "rolling", "in_place")


def prompt(index: int) -> list[int]:
    return [10 + index, 20, 30, 40]


def off_by(models: dict[int, Any], index: int, generation: Generation) -> float:
    """Largest difference of a token's logprob to a plain forward pass under the version that it is labelled with."""
    context = prompt(index)
    ids = torch.tensor([[*context, *generation.ids]])
    worst = 0.0
    for version in set(generation.versions):
        with torch.no_grad():
            logprobs = torch.log_softmax(models[version](ids).logits[0, len(context) - 1 : -1], dim=-1)
        for at, token in enumerate(generation.ids):
            if generation.versions[at] == version:
                worst = max(worst, abs(float(logprobs[at, token]) - generation.logprobs[at]))
    return worst


@pytest.mark.slow
@pytest.mark.asyncio
async def test_every_mode_keeps_generations_and_labels_true_and_a_broken_policy_is_rolled_back(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    paths = [make_endless_model(tmp_path / f"v{version}", seed=version) for version in range(len(MODES) + 2)]
    broken = make_endless_model(tmp_path / "broken", seed=99)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    models = {version: AutoModelForCausalLM.from_pretrained(path).eval() for version, path in enumerate(paths)}

    def record(version: int, path: Path) -> PolicyRecord:
        return PolicyRecord(run_epoch=1, version=version, path=str(path), digest=weights_digest(path))

    announced = record(0, paths[0])
    ears = Ears()

    async def read_policy() -> PolicyRecord:
        return announced

    async with AsyncLLMServerManager() as manager, asyncio.TaskGroup() as group:
        specs = [EmbeddedEngineSpec(model_path=str(paths[0])) for _ in range(2)]
        fleet = EngineFleet(specs, manager=manager, log_dir=tmp_path, omp_threads=1, backoff_s=0.1)
        fleet_loop = group.create_task(fleet.run())
        await until(lambda: len(manager.urls) == 2)

        async def rollout(index: int) -> Generation:
            sampling = SamplingParams(max_new_tokens=NUM_TOKENS)
            return await manager.generate(
                prompt(index), sampling, trajectory_id=f"t{index}", group_id=f"g{index}", deadline=280, on_tokens=ears[index]
            )

        def is_settled(reconciler: WeightReconciler) -> bool:
            return reconciler.target == announced and reconciler.is_settled

        for version, mode in enumerate(MODES, start=1):
            reconciler = WeightReconciler(manager, read_policy=read_policy, mode=mode, poll_s=0.01, drain_timeout_s=280)
            loop = group.create_task(reconciler.run())
            await until(lambda reconciler=reconciler: is_settled(reconciler))
            served = sum(stats.tokens_served for stats in manager.stats())
            ears.forget()
            tasks = [group.create_task(rollout(index)) for index in range(6)]
            await until(lambda: ears.heard(6))
            announced = record(version, paths[version])
            await until(lambda reconciler=reconciler: is_settled(reconciler))
            generations = await asyncio.gather(*tasks)
            for index, generation in enumerate(generations):
                assert (generation.finish, len(generation.ids)) == ("length", NUM_TOKENS)
                assert generation.versions == sorted(generation.versions)
                assert set(generation.versions) <= {version - 1, version}
                if mode != "in_place":  # there the rest is sampled on the old weights' keys and values
                    assert off_by(models, index, generation) < TOLERANCE, mode
            seen = {v for generation in generations for v in generation.versions}
            # A drained server finishes what it has, so one generation has one version.
            assert seen == ({version - 1} if mode == "rolling" else {version - 1, version}), mode
            assert sum(stats.tokens_served for stats in manager.stats()) - served == sum(len(g.ids) for g in generations)
            assert manager.counters()["tokens_discarded"] == 0
            assert manager.counters()["version_mismatches"] == 0
            loop.cancel()

        # No engine takes a broken policy: both say so, and the last good one samples on.
        last = announced
        problems: list[PolicyProblem | None] = []
        reconciler = WeightReconciler(
            manager, read_policy=read_policy, poll_s=0.01, retry_s=60.0, backoff_s=0.05, on_problem=problems.append
        )
        loop = group.create_task(reconciler.run())
        await until(lambda: is_settled(reconciler))
        ears.forget()
        tasks = [group.create_task(rollout(index)) for index in range(6)]
        await until(lambda: ears.heard(6))
        announced = record(len(MODES) + 1, broken)
        await until(lambda: reconciler.num_rollbacks == 1)
        after = await rollout(7)
        for generation in [*await asyncio.gather(*tasks), after]:
            assert set(generation.versions) == {last.version}
            assert (generation.finish, len(generation.ids)) == ("length", NUM_TOKENS)
        assert off_by(models, 7, after) < TOLERANCE
        assert problems[0] is not None
        assert "NaN or infinity in model.norm.weight" in problems[0].error
        announced = record(len(MODES) + 1, paths[len(MODES) + 1])
        announced = PolicyRecord(run_epoch=1, version=len(MODES) + 2, path=announced.path, digest=announced.digest)
        await until(lambda: is_settled(reconciler))
        assert (reconciler.problem, problems[-1]) == (None, None)
        assert set((await rollout(8)).versions) == {len(MODES) + 2}
        loop.cancel()
        fleet_loop.cancel()
