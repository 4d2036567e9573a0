"""A generator that says what a script tells it and remembers what it was shown; two tools; a stream in memory."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentrl.errors import SandboxError, ToolError
from agentrl.plugins import tool
from agentrl.protocols import TokenListener, ToolResult
from agentrl.rollout.trajectory_builder import TrajectoryBuilder
from agentrl.testing.clock import pass_time
from agentrl.types import Generation, GroupClose, SampledTokens, SamplingParams, Task, Trajectory


@dataclass
class Say:
    """One turn: its text, and how it ends."""

    text: str
    finish: str = "stop"
    seconds: float = 0.0
    passes: float = 0.0
    """Seconds that pass at once while it is said; at least as many are needed to say it then, or the ``error`` comes after them."""
    error: Exception | None = None
    version: int = 3
    change: dict[str, Any] = field(default_factory=dict)
    """Fields of the generation to replace, for broken servers."""


Script = Callable[[str, int, Sequence[int]], Say]
"""(trajectory id, turn, ids so far) -> what to say."""


class ScriptedGenerator:
    """Encodes the script's text with the real tokenizer, one pseudo-random logprob per token."""

    def __init__(self, tokenizer: Any, script: Script | Sequence[Say]) -> None:
        self.tokenizer = tokenizer
        self.script: Script = script if callable(script) else lambda _, turn, __: script[turn]
        self.requests: list[tuple[str, list[int], SamplingParams]] = []
        self.generations: dict[str, list[Generation]] = {}

    async def generate(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        *,
        trajectory_id: str,
        group_id: str,
        deadline: float,
        on_tokens: TokenListener | None = None,
    ) -> Generation:
        done = self.generations.setdefault(trajectory_id, [])
        self.requests.append((trajectory_id, list(ids), sampling))
        say = self.script(trajectory_id, len(done), ids)
        if say.passes:
            asyncio.get_running_loop().call_soon(pass_time, say.passes)
        await asyncio.sleep(max(say.seconds, 2 * say.passes if say.error is None else 0.0))
        if say.error is not None:
            raise say.error
        sampled = self.tokenizer.encode(say.text, add_special_tokens=False)
        if say.finish == "stop":
            sampled.append(self.tokenizer.eos_token_id)
        finish = say.finish
        if len(sampled) > sampling.max_new_tokens:
            sampled, finish = sampled[: sampling.max_new_tokens], "length"
        fields: dict[str, Any] = {
            "ids": sampled,
            "logprobs": [-((i * 7919 + n) % 997) / 100 for n, i in enumerate(sampled)],
            "versions": [say.version] * len(sampled),
            "finish": finish,
            "server": "http://test:1",
            **say.change,
        }
        generation = Generation(**fields)
        done.append(generation)
        for index, token in enumerate(generation.ids if on_tokens else ()):
            assert on_tokens is not None
            one = slice(index, index + 1)
            on_tokens(SampledTokens([token], generation.logprobs[one], generation.versions[one], generation.server))
            await asyncio.sleep(0)
        return generation


@tool
async def calculator(expression: str) -> str:
    """Compute an expression."""
    if expression == "fail":
        raise SandboxError("the sandbox is gone")
    if expression == "sleep":
        asyncio.get_running_loop().call_soon(pass_time, 200)
        await asyncio.sleep(3600)
    try:
        return str(sum(int(x) for x in expression.split("+")))
    except ValueError:
        raise ToolError(f"cannot compute {expression!r}") from None


async def rewarding() -> ToolResult:
    """Rewards."""
    return ToolResult(text="ok", reward=3.0)


@dataclass
class Progress:
    """Where a run stands; tests move ``consumed_groups``."""

    run_epoch: int = 1
    version: int = 0
    consumed_groups: int = 0
    closed_groups: int = 0


class MemoryStream:
    """The stream's side of the worker, with the producer's promises: one entry per id, closes after their members."""

    def __init__(self) -> None:
        self.trajectories: dict[str, Trajectory] = {}
        self.closes: dict[int, GroupClose] = {}
        self.events: list[str] = []
        self.progress = Progress()
        self.room = asyncio.Event()
        self.room.set()

    async def put_trajectory(self, trajectory: Trajectory) -> None:
        await self.room.wait()
        await asyncio.sleep(0)
        assert trajectory.ordinal not in self.closes, "put after its group closed"
        self.trajectories.setdefault(trajectory.id, trajectory)
        self.events.append(trajectory.id)

    async def close_group(self, close: GroupClose) -> None:
        await asyncio.sleep(0)
        assert close.ordinal not in self.closes, "closed twice"
        assert set(close.members) <= set(self.trajectories), "members that were never put"
        assert len(close.members) + len(close.failed) == close.size
        assert not set(close.members) & set(close.failed)
        self.closes[close.ordinal] = close
        self.progress.closed_groups += 1
        self.events.append(close.id)

    async def present(self, ids: Sequence[str]) -> set[str]:
        return {i for i in ids if i in self.trajectories}

    async def next_open_ordinal(self) -> int:
        ordinal = 0
        while ordinal in self.closes:
            ordinal += 1
        return ordinal

    async def is_closed(self, ordinals: Iterable[int]) -> set[int]:
        return {o for o in ordinals if o in self.closes}

    async def read_progress(self) -> Progress:
        await asyncio.sleep(0)
        return Progress(**vars(self.progress))


def tiny_trajectory(task: Task, trajectory_id: str, ordinal: int, sample: int, attempt: int, *, version: int = 0) -> Trajectory:
    """A trajectory of a prompt token and two sampled ones."""
    builder = TrajectoryBuilder([5])
    builder.append_sampled(Generation(ids=[7, 8], logprobs=[-1.0, -2.0], versions=[version] * 2, finish="stop", server="s"))
    return builder.finish(
        id=trajectory_id, task_id=task.id, group_id=f"{task.id}/{ordinal}", ordinal=ordinal, sample_index=sample,
        attempt=attempt, env="e", agent="a", data_source="d", split="train", reward=1.0, reward_terms={"correct": 1.0},
        stop="answered", created=0.0, finished=1.0,
    )  # fmt: skip
