"""The siblings of one task: each fails alone, all end by the group's deadline, and the close says what came of them.

Waits for: a permit (``capacity``), its rollouts, room on the stream (``stream``). A finished trajectory keeps its permit
until the stream has it, so a full stream stops new rollouts.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from agentrl.errors import DeadlineExceeded, RolloutError
from agentrl.protocols import TrajectorySink
from agentrl.supervise import deadline, waiting
from agentrl.types import Episode, GroupClose, Task, Trajectory, group_id_of

logger = logging.getLogger(__name__)

RETRYABLE = frozenset({"generation", "tool_infra", "sandbox", "env", "agent", "deadline", "aborted", "rollout"})
"""Kinds of failure that another attempt may cure. A scorer that raised, or a template that does not fit, will again."""

RolloutFunction: TypeAlias = Callable[[Task, str, str, int, int, int], Awaitable[tuple[Trajectory, Episode | None]]]
"""(task, trajectory_id, group_id, ordinal, sample_index, attempt) -> what was rolled out; raises ``RolloutError``."""


class Listener(Protocol):
    """Told of every member's end, and of a greedy baseline's failures. Called on the event loop, so it must be quick; what it raises stops the process."""

    def finished(self, trajectory: Trajectory, episode: Episode | None) -> None:
        """A trajectory is about to go onto the stream."""
        ...

    def failed(self, trajectory_id: str, error: RolloutError, *, is_final: bool) -> None:
        """An attempt gave nothing; ``is_final`` where no other follows."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """How a group is played."""

    size: int
    min_group: int = 1
    """Finished members below which the group counts as failed. Trajectories are held back until so many are there."""
    timeout_s: float = 3600.0
    """From the first member's start; members still running then are recorded as failed."""
    attempts: int = 2
    """Tries per member where the failure is not the model's."""


@dataclass(slots=True)
class _Ends:
    """What came of the members."""

    put: list[str] = field(default_factory=list[str])
    held: list[tuple[Trajectory, Episode | None]] = field(default_factory=list[tuple[Trajectory, Episode | None]])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    baseline: float | None = None


def member_id(group_id: str, sample_index: int, attempt: int) -> str:
    """The trajectory id of one attempt: the same work has the same id after a restart."""
    return f"{group_id}/{sample_index}/{attempt}"


def possible_ids(group_id: str, plan: GroupPlan) -> list[str]:
    """Every id a member of the group may have."""
    return [member_id(group_id, s, a) for s in range(plan.size) for a in range(plan.attempts)]


