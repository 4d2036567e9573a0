"""The seams. Each has at least two implementations; the shipped doubles in ``agentrl.testing`` count.

``Env`` and ``Tool`` are what users write; the others hold the stages apart, which never import each other.
"""

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from agentrl.types import (
    Episode,
    Generation,
    GroupClose,
    Message,
    PolicyRecord,
    SampledTokens,
    SamplingParams,
    Score,
    Task,
    Trajectory,
    TrajectoryGroup,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What an Env answers to a turn."""

    text: str | None = None
    """The user message that continues the conversation; None ends it."""
    reward: float | None = None
    """Of the turn that was just played. Recorded at that turn's last token, and part of the reward as its term ``turns``."""


class Env(Protocol):
    """Tasks and scoring. Subclass it, or give a verl-style ``compute_score`` in the config instead.

    One object serves all rollouts of a process at once, so what belongs to one rollout lives in what ``open`` returns.
    The loop ``env`` calls ``open``, then ``reply`` after each turn, then ``score``, then always ``close``.
    """

    def prompt(self, task: Task) -> Sequence[Message]:
        """The messages that open the rollout."""
        return task.prompt

    async def score(self, episode: Episode) -> Score:
        """The reward of a finished rollout. Raising fails the rollout, never the run."""
        ...

    async def open(self, task: Task, *, trajectory_id: str) -> Any:
        """The state of one rollout (loop ``env``): a game, a simulated user. It comes back as ``episode.state``."""
        return None

    async def reply(self, episode: Episode) -> Reply | str | None:
        """A user message that continues the conversation (loop ``env``), or None to end it.

        Asked after every turn that called no tool, also after the last one that is allowed. ``episode.texts[-1]`` is
        that turn. Raising fails the rollout, never the run.
        """
        return None

    async def close(self, state: Any) -> None:
        """Release what ``open`` or ``resume`` returned. Always runs once it returned, also after a cancellation."""

    async def save(self, state: Any) -> Mapping[str, Any] | None:
        """What ``resume`` needs to go on from here in another process, as JSON has it (``serve.resume_partial``).

        Asked after each reply and each turn of tools. None, as by default: a rollout that a restart cut starts again.
        """
        return None

    async def resume(self, task: Task, saved: Mapping[str, Any], *, trajectory_id: str) -> Any:
        """The state that ``save`` was given, from what it returned; in place of ``open``. Only for an Env that saves."""
        raise NotImplementedError


@dataclass(slots=True, kw_only=True)
class ToolContext:
    """What a tool may know of the rollout that calls it. The ground truth is absent unless the tool is an oracle."""

    trajectory_id: str
    task_id: str
    sample_index: int
    turn: int = 0
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The row's ``tools_kwargs[<tool>]``."""
    state: dict[str, Any] = field(default_factory=dict[str, Any])
    """Lives as long as the trajectory; shared by its calls."""
    ground_truth: Any = None
    """Only set for tools declared with ``oracle: true``."""
    _seed: str = ""
    _rng: random.Random | None = None

    @property
    def rng(self) -> random.Random:
        """Chance, seeded by the trajectory, the tool and the turn: a rollout that is resumed draws the same numbers again."""
        if self._rng is None:
            self._rng = random.Random(self._seed or None)
        return self._rng

    @property
    def group_index(self) -> int:
        """Which of the group's rollouts this is; another name of ``sample_index``."""
        return self.sample_index

    def begin(self, turn: int, *, seed: str) -> None:
        """Calls of this turn follow; the rollout tells."""
        if seed != self._seed:
            self.turn, self._seed, self._rng = turn, seed, None

    def log(self, message: str, **values: Any) -> None:
        """Write a line to the run's log, with the trajectory and the turn. The model does not see it."""
        told = "".join(f" {key}={value!r}" for key, value in values.items())
        logger.info("tool_log trajectory=%s turn=%d: %s%s", self.trajectory_id, self.turn, message, told)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What a tool answers: text for the model, and optionally a step reward and metrics."""

    text: str
    reward: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


class Tool(Protocol):
    """A tool that lives as long as the trajectory: ``open``, any number of ``call``, then always ``close``."""

    async def open(self, ctx: ToolContext) -> None:
        """Acquire what the trajectory needs."""

    async def call(self, **arguments: Any) -> str | ToolResult:
        """Answer one call. ``ToolError`` is text for the model; any other exception is an infrastructure failure."""
        ...

    async def close(self) -> None:
        """Release it. Always runs, also after cancellation."""


TokenListener: TypeAlias = Callable[[SampledTokens], None]
"""Told the tokens of a generation as they arrive. It returns at once and never raises."""


class Generator(Protocol):
    """Sample tokens. ``AsyncLLMServerManager`` is the real one."""

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
        """Continue ``ids``.

        Args:
            ids: the whole context so far.
            sampling: how to sample.
            trajectory_id: later turns go where its cache is.
            group_id: the siblings' first turns go to one server.
            deadline: seconds from now after which ``DeadlineExceeded`` is raised.
            on_tokens: told the tokens while they are sampled, for a caller that shows them at once or wants what there is of a
                generation that it breaks off. All it was told when the call returns are the ids of the `Generation`, in order
                and once each, whatever servers they came from; a version may still be set right at the end, as where a stream
                breaks. A generator that cannot stream tells nothing.

        Raises:
            GenerationError: no server could generate.
            DeadlineExceeded: the deadline passed.
        """
        ...


class TrajectorySink(Protocol):
    """Where finished work goes. Blocks while the stream is full; never drops."""

    async def put_trajectory(self, trajectory: Trajectory) -> None: ...

    async def close_group(self, close: GroupClose) -> None: ...


class TrajectorySource(Protocol):
    """Where the learner gets complete groups, each exactly once per checkpoint lineage."""

    def next_group(self, timeout_s: float) -> TrajectoryGroup | None:
        """The next complete group, or None when none came in time."""
        ...

    def commit(self, ids: Iterable[str], *, outcomes: Mapping[str, str]) -> None:
        """Acknowledge entries whose effect a durable checkpoint contains."""
        ...


class WeightSync(Protocol):
    """The learner's way to tell every server what to serve."""

    def publish(self, record: PolicyRecord) -> None: ...
