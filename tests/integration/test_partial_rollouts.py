"""A rollout that a process could not finish goes on in the next one, token for token; where it cannot, it starts again."""

import asyncio
import dataclasses
import tempfile
from typing import Any

import pytest
from rollout_kit import MemoryStream, Say, ScriptedGenerator
from test_rollout_agent_loop import TASK, TOKENIZER, assert_tokens_are_what_was_sampled, call, solved, toolbox

from agentrl.errors import EnvError
from agentrl.plugins import load_object
from agentrl.protocols import Env, Tool, ToolContext
from agentrl.rollout.agent_loop import Limits, Rollout, run_rollout
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.partial import PartialRollouts
from agentrl.rollout.partial_sink import PartialSink
from agentrl.rollout.reward import Scorer
from agentrl.rollout.tool_loading import load_tools
from agentrl.rollout.toolbox import Toolbox
from agentrl.stream.keys import Keys
from agentrl.stream.partials import RedisPartials
from agentrl.stream.server import EmbeddedServer, connect_async, ensure
from agentrl.types import Episode, GroupClose, SamplingParams, Score, Task, content_digest

ID = "t/1/0/0/0"
TURNS = (call("1+1"), call("2+2"), "#### 7")


class MemoryStore:
    """Snapshots in a dict."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}

    async def load(self, trajectory_id: str) -> bytes | None:
        return self.data.get(trajectory_id)

    async def save(self, trajectory_id: str, data: bytes) -> None:
        self.data[trajectory_id] = data

    async def delete(self, *trajectory_ids: str) -> None:
        for name in trajectory_ids:
            self.data.pop(name, None)


class Noted(Tool):
    """Counts its calls."""

    async def open(self, ctx: ToolContext) -> None:
        self.calls = 0

    async def call(self, expression: str) -> str:
        """Count."""
        self.calls += 1
        return str(self.calls)


async def play(
    generator: ScriptedGenerator,
    partials: PartialRollouts,
    *,
    task: Task = TASK,
    box: Toolbox | None = None,
    env: Env | None = None,
) -> Rollout:
    box = box or toolbox()
    return await run_rollout(
        task, loop="env" if env else "tool_agent", template=ChatTemplate(TOKENIZER, tools=box.schemas()), generator=generator, toolbox=box,
        scorer=Scorer(env=env) if env else Scorer(fn=solved), limits=Limits(), sampling=SamplingParams(max_new_tokens=64), trajectory_id=ID,
        group_id="t/1/0", ordinal=0, sample_index=0, attempt=0, env_name="e", partials=partials,
    )  # fmt: skip


async def cut(turns: Any, at: int, partials: PartialRollouts, **more: Any) -> ScriptedGenerator:
    """Play until turn ``at`` is being generated, then stop as a drained or killed process would."""
    generator = ScriptedGenerator(TOKENIZER, [Say(t, seconds=60 if n == at else 0, version=n) for n, t in enumerate(turns)])
    task = asyncio.create_task(play(generator, partials, **more))
    while len(generator.requests) <= at:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return generator


def going_on(turns: Any, done: int) -> ScriptedGenerator:
    """A new process's generator: only the turns after ``done`` are asked for."""
    return ScriptedGenerator(TOKENIZER, lambda _, n, __: Say(turns[done + n], version=done + n))


