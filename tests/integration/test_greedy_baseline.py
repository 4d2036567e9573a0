"""remax from the config to the gradient: serve's rollouts, the group's close, the learner's credit."""

import asyncio
import json
from collections.abc import Sequence

import pytest
from rollout_kit import MemoryStream, Say, ScriptedGenerator

from agentrl.assembly.learn import check_learning, loss_settings
from agentrl.assembly.parts import build_scorer, build_template, build_toolbox, fingerprint
from agentrl.assembly.rollouts import greedy_rollout_function, rollout_function
from agentrl.config import Config, load_config
from agentrl.learner.batching import BatchBuilder
from agentrl.learner.credit import TokenStatistics, assign_credit
from agentrl.plugins import load_object
from agentrl.rollout.worker import RolloutWorker
from agentrl.stream.codec import decode, encode
from agentrl.testing.tiny_model import make_tiny_tokenizer
from agentrl.types import GroupClose, Task, TrajectoryGroup


def config_of(*more: str) -> Config:
    overrides = ["~learn.advantage_params", "learn.advantage=remax", "learn.zero_spread=keep", "serve.n=3", "learn.groups=2"]
    return load_config("quickstart", [*overrides, "serve.tokens=512", "serve.tokens_per_turn=256", *more])


def call(expression: str) -> str:
    return "<tool_call>\n" + json.dumps({"name": "calculator", "arguments": {"expression": expression}}) + "\n</tool_call>"


@pytest.mark.asyncio
async def test_serve_plays_one_greedy_rollout_per_group_and_the_learner_takes_its_reward_off() -> None:
    config, tokenizer = config_of(), make_tiny_tokenizer()
    tasks: list[Task] = load_object("envs.arithmetic:generate_tasks")(2, 0)
    # The greedy rollout (sample 3) solves the first task only; of the members, sample 0 solves both.
    right = {f"{tasks[0].id}/0/3/0", f"{tasks[0].id}/0/0/0", f"{tasks[1].id}/1/0/0"}

    def script(trajectory_id: str, turn: int, ids: Sequence[int]) -> Say:
        task = next(t for t in tasks if trajectory_id.startswith(f"{t.id}/"))
        if turn == 0:
            return Say(call(str(task.extra_info["expression"])))
        return Say(f"#### {task.ground_truth if trajectory_id in right else 'no idea'}")

    generator = ScriptedGenerator(tokenizer, script)
    toolbox = build_toolbox(config, tokenizer, sandbox_url=None)
    parts = (config, generator, build_template(config, tokenizer, toolbox), toolbox, build_scorer(config))
    stream = MemoryStream()
    worker = RolloutWorker(
        task_at=lambda ordinal: tasks[ordinal], sink=stream, read_progress=stream.read_progress,
        rollout=rollout_function(*parts), baseline=greedy_rollout_function(*parts), group_size=config.serve.n,  # pyright: ignore[reportArgumentType]
        groups_per_step=2, max_staleness=2, pipeline_depth=1, in_flight=4, last_ordinal=2,
    )  # fmt: skip
    await asyncio.wait_for(worker.run(), 240)
    await toolbox.aclose()

    temperatures = {i: {s.temperature for t, _, s in generator.requests if t == i} for i, _, _ in generator.requests}
    assert {i for i, found in temperatures.items() if found == {0.0}} == {f"{tasks[o].id}/{o}/3/0" for o in (0, 1)}
    assert sum(found == {1.0} for found in temperatures.values()) == 6
    assert len(stream.trajectories) == 6, "the greedy rollouts are not on the stream"
    assert (worker.status()["finished"], worker.status()["groups_without_baseline"]) == (6, 0)

    batches = BatchBuilder(groups_per_step=2, max_staleness=5, zero_spread="keep", min_group_size=1, needs_baseline=True)
    for ordinal in (0, 1):
        close = decode(encode(stream.closes[ordinal]))
        assert isinstance(close, GroupClose)
        batches.add(TrajectoryGroup(close, tuple(stream.trajectories[i] for i in sorted(close.members))))
    batch = batches.build(3)
    assert sorted(batch.outcomes.values()) == ["trained"] * 6
    credit = assign_credit(batch.rows, loss_settings(config), kl_coef=0.0, found=TokenStatistics())
    counts = [row.trajectory.num_sampled for row in batch.rows]
    advantages = [set(part.tolist()) for part in credit.advantages.split(counts)]
    assert advantages == [{0.0}, {-1.0}, {-1.0}, {1.0}, {0.0}, {0.0}]


def test_one_config_decides_for_both_sides_and_a_difference_is_seen() -> None:
    remax = config_of()
    check_learning(remax)
    grpo = load_config("quickstart")
    assert (remax.learn.needs_greedy_baseline, grpo.learn.needs_greedy_baseline) == (True, False)
    tokenizer = make_tiny_tokenizer()
    ours, theirs = fingerprint(remax, tokenizer, []), fingerprint(grpo, tokenizer, [])
    assert (ours["greedy_baseline"], theirs["greedy_baseline"]) == ("True", "False")
    assert loss_settings(remax).advantage == "remax"
