"""The rollout process: admitted tasks -> groups -> stream, for as long as it is left running.

Waits for: the learner to consume (``trainer``), a permit (``capacity``), room on the stream (``stream``), a tool whose
circuit is open (``tool:<name>``), or the end of a failure wave (``failing:<kind>``). Where the run stands comes from the
stream at every decision, never from counters that a restart forgets.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

from agentrl.errors import DeadlineExceeded, MembersLost, RolloutError
from agentrl.protocols import TrajectorySink
from agentrl.rollout.admission import admit, group_budget
from agentrl.rollout.circuit import CircuitBreaker
from agentrl.rollout.group import GroupPlan, RolloutFunction, possible_ids, run_group
from agentrl.supervise import current_waits, deadline, waiting
from agentrl.types import Episode, GroupClose, Task, Trajectory, group_id_of

logger = logging.getLogger(__name__)

FAILURE_COOLDOWN_S = 10.0
"""Longest pause between probe groups while nearly every rollout fails."""
FAILURE_RATE = 0.8
"""Share of failed attempts above which new groups pause: otherwise a dead fleet would burn through the tasks."""


class Progress(Protocol):
    """Where the run stands, from the stream."""

    @property
    def run_epoch(self) -> int: ...
    @property
    def version(self) -> int: ...
    @property
    def consumed_groups(self) -> int: ...
    @property
    def closed_groups(self) -> int: ...


class GroupSink(TrajectorySink, Protocol):
    """A sink that remembers what it holds, so that a restarted worker repeats nothing."""

    async def present(self, ids: Sequence[str]) -> set[str]:
        """Which of these trajectories were ever put."""
        ...

    async def next_open_ordinal(self) -> int:
        """The lowest ordinal whose group is not closed."""
        ...

    async def is_closed(self, ordinals: Iterable[int]) -> set[int]:
        """Which of these ordinals are closed."""
        ...


class Leases(Protocol):
    """Deals the tasks of a run to its rollout processes, under the budget of the whole run."""

    async def claim(self, want: int, *, consumed_groups: int) -> dict[int, int]:
        """Up to ``want`` groups for this process, ordinal -> round; none while the run is as far ahead of the learner as it may be."""
        ...

    def release(self, ordinal: int) -> None:
        """This process plays the group no longer."""
        ...


class RolloutWorker:
    """Starts groups as admission allows and keeps ``in_flight`` rollouts running.

    Args:
        task_at: the task of an ordinal; the same one after a restart.
        sink: the stream.
        read_progress: asks the stream where the run stands.
        rollout: plays one rollout; raises ``RolloutError`` where there is nothing to train on.
        baseline: plays one greedy rollout per group, whose reward goes into the group's close; None plays none.
        group_size: rollouts per task.
        groups_per_step: groups the learner takes per step.
        max_staleness: policy versions, a hard bound at admission.
        pipeline_depth: steps of work wanted ahead.
        in_flight: rollouts at once.
        min_group: finished members below which a group counts as failed.
        group_timeout_s: deadline of a group, in seconds.
        attempts: tries per rollout where the failure is not the model's.
        on_trajectory: told of each trajectory just before it goes onto the stream; must be quick.
        on_failure: told of each failed attempt: its id, the error (whose ``partial`` may hold what was rolled out).
        paused: a wait reason while no new group may start, else None; ``Toolbox.blocked`` is one.
        leases: where other processes play groups of the same run too; without it, this one plays all of them.
        requeued: ordinal -> round of groups that the learner gave back; they start before new ones. Leases deal them by themselves.
        last_ordinal: stop before this ordinal; None never stops.
        poll_s: how often progress is read while blocked.
    """

    def __init__(
        self,
        *,
        task_at: Callable[[int], Task],
        sink: GroupSink,
        read_progress: Callable[[], Awaitable[Progress]],
        rollout: RolloutFunction,
        baseline: RolloutFunction | None = None,
        group_size: int,
        groups_per_step: int,
        max_staleness: int,
        pipeline_depth: int,
        in_flight: int,
        min_group: int = 1,
        group_timeout_s: float = 3600.0,
        attempts: int = 2,
        on_trajectory: Callable[[Trajectory, Episode | None], None] | None = None,
        on_failure: Callable[[str, RolloutError], None] | None = None,
        paused: Callable[[], str | None] | None = None,
        leases: Leases | None = None,
        requeued: Callable[[], Awaitable[Mapping[int, int]]] | None = None,
        last_ordinal: int | None = None,
        poll_s: float = 0.05,
    ) -> None:
        self._budget = group_budget(groups_per_step=groups_per_step, max_staleness=max_staleness, pipeline_depth=pipeline_depth)
        if in_flight < 1 or group_size < 1 or attempts < 1:
            raise ValueError(f"in_flight={in_flight}, group_size={group_size} and attempts={attempts} must be at least 1")
        if leases is not None and last_ordinal is not None:
            raise ValueError(f"last_ordinal={last_ordinal} ends the run of a single process; leave it out with leases")
        self._task_at = task_at
        self._leases = leases
        self._sink = sink
        self._read_progress = read_progress
        self._rollout = rollout
        self._baseline = baseline
        self._plan = GroupPlan(size=group_size, min_group=min_group, timeout_s=group_timeout_s, attempts=attempts)
        self._members_to_play = group_size + (baseline is not None)
        self._groups_per_step = groups_per_step
        self._max_staleness = max_staleness
        self._pipeline_depth = pipeline_depth
        self._in_flight = in_flight
        self._on_trajectory = on_trajectory
        self._on_failure = on_failure
        self._paused = paused
        self._requeued = requeued
        self._last_ordinal = last_ordinal
        self._poll_s = poll_s
        self._permits = asyncio.Semaphore(in_flight)
        self._groups: dict[int, asyncio.Task[None]] = {}
        self._unfinished: dict[int, int] = {}
        self._running: dict[str, float] = {}
        self._next = 0
        self._progress: Progress | None = None
        self._draining = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._reason = ""
        self._reason_since = 0.0
        self._counts: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._breaker = CircuitBreaker(
            window=max(32, 2 * group_size), min_calls=16, max_rate=FAILURE_RATE, cooldown_s=FAILURE_COOLDOWN_S
        )
        self._last_failure = ""

    async def run(self) -> None:
        """Admit and play groups. Returns when ``last_ordinal`` is reached; otherwise runs until cancelled.

        After `drain` it stays idle until it is cancelled, so that it can run beside others in ``supervise.running``.
        """
        self._idle.clear()
        try:
            self._next = await self._sink.next_open_ordinal()
            logger.info("rollouts_start ordinal=%d budget_groups=%d in_flight=%d", self._next, self._budget, self._in_flight)
            with ExitStack() as waits:
                async with asyncio.TaskGroup() as groups:
                    while not self._draining and not self._is_past_the_end():
                        room, reason = await self._room()
                        self._say(reason if room == 0 else "", waits)
                        if room == 0:
                            await self._sleep()
                        elif not await self._start(groups, room):
                            self._say("trainer", waits)
                            await self._sleep()
                    self._say("group" if self._groups else "", waits)
                self._say("", waits)
        finally:
            self._idle.set()
        if self._draining:
            await asyncio.Event().wait()

    async def drain(self, *, limit_s: float) -> None:
        """Start no more groups and let the open ones finish; those that do not within ``limit_s`` are left for a restart."""
        self._draining = True
        self._wake.set()
        try:
            async with deadline(limit_s, "drain"):
                await self._idle.wait()
        except DeadlineExceeded:
            left = dict(self._groups)
            logger.warning(
                "drain_cut groups=%d after=%g s: they stay open; the next start rolls their missing members out",
                len(left),
                limit_s,
            )
            self._counts["abandoned_groups"] += len(left)
            for task in left.values():
                task.cancel()
            await self._idle.wait()

    def status(self) -> dict[str, Any]:
        """Counts for people: groups, rollouts, tokens, failures by kind, and where the run stands."""
        progress = self._progress
        return {
            "next_ordinal": self._next,
            "open_groups": len(self._groups),
            "running_rollouts": len(self._running),
            "finished": self._counts["finished"],
            "failed": dict(self._failed),
            "retried": self._counts["retried"],
            "groups_closed": self._counts["groups_closed"],
            "groups_again": self._counts["groups_again"],
            "groups_lost": self._counts["groups_lost"],
            "groups_without_members": self._counts["groups_without_members"],
            "groups_without_baseline": self._counts["groups_without_baseline"],
            "tokens_sampled": self._counts["tokens_sampled"],
            "tokens_observed": self._counts["tokens_observed"],
            "budget_groups": self._budget,
            "policy_version": progress.version if progress else -1,
            "closed_groups": progress.closed_groups if progress else 0,
            "consumed_groups": progress.consumed_groups if progress else 0,
            "draining": self._draining,
            "oldest_rollout_s": self._oldest_rollout_s(),
            "oldest_rollout": min(self._running, key=self._running.__getitem__, default=""),
            "failing": self._last_failure if self._breaker.is_open else "",
        }

    def waits(self) -> dict[str, Any]:
        """Why no group starts now (``reason``, empty if they do), since when, and what everything in flight waits for."""
        return {
            "reason": self._reason,
            "since_s": time.monotonic() - self._reason_since if self._reason else 0.0,
            "oldest_rollout_s": self._oldest_rollout_s(),
            "in_flight": {reason: {"count": w.count, "oldest_s": w.oldest_s} for reason, w in current_waits().items()},
        }

    # Admission

    def _is_past_the_end(self) -> bool:
        return self._last_ordinal is not None and self._next >= self._last_ordinal

    async def _room(self) -> tuple[int, str]:
        """How many groups may start, or why none may."""
        open_groups = len(self._groups)  # before progress is read; see `admit`
        self._progress = progress = await self._read_progress()
        by_staleness = admit(
            open_groups=open_groups,
            closed_groups=progress.closed_groups,
            consumed_groups=progress.consumed_groups,
            groups_per_step=self._groups_per_step,
            max_staleness=self._max_staleness,
            pipeline_depth=self._pipeline_depth,
        )
        if by_staleness == 0:
            return 0, "trainer"
        room = admit(
            open_groups=open_groups,
            closed_groups=progress.closed_groups,
            consumed_groups=progress.consumed_groups,
            groups_per_step=self._groups_per_step,
            max_staleness=self._max_staleness,
            pipeline_depth=self._pipeline_depth,
            unfinished_rollouts=sum(self._unfinished.values()),
            in_flight=self._in_flight,
            group_size=self._plan.size,
        )
        if room == 0:
            return 0, "capacity"
        # Asked last: an open circuit answers None once per pause, and that probe must not be wasted.
        paused = self._paused() if self._paused is not None else None
        if paused:
            return 0, paused
        if not self._breaker.allows():
            return 0, f"failing:{self._last_failure}"
        return (1, "") if self._breaker.is_open else (room, "")

    async def _start(self, groups: asyncio.TaskGroup, room: int) -> bool:
        """Whether there was anything to start."""
        dealt = await self._deal(room)
        for ordinal, round_ in dealt:
            self._counts["groups_again"] += round_ > 0
            self._unfinished[ordinal] = self._members_to_play
            task = groups.create_task(self._group(ordinal, round_), name=f"group {ordinal}")
            self._groups[ordinal] = task
            task.add_done_callback(lambda _, ordinal=ordinal: self._forget(ordinal))
        return self._leases is None or bool(dealt)

    async def _deal(self, room: int) -> list[tuple[int, int]]:
        """The next groups that are this process's to play: ordinal and round."""
        if self._leases is not None:
            assert self._progress is not None
            leased = await self._leases.claim(room, consumed_groups=self._progress.consumed_groups)
            self._next = max([self._next, *(ordinal + 1 for ordinal in leased)])
            return [(ordinal, round_) for ordinal, round_ in leased.items() if ordinal not in self._groups]
        forgotten = await self._forgotten()  # before what was given back is read: a group that was given back is open, too
        given_back = await self._requeued() if self._requeued is not None else {}
        if forgotten is not None and forgotten not in given_back:
            logger.warning("group_again ordinal=%d: it was closed, and the stream's server lost that", forgotten)
            self._counts["groups_lost"] += 1
            given_back = {**given_back, forgotten: 0}
        # Lowest first, and before new ones: what waits longest is what the run's cursor stands at.
        again = [(ordinal, round_) for ordinal, round_ in sorted(given_back.items()) if ordinal not in self._groups][:room]
        ordinals = range(self._next, self._next + room - len(again))
        if self._last_ordinal is not None:
            ordinals = range(self._next, min(ordinals.stop, self._last_ordinal))
        closed = await self._sink.is_closed(ordinals)
        self._next = max(self._next, ordinals.stop)
        return again + [(ordinal, 0) for ordinal in ordinals if ordinal not in closed]

    async def _forgotten(self) -> int | None:
        """The lowest group that is open on the stream although nobody plays it: a server that lost the end of its file."""
        dealt, playing = self._next, set(self._groups)
        ordinal = await self._sink.next_open_ordinal()
        return ordinal if ordinal < dealt and ordinal not in playing else None

    def _forget(self, ordinal: int) -> None:
        if self._leases is not None:
            self._leases.release(ordinal)
        self._groups.pop(ordinal, None)
        self._unfinished.pop(ordinal, None)
        self._wake.set()

    async def _sleep(self) -> None:
        """Until something here changed, or it is time to ask the stream again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._poll_s):
                await self._wake.wait()
        self._wake.clear()

    def _say(self, reason: str, waits: ExitStack) -> None:
        """Keep one wait open for as long as its reason stays the same."""
        if reason == self._reason:
            return
        waits.close()
        self._reason, self._reason_since = reason, time.monotonic()
        if reason:
            waits.enter_context(waiting(reason))

    # Groups

    async def _group(self, ordinal: int, round_: int) -> None:
        task = self._task_at(ordinal)

        def member_ended() -> None:
            if ordinal in self._unfinished:
                self._unfinished[ordinal] -= 1
            self._wake.set()

        close: GroupClose | None = None
        while close is None:
            already = await self._sink.present(possible_ids(group_id_of(task.id, ordinal, round_), self._plan))
            try:
                close = await run_group(
                    task,
                    ordinal,
                    plan=self._plan,
                    rollout=partial(self._timed, self._rollout),
                    baseline=None if self._baseline is None else partial(self._timed, self._baseline),
                    sink=self._sink,
                    permits=self._permits,
                    round_=round_,
                    already=already,
                    listener=self,
                    on_member_end=member_ended,
                )
            except MembersLost as error:
                logger.warning("members_again ordinal=%d: %s", ordinal, error)
                self._counts["groups_lost"] += 1
                self._unfinished[ordinal] = self._members_to_play
        self._counts["groups_closed"] += 1
        self._counts["groups_without_members"] += not close.members
        if self._baseline is not None:
            self._counts["groups_without_baseline"] += close.baseline is None

    async def _timed(
        self,
        rollout: RolloutFunction,
        task: Task,
        trajectory_id: str,
        group_id: str,
        ordinal: int,
        sample_index: int,
        attempt: int,
    ) -> tuple[Trajectory, Episode | None]:
        self._running[trajectory_id] = time.monotonic()
        try:
            return await rollout(task, trajectory_id, group_id, ordinal, sample_index, attempt)
        finally:
            del self._running[trajectory_id]

    def finished(self, trajectory: Trajectory, episode: Episode | None) -> None:
        """Count a trajectory and pass it on; see ``group.Listener``."""
        self._counts["finished"] += 1
        num_sampled = trajectory.num_sampled
        self._counts["tokens_sampled"] += num_sampled
        prompts = sum(s.prompt_length for s in trajectory.segments)
        self._counts["tokens_observed"] += trajectory.num_tokens - num_sampled - prompts
        if self._breaker.record(ok=True) == "closed":
            logger.warning("rollouts_resume: a rollout succeeded after a wave of failures")
        if self._on_trajectory is not None:
            self._on_trajectory(trajectory, episode)

    def failed(self, trajectory_id: str, error: RolloutError, *, is_final: bool) -> None:
        """Count a failed attempt and pass it on; see ``group.Listener``."""
        if is_final:
            self._failed[error.kind] += 1
        else:
            self._counts["retried"] += 1
        self._last_failure = error.kind
        if self._breaker.record(ok=False) == "opened":
            logger.error(
                "rollouts_pause: %d of the last %d attempts failed (last: %s: %s). New groups wait; nothing of these is trained "
                "on. Repair the cause; single groups probe, in the end every %g s",
                self._breaker.failed, self._breaker.seen, error.kind, error, FAILURE_COOLDOWN_S,
            )  # fmt: skip
        if self._on_failure is not None:
            self._on_failure(trajectory_id, error)

    def _oldest_rollout_s(self) -> float:
        return time.monotonic() - min(self._running.values()) if self._running else 0.0