@pytest.mark.asyncio
@pytest.mark.parametrize("at", [1, 2])
async def test_a_resumed_rollout_equals_an_undisturbed_one(at: int) -> None:
    store = MemoryStore()
    partials = PartialRollouts(store)
    whole_generator = going_on(TURNS, 0)
    whole = await play(whole_generator, PartialRollouts(MemoryStore()))
    assert_tokens_are_what_was_sampled(whole, whole_generator)

    before = await cut(TURNS, at, partials)
    after = going_on(TURNS, at)
    resumed = await play(after, partials)
    assert len(after.requests) == len(TURNS) - at  # nothing was generated again
    assert after.requests[0][1] == before.requests[-1][1]
    # The scripted logprobs depend on the token alone, so equal turns are equal in every array.
    assert content_digest(resumed.trajectory) == content_digest(whole.trajectory)
    assert [dataclasses.replace(t, ms=0) for t in resumed.trajectory.turns] == [
        dataclasses.replace(t, ms=0) for t in whole.trajectory.turns
    ]
    assert resumed.episode.calls == whole.episode.calls
    assert (resumed.episode.assistant_text, resumed.episode.num_turns) == (whole.episode.assistant_text, 3)
    assert (resumed.trajectory.reward, resumed.trajectory.stop) == (1.0, "answered")
    sampled = sum(len(g.ids) for g in before.generations[ID])
    assert partials.stats() == {"resumed": 1, "resumed_tokens": sampled, "wasted_tokens": 0}


@pytest.mark.asyncio
async def test_what_a_stateful_tool_did_cannot_be_resumed_and_its_tokens_are_counted_as_wasted() -> None:
    partials = PartialRollouts(MemoryStore())
    box = load_tools([{"use": "test_partial_rollouts:Noted", "name": "calculator"}], tokenizer=TOKENIZER)
    before = await cut(TURNS, 2, partials, box=box)
    after = going_on(TURNS, 0)
    rollout = await play(after, partials, box=box)
    assert len(after.requests) == 3
    assert [c.result for c in rollout.episode.calls] == ["1", "2"]
    wasted = sum(len(g.ids) for g in before.generations[ID][:2])
    assert partials.stats() == {"resumed": 0, "resumed_tokens": 0, "wasted_tokens": wasted}


GAME = load_object("envs.guess_number:generate_tasks")(1, 0, highest=16)[0]
SECRET = int(GAME.ground_truth)
GUESSES = (f"I say {max(1, SECRET - 2)}", call("1+1"), f"then {min(16, SECRET + 1)}", str(SECRET))


@pytest.mark.asyncio
@pytest.mark.parametrize("at", [1, 2, 3])
async def test_a_game_goes_on_where_its_environment_saved_it(at: int) -> None:
    whole = await play(
        going_on(GUESSES, 0), PartialRollouts(MemoryStore()), task=GAME, env=load_object("envs.guess_number:GuessNumber")()
    )
    partials = PartialRollouts(MemoryStore())
    before = await cut(GUESSES, at, partials, task=GAME, env=load_object("envs.guess_number:GuessNumber")())
    after = going_on(GUESSES, at)
    resumed = await play(after, partials, task=GAME, env=load_object("envs.guess_number:GuessNumber")())
    assert after.requests[0][1] == before.requests[-1][1]
    assert len(after.requests) == len(GUESSES) - at
    assert content_digest(resumed.trajectory) == content_digest(whole.trajectory)
    assert resumed.trajectory.turn_rewards == whole.trajectory.turn_rewards
    assert (resumed.episode.state, resumed.trajectory.reward_terms["correct"]) == (whole.episode.state, 1.0)
    assert partials.resumed == 1


class Forgetful(Env):
    """Asks on three times; what it saves depends."""

    def __init__(self, saved: Any) -> None:
        self.saved, self.events = saved, list[str]()

    async def open(self, task: Task, *, trajectory_id: str) -> str:
        self.events.append("open")
        return "state"

    async def reply(self, episode: Episode) -> str | None:
        return "On." if len(episode.texts) < 3 else None

    async def save(self, state: Any) -> Any:
        if isinstance(self.saved, Exception):
            raise self.saved
        return self.saved

    async def resume(self, task: Task, saved: Any, *, trajectory_id: str) -> Any:
        raise OSError("the game server forgot it")

    async def close(self, state: Any) -> None:
        self.events.append("close")

    async def score(self, episode: Episode) -> Score:
        return Score(correct=1.0)


