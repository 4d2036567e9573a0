import asyncio
from typing import Any

import pytest

from agentrl.errors import RewardError
from agentrl.rollout.reward import Scorer
from agentrl.types import Episode, Score, Task

EPISODE = Episode(
    task=Task(id="t", prompt=[], data_source="openai/gsm8k", ground_truth="42", extra_info={"index": 3}),
    assistant_text="written",
    final="last",
    transcript="written <tool_response> 42",
    calls=(),
    stop="answered",
    num_turns=2,
)


@pytest.mark.asyncio
async def test_a_verl_function_is_called_by_keyword_with_what_the_assistant_wrote() -> None:
    seen: dict[str, Any] = {}

    def compute_score(**arguments: Any) -> float:
        seen.update(arguments)
        return 0.5

    score = await Scorer(fn=compute_score, kwargs={"method": "strict"}).score(EPISODE)
    assert score == Score(correct=0.5)
    assert seen == {
        "data_source": "openai/gsm8k",
        "solution_str": "written",
        "ground_truth": "42",
        "extra_info": {"index": 3, "num_turns": 4},
        "method": "strict",
    }
    await Scorer(fn=compute_score, solution="transcript").score(EPISODE)
    assert seen["solution_str"] == "written <tool_response> 42"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("value", "correct", "reward", "info"),
    [
        (True, 1.0, 1.0, {}),
        (0.25, 0.25, 0.25, {}),
        ({"score": 1.0, "pred": "42"}, 1.0, 1.0, {"pred": "42"}),
        ({"score": -1.0, "acc": False, "pred": "41"}, 0.0, -1.0, {"acc": False, "pred": "41"}),
        (Score(correct=1.0, terms={"format": 0.1}), 1.0, 1.1, {}),
    ],
)
async def test_numbers_dicts_and_scores_are_understood(value: Any, correct: float, reward: float, info: dict[str, Any]) -> None:
    async def compute_score(**_: Any) -> Any:
        return value

    score = await Scorer(fn=compute_score).score(EPISODE)
    assert (score.correct, score.reward, dict(score.info)) == (correct, pytest.approx(reward), info)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "must be finite"),
        (float("inf"), "must be finite"),
        (None, "returned NoneType"),
        ("right", "returned str"),
        ({"reward": 1.0}, "without `score`"),
        ({"score": None}, "returned NoneType"),
    ],
)
async def test_what_is_no_reward_fails_the_rollout_and_names_scorer_and_task(value: Any, message: str) -> None:
    def compute_score(**_: Any) -> Any:
        return value

    with pytest.raises(RewardError, match=message) as caught:
        await Scorer(fn=compute_score).score(EPISODE)
    assert "compute_score" in str(caught.value)
    assert caught.value.kind == "reward"


@pytest.mark.asyncio
async def test_a_scorer_that_hangs_is_given_up() -> None:
    async def hangs(**_: Any) -> float:
        await asyncio.sleep(30)
        return 1.0

    with pytest.raises(RewardError, match=r"did not score task t within 0\.02 s"):
        await Scorer(fn=hangs, timeout_s=0.02).score(EPISODE)


@pytest.mark.asyncio
async def test_an_env_scores_the_episode_itself() -> None:
    class Env:
        async def score(self, episode: Episode) -> Score:
            return Score(correct=float(episode.final == "last"), terms={"length": -0.25})

    score = await Scorer(env=Env()).score(EPISODE, tool_rewards=5.0)  # type: ignore[arg-type]
    assert (score.reward, dict(score.terms)) == (0.75, {"length": -0.25})  # no weight: tools' rewards are not used


def test_a_scorer_needs_exactly_one_target() -> None:
    with pytest.raises(TypeError, match="one of them"):
        Scorer()
