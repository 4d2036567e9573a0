"""Environments that reply: token-exact, under deadlines, and always closed."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from rollout_kit import Say, ScriptedGenerator
from test_rollout_agent_loop import assert_tokens_are_what_was_sampled, call, toolbox

from agentrl.config import Config
from agentrl.errors import DeadlineExceeded, EnvError
from agentrl.plugins import load_object
from agentrl.protocols import Env, Reply
from agentrl.rollout.agent_loop import Limits, Rollout, run_rollout
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.reward import Scorer
from agentrl.rollout.toolbox import Toolbox
from agentrl.stream.codec import decode, encode
from agentrl.supervise import current_waits
from agentrl.testing.clock import pass_time
from agentrl.testing.tiny_model import make_tiny_tokenizer
from agentrl.types import Episode, SamplingParams, Score, Task

TOKENIZER = make_tiny_tokenizer()
GAME = load_object("envs.guess_number:generate_tasks")(1, 0, highest=16)[0]
SECRET = int(GAME.ground_truth)


class Sure(Env):
    """Asks once whether the model is sure, then ends; remembers what happened to it."""

    def __init__(self, **changes: Any) -> None:
        self.events: list[str] = []
        self.changes = changes

    async def open(self, task: Task, *, trajectory_id: str) -> str:
        self.events.append(f"open {trajectory_id}")
        return f"state of {trajectory_id}"

    async def reply(self, episode: Episode) -> Reply | str | None:
        assert episode.state == "state of t/0/0/0"
        self.events.append(f"reply to {episode.texts[-1]}")
        if error := self.changes.get("error"):
            raise error
        if hangs := self.changes.get("hangs", 0):
            asyncio.get_running_loop().call_soon(pass_time, hangs)
        await asyncio.sleep(2 * hangs)
        return self.changes.get("reply", "Sure?") if sum(e.startswith("reply") for e in self.events) == 1 else None

    async def score(self, episode: Episode) -> Score:
        self.events.append("score")
        return Score(correct=float(episode.texts[-1] == "yes"))

    async def close(self, state: Any) -> None:
        self.events.append(f"close {state}")


async def play(env: Env, *turns: Say | str, task: Task = GAME, tools: Toolbox | None = None, **limits: Any) -> Any:
    generator = ScriptedGenerator(TOKENIZER, [t if isinstance(t, Say) else Say(t) for t in turns])
    box = tools or Toolbox()
    rollout = await run_rollout(
        task, loop="env", template=ChatTemplate(TOKENIZER, tools=box.schemas() or None), generator=generator, toolbox=box,
        scorer=Scorer(env=env), limits=Limits(**limits), sampling=SamplingParams(max_new_tokens=64), trajectory_id="t/0/0/0",
        group_id="t/0", ordinal=0, sample_index=0, attempt=0, env_name="e",
    )  # fmt: skip
    return rollout, generator


@pytest.mark.asyncio
async def test_a_game_is_the_templates_rendering_with_a_reward_at_each_turn() -> None:
    below = max(1, SECRET - 1)
    env = load_object("envs.guess_number:GuessNumber")(turn_reward=0.5)
    rollout, generator = await play(env, f"I say {below}", "no idea", str(SECRET))
    assert_tokens_are_what_was_sampled(rollout, generator)
    trajectory, episode = rollout
    (segment,) = trajectory.segments
    messages = [
        *GAME.prompt,
        {"role": "assistant", "content": f"I say {below}"},
        {"role": "user", "content": "Higher."},
        {"role": "assistant", "content": "no idea"},
        {"role": "user", "content": "That is no number. Answer with a number."},
        {"role": "assistant", "content": str(SECRET)},
    ]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == TOKENIZER.decode(segment.ids.tolist()) + "\n"
    assert [(t.kind, t.name) for t in trajectory.turns] == [
        ("model", ""), ("env", "GuessNumber"), ("model", ""), ("env", "GuessNumber"), ("model", ""),
    ]  # fmt: skip
    sampled = [t for t in trajectory.turns if t.kind == "model"]
    assert [(s, token) for s, token, _ in trajectory.turn_rewards] == [(0, t.end - 1) for t in sampled]
    values = [value for _, _, value in trajectory.turn_rewards]
    assert values[1] == 0.0
    assert sum(values) == pytest.approx(0.5)  # all bits of the game
    assert dict(trajectory.reward_terms) == {"correct": 1.0, "turns": pytest.approx(0.5)}
    assert (trajectory.reward, trajectory.stop) == (pytest.approx(1.5), "answered")
    assert "Higher." in episode.transcript
    decoded = decode(encode(trajectory))
    assert decoded.turn_rewards == trajectory.turn_rewards  # type: ignore[union-attr]


@pytest.mark.asyncio
async def test_a_lost_game_ends_with_its_turns_and_keeps_what_they_earned() -> None:
    env = load_object("envs.guess_number:GuessNumber")()
    wrong = 16 if SECRET < 16 else 1
    rollout, _ = await play(env, str(wrong), str(wrong), max_turns=2)
    assert (rollout.trajectory.stop, rollout.trajectory.reward_terms["correct"]) == ("max_turns", 0.0)
    assert len(rollout.trajectory.turn_rewards) == 2  # the last turn was answered too, although its reply is not shown
    assert rollout.episode.state.guesses == 2


@pytest.mark.asyncio
async def test_the_environment_is_opened_asked_scored_and_closed_in_that_order() -> None:
    env = Sure()
    rollout, _ = await play(env, "maybe", "yes")
    assert rollout.trajectory.reward == 1.0
    assert env.events == [
        "open t/0/0/0", "reply to maybe", "reply to yes", "score", "close state of t/0/0/0",
    ]  # fmt: skip


@pytest.mark.asyncio
async def test_tools_and_replies_share_one_conversation() -> None:
    env = Sure()
    rollout, generator = await play(env, call("3+4"), "maybe", call("1+1"), "yes", tools=toolbox())
    assert [t.kind for t in rollout.trajectory.turns] == ["model", "tool", "model", "env", "model", "tool", "model"]
    assert_tokens_are_what_was_sampled(rollout, generator)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"error": KeyError("bug")}, "Sure.reply raised KeyError"),
        ({"hangs": 100}, "Sure.reply did not finish within 100 s"),
        ({"reply": 7}, "returned int"),
        ({"reply": Reply(text="x", reward=float("nan"))}, "the reward nan"),
        ({"reply": Reply(text="x", reward="0.5")}, "the reward '0.5'; it must be a number"),
    ],
)
async def test_an_environment_that_fails_fails_the_rollout_and_is_closed(change: dict[str, Any], match: str) -> None:
    env = Sure(**change)
    with pytest.raises(EnvError, match=match) as caught:
        await play(env, "maybe", env_timeout_s=100)
    assert env.events[-1] == "close state of t/0/0/0"
    assert "score" not in env.events
    assert isinstance(caught.value.partial, Rollout)
    assert caught.value.partial.trajectory.stop == "error:env"
    assert current_waits() == {}


@pytest.mark.asyncio
async def test_the_environment_is_closed_when_the_rollout_is_cancelled_or_out_of_time() -> None:
    env = Sure(hangs=200)
    rollout, _ = await play(env, "maybe", rollout_timeout_s=200, env_timeout_s=1000)
    assert (rollout.trajectory.stop, env.events[-2:]) == ("deadline", ["score", "close state of t/0/0/0"])
    stuck = Sure()
    with pytest.raises(DeadlineExceeded):
        await play(stuck, Say("x", passes=200), rollout_timeout_s=200)
    assert stuck.events == ["open t/0/0/0", "close state of t/0/0/0"]
    running = Sure(hangs=200)
    task = asyncio.create_task(play(running, "maybe", env_timeout_s=1000))
    while not any(e.startswith("reply") for e in running.events):
        await asyncio.sleep(0)
    assert "env:Sure" in current_waits()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running.events[-1] == "close state of t/0/0/0"


@pytest.mark.asyncio
async def test_long_replies_are_cut_and_those_that_do_not_fit_end_the_rollout() -> None:
    rollout, _ = await play(Sure(reply="word " * 500), "maybe", "yes", max_reply_tokens=40)
    assert rollout.trajectory.stop == "answered"
    assert "tokens cut" in rollout.episode.transcript
    rollout, _ = await play(Sure(reply="word " * 500), "maybe", "yes", max_tokens=30)
    assert (rollout.trajectory.stop, rollout.episode.num_turns) == ("max_tokens", 1)


@pytest.mark.asyncio
async def test_the_envs_own_prompt_opens_the_rollout() -> None:
    class Pirate(Sure):
        def prompt(self, task: Task) -> list[dict[str, Any]]:
            return [{"role": "system", "content": "Speak like a pirate."}, *task.prompt]

    rollout, _ = await play(Pirate(), "maybe", "yes", task=dataclasses.replace(GAME))
    segment = rollout.trajectory.segments[0]
    assert "Speak like a pirate." in TOKENIZER.decode(segment.ids[: segment.prompt_length].tolist())


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("given", "match"),
    [
        (KeyError("hint"), "Broken.prompt raised KeyError on task t/0: 'hint'"),
        ("Guess.", "Broken.prompt returned str for task t/0"),
    ],
)
async def test_a_row_that_the_env_cannot_open_fails_alone(given: Any, match: str) -> None:
    class Broken(Sure):
        def prompt(self, task: Task) -> Any:
            if isinstance(given, Exception):
                raise given
            return given

    with pytest.raises(EnvError, match=match):
        await play(Broken(), "maybe", task=dataclasses.replace(GAME, id="t/0"))


def test_the_games_are_generated_and_their_number_is_in_no_message(tmp_path: Path) -> None:
    report = load_object("envs.guess_number:prepare")(tmp_path, limit=20)
    assert report["train"]["rows"] == 20
    tasks = load_object("envs.guess_number:generate_tasks")(200, 3)
    assert len({t.ground_truth for t in tasks}) > 50
    assert len({t.prompt[0]["content"] for t in tasks}) == 1
    guessed = load_object("envs.guess_number:guessed_number")
    texts = ("7", "not 50, I say 12.", "<think>9</think>\n3", "none", "3.5 or 1", "-4")
    assert [guessed(t) for t in texts] == [7, 12, 3, None, 1, -4]


def test_a_run_whose_env_should_reply_but_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="no env is given"):
        Config.model_validate({"serve": {"agent": "env"}})
