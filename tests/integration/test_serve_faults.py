"""Faults under whole rollouts, over real HTTP: each ends within its deadline, with its reason, and with no wrong reward.

Durations are only bounded from above, generously: what a fault must never do is hold a group.
"""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from rollout_kit import MemoryStream

from agentrl import supervise
from agentrl.errors import RolloutError
from agentrl.plugins import tool
from agentrl.process import ClaimedPort
from agentrl.protocols import ToolContext
from agentrl.rollout.agent_loop import Limits, Rollout, run_rollout
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.group import GroupPlan, run_group
from agentrl.rollout.reward import Scorer
from agentrl.rollout.tool_loading import load_tools
from agentrl.rollout.toolbox import Toolbox
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.supervise import current_waits, num_left_behind, running
from agentrl.testing.fake_sglang import FakeSGLang
from agentrl.testing.tiny_model import EOS_TOKEN_ID, make_tiny_tokenizer
from agentrl.types import Episode, GroupClose, SamplingParams, Task, Trajectory

pytestmark = pytest.mark.asyncio

LABEL = "e1-v4"
PLENTY_S = 60.0
"""For what takes a moment on a quiet machine."""
TOKENIZER = make_tiny_tokenizer(vocab_size=1000)
TASK = Task(id="t/1", prompt=[{"role": "user", "content": "What is 3 + 4?"}], data_source="sums", ground_truth="7")
ANSWER = "So it is #### 7"


class Policy:
    """Calls a tool once, then answers: a pure function of the context, as the fake engine demands."""

    def __init__(self, tool_name: str, **arguments: Any) -> None:
        call = f"<tool_call>\n{json.dumps({'name': tool_name, 'arguments': arguments})}\n</tool_call>"
        self._header = TOKENIZER.encode("<|im_start|>assistant\n", add_special_tokens=False)
        self._replies = [TOKENIZER.encode(text, add_special_tokens=False) for text in (call, ANSWER)]

    def __call__(self, context: Sequence[int]) -> int:
        ids, size = list(context), len(self._header)
        starts = [i + size for i in range(len(ids) - size + 1) if ids[i : i + size] == self._header]
        reply, position = self._replies[len(starts) > 1], len(ids) - starts[-1]
        return reply[position] if position < len(reply) else EOS_TOKEN_ID


@tool
async def quick() -> str:
    """Answers at once."""
    return "seven"


@tool
async def stubborn() -> str:
    """Goes on when it is cancelled."""
    released = _released[-1]
    while not released.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await released.wait()
    return "much too late"


_released: list[asyncio.Event] = []
_between_turns: list[Callable[[ToolContext], Any]] = []


@tool
async def meanwhile(ctx: ToolContext) -> str:
    """Something happens to the engines while it runs."""
    for happens in _between_turns:
        await happens(ctx)
    return "seven"


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return float(solution_str.endswith(f"#### {ground_truth}"))


@dataclass
class Played:
    """What came of a group."""

    close: GroupClose
    stream: MemoryStream
    seconds: float
    errors: list[RolloutError] = field(default_factory=list[RolloutError])

    def finished(self, trajectory: Trajectory, episode: Episode | None) -> None:
        assert episode is not None

    def failed(self, trajectory_id: str, error: RolloutError, *, is_final: bool) -> None:
        self.errors.append(error)

    @property
    def rewards(self) -> list[float]:
        return [t.reward for t in self.stream.trajectories.values()]


