"""Deal out tasks by ordinal. The order is a pure function of seed and epoch, so a resume needs one number and keeps no state."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from agentrl.errors import ConfigError, DataError
from agentrl.types import Task


class TaskSource:
    """An endless sequence of tasks: every epoch holds each task once, in an order of its own.

    Args:
        tasks: at least one.
        seed: of the shuffling, not negative.
        shuffle: False deals the tasks in file order, every epoch the same.

    Raises:
        DataError: no tasks.
        ConfigError: a negative seed.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, shuffle: bool = True) -> None:
        if not tasks:
            raise DataError("a task source needs at least one task, got 0")
        if seed < 0:
            raise ConfigError(f"seed={seed} must not be negative")
        self._tasks = tuple(tasks)
        self._seed = seed
        self._shuffle = shuffle

    def __len__(self) -> int:
        """Tasks per epoch."""
        return len(self._tasks)

    def epoch(self, ordinal: int) -> int:
        """How many times all tasks were dealt before this ordinal."""
        if ordinal < 0:
            raise ValueError(f"ordinal={ordinal} must not be negative")
        return ordinal // len(self._tasks)

    def task(self, ordinal: int) -> Task:
        """The task at a position of the endless sequence."""
        epoch, position = self.epoch(ordinal), ordinal % len(self._tasks)
        return self._tasks[_permutation(len(self._tasks), self._seed, epoch)[position] if self._shuffle else position]


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, epoch: int) -> NDArray[np.intp]:
    """[size] order of one epoch. Sorts raw PCG64 output: numpy keeps the bit stream stable across releases, ``permutation`` it does not."""
    raw = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(size)
    return np.argsort(raw, kind="stable")
