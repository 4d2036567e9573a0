"""A structured episode in, a reward and its named terms out. By default scoring sees only what the assistant wrote."""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from agentrl.errors import DeadlineExceeded, RewardError
from agentrl.protocols import Env
from agentrl.supervise import deadline, waiting
from agentrl.types import Episode, Score

Solution = Literal["assistant", "transcript"]


class Scorer:
    """Scores with an ``Env`` or with a function in verl's shape.

    Args:
        env: an object with ``score(episode)``.
        fn: ``compute_score(data_source, solution_str, ground_truth, extra_info=None)`` that returns a number or a dict
            with ``score``; sync (it then runs in a thread) or async. Give ``env`` or ``fn``.
        solution: what ``solution_str`` holds: ``assistant`` is what the policy wrote, so text from a tool earns nothing;
            ``transcript`` is everything after the prompt, as verl passes it.
        kwargs: further keyword arguments for the function.
        tool_reward_weight: the sum of the tools' step rewards, times this, is the term ``tool``; 0 leaves it out.
        timeout_s: deadline of one scoring, in seconds.
    """

    def __init__(
        self,
        *,
        env: Env | None = None,
        fn: Callable[..., Any] | None = None,
        solution: Solution = "assistant",
        kwargs: Mapping[str, Any] | None = None,
        tool_reward_weight: float = 0.0,
        timeout_s: float = 60.0,
    ) -> None:
        if (env is None) == (fn is None):
            raise TypeError("give `env` or `fn`, one of them")
        self.env = env
        self._score = None if env is None else env.score
        self._function = fn
        self._solution: Solution = solution
        self._kwargs = dict(kwargs or {})
        self._tool_reward_weight = tool_reward_weight
        self._timeout_s = timeout_s
        self.name = str(getattr(fn, "__name__", "reward function")) if env is None else type(env).__name__

    async def score(self, episode: Episode, *, tool_rewards: float = 0.0) -> Score:
        """The score of a finished rollout.

        Raises:
            RewardError: the scorer raised, took too long, or returned something that is no reward.
        """
        try:
            with waiting("reward"):
                async with deadline(self._timeout_s, "reward"):
                    value = await self._call(episode)
        except DeadlineExceeded as error:
            raise RewardError(f"{self.name} did not score task {episode.task.id} within {self._timeout_s:g} s") from error
        except Exception as error:  # noqa: BLE001  # a scorer is foreign code; classified here, once
            raise RewardError(
                f"{self.name} raised {type(error).__name__} on task {episode.task.id}: {error}. "
                "The rollout is kept for replay, not trained on"
            ) from error
        score = self._as_score(value, episode)
        if self._tool_reward_weight and tool_rewards:
            terms = {**score.terms, "tool": self._tool_reward_weight * tool_rewards}
            score = Score(correct=score.correct, terms=terms, info=score.info)
        if not math.isfinite(score.reward):
            raise RewardError(f"{self.name} gave the reward {score.reward} to task {episode.task.id}; it must be finite")
        return score

    async def _call(self, episode: Episode) -> Any:
        if self._score is not None:
            return await _invoke(self._score, episode)
        assert self._function is not None
        task = episode.task
        extra: dict[str, Any] = {**task.extra_info, "num_turns": 2 * episode.num_turns}  # verl counts user turns and one more
        text = episode.assistant_text if self._solution == "assistant" else episode.transcript
        return await _invoke(
            self._function,
            data_source=task.data_source,
            solution_str=text,
            ground_truth=task.ground_truth,
            extra_info=extra,
            **self._kwargs,
        )

    def _as_score(self, value: Any, episode: Episode) -> Score:
        if isinstance(value, Score):
            return value
        if isinstance(value, Mapping):
            fields: dict[str, Any] = {str(k): v for k, v in value.items()}
            if "score" not in fields:
                raise RewardError(f"{self.name} returned a dict without `score` (keys: {', '.join(fields) or 'none'})")
            reward = self._number(fields.pop("score"), episode)
            # verl's `acc` says whether the answer is right; `score` is the reward (DAPO's is -1 or 1). Both are kept.
            correct = self._number(fields["acc"], episode) if isinstance(fields.get("acc"), bool | int | float) else reward
            terms = {} if correct == reward else {"shaping": reward - correct}
            return Score(correct=correct, terms=terms, info=fields)
        return Score(correct=self._number(value, episode))

    def _number(self, value: Any, episode: Episode) -> float:
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"{self.name} returned {type(value).__name__} for task {episode.task.id}; "
                "return a number or a dict with a number under `score`"
            ) from error


async def _invoke(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if inspect.iscoroutinefunction(function):
        return await function(*args, **kwargs)
    result = await asyncio.to_thread(function, *args, **kwargs)
    return await result if inspect.isawaitable(result) else result