async def play(
    manager: AsyncLLMServerManager,
    tools: Toolbox | str = "quick",
    *,
    size: int = 2,
    attempts: int = 1,
    turn_timeout_s: float = PLENTY_S,
    silent_to_first: FakeSGLang | None = None,
    group_timeout_s: float = 2 * PLENTY_S,
) -> Played:
    """One group through the real loop, tools, scorer and manager. Where a server falls ``silent_to_first``, the first attempt of the
    first member comes to it first, and the turns' deadline is for that alone: what should go well has time on any machine."""
    box = load_tools([{"use": f"{__name__}:{tools}"}], tokenizer=TOKENIZER) if isinstance(tools, str) else tools
    template, stream = ChatTemplate(TOKENIZER, tools=box.schemas()), MemoryStream()
    scorer = Scorer(fn=compute_score)

    async def rollout(
        task: Task, trajectory_id: str, group_id: str, ordinal: int, sample: int, attempt: int
    ) -> tuple[Trajectory, Episode]:
        has_plenty = silent_to_first is not None and (sample, attempt) != (0, 0)
        while has_plenty and not silent_to_first.requests:
            await asyncio.sleep(0.005)
        return await run_rollout(
            task, loop="tool_agent", template=template, generator=manager, toolbox=box, scorer=scorer,
            limits=Limits(turn_timeout_s=PLENTY_S if has_plenty else turn_timeout_s), sampling=SamplingParams(max_new_tokens=128),
            trajectory_id=trajectory_id, group_id=group_id, ordinal=ordinal, sample_index=sample, attempt=attempt,
            env_name="sums",
        )  # fmt: skip

    started = time.monotonic()
    played = Played(GroupClose(group_id="", task_id="", ordinal=0, size=0, members=()), stream, 0.0)
    plan = GroupPlan(size=size, attempts=attempts, timeout_s=group_timeout_s)
    played.close = await run_group(
        TASK, 0, plan=plan, rollout=rollout, sink=stream, permits=asyncio.Semaphore(8), listener=played
    )
    played.seconds = time.monotonic() - started
    assert current_waits() == {}, "nothing may be left waiting"
    return played


def add_verified(manager: AsyncLLMServerManager, *urls: str) -> None:
    for url in urls:
        manager.add_server(url)
        manager.set_verified(url, LABEL)
    manager.require_version(LABEL)


# An engine that stalls


async def test_a_stream_that_falls_silent_fails_its_rollout_alone_by_the_turns_deadline() -> None:
    async with FakeSGLang(label=LABEL, sampler=Policy("quick")) as server, AsyncLLMServerManager() as manager:
        add_verified(manager, server.url)
        server.stall_after(tokens=5)
        played = await play(manager, turn_timeout_s=1.0, silent_to_first=server)
        async with asyncio.timeout(PLENTY_S):
            while server.num_live:  # the engine hears that nobody waits any more
                await asyncio.sleep(0.01)
    ((silent, reason),) = played.close.failed.items()
    assert (silent.rpartition("t/1/0/")[2], reason) == ("0/0", "deadline")
    assert played.rewards == [1.0], "its sibling is scored, it is not"
    assert "waiting for server" in str(played.errors[0])
    assert played.seconds < 30


async def test_with_attempts_left_the_silent_rollout_is_played_again() -> None:
    async with FakeSGLang(label=LABEL, sampler=Policy("quick")) as server, AsyncLLMServerManager() as manager:
        add_verified(manager, server.url)
        server.stall_after(tokens=5)
        played = await play(manager, attempts=2, turn_timeout_s=1.0, silent_to_first=server)
    assert (played.close.failed, played.rewards) == ({}, [1.0, 1.0])
    assert sorted(id.rsplit("/", 1)[1] for id in played.close.members) == ["0", "1"]


# Half-open TCP


class HalfOpen:
    """A TCP proxy that stops forwarding when it is frozen, and keeps every connection open: a peer that vanished."""

    def __init__(self, url: str) -> None:
        self._port = int(url.rpartition(":")[2])
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._connections: set[asyncio.Task[Any]] = set()
        self.url = ""

    def freeze(self) -> None:
        self._flowing.clear()

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator["HalfOpen", None]:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            await server.wait_closed()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        writers = [writer]
        try:
            await self._flowing.wait()
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._port)
            writers.append(upstream_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, upstream_writer))
                group.create_task(self._pump(upstream_reader, writer))
        except asyncio.CancelledError:
            pass  # asyncio's own callback of this task would complain
        finally:
            for open_writer in writers:
                open_writer.transport.abort()
            self._connections.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