async def run_group(
    task: Task,
    ordinal: int,
    *,
    plan: GroupPlan,
    rollout: RolloutFunction,
    baseline: RolloutFunction | None = None,
    sink: TrajectorySink,
    permits: asyncio.Semaphore,
    round_: int = 0,
    already: AbstractSet[str] = frozenset(),
    listener: Listener | None = None,
    on_member_end: Callable[[], None] | None = None,
) -> GroupClose:
    """Roll out what is missing of a group, then close it.

    Args:
        task: what every member is asked.
        ordinal: the group's place in the run's task order.
        plan: size, quorum, deadline, attempts.
        rollout: plays one member.
        baseline: plays one greedy rollout beside the members. It is no member and never on the stream: its reward is in the close.
        sink: gets each trajectory as it finishes, then the close.
        permits: one per running rollout, taken before the rollout exists.
        round_: how often the learner gave this group back before; makes its ids new.
        already: ids that an earlier process put; their members are not rolled out again.
        listener: told of every member's end.
        on_member_end: called once per member and once for the baseline, whatever the end.

    Returns:
        The close that was put. ``failed`` holds a kind of error, ``group_deadline`` or ``quorum`` per missing member.
    """
    group_id = group_id_of(task.id, ordinal, round_)
    ends = _Ends(put=sorted(already))
    done = {sample for sample in range(plan.size) for a in range(plan.attempts) if member_id(group_id, sample, a) in already}
    ends_at: float | None = None

    async def member(sample: int, until: float) -> None:
        finished = await _attempts(task, group_id, ordinal, sample, until, plan, rollout, listener, ends.failed)
        if finished is not None:
            await _put(finished, plan, sink, ends, listener)

    async def compare(play: RolloutFunction, until: float) -> None:
        # A failure is the listener's to count: nothing was asked of the ledger, so nothing may be recorded there.
        finished = await _attempts(task, group_id, ordinal, plan.size, until, plan, play, listener, {})
        ends.baseline = None if finished is None else finished[0].reward

    for _ in done:
        if on_member_end is not None:
            on_member_end()
    async with asyncio.TaskGroup() as members:
        # The baseline first: the group cannot be used without it.
        todo: list[int | None] = [*([None] if baseline is not None else []), *(s for s in range(plan.size) if s not in done)]
        for sample in todo:
            with waiting("capacity"):
                await permits.acquire()
            if ends_at is None:
                ends_at = asyncio.get_running_loop().time() + plan.timeout_s
            if sample is None:
                assert baseline is not None
                started = members.create_task(compare(baseline, ends_at), name=f"{group_id}/baseline")
            else:
                started = members.create_task(member(sample, ends_at), name=member_id(group_id, sample, 0))
            # Not in the task's `finally`: a task that is cancelled before its first step never runs it.
            started.add_done_callback(lambda _: permits.release())
            if on_member_end is not None:
                started.add_done_callback(lambda _: on_member_end())
    ends.failed.update({trajectory.id: "quorum" for trajectory, _ in ends.held})
    close = GroupClose(
        group_id=group_id, task_id=task.id, ordinal=ordinal, size=plan.size, members=tuple(ends.put), failed=ends.failed,
        baseline=ends.baseline,
    )  # fmt: skip
    if ends.failed:
        logger.info("group_closed group=%s finished=%d of=%d failed=%s", group_id, len(ends.put), plan.size, summary(ends.failed))
    with waiting("stream"):
        await sink.close_group(close)
    return close


def summary(failed: Mapping[str, str]) -> str:
    """Reasons and their counts."""
    return ", ".join(f"{reason} x{count}" for reason, count in Counter(failed.values()).most_common())


async def _attempts(
    task: Task,
    group_id: str,
    ordinal: int,
    sample: int,
    until: float,
    plan: GroupPlan,
    rollout: RolloutFunction,
    listener: Listener | None,
    failed: dict[str, str],
) -> tuple[Trajectory, Episode | None] | None:
    """One rollout, tried again under the group's deadline; None, with the reason in ``failed``, where no attempt gave anything."""
    for attempt in range(plan.attempts):
        trajectory_id = member_id(group_id, sample, attempt)
        is_last = attempt == plan.attempts - 1
        left_s = max(0.0, until - asyncio.get_running_loop().time())
        try:
            async with deadline(left_s, "group"):
                return await rollout(task, trajectory_id, group_id, ordinal, sample, attempt)
        except RolloutError as error:
            out_of_time = isinstance(error, DeadlineExceeded) and error.stage == "group"
            is_final = is_last or out_of_time or error.kind not in RETRYABLE
            logger.warning("rollout_failed id=%s kind=%s final=%s: %s", trajectory_id, error.kind, is_final, error)
            if listener is not None:
                listener.failed(trajectory_id, error, is_final=is_final)
            if is_final:
                failed[trajectory_id] = "group_deadline" if out_of_time else error.kind
                return None
    return None


async def _put(
    finished: tuple[Trajectory, Episode | None], plan: GroupPlan, sink: TrajectorySink, ends: _Ends, listener: Listener | None
) -> None:
    ends.held.append(finished)
    if len(ends.put) + len(ends.held) < plan.min_group:
        return
    ready: Sequence[tuple[Trajectory, Episode | None]] = ends.held
    ends.held = []
    ends.put.extend(trajectory.id for trajectory, _ in ready)  # before the await: siblings count them for the quorum
    for trajectory, episode in ready:
        if listener is not None:
            listener.finished(trajectory, episode)
        with waiting("stream"):
            await sink.put_trajectory(trajectory)
