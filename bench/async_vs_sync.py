"""The same episodes trained on synchronously, one step off, and fully asynchronously: seconds per step and who idles.

    python bench/async_vs_sync.py [--steps 8] [--train-s 1.5] [--scale 1.0]

Real parts: ``RolloutWorker`` with its admission, ``run_rollout``, ``AsyncLLMServerManager``, tools, producer, Redis, consumer. The
engine is ``FakeSGLang`` with a fixed time per generation; the trainer takes groups from the stream, sleeps, commits and
announces the next version. An episode has three tool calls, whose heavy-tailed times depend on the trajectory's id and
the turn alone, so that every mode plays the same ones with the same places in flight.

The three modes differ in two numbers of admission only: ``max_staleness`` and ``pipeline_depth``.

The bound per step is max(generation, training): generation is all planned seconds of a step's rollouts over the places in
flight (as if no place were ever empty), training is the trainer's sleep.
"""

import argparse
import asyncio
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from agentrl.plugins import tool
from agentrl.protocols import ToolContext
from agentrl.rollout.agent_loop import Limits, run_rollout
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.reward import Scorer
from agentrl.rollout.tool_loading import load_tools
from agentrl.rollout.worker import RolloutWorker
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.stream.connection import connect, connect_async
from agentrl.stream.consumer import TrajectoryConsumer
from agentrl.stream.keys import Keys
from agentrl.stream.policy import read_progress
from agentrl.stream.producer import TrajectoryProducer
from agentrl.stream.server import EmbeddedServer
from agentrl.supervise import running
from agentrl.testing.fake_sglang import FakeSGLang, lognormal
from agentrl.testing.tiny_model import EOS_TOKEN_ID, make_tiny_tokenizer
from agentrl.types import Episode, PolicyRecord, SamplingParams, Score, Task, Trajectory

HERE = Path(__file__).resolve()
GROUPS_PER_STEP = 6
GROUP_SIZE = 4
IN_FLIGHT = GROUPS_PER_STEP * GROUP_SIZE
CALLS = 3
GENERATION_S = 0.1
TOOL_MEDIAN_S, TOOL_SIGMA, TOOL_LIMIT_S = 0.25, 1.0, 4.0
MODES = {"sync": (0, 0), "one step off": (1, 1), "async": (4, 3)}
"""Name -> (max_staleness, pipeline_depth)."""
CALL_TEXT = '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call><|im_end|>'
ANSWER_TEXT = "It is done.<|im_end|>"

_scale = 1.0


def tool_s(trajectory_id: str, turn: int) -> float:
    """The planned seconds of one tool call."""
    draw = lognormal(TOOL_MEDIAN_S, TOOL_SIGMA, limit=TOOL_LIMIT_S)
    return _scale * draw(random.Random(f"{trajectory_id} {turn}"))


def planned_s(trajectory_id: str) -> float:
    return sum(tool_s(trajectory_id, turn) for turn in range(CALLS)) + (CALLS + 1) * GENERATION_S * _scale


@tool
async def wait(ctx: ToolContext) -> str:
    """Take a while."""
    await asyncio.sleep(tool_s(ctx.trajectory_id, ctx.turn))
    return "ok"


class TrivialEnv:
    """Scores without work."""

    def prompt(self, task: Task) -> Sequence[dict[str, Any]]:
        return task.prompt

    async def score(self, episode: Episode) -> Score:
        return Score(correct=1.0)

    async def reply(self, episode: Episode) -> str | None:
        return None


class Replies:
    """A scripted policy: so many calls, then an answer. A pure function of the context, as the fake demands."""

    def __init__(self, tokenizer: Any) -> None:
        encode = tokenizer.encode
        self._header: list[int] = encode("<|im_start|>assistant\n", add_special_tokens=False)
        self._replies: list[list[int]] = [encode(text, add_special_tokens=False) for text in (CALL_TEXT, ANSWER_TEXT)]

    def __call__(self, context: Sequence[int]) -> int:
        ids, size = list(context), len(self._header)
        starts = [i + size for i, token in enumerate(ids) if token == self._header[0] and ids[i : i + size] == self._header]
        reply = self._replies[len(starts) > CALLS]
        position = len(ids) - starts[-1]
        return reply[position] if position < len(reply) else EOS_TOKEN_ID


@dataclass(frozen=True)
class Outcome:
    """One mode's figures."""

    wall_s: float
    generation_s: float
    """Planned seconds of the rollouts that were trained, over the places in flight."""
    training_s: float
    mean_staleness: float
    max_staleness: int

    @property
    def bound_s(self) -> float:
        return max(self.generation_s, self.training_s)