async def test_behind_a_half_open_connection_a_rollout_ends_by_its_deadline_without_a_reward() -> None:
    async with (
        FakeSGLang(label=LABEL, sampler=Policy("quick"), token_latency_s=0.01) as server,
        HalfOpen(server.url).serving() as proxy,
        AsyncLLMServerManager() as manager,
        asyncio.TaskGroup() as group,
    ):
        add_verified(manager, proxy.url)
        group.create_task(freeze_in_mid_stream(proxy, server))
        played = await play(manager, turn_timeout_s=3.0)
    assert sorted(played.close.failed.values()) == ["deadline", "deadline"]
    assert played.rewards == []
    assert played.seconds < 30
    for error in played.errors:
        assert isinstance(error.partial, Rollout)
        assert (error.partial.trajectory.reward, error.partial.trajectory.stop) == (0.0, "error:deadline")


async def freeze_in_mid_stream(proxy: HalfOpen, engine: FakeSGLang) -> None:
    async with asyncio.timeout(PLENTY_S):
        while engine.num_tokens < 12:
            await asyncio.sleep(0.002)
    proxy.freeze()


async def test_the_health_loop_takes_requests_off_a_half_open_server_with_their_tokens() -> None:
    async with (
        FakeSGLang(label=LABEL, sampler=Policy("quick"), token_latency_s=0.01) as first,
        FakeSGLang(label=LABEL, sampler=Policy("quick")) as second,
        HalfOpen(first.url).serving() as proxy,
        AsyncLLMServerManager(probe_every_s=0.1, probe_timeout_s=0.3, unhealthy_after=2) as manager,
    ):
        add_verified(manager, proxy.url)

        async def add_the_other() -> None:
            await freeze_in_mid_stream(proxy, first)
            add_verified(manager, second.url)

        async with running(health=manager.run()), asyncio.TaskGroup() as group:
            group.create_task(add_the_other())
            played = await play(manager)
    assert (played.close.failed, played.rewards) == ({}, [1.0, 1.0])
    assert manager.counters()["unhealthy"] >= 1
    assert manager.counters()["continuations"] >= 1, "what had arrived was kept"
    assert played.seconds < 40


# A tool that ignores cancellation


async def test_a_tool_that_ignores_cancellation_holds_nobody_beyond_its_deadline(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervise, "GRACE_S", 0.05)
    _released.append(asyncio.Event())
    before = num_left_behind()
    tools = load_tools([{"use": f"{__name__}:stubborn", "timeout_s": 0.3}], tokenizer=TOKENIZER)
    async with FakeSGLang(label=LABEL, sampler=Policy("stubborn")) as server, AsyncLLMServerManager() as manager:
        add_verified(manager, server.url)
        try:
            played = await play(manager, tools)
            assert num_left_behind() == before + 2
        finally:
            _released[-1].set()
    async with asyncio.timeout(PLENTY_S):
        while num_left_behind() > before:
            await asyncio.sleep(0.01)
    assert played.seconds < 30
    assert "cancellation_ignored" in caplog.text
    # A tool that takes too long is the model's to read; it answered, and that is what is scored.
    assert (played.close.failed, played.rewards) == ({}, [1.0, 1.0])
    for trajectory in played.stream.trajectories.values():
        (observed,) = [turn for turn in trajectory.turns if turn.kind == "tool"]
        assert (observed.ok, observed.error_kind) == (False, "timeout")
        assert "much too late" not in observed.text


async def test_a_stubborn_tool_does_not_hold_its_group_beyond_the_groups_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "GRACE_S", 0.05)
    _released.append(asyncio.Event())
    before = num_left_behind()
    tools = load_tools([{"use": f"{__name__}:stubborn", "timeout_s": 100}], tokenizer=TOKENIZER)
    async with FakeSGLang(label=LABEL, sampler=Policy("stubborn")) as server, AsyncLLMServerManager() as manager:
        add_verified(manager, server.url)
        try:
            played = await play(manager, tools, group_timeout_s=1.0)
        finally:
            _released[-1].set()
    assert sorted(played.close.failed.values()) == ["group_deadline", "group_deadline"]
    assert played.rewards == []
    assert played.seconds < 30
    async with asyncio.timeout(PLENTY_S):
        while num_left_behind() > before:
            await asyncio.sleep(0.01)


