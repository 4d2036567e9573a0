"""Guess a number: a game of several turns, the shipped example of an environment that replies (``serve.agent: env``).

The environment thinks of a number; each guess is answered with "Higher" or "Lower". Nothing but the number counts as success, so
the reward cannot be talked into. Each turn can also earn a little for what it rules out, recorded at that turn.
"""

import hashlib
import math
import random
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentrl.errors import ConfigError
from agentrl.plugins import load_object
from agentrl.protocols import Env, Reply
from agentrl.types import Episode, Score, Task

DATA_SOURCE = "guess_number"
WRITER = "agentrl.data.prepare:write_dataset"
HIGHEST = 100
_NUMBER = re.compile(r"(?<![\d.])-?\d{1,9}(?![\d.]*\d)")


@dataclass(slots=True)
class Game:
    """One rollout's game: what the replies so far leave possible."""

    secret: int
    low: int
    high: int
    guesses: int = 0
    found: bool = False

    @property
    def candidates(self) -> int:
        return self.high - self.low + 1

    def guess(self, number: int) -> str:
        """Narrow the range and say where the number lies; empty when this was it."""
        self.guesses += 1
        if number == self.secret:
            self.low = self.high = number
            self.found = True
            return ""
        if number < self.secret:
            self.low = max(self.low, number + 1)
            return "Higher."
        self.high = min(self.high, number - 1)
        return "Lower."


class GuessNumber(Env):
    """Success is finding the number within the run's turns.

    Args:
        turn_reward: what a game's turns can earn together: each earns the share of the game's bits that it ruled out.
            0 gives no turn rewards.
    """

    def __init__(self, turn_reward: float = 0.1) -> None:
        if not 0 <= turn_reward < 1:
            raise ConfigError(f"turn_reward={turn_reward} must lie in [0, 1): more would be worth more than the number itself")
        self._turn_reward = turn_reward

    async def open(self, task: Task, *, trajectory_id: str) -> Game:
        return Game(secret=int(task.ground_truth), low=1, high=int(task.extra_info.get("highest") or HIGHEST))

    async def reply(self, episode: Episode) -> Reply:
        game: Game = episode.state
        number = guessed_number(episode.texts[-1])
        if number is None:
            return Reply(text="That is no number. Answer with a number.", reward=0.0 if self._turn_reward else None)
        before = game.candidates
        hint = game.guess(number)
        reward = None
        if self._turn_reward:
            highest = int(episode.task.extra_info.get("highest") or HIGHEST)
            reward = self._turn_reward * math.log2(before / game.candidates) / math.log2(highest)
        return Reply(text=hint or None, reward=reward)

    async def save(self, state: Game) -> dict[str, Any]:
        return asdict(state)

    async def resume(self, task: Task, saved: Mapping[str, Any], *, trajectory_id: str) -> Game:
        return Game(**saved)

    async def score(self, episode: Episode) -> Score:
        game: Game = episode.state
        return Score(correct=float(game.found), info={"guesses": game.guesses, "left": game.candidates})


def guessed_number(text: str) -> int | None:
    """The last whole number in a turn, after any reasoning; None where there is none."""
    found = _NUMBER.findall(text.rpartition("</think>")[2])
    return int(found[-1]) if found else None


def generate_tasks(n: int, seed: int, split: str = "train", *, highest: int = HIGHEST) -> list[Task]:
    """``n`` games; the number is in no message. The same arguments give the same games."""
    if highest < 2:
        raise ConfigError(f"highest={highest} leaves nothing to guess: use at least 2")
    tasks: list[Task] = []
    for index in range(n):
        name = f"{DATA_SOURCE}/{split}/{seed}/{index}"
        secret = random.Random(hashlib.sha256(name.encode()).digest()).randint(1, highest)
        question = f"I think of a number from 1 to {highest}. Guess it; I answer Higher or Lower. Answer with a number only."
        tasks.append(
            Task(
                id=name,
                prompt=[{"role": "user", "content": question}],
                data_source=DATA_SOURCE,
                ground_truth=str(secret),
                split=split,
                extra_info={"split": split, "index": index, "highest": highest},
            )
        )
    return tasks


def prepare(
    out_dir: Path,
    *,
    source: Path | None = None,
    sft: bool = False,
    train: int = 512,
    val: int = 100,
    highest: int = HIGHEST,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write ``train.parquet`` and ``val.parquet``. Nothing is downloaded.

    Raises:
        ConfigError: a source or a cold start was asked for; the games are generated and have none.
    """
    if source is not None or sft:
        raise ConfigError("guess_number is generated: it reads no source and has no cold start. Leave --source and --sft out")
    train, val = (count if limit is None else min(count, limit) for count in (train, val))
    splits = {name: generate_tasks(n, seed, name, highest=highest) for name, n in (("train", train), ("val", val))}
    return load_object(WRITER)(out_dir, splits)