def train(url: str, keys: Keys, steps: int, train_s: float, announce: Any) -> tuple[float, float, float, int]:
    """The trainer's thread: seconds in all, planned seconds of what it got, mean and largest staleness."""
    planned, staleness = 0.0, list[int]()
    with connect(url) as client:
        consumer = TrajectoryConsumer(client, keys)
        epoch = consumer.acquire()

        def publish(version: int) -> None:
            record = PolicyRecord(run_epoch=epoch, version=version, path="none", digest="sha256:none")
            consumer.publish_policy(record, consumed_groups=version * GROUPS_PER_STEP)
            announce(record.label)

        publish(0)
        began = time.perf_counter()
        for step in range(steps):
            groups = []
            while len(groups) < GROUPS_PER_STEP:
                group = consumer.next_group(60.0)
                assert group is not None, "no group within a minute"
                groups.append(group)
            members = [t for group in groups for t in group]
            assert len(members) == IN_FLIGHT
            planned += sum(planned_s(t.id) for t in members)
            staleness += [step - t.min_version for t in members]
            time.sleep(train_s)
            consumer.commit([group.close.id for group in groups], outcomes={t.id: "trained" for t in members})
            publish(step + 1)
        return time.perf_counter() - began, planned, sum(staleness) / len(staleness), max(staleness)


async def play(url: str, name: str, steps: int, train_s: float) -> Outcome:
    """One mode from its first group to its last step."""
    max_staleness, pipeline_depth = MODES[name]
    keys, client, loop = Keys(name.replace(" ", "-")), connect_async(url), asyncio.get_running_loop()
    tokenizer = make_tiny_tokenizer(vocab_size=1000)
    toolbox = load_tools([{"use": f"{HERE}:wait"}], tokenizer=tokenizer)
    template = ChatTemplate(tokenizer, tools=toolbox.schemas())
    limits, sampling = Limits(max_turns=CALLS + 1), SamplingParams(max_new_tokens=128)
    scorer = Scorer(env=TrivialEnv())
    server = FakeSGLang(label="e1-v0", first_token_s=lambda _: GENERATION_S * _scale, sampler=Replies(tokenizer))
    async with server, AsyncLLMServerManager() as manager:
        manager.add_server(server.url)

        async def rollout(
            task: Task, trajectory_id: str, group_id: str, ordinal: int, sample: int, attempt: int
        ) -> tuple[Trajectory, Episode]:
            return await run_rollout(
                task, loop="tool_agent", template=template, generator=manager, toolbox=toolbox, scorer=scorer, limits=limits,
                sampling=sampling, trajectory_id=trajectory_id, group_id=group_id, ordinal=ordinal, sample_index=sample,
                attempt=attempt, env_name="bench",
            )  # fmt: skip

        worker = RolloutWorker(
            task_at=lambda n: Task(id=f"t{n}", prompt=[{"role": "user", "content": f"Question {n}."}], data_source="bench"),
            sink=TrajectoryProducer(client, keys), read_progress=lambda: read_progress(client, keys), rollout=rollout,
            group_size=GROUP_SIZE, groups_per_step=GROUPS_PER_STEP, max_staleness=max_staleness,
            pipeline_depth=pipeline_depth, in_flight=IN_FLIGHT, poll_s=0.02,
        )  # fmt: skip

        def announce(label: str) -> None:
            loop.call_soon_threadsafe(setattr, server, "label", label)

        async with running(worker=worker.run()):
            wall, planned, mean, most = await asyncio.to_thread(train, url, keys, steps, train_s, announce)
    await client.aclose()
    return Outcome(wall, planned / IN_FLIGHT, steps * train_s, mean, most)


def main() -> None:
    global _scale
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--train-s", type=float, default=1.5)
    parser.add_argument("--scale", type=float, default=1.0, help="of all times")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    _scale = args.scale
    outcomes: dict[str, Outcome] = {}
    print(f"{args.steps} steps of {GROUPS_PER_STEP} groups x {GROUP_SIZE}, {IN_FLIGHT} places in flight, {CALLS} tool calls each")
    with tempfile.TemporaryDirectory(prefix="arl-bench-") as folder:
        redis = EmbeddedServer(folder)
        url = redis.ensure()
        try:
            for name in MODES:
                o = outcomes[name] = uvloop.run(play(url, name, args.steps, args.train_s * args.scale))
                trainer_idle = 1 - o.training_s / o.wall_s
                places_idle = 1 - o.generation_s / o.wall_s if o.wall_s else math.nan
                print(
                    f"  {name:13} {o.wall_s / args.steps:6.2f} s/step   speed-up {outcomes['sync'].wall_s / o.wall_s:4.2f}   "
                    f"{o.wall_s / o.bound_s:4.2f} x bound ({o.bound_s / args.steps:.2f} s: generation "
                    f"{o.generation_s / args.steps:.2f}, training {o.training_s / args.steps:.2f})   idle: trainer "
                    f"{100 * trainer_idle:3.0f} %, places {100 * max(0.0, places_idle):3.0f} %   staleness mean "
                    f"{o.mean_staleness:.2f} max {o.max_staleness}",
                    flush=True,
                )
        finally:
            redis.stop()
    if args.json:
        print(json.dumps({name: asdict(o) | {"bound_s": o.bound_s} for name, o in outcomes.items()}))


if __name__ == "__main__":
    main()
