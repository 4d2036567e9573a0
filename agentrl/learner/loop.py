"""The learner's process: batch -> step -> publish -> checkpoint -> acknowledge, until enough steps are done.

It waits for one thing only, groups from the stream; a rollout that finishes unblocks it, and so does ``should_stop``. Groups
are acknowledged behind the durable checkpoint that contains their effect (I3): killed anywhere, this process leaves the
trained set of the surviving checkpoint equal to what was acknowledged or will be, once each, when it comes back.

With ``async_save`` training goes on while a checkpoint is written. Its groups are then set aside until it is durable: what is
acknowledged is never more than what ``latest`` contains, only later.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from agentrl.errors import CheckpointError, DataError, StalledError
from agentrl.learner.batching import BatchBuilder, StepBatch
from agentrl.learner.checkpoint import Checkpoints, Consumed
from agentrl.learner.durable import writing
from agentrl.learner.learner import Learner
from agentrl.learner.prefetch import Prefetcher
from agentrl.learner.weight_publisher import WeightPublisher
from agentrl.types import PolicyRecord, TrajectoryGroup, content_digest

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""How long one look at the stream may take; bounds the delay of a stop request."""

FIRST_WAIT_REPORT_S = 10.0
"""Quiet seconds before the first report; each further one waits twice as long."""

IDLE_CHECKPOINT_S = 15.0
"""Quiet seconds after which an idle learner checkpoints what it has, due or not: a stream that is full of entries which only
wait for that checkpoint could not bring it another group."""

ABANDON_S = 30.0
"""Seconds that a run which ends by an error leaves to a checkpoint that is still being written."""

WAIT_REASON = "group"


class GroupSource(Protocol):
    """Complete groups, each once per checkpoint lineage."""

    def acquire(self) -> int:
        """Become the stream's only learner; returns the run epoch, higher than any before."""
        ...

    def next_group(self, timeout_s: float) -> TrajectoryGroup | None:
        """The next complete group, or None when none came in time. A redelivered group may come again."""
        ...

    def commit(self, groups: Sequence[TrajectoryGroup], outcomes: Mapping[str, str]) -> None:
        """Acknowledge groups and record how each of their trajectories ended."""
        ...

    def report_progress(self, consumed_groups: int) -> None:
        """Tell admission how many groups were consumed since the run began."""
        ...