@pytest.mark.asyncio
@pytest.mark.parametrize("saved", [None, OSError("no room"), {"x": object()}, ["no", "mapping"]])
async def test_an_environment_that_does_not_save_starts_again(saved: Any) -> None:
    partials = PartialRollouts(MemoryStore())
    before = await cut(("a", "b", "7"), 2, partials, env=Forgetful(saved))
    env, after = Forgetful(saved), going_on(("a", "b", "7"), 0)
    rollout = await play(after, partials, env=env)
    assert (len(after.requests), rollout.trajectory.stop, env.events) == (3, "answered", ["open", "close"])
    wasted = sum(len(g.ids) for g in before.generations[ID][:2])
    assert partials.stats() == {"resumed": 0, "resumed_tokens": 0, "wasted_tokens": wasted}


@pytest.mark.asyncio
async def test_an_environment_that_cannot_resume_fails_this_attempt_only() -> None:
    store = MemoryStore()
    await cut(("a", "7", "7"), 1, PartialRollouts(store), env=Forgetful({"game": 5}))
    with pytest.raises(EnvError, match="resume raised OSError: the game server forgot it"):
        await play(going_on(("a", "7", "7"), 1), PartialRollouts(store), env=Forgetful({"game": 5}))
    assert store.data == {}
    # Nor does a loop without an environment go on from what one with an environment kept.
    await cut(("a", "7", "7"), 1, PartialRollouts(store), env=Forgetful({"game": 5}))
    after = going_on(("#### 7",), 0)
    assert (await play(after, PartialRollouts(store))).trajectory.reward == 1.0


@pytest.mark.asyncio
async def test_another_prompt_or_a_damaged_snapshot_starts_again() -> None:
    store = MemoryStore()
    partials = PartialRollouts(store)
    await cut(TURNS, 1, partials)
    other = dataclasses.replace(TASK, prompt=[{"role": "user", "content": "Something else"}])
    after = going_on(TURNS, 0)
    await play(after, partials, task=other)
    assert len(after.requests) == 3
    assert partials.wasted_tokens > 0
    for damage in (b"", b"\x00" * 20, store.data[ID][:-7], b"\x81\xa1v\x02"):
        store.data[ID] = damage
        after = going_on(TURNS, 0)
        rollout = await play(after, partials)
        assert (len(after.requests), rollout.trajectory.reward) == (3, 1.0)


@pytest.mark.asyncio
async def test_a_store_that_fails_costs_nothing_but_the_chance() -> None:
    class Broken(MemoryStore):
        async def load(self, trajectory_id: str) -> bytes | None:
            raise ConnectionError("gone")

        async def save(self, trajectory_id: str, data: bytes) -> None:
            raise ConnectionError("gone")

    rollout = await play(going_on(TURNS, 0), PartialRollouts(Broken()))
    assert rollout.trajectory.reward == 1.0


@pytest.mark.asyncio
async def test_snapshots_live_in_redis_until_their_trajectory_is_put_or_their_group_closes() -> None:
    with tempfile.TemporaryDirectory(prefix="arl-") as directory:
        client = connect_async(ensure(directory), role="serve")
        try:
            keys = Keys("test")
            store = RedisPartials(client, keys)
            partials = PartialRollouts(store)
            await cut(TURNS, 2, partials)
            assert await client.hlen(keys.partial) == 1  # type: ignore[misc]
            resumed = await play(going_on(TURNS, 2), PartialRollouts(RedisPartials(client, keys)))
            sink = PartialSink(MemoryStream(), partials, attempts=2)
            await sink.put_trajectory(resumed.trajectory)
            assert await store.load(ID) is None
            await store.save("t/1/0/1/1", b"of a member that the group's deadline cut")
            failed = {"t/1/0/1/1": "group_deadline"}
            await sink.close_group(GroupClose(group_id="t/1/0", task_id="t/1", ordinal=0, size=2, members=(ID,), failed=failed))
            assert await client.hlen(keys.partial) == 0  # type: ignore[misc]
        finally:
            await client.aclose()
            EmbeddedServer(directory).stop()