# The sandbox is down


def interpreter(url: str, *, timeout_s: float, **config: Any) -> Toolbox:
    entry = {"class_name": "tools.code_interpreter.CodeInterpreter", "config": {"url": url, "max_retries": 0, **config}}
    return load_tools([{**entry, "timeout_s": timeout_s}], tokenizer=TOKENIZER)


async def test_without_a_sandbox_rollouts_fail_as_infrastructure_and_nothing_is_scored() -> None:
    with ClaimedPort("127.0.0.1") as nobody:
        tools = interpreter(f"http://127.0.0.1:{nobody}", timeout_s=PLENTY_S)
        async with (
            FakeSGLang(label=LABEL, sampler=Policy("code_interpreter", code="print(7)")) as server,
            AsyncLLMServerManager() as manager,
        ):
            add_verified(manager, server.url)
            played = await play(manager, tools, attempts=2)
            await tools.aclose()
    assert set(played.close.failed.values()) == {"sandbox"}
    assert (played.rewards, len(played.errors)) == ([], 4)
    assert tools.stats()["code_interpreter"]["infra_errors"] == 4
    assert played.seconds < 30


async def test_a_sandbox_that_takes_connections_and_never_answers_ends_by_the_tools_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel accepts; nobody reads
        tools = interpreter(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=2)
        async with (
            FakeSGLang(label=LABEL, sampler=Policy("code_interpreter", code="print(7)")) as server,
            AsyncLLMServerManager() as manager,
        ):
            add_verified(manager, server.url)
            played = await play(manager, tools)
            await tools.aclose()
    assert played.seconds < 30
    for trajectory in played.stream.trajectories.values():
        (observed,) = [turn for turn in trajectory.turns if turn.kind == "tool"]
        assert (observed.ok, observed.error_kind) == (False, "timeout")


# An engine that comes back with its base weights


async def test_an_engine_that_restarts_with_base_weights_between_turns_gives_no_token_of_them() -> None:
    async with (
        FakeSGLang(label=LABEL, sampler=Policy("meanwhile")) as first,
        FakeSGLang(label=LABEL, sampler=Policy("meanwhile")) as second,
        AsyncLLMServerManager() as manager,
        asyncio.TaskGroup() as group,
    ):
        first.base_label = "default"
        add_verified(manager, first.url)

        async def restart(ctx: ToolContext) -> None:
            if ctx.sample_index == 0:
                await first.restart_with_base_weights()

        async def add_the_other_once_it_is_caught() -> None:
            async with asyncio.timeout(PLENTY_S):
                while manager.stats()[0].state != "quarantined":
                    await asyncio.sleep(0.01)
            add_verified(manager, second.url)

        _between_turns[:] = [restart]
        group.create_task(add_the_other_once_it_is_caught())
        played = await play(manager, "meanwhile")
        discarded = manager.counters()["tokens_discarded"]
    assert (played.close.failed, played.rewards) == ({}, [1.0, 1.0])
    for trajectory in played.stream.trajectories.values():
        (segment,) = trajectory.segments
        assert np.unique(segment.versions[segment.mask]).tolist() == [4]
    assert discarded > 0, "it was asked once more, and its answer was thrown away"


async def test_with_only_base_weights_left_rollouts_wait_for_weights_until_their_deadline() -> None:
    async with FakeSGLang(label=LABEL, sampler=Policy("meanwhile")) as server, AsyncLLMServerManager() as manager:
        server.base_label = "default"
        add_verified(manager, server.url)
        arrived = 0
        everybody = asyncio.Event()

        async def restart(ctx: ToolContext) -> None:
            nonlocal arrived
            arrived += 1
            if arrived == 2:
                await server.restart_with_base_weights()
                everybody.set()
            await everybody.wait()

        _between_turns[:] = [restart]
        played = await play(manager, "meanwhile", turn_timeout_s=4.0)
        assert manager.num_parked() == 0
    assert sorted(played.close.failed.values()) == ["deadline", "deadline"]
    assert all("waiting for weights" in str(error) for error in played.errors)
    assert played.rewards == []
    assert played.seconds < 30