def run_learning(
    source: GroupSource | None,
    batches: BatchBuilder,
    learner: Learner,
    checkpoints: Checkpoints,
    publisher: WeightPublisher,
    announce: Callable[[PolicyRecord, int], None],
    *,
    num_steps: int,
    save_every: int,
    ack_at: Literal["checkpoint", "step"] = "checkpoint",
    on_step: Callable[[dict[str, float]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    stall_timeout_s: float | None = None,
    resume: str = "auto",
    on_wait: Callable[[str, float], None] | None = None,
    prefetch: bool = False,
    async_save: bool = False,
) -> int:
    """Learn until ``num_steps`` policy versions exist, or until asked to stop; call it on every rank.

    Args:
        source: of groups; only rank 0 reads it, the others may pass None.
        announce: makes a policy record known to the servers, with the groups consumed so far.
        num_steps: policy version at which the run is complete.
        save_every: steps between checkpoints; one more is written at the end.
        ack_at: ``checkpoint`` acknowledges behind the checkpoint (nothing lost, nothing twice; the stream must hold all entries of
            an interval). ``step`` acknowledges after each step: a kill loses what was trained since the last checkpoint.
        on_step: gets each step's metrics, after its publish; ``timing_s/checkpoint`` is that of the checkpoint before the step.
        should_stop: asked between steps and while waiting; True ends the run with a checkpoint.
        stall_timeout_s: quiet seconds after which waiting for a group is an error; None waits for ever, and says so.
        resume: see `Checkpoints.load`.
        on_wait: told (``group``, quiet seconds) while waiting.
        prefetch: read the next batch's groups in a thread while this one is trained.
        async_save: write checkpoints in a thread while the next steps are trained; needs host memory for a copy of weights and moments.

    Returns:
        The policy version reached.

    Raises:
        StalledError: no group came for ``stall_timeout_s``; what was learned is checkpointed first.
        TrainingDiverged, CheckpointError, StreamError: from the parts; nothing is acknowledged then.
    """
    if not learner.team.is_main:
        return _follow(learner, checkpoints, publisher, resume=resume)
    if source is None:
        raise ValueError("rank 0 must have a source of groups")
    run = _Run(
        source, batches, learner, checkpoints, publisher, announce,
        ack_at=ack_at, should_stop=should_stop or _never, stall_timeout_s=stall_timeout_s, on_wait=on_wait or _ignore_wait,
        async_save=async_save,
    )  # fmt: skip
    run.start(resume, prefetch=prefetch)
    try:
        while learner.policy_version < num_steps:
            with run.timed("wait"):
                batch = run.next_batch()
            if batch is None:
                break
            metrics = run.learn(batch)
            if on_step is not None:
                # Before the checkpoint: a kill in between repeats a step's metrics, where the other order would leave a hole.
                on_step(metrics | run.take_timings())
            if learner.policy_version % save_every == 0:
                run.checkpoint()
        run.stop_reading()
        run.finish()
    except StalledError:
        run.stop_reading()
        run.finish()
        raise
    finally:
        run.stop_reading()
        run.abandon_save()
    return learner.policy_version


@dataclass(frozen=True, slots=True)
class _Awaiting:
    """Groups that the checkpoint being written contains, to be acknowledged when it is durable."""

    groups: Sequence[TrajectoryGroup]
    outcomes: Mapping[str, str]


class _Run:
    """Rank 0's side: what was consumed, what is still to be acknowledged."""

    def __init__(
        self,
        source: GroupSource,
        batches: BatchBuilder,
        learner: Learner,
        checkpoints: Checkpoints,
        publisher: WeightPublisher,
        announce: Callable[[PolicyRecord, int], None],
        *,
        ack_at: Literal["checkpoint", "step"],
        should_stop: Callable[[], bool],
        stall_timeout_s: float | None,
        on_wait: Callable[[str, float], None],
        async_save: bool,
    ) -> None:
        self._source, self._batches, self._learner = source, batches, learner
        self._checkpoints, self._publisher, self._announce = checkpoints, publisher, announce
        self._ack_at, self._should_stop = ack_at, should_stop
        self._stall_timeout_s, self._on_wait = stall_timeout_s, on_wait
        self._async_save = async_save
        self._run_epoch = 0
        self._consumed_groups = 0
        self._reported_useless = 0
        self._totals = Counter[str]()
        self._contained: Mapping[str, str] = {}
        self._unsaved: list[Consumed] = []
        self._unacknowledged: list[TrajectoryGroup] = []
        self._outcomes: dict[str, str] = {}
        self._awaiting: _Awaiting | None = None
        self._saved_version = -1
        self._record: PolicyRecord | None = None
        self._timings: dict[str, float] = {}
        self._prefetcher: Prefetcher | None = None

    def start(self, resume: str, *, prefetch: bool) -> None:
        """Fence off an older learner, restore, and announce what is there before anything else."""
        self._run_epoch = self._source.acquire()
        loaded = self._checkpoints.load(self._learner, resume)
        if loaded is not None:
            self._consumed_groups = int(loaded.state["consumed_groups"])
            self._totals = Counter(loaded.state["totals"])
            self._contained = loaded.outcomes
        self._saved_version = self._learner.policy_version
        self._publish()
        if prefetch:
            self._prefetcher = Prefetcher(self._source, capacity=self._batches.groups_per_step)

    def stop_reading(self) -> None:
        """End the prefetch thread; what it had read stays on the stream. Safe to call twice."""
        if self._prefetcher is not None:
            read_in_vain = self._prefetcher.close()
            self._prefetcher = None
            logger.debug("groups read ahead and left on the stream: %d", read_in_vain)

    def next_batch(self) -> StepBatch | None:
        """Collect groups until a batch is complete; None when asked to stop."""
        version = self._learner.policy_version
        quiet_since = time.monotonic()
        next_report_s = FIRST_WAIT_REPORT_S
        while not self._batches.is_full(version):
            if self._should_stop():
                return None
            self._command("idle")
            self.settle()
            group = (self._prefetcher or self._source).next_group(POLL_S)
            if group is not None:
                self._take(group)
                quiet_since, next_report_s = time.monotonic(), FIRST_WAIT_REPORT_S
                continue
            quiet_s = time.monotonic() - quiet_since
            self._on_wait(WAIT_REASON, quiet_s)
            where = (
                f"trainer waits: {WAIT_REASON} (step {version + 1}: {len(self._batches)} collected, "
                f"{self._batches.groups_per_step} per step, nothing for {quiet_s:.0f} s)"
            )
            if self._stall_timeout_s is not None and quiet_s > self._stall_timeout_s:
                raise StalledError(
                    f"{where}; stall_timeout_s={self._stall_timeout_s:g} passed. Check that `agentrl serve` runs and is not at its "
                    f"staleness bound."
                )
            if quiet_s > IDLE_CHECKPOINT_S and self._unacknowledged:
                logger.info("checkpoint ahead of time: idle for %.0f s with unacknowledged groups", quiet_s)
                self.checkpoint()
            if quiet_s > next_report_s:
                logger.warning("%s", where)
                next_report_s *= 2
        if self._should_stop():
            return None
        return self._batches.build(version)

    def learn(self, batch: StepBatch) -> dict[str, float]:
        """One step, and its policy announced."""
        self._command("step")
        with self._blaming(batch):
            metrics = self._learner.step(batch)
        self._checkpoints.note(metrics)
        self._account(batch, was_skipped=metrics.get("update/nonfinite", 0.0) >= 1.0)
        with self.timed("publish"):
            self._publish()
        # Not before: admission would start groups in these places on the weights before, stale at a bound of 0.
        self._source.report_progress(self._consumed_groups)
        if self._ack_at == "step":
            self._acknowledge()
        self.settle()
        return metrics | {
            "agentrl/groups/consumed_total": self._consumed_groups,
            **{f"agentrl/trajectories/{cause}_total": float(n) for cause, n in sorted(self._totals.items())},
        }

    def checkpoint(self) -> None:
        """Make everything learned durable, then acknowledge it; with ``async_save`` that is only begun here."""
        with self.timed("checkpoint"):
            self.settle(wait=True)
            record = self._record
            is_published = record is not None and record.version == self._learner.policy_version
            self._command("save", step=self._learner.policy_version, is_published=is_published, in_background=self._async_save)
            save = self._checkpoints.begin if self._async_save else self._checkpoints.save
            with writing("the checkpoint", self._checkpoints.directory):
                save(
                    self._learner,
                    step=self._learner.policy_version,
                    state={
                        "consumed_groups": self._consumed_groups, "totals": dict(self._totals), "run_epoch": self._run_epoch,
                    },
                    consumed=self._unsaved,
                    weights_from=self._publisher.full_snapshot if is_published else None,
                )  # fmt: skip
            self._unsaved = []
            self._saved_version = self._learner.policy_version
            # Set aside first: later steps' groups must not leave the stream with these.
            self._awaiting = _Awaiting(self._unacknowledged, self._outcomes)
            self._unacknowledged, self._outcomes = [], {}
            self.settle()

    def settle(self, *, wait: bool = False) -> None:
        """Acknowledge what the last checkpoint contains, once that is durable. An error of its writing is raised here."""
        if self._checkpoints.is_durable(wait=wait) and self._awaiting is not None:
            awaiting, self._awaiting = self._awaiting, None
            if awaiting.groups:
                self._source.commit(awaiting.groups, awaiting.outcomes)

    def abandon_save(self) -> None:
        """On the way out by an error: let the writing end. What it made durable is acknowledged by the next start."""
        try:
            if not self._checkpoints.is_durable(wait=True, timeout_s=ABANDON_S):
                logger.warning("a checkpoint is still being written after %.0f s and is given up", ABANDON_S)
        except CheckpointError as error:
            logger.warning("no checkpoint came of it: %s", error)

    def finish(self) -> None:
        """Checkpoint what is not yet durable, and let the other ranks go. Collected groups stay on the stream."""
        if self._learner.policy_version > self._saved_version:
            self.checkpoint()
        self.settle(wait=True)
        left = self._batches.take_collected()
        if left:
            logger.info("groups left on the stream for the next start: %d", len(left))
        self._command("stop")

    @contextmanager
    def timed(self, name: str) -> Generator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._timings[f"timing_s/{name}"] = time.perf_counter() - started

    def take_timings(self) -> dict[str, float]:
        timings, self._timings = self._timings, {}
        return timings

    def _take(self, group: TrajectoryGroup) -> None:
        """Keep a group for the batch, unless the checkpoint already contains it: a kill came between its save and its ack."""
        ids = [*group.close.members, *group.close.failed]
        if ids and all(i in self._contained for i in ids):
            self._source.commit([group], {i: self._contained[i] for i in ids})
            return
        self._batches.add(group)
        useless = self._batches.num_without_place(self._learner.policy_version)
        if useless > self._reported_useless:
            # Admission counts them as in the pipeline until told otherwise, and would start none in their place: a deadlock.
            self._source.report_progress(self._consumed_groups + useless)
            self._reported_useless = useless

    def _account(self, batch: StepBatch, *, was_skipped: bool) -> None:
        outcomes = dict(batch.outcomes)
        if was_skipped:
            outcomes = {i: "failed:nonfinite_gradient" if o == "trained" else o for i, o in outcomes.items()}
        digests = {t.id: content_digest(t) for group in batch.groups for t in group}
        step = self._learner.policy_version
        self._unsaved += [Consumed(id=i, step=step, outcome=o, digest=digests.get(i, "")) for i, o in outcomes.items()]
        self._totals.update(o.partition(":")[0] for o in outcomes.values())
        self._consumed_groups += len(batch.groups)
        self._reported_useless = 0
        self._unacknowledged += batch.groups
        self._outcomes |= outcomes

    @contextmanager
    def _blaming(self, batch: StepBatch) -> Generator[None]:
        """Poison protection: say which trajectories made training raise, so that the stream stops offering them for ever.

        An error that names its trajectories blames those; another one that data can cause blames the batch. What says nothing
        about the data (memory, a lost rank, divergence) blames nothing.
        """
        try:
            yield
        except (DataError, ValueError, IndexError) as error:
            ids: tuple[str, ...] = getattr(error, "trajectory_ids", ()) or tuple(row.trajectory.id for row in batch.rows)
            blame: Callable[[Sequence[str]], None] | None = getattr(self._source, "blame", None)
            if blame is not None and ids:
                logger.error("training raised on this batch; blamed %d trajectories, first %s: %s", len(ids), ids[0], error)
                blame(ids)
            raise

    def _acknowledge(self) -> None:
        if self._unacknowledged:
            self._source.commit(self._unacknowledged, self._outcomes)
        self._unacknowledged, self._outcomes = [], {}

    def _publish(self) -> None:
        self._command("publish", run_epoch=self._run_epoch)
        with writing("the weights", self._publisher.directory):
            self._record = self._publisher.publish(self._learner, run_epoch=self._run_epoch)
        self._announce(self._record, self._consumed_groups)

    def _command(self, name: str, **arguments: Any) -> None:
        """Tell the other ranks what comes; also the sign of life that keeps their collectives from timing out."""
        if self._learner.team.world_size > 1:
            self._learner.team.broadcast_json({"do": name, **arguments})


def _follow(learner: Learner, checkpoints: Checkpoints, publisher: WeightPublisher, *, resume: str) -> int:
    """The other ranks' side: take part in what rank 0 does."""
    checkpoints.load(learner, resume)
    while True:
        command = learner.team.broadcast_json(None)
        match command["do"]:
            case "step":
                learner.step(None)
                checkpoints.is_durable()  # raises what this rank's writing thread met
            case "publish":
                publisher.publish(learner, run_epoch=command["run_epoch"])
            case "save":
                linked = publisher.directory if command["is_published"] else None
                save = checkpoints.begin if command["in_background"] else checkpoints.save
                save(learner, step=command["step"], state={}, weights_from=linked)
            case "stop":
                checkpoints.is_durable(wait=True)
                return learner.policy_version
            case _:
                pass


def _never() -> bool:
    return False


def _ignore_wait(reason: str, seconds: float) -> None:
    pass
